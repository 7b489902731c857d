"""Opens the model to evaluate: one of ours, or a public one."""

from pathlib import Path

from stair.clip import DenseClip
from stair.evaluate.foreign import open_foreign
from stair.evaluate.scored import Scored
from stair.model import Stair
from stair.towers import TwoTowers, folder_of, read_description
from stair.vocabulary import Vocabulary


def open_model(source: str, vocabulary: str | None = None) -> Scored:
    """Opens a model to evaluate.

    Args:
        source: a folder that training handed over (STAIR or dense CLIP), a STAIR model of the hub, or
            `open_clip:ARCHITECTURE:CHECKPOINT` or `sentence_transformers:FOLDER`.
        vocabulary: words for the vocabulary test of a model that has none of its own.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it is none we can read, or needs a package that is not installed.
    """
    scheme, _, rest = source.partition(":")
    extra = Vocabulary(vocabulary) if vocabulary else None
    if scheme in ("open_clip", "sentence_transformers"):
        return open_foreign(scheme, rest, extra)
    folder = folder_of(source)
    description = read_description(folder)
    families: dict[str, type[TwoTowers]] = {family.family: family for family in (Stair, DenseClip)}
    if description["family"] not in families:
        raise ValueError(f"{folder} holds a model of family {description['family']!r}; known are {sorted(families)}")
    config = description["model"]
    model = families[description["family"]].from_pretrained(folder)
    sparse = isinstance(model, Stair)
    if sparse and extra and extra.tokens != model.vocabulary.tokens:
        raise ValueError(f"{source} has words of its own, others cannot be put in their place: leave --vocabulary out")
    return Scored(
        model,
        "/".join(Path(source).resolve().parts[-3:]) if Path(source).is_dir() else source,
        "sparse" if sparse else "dense",
        model.vocabulary if sparse else None,
        model.vocabulary if sparse else extra or model.vocabulary,
        f"texts cut at {config['text']['max_tokens']} word pieces, images centre-cropped to "
        f"{config['image']['image_size']} px",
        dict(description["training"]),
    )

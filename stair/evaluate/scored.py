"""A model under evaluation, whatever it is: what it must be able to do, and how one is opened."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL.Image import Image
from torch import Tensor

from stair.clip import DenseClip
from stair.model import Stair
from stair.towers import TwoTowers, folder_of, read_description
from stair.vocabulary import Vocabulary


class Encoder(Protocol):
    """What embeds. B images or texts, V words (or the width of a dense embedding)."""

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared."""
        ...

    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings of RGB pictures of any size."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings of texts."""
        ...


@dataclass(frozen=True)
class Scored:
    """A model with what tables say of it.

    Attributes:
        encoder: the model.
        name: what tables call it.
        kind: `sparse` or `dense`.
        words: names the dimensions; None where they have no names.
        vocabulary: words to choose among in the vocabulary test; that of `words`, or any other for a dense model.
        truncation: what becomes of long texts, as printed beside the figures.
        facts: about its training, for the model card.
    """

    encoder: Encoder
    name: str
    kind: Literal["sparse", "dense"]
    words: Vocabulary | None
    vocabulary: Vocabulary | None
    truncation: str
    facts: dict[str, object]


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
        from stair.evaluate.foreign import open_foreign

        return open_foreign(scheme, rest, extra)
    folder = folder_of(source)
    description = read_description(folder)
    families: dict[str, type[TwoTowers]] = {family.family: family for family in (Stair, DenseClip)}
    if description["family"] not in families:
        raise ValueError(f"{folder} holds a model of family {description['family']!r}; known are {sorted(families)}")
    config = description["model"]
    model = families[description["family"]].from_pretrained(folder)
    sparse = isinstance(model, Stair)
    return Scored(
        model,
        "/".join(Path(source).resolve().parts[-3:]) if Path(source).is_dir() else source,
        "sparse" if sparse else "dense",
        model.vocabulary if sparse else None,
        extra or model.vocabulary,
        f"texts cut at {config['text']['max_tokens']} word pieces, images centre-cropped to "
        f"{config['image']['image_size']} px",
        dict(description["training"]),
    )

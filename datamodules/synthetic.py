"""Drawn scenes with captions: a data set without a download, to train and to test all stages on a laptop.

Captions name one thing by several words (circle, disc, ball) and omit most of a scene, so a text tower can learn to add
terms. No scene occurs twice, in training or validation. The first caption of an image names everything in it.

    python -m datamodules.synthetic FOLDER

writes `train-0000.tar` … `train-0003.tar` and `val-0000.tar` (KEY.png beside KEY.json with `captions`, `boxes` and
`spec`, the scene), `vocab.txt` and `manifest.json`. Same arguments, same bytes.
"""

import argparse
import hashlib
import inspect
import io
import json
import string
import tarfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from datamodules.depictions import caption_scene, draw_scene
from datamodules.scenes import SHAPES, Scene, random_scene
from stair.errors import require
from stair.files import atomic_write, read_json, sha256, write_json, write_text

TRAIN_SHARDS = 4
_MANIFEST = "manifest.json"
_SOURCES = ("scenes.yaml", "scenes.py", "depictions.py", "synthetic.py")  # of which the drawings depend
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_scenes(folder: Path, *, train: int = 4000, val: int = 300, seed: int = 0, image_size: int = 64) -> bool:
    """Writes the data set, unless the folder holds exactly this one already, and returns whether it did.

    Args:
        folder: created if missing; files of an earlier data set are replaced.
        train: training scenes, at least one a shard. Validation does not depend on their number.
        val: validation scenes.
        seed: of everything random.
        image_size: side of the square images, in pixels.

    Raises:
        SettingError: if a number is too small.
    """
    require(train >= TRAIN_SHARDS, "train", train, f"{TRAIN_SHARDS} or more, one a shard")
    require(val >= 1, "val", val, "1 or more")
    require(image_size >= 16, "image_size", image_size, "16 or more pixels")
    code = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _SOURCES)).hexdigest()
    parameters = {"train": train, "val": val, "seed": seed, "image_size": image_size, "drawn_by": code}
    if _is_complete(folder, parameters):
        return False
    (folder / _MANIFEST).unlink(missing_ok=True)
    drawn: set[Scene] = set()
    splits = {split: _samples(split, count, seed, drawn) for split, count in (("val", val), ("train", train))}
    shards = {f"train-{i:04d}.tar": splits["train"][i::TRAIN_SHARDS] for i in range(TRAIN_SHARDS)}
    for name, samples in {**shards, "val-0000.tar": splits["val"]}.items():
        _write_tar(folder / name, samples, image_size)
    write_text(folder / "vocab.txt", "\n".join(_vocabulary(splits["train"])) + "\n")
    files = {name: sha256(folder / name) for name in (*shards, "val-0000.tar", "vocab.txt")}
    write_json(folder / _MANIFEST, {"parameters": parameters, "files": files})
    return True


def _is_complete(folder: Path, parameters: dict[str, Any]) -> bool:
    try:
        manifest = read_json(folder / _MANIFEST)
        files = manifest["files"].items()
        return manifest["parameters"] == parameters and all(sha256(folder / name) == digest for name, digest in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class _Sample(NamedTuple):
    name: str  # seeds its captions and pixels
    key: str
    scene: Scene
    captions: list[str]


def _samples(split: str, count: int, seed: int, drawn: set[Scene]) -> list[_Sample]:
    """`count` scenes that are not in `drawn`, which they join."""
    rng, samples = Random(f"{seed}/{split}"), list[_Sample]()
    while len(samples) < count:
        if (scene := random_scene(rng)) not in drawn:
            drawn.add(scene)
            name, key = f"{seed}/{split}/{len(samples)}", f"{split}-{len(samples):06d}"
            samples.append(_Sample(name, key, scene, caption_scene(scene, Random(f"{name}/captions"))))
    return samples


def _write_tar(path: Path, samples: list[_Sample], image_size: int) -> None:
    with atomic_write(path) as part, tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            image, drawn = io.BytesIO(), draw_scene(sample.scene, Random(f"{sample.name}/pixels"), image_size)
            drawn[0].save(image, "PNG")
            nouns = [[noun for forms in SHAPES[group.shape].nouns for noun in forms] for group in sample.scene.groups]
            boxes = [{"names": n, "box": box} for n, own in zip(nouns, drawn[1], strict=True) for box in own]
            facts = {"captions": sample.captions, "spec": asdict(sample.scene), "boxes": boxes}
            for kind, content in (("png", image.getvalue()), ("json", json.dumps(facts).encode())):
                member = tarfile.TarInfo(f"{sample.key}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _vocabulary(samples: list[_Sample]) -> list[str]:
    """Tokens: the special ones, letters to spell any other word with, then words by frequency.

    The trainer of `tokenizers` is not used: it breaks ties by hash order, so its vocabularies differ between runs.
    """
    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    captions = (caption for sample in samples for caption in sample.captions)
    counts = Counter(word for caption in captions for word, _ in split(normalize(caption)))
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    return list(dict.fromkeys([*_SPECIALS, *letters, *sorted(counts, key=lambda word: (-counts[word], word))]))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.synthetic", description="Draws the demo data set.")
    parser.add_argument("folder", type=Path)
    for name, parameter in list(inspect.signature(write_scenes).parameters.items())[1:]:
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=parameter.default, help="default: %(default)s")
    args = parser.parse_args()
    print(
        f"{args.folder}: {'written' if write_scenes(**vars(args)) else 'already holds exactly this data, nothing done'}"
    )


if __name__ == "__main__":
    main()

"""Drawn scenes with captions: a data set that needs no download, to train and to test all stages on a laptop.

Every scene is drawn from a `Scene`, and so are its captions, so what an image shows is known exactly. Two properties
make it a test of STAIR rather than of any classifier:

* Captions name the same thing by several words (circle, disc, ball) and leave most of a scene out. A text tower can
  therefore learn in the unmasked stages to add the words that a caption did not choose.
* Validation holds out whole combinations: no validation scene occurs in training, and no two are the same, so recall by
  index means something. The first caption of each image names all of it.

    python -m datamodules.synthetic FOLDER

writes `train-0000.tar` … `train-0003.tar` and `val-0000.tar` (WebDataset: KEY.png beside KEY.json with `captions` and
the `spec` they were drawn from), `vocab.txt` for `stair.Vocabulary`, and `manifest.json`. Same arguments, same bytes.
"""

import argparse
import hashlib
import io
import json
import string
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from datamodules.depictions import caption_scene, draw_scene
from datamodules.scenes import Scene, random_scene
from stair.files import read_json, sha256, write_bytes

TRAIN_SHARDS = 4
_MANIFEST = "manifest.json"
_DRAWN_BY = ("scenes.py", "depictions.py", "synthetic.py")
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def _distinct_scenes(rng: Random, count: int, taken: set[Scene]) -> list[Scene]:
    """`count` scenes that are not in `taken`, which they join."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene not in taken:
            taken.add(scene)
            scenes.append(scene)
    return scenes


@dataclass(frozen=True)
class _Sample:
    key: str
    scene: Scene
    captions: list[str]
    seed: str


def _samples(split: str, scenes: list[Scene], seed: int) -> list[_Sample]:
    samples = []
    for i, scene in enumerate(scenes):
        name = f"{seed}/{split}/{i}"
        samples.append(_Sample(f"{split}-{i:06d}", scene, caption_scene(scene, Random(f"{name}/captions")), name))
    return samples


def _members(samples: Iterable[_Sample], image_size: int) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        buffer = io.BytesIO()
        draw_scene(sample.scene, Random(f"{sample.seed}/pixels"), image_size).save(buffer, "PNG")
        yield f"{sample.key}.png", buffer.getvalue()
        facts = {"captions": sample.captions, "spec": asdict(sample.scene)}
        yield f"{sample.key}.json", json.dumps(facts).encode()


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Packs members with nothing in their headers that changes from one run to the next (tarfile's mtime is 0)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _vocabulary(captions: Iterable[str]) -> list[str]:
    """WordPiece pieces: the special tokens, letters to spell any other word with, then words, frequent ones first.

    Words are counted by the BERT rules of the `tokenizers` library but not by its trainer: that one breaks ties by hash
    order, so two runs give two vocabularies, and keeps half-merged pieces (`autom`, `##brel`) that nobody can read.
    """
    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    counts = Counter(word for caption in captions for word, _ in split(normalize(caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    return list(dict.fromkeys([*_SPECIALS, *letters, *words]))


def _write(path: Path, content: bytes) -> str:
    """Writes a file atomically and returns its sha256."""
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _is_complete(folder: Path, parameters: dict[str, int | str]) -> bool:
    try:
        manifest = read_json(folder / _MANIFEST)
        return manifest["parameters"] == parameters and all(
            sha256(folder / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_scenes(folder: Path, *, train: int = 4000, val: int = 300, seed: int = 0, image_size: int = 64) -> bool:
    """Writes the data set, unless the folder holds exactly this one already.

    The validation set depends on `val`, `seed` and `image_size` alone: it stays the same whatever the size of training.

    Args:
        folder: is created where missing; files of an earlier data set in it are replaced.
        train: training scenes, at least one a shard.
        val: validation scenes.
        seed: of everything random.
        image_size: side of the square images, in pixels.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: if a number is too small.
    """
    if train < TRAIN_SHARDS or val < 1 or image_size < 16:
        raise ValueError(
            f"train={train}, val={val}, image_size={image_size} cannot be drawn; "
            f"give train of {TRAIN_SHARDS} or more (one a shard), val of 1 or more and image_size of 16 or more"
        )
    source = hashlib.sha256(b"".join(Path(__file__).with_name(name).read_bytes() for name in _DRAWN_BY)).hexdigest()
    parameters: dict[str, int | str] = {
        "train": train,
        "val": val,
        "seed": seed,
        "image_size": image_size,
        "drawn_by": source,
    }
    if _is_complete(folder, parameters):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)

    taken: set[Scene] = set()
    held_out = _samples("val", _distinct_scenes(Random(f"{seed}/val"), val, taken), seed)
    training = _samples("train", _distinct_scenes(Random(f"{seed}/train"), train, taken), seed)
    shards = {f"train-{i:04d}.tar": training[i::TRAIN_SHARDS] for i in range(TRAIN_SHARDS)} | {"val-0000.tar": held_out}
    files = {name: _write(folder / name, _tar(_members(samples, image_size))) for name, samples in shards.items()}
    pieces = _vocabulary(caption for sample in training for caption in sample.captions)
    files["vocab.txt"] = _write(folder / "vocab.txt", ("\n".join(pieces) + "\n").encode())
    _write(folder / _MANIFEST, json.dumps({"parameters": parameters, "files": files}, indent=2).encode())
    return True


def main() -> None:
    """The command `python -m datamodules.synthetic`."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.synthetic", description="Draw the demo data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=300, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=64, help="pixels a side (default: %(default)s)")
    arguments = parser.parse_args()
    numbers = {name: value for name, value in vars(arguments).items() if name != "folder"}
    written = write_scenes(arguments.folder, **numbers)
    print(f"{arguments.folder}: {'written' if written else 'already holds exactly this data, nothing done'}")


if __name__ == "__main__":
    main()

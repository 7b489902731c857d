"""Small shards of noise images, and the batches that a loader makes of them."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.reading import TrainingLoader
from datamodules.shards import ImageTextShards

WORDS = [f"word{i}" for i in range(64)]


def write_words(folder: Path) -> str:
    path = folder / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return str(path)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def picture(number: int, size: tuple[int, int] = (20, 16)) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return encode(Image.fromarray(noise))


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def good(number: int) -> dict[str, bytes]:
    texts = [f"{WORDS[number % 64]} {WORDS[k]}" for k in range(3)]
    return {f"{number:05d}.png": picture(number), f"{number:05d}.json": json.dumps({"captions": texts}).encode()}


def write_shards(folder: Path, sizes: list[int], bad: dict[str, bytes] | None = None) -> str:
    """Shards with these many samples, numbered through; the members in `bad` replace good ones of the same name."""
    first = 0
    for i, size in enumerate(sizes):
        members = {k: v for n in range(first, first + size) for k, v in good(n).items()}
        write_tar(folder / f"train-{i:04d}.tar", {k: (bad or {}).get(k, v) for k, v in members.items()})
        first += size
    return str(folder / "train-*.tar")


def shards(train, vocab: str, **options) -> ImageTextShards:
    given = {"val": None, "test": None, "image_size": 8, "max_tokens": 8, "global_batch_size": 4, "workers": 0}
    return ImageTextShards(train=train, vocabulary=vocab, **{**given, "shuffle": 8, **options})


def loader(train, vocab: str, rank: int = 0, ranks: int = 1, **options) -> TrainingLoader:
    data = shards(train, vocab, **options)
    data._rank_of = lambda: (rank, ranks)
    data.setup("fit")
    return data.train_dataloader()


def digest(batch: dict) -> list[tuple[str, str, str]]:
    """Key, caption and pixels of each row."""
    rows = zip(batch["key"], batch["ids"], batch["mask"], batch["pixels"], strict=True)
    return [
        (k, str(i[m].tolist()), hashlib.md5(p.contiguous().numpy().tobytes()).hexdigest()[:8]) for k, i, m, p in rows
    ]


def keys(batches) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def take(data, steps: int) -> list:
    """So many batches from where the loader stands, through epochs."""
    found = []
    while len(found) < steps:
        for batch in data:
            found.append((data.epoch, digest(batch)))
            if len(found) == steps:
                break
    return found

"""How fast training reads: against the tar's bytes alone, decoding alone, and a plain WebDataset pipeline, in one run.

    python -m benchmarks.loader_speed 'shards/*.tar' --vocabulary vocab.txt --image_size 224

Prints, for one process and by turns, the processor seconds an image costs (comparable on a busy machine), then with
reading processes the images a second, the time to the first batch, and memory over several epochs.
"""

import argparse
import io
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from datamodules.augment import Augment
from datamodules.pairs import Pair
from datamodules.shards import ImageTextShards
from datamodules.tars import captions, expand, image_bytes, stream

_BLOCK = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")


def tar_bytes(shards: list[str]) -> None:
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass


def tar_members(shards: list[str]) -> None:
    for shard in shards:
        for _ in stream(shard, _raise):
            pass


def decode_and_resize(images: list[bytes], size: int) -> None:
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def decode_and_resize_as_we_do(images: list[bytes], augment: Augment) -> None:
    rng = random.Random(0)
    for data in images:
        augment(data, rng)


def plain_webdataset(data: ImageTextShards, shards: list[str]) -> None:
    """The same work by the library's own stages: shuffle, decode with Pillow, crop, one caption, tokenise, batch."""
    rng = random.Random(0)

    def pair(sample: dict[str, Any]) -> Pair:
        crop = data.augment(image_bytes(sample), rng)
        return Pair(crop, [rng.choice(captions(sample))], 0, sample["__key__"])

    pipeline = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(data.shuffle).map(pair)
    for _ in pipeline.batched(data.global_batch_size, collation_fn=data.collate, partial=False):
        pass


def ours(loader: Any) -> None:
    for _ in loader:
        pass


def _raise(error: Exception) -> None:
    raise error


def by_turns(contestants: dict[str, Callable[[], None]], images: int, repeats: int) -> dict[str, float]:
    """Median processor microseconds an image."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _, (name, work) in itertools.product(range(repeats), contestants.items()):
        start = time.process_time()
        work()
        seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) / images * 1e6 for name, values in seconds.items()}


def resident_mib(pids: list[int]) -> float:
    """Memory of processes, shared pages counted in each."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE for pid in pids) / 2**20


def with_processes(data: ImageTextShards, epochs: int) -> Iterator[dict[str, float]]:
    data.setup("fit")
    loader = data.train_dataloader()
    for epoch in range(epochs):
        start = time.perf_counter()
        for number, batch in enumerate(loader):
            if number == 0:
                first, size = time.perf_counter() - start, len(batch["pixels"])
            if number == len(loader) - 2:
                workers = [process.pid for process in getattr(loader._iterator, "_workers", [])]
                memory = resident_mib([os.getpid(), *workers])
        rate = (len(loader) - 1) * size / (time.perf_counter() - start - first)
        yield {"epoch": epoch, "first_batch_s": first, "images_per_s": rate, "resident_MiB": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="local shard spec")
    parser.add_argument("--vocabulary", required=True)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--shuffle", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    shards = expand(args.shards)
    make = partial(
        ImageTextShards, args.shards, None, None, args.vocabulary, args.image_size, 77, args.batch_size,
        shuffle=args.shuffle,
    )  # fmt: skip
    alone = make(workers=0)
    alone.setup("fit")
    images = [image_bytes(sample) for shard in shards for sample in stream(shard, _raise)]
    contestants = {
        "tar bytes": partial(tar_bytes, shards),
        "tar members": partial(tar_members, shards),
        "decode + resize": partial(decode_and_resize, images, args.image_size),
        "decode + crop, ours": partial(decode_and_resize_as_we_do, images, alone.augment),
        "plain webdataset": partial(plain_webdataset, alone, shards),
        "ours": partial(ours, alone.train_dataloader()),
    }
    cost = by_turns(contestants, len(images), args.repeats)
    for name, microseconds in cost.items():
        print(
            f"{name:22}{microseconds:9.0f} us of processor an image {1e6 / microseconds:9.0f} images a second and core"
        )
    print(f"ours / decode + resize {cost['decode + resize'] / cost['ours']:.3f} of its speed")
    print(f"ours / plain webdataset {cost['plain webdataset'] / cost['ours']:.3f} of its speed")
    print(json.dumps({"images": len(images), "microseconds": cost}))
    if args.epochs:
        for line in with_processes(make(workers=args.workers), args.epochs):
            print(json.dumps({key: round(value, 2) for key, value in line.items()}))


if __name__ == "__main__":
    main()

"""How fast training reads: against the tar's bytes alone, decoding alone, and a plain WebDataset pipeline, in one run.

    python -m benchmarks.loader_speed                       # 500 generated images of 500 x 375 pixels
    python -m benchmarks.loader_speed 'shards/*.tar' --vocabulary vocab.txt

In one process and by turns, the processor time an image costs (comparable on a busy machine):

- tar bytes: reading the files. tar members: reading all samples from front to end.
- decode + resize: what most loaders do, Pillow's decoder in full and its bicubic resize of the whole image to the square.
  No crop, no flip, no caption, no batch.
- decode + crop, ours: the decoder, random crop, scaling and tensor of our pipeline, alone in a loop.
- plain webdataset: its own stages (tar, shuffle, batch) around *our* decoding, captions and tokenising.
- ours: all of it, to the batch that a step is given (uint8; the model normalises).

Then what its parts cost. Then with reading processes: images a second, time to the first batch (processes started
within it), and memory over one long epoch, in eighths: that of the process itself, without shared memory (which
holds batches) and mapped files. Memory that still rises in the last eighths wants more
`--batches`; `--rounds 0` leaves out the first part.

Pictures of the size of photographs made of small ones: `benchmarks/mosaics.py`.
"""

import argparse
import io
import itertools
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks.ratios import header
from datamodules import dataset
from datamodules.augment import Augment
from datamodules.order import Order
from datamodules.shards import ImageTextShards
from stair.data.pairs import Pair
from stair.data.samples import captions, image_bytes
from stair.data.shard_index import SampleReader
from stair.data.tars import expand, read_samples

_BLOCK = 1 << 20
_PARTS = 8


def tar_bytes(shards: list[str], images: int) -> int:
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass
    return images


def tar_members(shards: list[str]) -> int:
    return sum(1 for shard in shards for _ in read_samples(shard))


def decode_and_resize(images: list[bytes], size: int) -> int:
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return len(images)


def decode_and_resize_as_we_do(images: list[bytes], augment: Augment) -> int:
    rng = random.Random(0)
    for data in images:
        augment(data, rng)
    return len(images)


def plain_webdataset(data: ImageTextShards, shards: list[str]) -> int:
    rng = random.Random(0)

    def pair(sample: dict[str, Any]) -> Pair:
        crop = data.augment(image_bytes(sample), rng)
        return Pair(crop, [rng.choice(captions(sample))], 0, sample["__key__"])

    pipeline = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).shuffle(data.shuffle).map(pair)
    batches = pipeline.batched(data.global_batch_size, collation_fn=data.collate, partial=False)
    return sum(len(batch["pixels"]) for batch in batches)


def ours(loader: Any) -> int:
    return sum(len(batch["pixels"]) for batch in loader)


def by_turns(contestants: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    """Processor microseconds an image in each round, after one round to warm up; each returns its number of images."""
    cost: dict[str, list[float]] = {name: [] for name in contestants}
    for at, (name, work) in itertools.product(range(rounds + 1), contestants.items()):
        start = time.process_time()
        images = work()
        if at:
            cost[name].append((time.process_time() - start) / images * 1e6)
    return cost


def by_part(loader: Any, images: list[bytes], alone: Augment) -> Iterator[str]:
    """Where the time of ours goes: processor time of its parts, in the same loop."""
    spent: Counter[str] = Counter()

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.thread_time_ns()
            try:
                return work(*args, **options)
            finally:
                spent[name] += time.thread_time_ns() - start

        return call

    def read(self: SampleReader, samples: Any) -> Iterator[Any]:
        found = plain(self, samples)
        following = timed("reading and parsing the sample", lambda: next(found, None))
        while (sample := following()) is not None:
            yield sample

    plain = SampleReader.read
    with ExitStack() as patches:
        for place, name, part in (
            (Augment, "__call__", "decode + crop, in the loop"),
            (dataset, "caption_choices", "caption of the JSON or text"),
            (dataset, "seeded", "random state of the sample"),
            (dataset.CollatePairs, "__call__", "tokens and batch"),
            (Order, "batch", "order"),
        ):
            patches.enter_context(mock.patch.object(place, name, timed(part, getattr(place, name))))
        patches.enter_context(mock.patch.object(SampleReader, "read", read))
        start = time.thread_time_ns()
        count = ours(loader)
        total = time.thread_time_ns() - start
    start = time.thread_time_ns()
    decode_and_resize_as_we_do(images, alone)
    baseline = (time.thread_time_ns() - start) / len(images) / 1e3
    cold = spent.pop("decode + crop, in the loop") / count / 1e3
    rest = (total - spent.total()) / count / 1e3 - cold
    parts = {name: value / count / 1e3 for name, value in spent.items()}
    parts |= {"decode + crop into the batch, beyond decoding alone": cold - baseline, "all else": rest}
    yield f"| part of ours | µs an image |\n|---|---|\n| decode + crop alone | {baseline:.0f} |"
    yield from (f"| {name} | {value:.0f} |" for name, value in sorted(parts.items(), key=lambda part: -part[1]))


def _middle(values: list[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def side_by_side(cost: dict[str, list[float]]) -> Iterator[str]:
    yield "| what | µs of processor an image, median (range) | images a second and core | ours has so much of its speed |"
    yield "|---|---|---|---|"
    for name, values in cost.items():
        shares = [theirs / mine for theirs, mine in zip(values, cost["ours"], strict=True)]
        rate = 1e6 / statistics.median(values)
        yield f"| {name} | {_middle(values, '.0f')} | {rate:.0f} | {_middle(shares, '.3f')} |"


def own_mib(pid: int) -> float:
    output = Path(f"/proc/{pid}/status").read_text()
    return int(output.partition("RssAnon:")[2].split(maxsplit=1)[0]) / 1024


def watched(loader: Any) -> Iterator[tuple[float, int, list[float]]]:
    """The clock, the batch's size, and MiB of this process and of each worker, batch by batch."""
    for batch in loader:
        workers = [process.pid for process in getattr(loader._iterator, "_workers", [])]
        yield time.perf_counter(), len(batch["pixels"]), [own_mib(pid) for pid in (os.getpid(), *workers)]


def with_processes(data: ImageTextShards) -> Iterator[str]:
    data.setup("fit")
    loader = data.train_dataloader()
    start = time.perf_counter()
    clock, sizes, memory = zip(*watched(loader), strict=True)
    rate = sum(sizes[1:]) / (clock[-1] - clock[0])
    yield f"{data.workers} workers: first batch after {clock[0] - start:.2f} s, then {rate:.0f} images a second\n"
    names = ["this process", *(f"worker {i}" for i in range(data.workers))]
    eighths = " | ".join(map(str, range(1, _PARTS + 1)))
    yield f"| MiB in eighths of {len(clock)} batches of {sizes[0]} | {eighths} |"
    yield "|---" * (_PARTS + 1) + "|"
    for name, values in zip(names, zip(*memory, strict=True), strict=True):
        means = [statistics.mean(part) for part in np.array_split(values, _PARTS)]
        yield f"| {name} | " + " | ".join(f"{value:.0f}" for value in means) + " |"


def write_photographs(folder: Path, count: int) -> str:
    """JPEGs of 500 x 375 pixels and 72 KiB, as smooth as photographs; returns their shard spec."""
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "photographs-%02d.tar"), maxcount=250, verbose=0) as writer:
        for number in range(count):
            noise = Image.fromarray(rng.integers(0, 256, (65, 86, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            noise.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            text = "a dog runs through the high grass near the water".split()
            writer.write({"__key__": f"{number:06d}", "jpg": buffer.getvalue(), "txt": " ".join(rng.permutation(text))})
    return str(folder / "photographs-*.tar")


def write_vocabulary(path: Path) -> Path:
    words = "a dog runs through the high grass near the water picture".split()
    path.write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(words)), *"0123456789"]) + "\n"
    )
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", help="local shard spec; left out, images are generated")
    parser.add_argument("--vocabulary")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--shuffle", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", type=int, default=400, help="with workers; 0 leaves that part out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as folder:
        args.shards = args.shards or write_photographs(Path(folder), 500)
        args.vocabulary = args.vocabulary or str(write_vocabulary(Path(folder) / "vocab.txt"))
        measure(args)


def measure(args: argparse.Namespace) -> None:
    shards = expand(args.shards)
    make = partial(
        ImageTextShards, args.shards, None, None, vocabulary=args.vocabulary, image_size=args.image_size, max_tokens=77,
        global_batch_size=args.batch_size, shuffle=args.shuffle,
    )  # fmt: skip
    alone = make(workers=0)
    alone.setup("fit")
    images = [image_bytes(sample.members) for shard in shards for sample in read_samples(shard)]
    contestants = {
        "tar bytes": partial(tar_bytes, shards, len(images)),
        "tar members": partial(tar_members, shards),
        "decode + resize": partial(decode_and_resize, images, args.image_size),
        "decode + crop, ours": partial(decode_and_resize_as_we_do, images, alone.augment),
        "plain webdataset": partial(plain_webdataset, alone, shards),
        "ours": partial(ours, alone.train_dataloader()),
    }
    kib = statistics.mean(map(len, images)) / 1024
    print(header("Reading images for training", torch.device("cpu")))
    print(f"{len(images)} images of {kib:.0f} KiB, to {args.image_size} px\n")
    if args.rounds:
        cost = by_turns(contestants, args.rounds)
        print("By turns in one process:\n")
        print(*side_by_side(cost), sep="\n", flush=True)
        for name, least in (("decode + crop, ours", 0.95), ("plain webdataset", 1.1)):
            share = statistics.median(theirs / mine for theirs, mine in zip(cost[name], cost["ours"], strict=True))
            print(f"\nSpeed against {name}: {share:.3f}, to be at least {least}")
        print()
        print(*by_part(alone.train_dataloader(), images, alone.augment), sep="\n")
    if args.batches:
        print()
        samples = args.batches * args.batch_size
        print(*with_processes(make(workers=args.workers, resample=True, train_samples=samples)), sep="\n")


if __name__ == "__main__":
    main()

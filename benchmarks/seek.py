"""How soon a run resumes anywhere in a billion samples: time and bytes to the first batch, which must be the same one.

    python -m benchmarks.seek

A simulated set in a temporary folder (or `--work`): one real shard of 10,000 samples with its index, under 100,000 names
(symbolic links), with an `index.json` of all. Places in the epoch, numbers of ranks and of workers are drawn at random.
Each first batch must equal the rows of the same global batch as one process reads them. Half of the draws read files,
half an http server with `Range` on this machine, whose bytes are counted. Files come from the page cache. The fork
server has made its imports before: a run starts it before it builds the model.
"""

import argparse
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import statistics
import tarfile
import tempfile
import time
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.loader_speed import write_vocabulary
from benchmarks.ratios import header
from datamodules.reading import TrainingLoader
from datamodules.shards import ImageTextShards
from stair.data.remote import Remote
from stair.data.shard_index import MANIFEST, MANIFEST_FORMAT, SUFFIX, SampleReader, build, write

_SAMPLES = 10_000


def simulate(folder: Path, shards: int) -> None:
    """Writes the set, unless it is there."""
    if (folder / MANIFEST).exists():
        return
    folder.mkdir(parents=True)
    shard = folder / "shard"
    rng = np.random.default_rng(0)
    with tarfile.open(shard, "w") as tar:
        for number in range(_SAMPLES):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "JPEG", quality=90)
            for kind, data in (
                ("jpg", buffer.getvalue()),
                ("json", json.dumps({"caption": f"picture {number}"}).encode()),
            ):
                info = tarfile.TarInfo(f"{number:05d}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write(folder / "index", build(shard)[0], shard.stat().st_size)
    names = [f"{i:06d}.tar" for i in range(shards)]
    for name in names:
        (folder / name).symlink_to(shard.name)
        (folder / f"{name}{SUFFIX}").symlink_to("index")
    entries = {name: {"samples": _SAMPLES, "bytes": shard.stat().st_size} for name in names}
    (folder / MANIFEST).write_text(json.dumps({"format": MANIFEST_FORMAT, "shards": entries}))


class Ranges(SimpleHTTPRequestHandler):
    """Sends parts of files, and counts their bytes and requests."""

    protocol_version = "HTTP/1.1"
    sent, requests = multiprocessing.Value("q"), multiprocessing.Value("q")

    def do_GET(self) -> None:
        """Sends a range."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        size = path.stat().st_size
        first, last = (self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=")).split("-")
        start, stop = int(first), min(int(last or size) + 1, size)
        if start >= size:
            return self.send_error(416)
        with open(path, "rb") as file:
            data = os.pread(file.fileno(), stop - start, start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.write(data)
        for value, more in ((self.sent, len(data)), (self.requests, 1)):
            with value.get_lock():
                value.value += more
        return None

    def log_message(self, *_: Any) -> None:
        """Says nothing."""
        pass


class Server(ThreadingHTTPServer):
    """With room for the connections of several readers: beyond the usual five, each would wait a second to connect."""

    request_queue_size = 512


def digests(batch: Any) -> list[str]:
    rows = zip(batch["key"], batch["ids"], batch["pixels"], strict=True)
    return [
        key + hashlib.md5(ids.numpy().tobytes() + pixels.numpy().tobytes()).hexdigest() for key, ids, pixels in rows
    ]


def first_batch(
    data: TrainingLoader, place: dict[str, Any], rank: int, ranks: int, workers: int
) -> tuple[list[str], float]:
    """The first batch at a place, and the seconds it took from the start of a loader of its own."""
    options = len(data), data.counter.limit, data.fingerprint
    dataset = replace(data.dataset, reader=SampleReader(Remote()))  # which has read nothing yet
    start = time.perf_counter()
    loader = TrainingLoader(dataset, data.order, rank, ranks, workers, *options)
    loader.load_state_dict({**place, "fingerprint": data.fingerprint})
    batch = next(iter(loader))
    return digests(batch), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the set, which is kept")
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--draws", type=int, default=60)
    parser.add_argument("--batch_size", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.work or Path(temporary) / "set", args)


def measure(work: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    simulate(work, args.shards)
    vocabulary = str(write_vocabulary(work / "vocab.txt"))
    server = Server(("127.0.0.1", 0), functools.partial(Ranges, directory=work))
    multiprocessing.get_context("fork").Process(target=server.serve_forever, daemon=True).start()
    rng, loaders = random.Random(0), {}
    names = f"{{000000..{args.shards - 1:06d}}}.tar"
    for kind, folder in (("files", str(work)), ("http", f"http://127.0.0.1:{server.server_address[1]}")):
        start = time.perf_counter()
        data = ImageTextShards(
            f"{folder}/{names}", vocabulary=vocabulary, image_size=32, max_tokens=16,
            global_batch_size=args.batch_size, workers=0,
        )  # fmt: skip
        data.setup("fit")
        loaders[kind] = data.train_dataloader()
        print(
            f"{kind}: {sum(loaders[kind].order.streams[0].counts)} samples, set up in {time.perf_counter() - start:.1f} s"
        )
    first_batch(loaders["files"], {"epoch": 0, "batches": 0}, 0, 1, 1)
    print(header("Time to the first batch", torch.device("cpu")))
    steps, found, wrong = len(loaders["files"]), {}, 0
    for number in range(args.draws):
        kind, ranks, workers = ("files", "http")[number % 2], 2 ** rng.randrange(4), (0, 0, 0, 1, 2)[number % 5]
        epoch, step, rank = rng.randrange(100), rng.randrange(steps), rng.randrange(ranks)
        place = {"epoch": epoch, "batches": step if number else int(0.9 * steps)}
        whole, _ = first_batch(loaders["files"], place, 0, 1, 0)
        Ranges.sent.value = Ranges.requests.value = 0
        got, seconds = first_batch(loaders[kind], place, rank, ranks, workers)
        size = args.batch_size // ranks
        wrong += got != whole[rank * size : (rank + 1) * size]
        found.setdefault((kind, workers), []).append((seconds, Ranges.sent.value / 1e6, Ranges.requests.value))
    print(
        "| from | workers | draws | seconds, median (max) | MB received (max) | requests (max) |\n|---|---|---|---|---|---|"
    )
    for (kind, workers), values in sorted(found.items()):
        seconds, sent, requests = (list(column) for column in zip(*values, strict=True))
        received = f"{max(sent):.1f} | {max(requests)}" if kind == "http" else "– | –"
        print(
            f"| {kind} | {workers} | {len(values)} | {statistics.median(seconds):.2f} ({max(seconds):.2f}) | {received} |"
        )
    medians = {key: statistics.median(seconds for seconds, *_ in values) for key, values in found.items()}
    most = max(sent for values in found.values() for _, sent, _ in values)
    print(f"\n{args.draws} draws of place, rank, ranks and workers, {wrong} first batches that differ")
    print(f"Largest median: {max(medians.values()):.2f} s, to be below 1; most read: {most:.1f} MB, to be below 10")


if __name__ == "__main__":
    main()

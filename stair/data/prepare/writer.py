"""Writes shards in parallel, with an index and a report; a command that was killed and run again writes the same bytes.

A sample is KEY.jpg|png|webp, KEY.json with `captions`, KEY.txt with the first of them. A shard is recorded in `.prepare` of
the folder when it is done; the lock is there too.
"""

import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from cyclopts import Parameter
from PIL import Image
from tqdm import tqdm

from stair.data.samples import Skipped, check_caption, count_causes, printable, skipped_lines
from stair.data.shard_index import MANIFEST, MANIFEST_FORMAT, index_shard, read_manifest
from stair.errors import FileError, StairError, require
from stair.files import atomic_write, lock, read_json, sha256, write_json
from stair.images import MAX_PIXELS, decode_image, image_format

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

REPORT, CLASSNAMES = "prepare.json", "classnames.json"
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_ENOUGH = 200  # inputs; among fewer, the share of skipped ones is checked only at the end

Record = dict[str, Any]  # of a shard: `inputs`, `samples`, `skipped`; if it exists, `bytes` and `sha256`


class Input(NamedTuple):
    """What becomes a sample. Its repr states all of it."""

    place: str  # for the report
    image: tuple[Any, ...]  # what the source's `read` takes
    captions: tuple[str, ...]
    fields: dict[str, Any]  # further fields of the JSON


@dataclass
class Source:
    """Where samples come from.

    `read` returns the bytes of an input's image file, or raises ValueError that begins with the cause and a colon. Other
    processes call it, and its repr states all that its results depend on.
    """

    name: str
    splits: dict[str, list[Input]]
    read: Callable[[Any], bytes]
    skipped: dict[str, list[Skipped]] = field(default_factory=dict)  # by split, what is skipped already
    shuffled: bool = True  # False if reading inputs out of order is slow
    classnames: list[str] | None = None  # in the order of `label`, for zero-shot evaluation


@Parameter(name="*")
@dataclass(frozen=True)
class ShardSettings:
    """How shards are written.

    Args:
        shard_samples: maximum number of samples per shard.
        seed: seed of the shuffle over all shards.
        keep_order: keep the order of the source instead.
        max_side: images whose longer side has more pixels are scaled down to it and rewritten; 0 keeps every size.
        max_pixels: largest width × height that is decoded; larger images are skipped.
        max_bad_share: maximum share of skipped inputs; above it, the command stops.
        workers: processes; 0 is one for each core.
    """

    shard_samples: int = 1000
    seed: int = 0
    keep_order: bool = False
    max_side: int = 0
    max_pixels: int = MAX_PIXELS
    max_bad_share: float = 0.05
    workers: int = 0

    def __post_init__(self) -> None:
        require(self.shard_samples >= 1, "shard_samples", self.shard_samples, "at least 1")
        require(self.max_side >= 0, "max_side", self.max_side, "0 or more")
        require(self.max_pixels >= 1, "max_pixels", self.max_pixels, "at least 1")
        require(0 <= self.max_bad_share < 1, "max_bad_share", self.max_bad_share, "0 or more and less than 1")
        require(self.workers >= 0, "workers", self.workers, "0 or more")


DEFAULTS = ShardSettings()


def write_shards(source: Source, out: Path, settings: ShardSettings = DEFAULTS) -> None:
    """Writes shards, their index and a report; continues where a killed command stopped.

    The folder `out` can hold several splits, also of several commands. StairError if too many inputs are bad, or it holds
    the split of something else.
    """
    for split in source.splits:
        require(_SPLIT.fullmatch(split) is not None, "split", split, "letters, digits, - and _: shards have its name")
    if not any([*source.splits.values(), *source.skipped.values()]):
        raise StairError(f"{source.name} contains no input")
    seed = settings.seed if source.shuffled and not settings.keep_order else None
    size = settings.max_side, settings.max_pixels
    stated = {"seed": seed, "shard_samples": settings.shard_samples, "max_side": settings.max_side}
    with preparing(out) as state:
        _write_classnames(out / CLASSNAMES, source.classnames)
        for split, inputs in source.splits.items():
            skipped = source.skipped.get(split, [])
            if not (inputs or skipped):
                continue
            keyed = [(f"{split}-{number:08d}", each) for number, each in enumerate(inputs)]
            if seed is not None:
                random.Random(seed).shuffle(keyed)
            digest = hashlib.sha256()  # of all that the bytes of the shards depend on
            for part in ((settings.shard_samples, *size), source.read, *keyed):
                digest.update(repr(part).encode("utf-8", "surrogateescape"))
            if _is_done(out, state, split, digest.hexdigest()):
                continue
            shards = math.ceil(len(keyed) / settings.shard_samples)
            cuts = [len(keyed) * i // max(shards, 1) for i in range(shards + 1)]
            jobs = {
                out / f"{split}-{i:05d}.tar": (keyed[start:stop], source.read, *size)
                for i, (start, stop) in enumerate(itertools.pairwise(cuts))
            }
            made = run(jobs, make_shard, state, digest.hexdigest(), settings.workers, settings.max_bad_share, skipped)
            report = {"source": source.name, "fingerprint": digest.hexdigest(), "settings": stated}
            _finish_split(out, state, split, report | {"inputs": len(inputs) + len(skipped)}, *made)


def _write_classnames(path: Path, names: list[str] | None) -> None:
    if names is None:
        return
    known = known_json(path)
    if known.get("classes", names) != names:
        raise FileError(f"{path} lists other classes, and labels are positions in it; give another folder", path)
    write_json(path, {**known, "classes": names})


def _is_done(out: Path, state: Path, split: str, fingerprint: str) -> bool:
    """Whether the split already exists; else notes that it is being written."""
    plan, reports = state / f"{split}.plan", known_json(out / REPORT).get("splits", {})
    sizes = {path.name: path.stat().st_size for path in out.glob("*.tar") if _is_of_split(path.name, split)}
    written_as = known_json(plan).get("fingerprint") or reports.get(split, {}).get("fingerprint")
    if sizes and written_as != fingerprint:
        raise FileError(
            f"{out} holds split {split!r} made of other inputs or with other settings ({', '.join(sorted(sizes)[:3])}): "
            f"give another folder or split, or remove {split}-*.tar there", out,
        )  # fmt: skip
    with suppress(FileError):  # a damaged index is written again
        indexed = {name: entry["bytes"] for name, entry in read_manifest(str(out)).items() if _is_of_split(name, split)}
        if sizes and sizes == indexed and not plan.exists():
            print(f"{out}: split {split!r} already exists, of the same inputs and settings; nothing done")
            return True
    write_json(plan, {"fingerprint": fingerprint})
    return False


def _is_of_split(name: str, split: str) -> bool:
    return re.fullmatch(rf"{re.escape(split)}-\d{{5,}}\.tar", name) is not None


def _finish_split(
    out: Path, state: Path, split: str, report: Record, records: dict[Path, Record], skipped: list[Skipped]
) -> None:
    """Writes report and index of a split, and prints what became of its inputs."""
    report |= {name: sum(record[name] for record in records.values()) for name in ("samples", "captions")}
    if not report["samples"]:
        raise StairError(f"{report['source']}: split {split!r} contains no input that can be used: {summary(skipped)}")
    anew = sum((Counter(record["written_anew"]) for record in records.values()), Counter[str]())
    report |= {"written_anew": anew, **skipped_facts(skipped)}
    reports = known_json(out / REPORT).get("splits", {})
    write_json(out / REPORT, {"format": 1, "splits": {**reports, split: report}})
    finish(out, state, records, lambda name: _is_of_split(name, split))
    (state / f"{split}.plan").unlink()
    lines = [*skipped_lines(skipped), f"{out}: {split}: {report['samples']} samples with {report['captions']} captions"]
    if anew:
        lines.append(f"  images rewritten: {listed(anew)}; all others are the original bytes")
    if skipped:
        causes = f"{listed(report['skipped'])}; which ones: {REPORT}"
        lines.append(f"  skipped {len(skipped)} of {report['inputs']} inputs: {causes}")
    print(*lines, sep="\n")


def make_shard(
    path: Path, keyed: list[tuple[str, Input]], read: Callable[[tuple[Any, ...]], bytes], max_side: int, max_pixels: int
) -> Record:
    """Writes the shard of keys and inputs, with its index, and returns its record. Without a sample, there is no tar."""
    skipped, written_anew, captions = list[Skipped](), Counter[str](), 0
    with atomic_write(path) as part, part.open("wb") as file, open_tar(file) as tar:
        for key, each in keyed:
            try:
                image = read(each.image)
                texts = [check_caption(text) for text in each.captions]
                if not texts:
                    raise ValueError("caption empty: the input has no caption")
                kind, image, reason = encode(image, max_side, max_pixels)
            except ValueError as error:
                skipped.append(Skipped(printable(each.place)[:300], printable(str(error))[:300]))
                continue
            facts = json.dumps({**each.fields, "captions": texts}, ensure_ascii=False, sort_keys=True)
            tar.write({"__key__": key, kind: image, "json": facts.encode(), "txt": texts[0].encode()})
            written_anew[reason] += 1
            captions += len(texts)
    samples = written_anew.total()
    if samples:
        index_shard(path)
    else:
        path.unlink()
    written_anew.pop("", None)
    counts = {"inputs": len(keyed), "samples": samples, "captions": captions}
    return {**counts, "written_anew": dict(written_anew), "skipped": skipped}


def open_tar(file: BinaryIO) -> "TarWriter":
    """A tar whose headers do not change from one run to the next."""
    from webdataset.writer import TarWriter  # here, as it imports torch

    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def encode(data: bytes, max_side: int, max_pixels: int) -> tuple[str, bytes, str]:
    """Type and bytes of an image in a shard, and why they are not the original ones (empty if they are).

    Errors are those of `decode_image`, by which training reads it.
    """
    image, kind = decode_image(data, max_pixels), image_format(data)
    reason = "" if kind else "of another format than JPEG, PNG, WebP"
    if max_side and max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        reason = f"with more than {max_side} pixels a side"
    if not reason:
        return kind, data, ""
    buffer, is_lossy = io.BytesIO(), kind in ("jpg", "webp")
    image.save(buffer, "JPEG" if is_lossy else "PNG", quality=95)
    return "jpg" if is_lossy else "png", buffer.getvalue(), reason


# ---- records of shards, and the index


def known_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one if there is none."""
    with suppress(OSError, FileError):
        return read_json(path)
    return {}


@contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """Locks a folder and yields that of its records; FileError if it is in use, or `index.json` is another tool's."""
    path, index = folder / MANIFEST, None
    with suppress(OSError, ValueError, RecursionError):
        index = json.loads(path.read_bytes())
    if index is not None and not (isinstance(index, dict) and "format" in index):
        raise FileError(f"{path} is another tool's (no `format`): move it away, or the tars to another folder", path)
    state = folder / ".prepare"
    try:
        with lock(state / "lock", f"another `stair prepare` writes to {folder}; wait for it or give another folder"):
            yield state
    finally:
        with suppress(OSError):  # records of unfinished work stay
            state.rmdir()


def run(
    jobs: dict[Path, tuple[Any, ...]],
    work: Callable[..., Record],
    state: Path,
    fingerprint: str,
    workers: int,
    max_bad_share: float = 0.0,
    skipped: Sequence[Skipped] = (),
) -> tuple[dict[Path, Record], list[Skipped]]:
    """Makes the shards without a current record; returns all records by path, and all skipped inputs.

    A job is `work(path, *arguments)`. A record with another fingerprint, or of a changed shard, is not current. `skipped`
    are inputs without a job. If more than `max_bad_share` of all are skipped, StairError; the records stay.
    """
    records = {path: known_json(state / f"{path.name}.json") for path in jobs}
    missing = {path for path in jobs if records[path].get("state") != [fingerprint, _modified(path)]}
    inputs, skipped = len(skipped), [*skipped]

    def check_share() -> None:
        if len(skipped) > max_bad_share * inputs:
            path = state / "skipped.json"
            write_json(path, [entry.facts() for entry in skipped])
            share = f"{len(skipped)} of {inputs} inputs cannot be used, more than max_bad_share={max_bad_share}"
            remedy = "Correct the source, or run again with a higher --max_bad_share: finished shards are kept"
            raise StairError(f"{share}: {summary(skipped)}. All of them: {path}. {remedy}")

    with closing(_results([(work, path, *jobs[path]) for path in jobs if path in missing], workers)) as results:
        for path in tqdm(jobs, "shards", disable=None):
            if path in missing:
                records[path] = next(results) | {"state": [fingerprint, _modified(path)]}
                write_json(state / f"{path.name}.json", records[path])
            inputs += records[path]["inputs"]
            skipped += [Skipped(*entry) for entry in records[path]["skipped"]]
            if inputs >= _ENOUGH:
                check_share()
    check_share()
    return records, skipped


def _modified(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def skipped_facts(skipped: Sequence[Skipped], name: str = "skipped") -> Record:
    """For reports: how many for each cause, and all of them."""
    return {name: count_causes(skipped), f"{name}_inputs": [entry.facts() for entry in skipped]}


def summary(skipped: Sequence[Skipped]) -> str:
    """Causes with their counts, and the first inputs."""
    first = "; ".join(f"{entry.place}: {entry.reason}" for entry in skipped[:3])
    return f"{listed(count_causes(skipped))}. The first: {first}"


def listed(counts: dict[str, int]) -> str:
    """Counts as text, the largest first."""
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))


def _results(jobs: Sequence[tuple[Any, ...]], workers: int) -> Generator[Record, None, None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(jobs))
    if workers < 2:
        yield from map(_record, jobs)
        return
    import webdataset.writer  # noqa: F401 - takes seconds: once here, not in each process

    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(_record, jobs)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process died, most likely as the machine ran out of memory; run the same command again with fewer "
                "--workers: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _record(job: tuple[Any, ...]) -> Record:
    work, path, *arguments = job
    record: Record = work(path, *arguments)
    return record | ({"bytes": path.stat().st_size, "sha256": sha256(path)} if path.exists() else {})


def _end_with_parent() -> None:  # else a process whose parent is killed would wait for ever, and hold the lock
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def finish(
    folder: Path, state: Path, records: dict[Path, Record], is_replaced: Callable[[str], bool] = lambda name: False
) -> None:
    """Writes `index.json` and removes the records. Entries that it had stay, unless `is_replaced` of their shard's name."""
    entries: dict[str, dict[str, Any]] = {}
    with suppress(FileError):  # damaged: it is written again
        entries = {name: entry for name, entry in read_manifest(str(folder)).items() if not is_replaced(name)}
    for path, record in records.items():
        if record["samples"]:
            entries[path.name] = {key: record[key] for key in ("samples", "bytes", "sha256")}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "shards": entries})
    for name in (*(path.name for path in records), "skipped"):
        (state / f"{name}.json").unlink(missing_ok=True)

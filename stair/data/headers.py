"""What index files and tar headers say of shards: how many samples, which are broken, which keys come twice.

No member is read. Indices are made here too: `index.json` beside the shards, which spares every later run the counting.
"""

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stair.data.prepare.jobs import Job, check_index, index_entries, known_json, preparing, run, write_index
from stair.data.remote import LastingError, Remote, is_remote
from stair.data.samples import CAPTION_TYPES, IMAGE_TYPES
from stair.data.shard_index import MANIFEST, index_shard, sizes
from stair.data.tars import walk
from stair.errors import FileError
from stair.files import sha256

_HASHED_SHARDS, _HASHED_BYTES = 8, 1 << 29  # whose checksums are compared


@dataclass
class Count:
    """What headers and index files say of a source.

    Attributes:
        shards: paths or URLs.
        samples: in each shard that could be counted, by its path.
        sizes: bytes of the local ones.
        broken: what is wrong with shards, by path.
        repeated: keys that come twice in one shard.
        copies: samples that another shard has too, by key and the sizes of all members; by the path of the later one.
        namesakes: samples whose key, but no more, another shard has too.
        incomplete: samples without image or caption member, in shards whose headers were read.
        walked: shards whose headers were read.
        stale: shards of another size than their index says, with both; a run refuses these.
        doubtful: shards of another number of samples or checksum than their index says.
    """

    shards: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    repeated: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    namesakes: int = 0
    incomplete: int = 0
    walked: list[str] = field(default_factory=list)
    stale: dict[str, str] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)
    _keys: set[int] = field(default_factory=set)
    _samples: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        """Samples in all shards, those not counted taken to be like the others."""
        return round(sum(self.samples.values()) * len(self.shards) / max(len(self.samples), 1))


def spread(shards: list[str], count: int) -> list[str]:
    """So many of the shards, from all over the source."""
    return [shards[round(i)] for i in np.linspace(0, len(shards) - 1, min(count, len(shards)))]


def count(shards: list[str], seconds: float, remote: Remote) -> Count:
    """Counts a source: by index files, by `NNNNN_stats.json` of img2dataset, and by headers.

    Args:
        shards: local ones and others; the latter are counted only where an index or statistics lie beside them.
        seconds: for reading headers; those of one shard are read in any case.
        remote: how to go about shards that are not local.

    Raises:
        ValueError: if an index is damaged; a run would refuse it.
    """
    found = Count(shards)
    far = [shard for shard in shards if is_remote(shard)]
    with suppress(FileError, LastingError):  # no index: their number stays unknown
        found.samples |= {shard: samples for shard, (samples, _) in sizes(far, remote, 1).items()}
    local = [shard for shard in shards if not is_remote(shard)]
    indices = {folder: index_entries(folder) for folder in {Path(shard).parent for shard in local}}
    entries = {shard: indices[Path(shard).parent].get(Path(shard).name) for shard in local}
    for shard, entry in entries.items():
        _read_stated(found, shard, entry)
    _compare_checksums(found, entries)
    start = time.monotonic()
    # those without a number first; of the others a few, to see whether it is true
    for shard in sorted(spread(local, len(local)), key=lambda shard: shard in found.samples):
        if found.walked and time.monotonic() - start > seconds * (0.3 if shard in found.samples else 1):
            break
        _walk(found, shard)
    return found


def _read_stated(count: Count, shard: str, entry: dict[str, Any] | None) -> None:
    path = Path(shard)
    count.sizes[shard] = path.stat().st_size
    stated = (
        known_json(path.with_name(f"{path.stem}_stats.json")).get("successes") if entry is None else entry["samples"]
    )
    if isinstance(stated, int):
        count.samples[shard] = stated
    if entry and entry["bytes"] != count.sizes[shard]:
        count.stale[shard] = f"{entry['bytes']} bytes in {MANIFEST}, {count.sizes[shard]} on disk"


def _compare_checksums(count: Count, entries: dict[str, dict[str, Any] | None]) -> None:
    left = _HASHED_BYTES
    for shard in spread(list(entries), _HASHED_SHARDS) if entries else []:
        entry = entries[shard] or {}
        left -= count.sizes[shard]
        if left > 0 and shard not in count.stale and entry.get("sha256") not in (None, sha256(Path(shard))):
            count.doubtful[shard] = f"other content than {MANIFEST} says (sha256)"


def _walk(count: Count, shard: str) -> None:
    keys: set[int] = set()
    sized: set[int] = set()
    samples = 0
    count.walked.append(shard)
    try:
        for sample in walk(shard, compressed=True):
            key, members = sample.key, sample.members
            samples += 1
            count.repeated[shard] += hash(key) in keys
            keys.add(hash(key))
            sized.add(hash((key, *sorted((kind, size) for kind, (_, size) in members.items()))))
            lacking = not members.keys() & set(IMAGE_TYPES) or not members.keys() & set(CAPTION_TYPES)
            count.incomplete += lacking
    except ValueError as error:
        count.broken[shard] = str(error)
    if copies := len(sized & count._samples):
        count.copies[shard] = copies
    count.namesakes += len(keys & count._keys) - copies
    count._keys |= keys
    count._samples |= sized
    if count.samples.get(shard, samples) != samples and shard not in count.stale:
        count.doubtful[shard] = f"{count.samples[shard]} samples by its index or statistics, {samples} in the tar"
    count.samples[shard] = samples


def write_indices(shards: list[str]) -> None:
    """Reads local shards from front to end and writes `index.json` into each of their folders.

    Raises:
        ValueError: if one cannot be read to its end: an index would make its loss official. Or if another tool's
            index lies there, or a `stair prepare` that is not finished.
    """
    folders: dict[Path, list[Path]] = {}
    for shard in dict.fromkeys(shards):
        folders.setdefault(Path(shard).parent, []).append(Path(shard))
    for folder in folders:
        check_index(folder)
    for folder, paths in folders.items():
        with preparing(folder) as state:
            if plans := sorted(state.glob("*.plan")):
                raise FileError(
                    f"{folder} is being prepared ({plans[0].relative_to(folder)}): finish `stair prepare` first, with the "
                    "same command; it writes the index itself",
                    folder,
                )
            is_current = partial(_is_current, folder)
            jobs = [Job(path.name, 1, (path,)) for path in paths]
            found, _ = run(jobs, index_entry, state, is_current, 0)
            write_index(folder, found)
            for job in jobs:
                (state / f"{job.name}.json").unlink()


def _is_current(folder: Path, name: str, record: dict[str, Any]) -> bool:
    return record.get("mtime") == (folder / name).stat().st_mtime_ns


def index_entry(shard: Path) -> dict[str, Any]:
    """Writes the index of a shard, and returns its `samples`, `bytes`, `sha256` and `mtime`.

    Raises:
        ValueError: if it cannot be read to its end.
    """
    samples = index_shard(shard)
    about = shard.stat()
    counts = {"inputs": 1, "samples": samples, "left_out": []}
    return {**counts, "bytes": about.st_size, "sha256": sha256(shard), "mtime": about.st_mtime_ns}

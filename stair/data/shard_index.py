"""Where the samples of a shard lie: `NAME.tar.idx` beside `NAME.tar`, so that any sample is read alone.

The file is one numpy array without pickle, (1 + N, 3) uint32. The first row is format and size of the shard (high and low
32 bits of the bytes). Each further row is a sample: first block of 512 bytes, blocks, CRC-32 of its key and members.
"""

import hashlib
import io
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stair.data.remote import LOCAL, LastingError, Remote, is_remote, local_copy, open_shard, read_ranges
from stair.data.samples import BLOCK, Grouped, group
from stair.data.tars import members_of_part, walk
from stair.errors import FileError
from stair.files import atomic_write, unreadable
from stair.processes import without_main

SUFFIX = ".idx"
MANIFEST, MANIFEST_FORMAT = "index.json", 1

_FORMAT = 2
_HEADER, _ROW = 128, 12  # bytes of numpy's header and of a row
_PAGE, _PAGES = 1024, 1024  # rows that are read together, and pages that a process keeps (12 MiB)
_LONGEST = 1 << 26  # bytes of an index file: 5 million samples, or a million shards in an index.json
_IN_PARALLEL = 1 << 31  # bytes of shards from which on processes are started to index them
_SILENT = 2.0  # seconds of indexing without a progress bar
_REMEDY = "delete it, or write it again with `stair doctor SHARDS --write_index`"

Rows = NDArray[np.uint32]  # (N, 3): first block, blocks, checksum of each sample


def build(shard: Path | str) -> tuple[Rows, FileError | None]:
    """Finds the samples of a local, uncompressed tar by its headers, and what keeps it from being read to its end."""
    rows, problem = [], None
    try:
        for sample in walk(str(shard)):
            check = _checksum(sample.key, {kind: size for kind, (_, size) in sample.members.items()})
            rows.append((sample.start // BLOCK, (sample.stop - sample.start) // BLOCK, check))
    except FileError as error:
        problem = error
    return np.array(rows, np.uint32).reshape(-1, 3), problem


def _checksum(key: str, lengths: dict[str, int]) -> int:
    return zlib.crc32(repr((key, lengths)).encode(errors="surrogateescape"))


def index_shard(shard: Path) -> int:
    """Writes the index of a local shard beside it, and returns its number of samples; FileError if it is broken."""
    rows, problem = build(shard)
    if problem:
        raise problem
    write(f"{shard}{SUFFIX}", rows, shard.stat().st_size)
    return len(rows)


def write(path: Path | str, rows: Rows, size: int) -> None:
    """Writes an index file of a shard of `size` bytes, whole or not at all."""
    first = np.array([[_FORMAT, size >> 32, size & 0xFFFFFFFF]], np.uint32)
    with atomic_write(Path(path)) as part, part.open("wb") as file:
        np.save(file, np.concatenate([first, rows]).astype("<u4"), allow_pickle=False)


def _checked(shard: str, data: bytes) -> int:
    """Number of samples by the beginning of an index; FileError if it is damaged, or of another file."""
    path = index_path(shard)
    beginning = io.BytesIO(data)
    try:
        np.lib.format.read_magic(beginning)
        shape, _, kind = np.lib.format.read_array_header_1_0(beginning)
        version, high, low = np.frombuffer(data, "<u4", 3, _HEADER).tolist()
        if beginning.tell() != _HEADER or kind != np.dtype("<u4") or shape[1:] != (3,) or version != _FORMAT:
            raise ValueError("it is of another format")
    except (ValueError, TypeError, EOFError) as error:
        raise FileError(f"{path} is not an index of a shard ({error}): {_REMEDY}", path) from error
    size: int = high << 32 | low
    if not is_remote(shard) and size != (actual := os.stat(shard).st_size):
        raise FileError(f"{shard} has {actual} bytes, {path} was made for a file of {size} bytes: {_REMEDY}", shard)
    return int(shape[0]) - 1


def read_index(shard: str, remote: Remote) -> Rows:
    """The rows of a shard, of its index file or made now. FileError if that is damaged or of another file; OSError."""
    (data,) = read_ranges([(index_path(shard), 0, _LONGEST)], replace(remote, cache=None))
    if isinstance(data, OSError):
        return _without_file(shard, remote, data)
    return _rows(shard, data[_position(0) :], _checked(shard, data))


def _position(row: int) -> int:
    """First byte of a row in an index file."""
    return _HEADER + (1 + row) * _ROW


def _rows(shard: str, data: bytes, samples: int) -> Rows:
    if len(data) > samples * _ROW:
        raise FileError(f"{shard}{SUFFIX} holds more samples than were counted: {_REMEDY}", shard)
    if len(data) < samples * _ROW:
        path = index_path(shard)
        raise FileError(f"{path} is truncated, or holds fewer samples than were counted: {_REMEDY}", path)
    return np.frombuffer(data, "<u4").reshape(-1, 3)


def _without_file(shard: str, remote: Remote, error: OSError) -> Rows:
    """The rows of a shard whose index is not there. A remote one is indexed in its copy."""
    if remote.cache and is_remote(shard) and isinstance(error, LastingError):
        with local_copy(shard, remote) as copy:
            return read_index(copy.name, remote)
    if is_remote(shard) or not isinstance(error, FileNotFoundError):
        raise error
    return _made(shard)[0]


def index_path(shard: str) -> str:
    """The index file beside a shard or, for a local one whose folder is read-only, in the user's cache."""
    beside = shard + SUFFIX
    return beside if is_remote(shard) or os.path.exists(beside) else _cached(shard)


def _cached(shard: str) -> str:
    """A name that changes with the file."""
    if not os.path.exists(shard):  # which opening it says
        return shard + SUFFIX
    status = os.stat(shard)
    name = f"{_FORMAT}/{os.path.abspath(shard)}/{status.st_size}/{status.st_mtime_ns}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "stair", "index", hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32])


def _made(shard: str) -> tuple[Rows, FileError | None]:
    """Makes an index and keeps it where that is possible. That of a broken shard is not kept."""
    rows, problem = build(shard)
    for path in () if problem else (shard + SUFFIX, _cached(shard)):
        with suppress(OSError):  # what cannot be kept costs the next run its time, no more
            write(path, rows, os.stat(shard).st_size)
            break
    return rows, problem


# ------------------------------------------------------------------ samples


class Span(NamedTuple):
    """Where a sample lies: path or URL, first byte, the byte behind the last; checksum of names; see `caption_lines`."""

    shard: str
    start: int
    stop: int
    check: int | None = None
    lines: bool = False


def spans_of(shard: str, rows: Rows) -> list[Span]:
    """Where the samples of rows of a shard lie."""
    return [Span(shard, first * BLOCK, (first + blocks) * BLOCK, check) for first, blocks, check in rows.tolist()]


def read_spans(spans: Sequence[Span], remote: Remote) -> Iterator[Grouped[bytes] | OSError]:
    """Reads samples, or says why they cannot be read. FileError if a shard is not the file whose spans these are."""
    for span, data in zip(spans, read_ranges([span[:3] for span in spans], remote), strict=True):
        yield data if isinstance(data, OSError) else _parsed(span, data)


def _parsed(span: Span, data: bytes) -> Grouped[bytes]:
    with suppress(ValueError):
        whole = len(data) == span.stop - span.start
        for sample in group(members_of_part(data), lambda member: member.read()) if whole else ():
            check = _checksum(sample.key, {kind: len(content) for kind, content in sample.members.items()})
            if span.check in (None, check):
                return sample
    raise FileError(
        f"{span.shard} is not the file that its index describes: another sample is at byte {span.start}; {_REMEDY}",
        span.shard,
    )  # fmt: skip


class SampleReader:
    """Reads samples by their rows, and keeps pages of indexes. Shards that failed are tried once, not for minutes again."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._failed = remote, set[str]()
        self._pages = dict[tuple[str, int], Rows | OSError]()

    def read(self, samples: Sequence[tuple[str, int, int]]) -> Iterator[Grouped[bytes] | OSError]:
        """The samples at (shard, row, number of rows in the shard), or why one cannot be read.

        FileError if a shard or its index was replaced, or the number is wrong.
        """
        spans = [
            page if isinstance(page, OSError) else spans_of(shard, page[row % _PAGE : row % _PAGE + 1])[0]
            for (shard, row, _), page in zip(samples, self._pages_of(samples), strict=True)
        ]
        known = [span for span in spans if isinstance(span, Span)]
        contents = read_spans(known, self._patience(span.shard for span in known))
        for (shard, _, _), span in zip(samples, spans, strict=True):
            sample = next(contents) if isinstance(span, Span) else span
            (self._failed.add if isinstance(sample, OSError) else self._failed.discard)(shard)
            yield sample

    def _patience(self, shards: Iterable[str]) -> Remote:
        return replace(self._remote, retries=0) if self._failed.issuperset(shards) else self._remote

    def _pages_of(self, samples: Sequence[tuple[str, int, int]]) -> list[Rows | OSError]:
        """The page of the index for each sample; all that are lacking are read at once."""
        needed = {(shard, row // _PAGE): count for shard, row, count in samples}
        lacking = {page: count for page, count in needed.items() if page not in self._pages}
        ranges = [
            # a byte more: behind the last row there must be nothing
            (index_path(shard), _position(page * _PAGE), _position(min(page * _PAGE + _PAGE, count)) + 1)
            for (shard, page), count in lacking.items()
        ]
        remote = replace(self._patience(shard for shard, _ in lacking), cache=None)
        for (page, count), data in zip(lacking.items(), read_ranges(ranges, remote), strict=True):
            self._pages[page] = self._page(*page, count, data)
        pages = [self._pages[shard, row // _PAGE] for shard, row, _ in samples]
        for page in lacking:
            if isinstance(self._pages[page], OSError) or len(self._pages) > _PAGES:
                self._pages.pop(page if isinstance(self._pages[page], OSError) else next(iter(self._pages)))
        return pages

    def _page(self, shard: str, page: int, count: int, data: bytes | OSError) -> Rows | OSError:
        first, last = page * _PAGE, min(page * _PAGE + _PAGE, count)
        if not isinstance(data, OSError):
            return _rows(shard, data if last == count else data[:-1], last - first)
        try:
            rows = _without_file(shard, self._remote, data)
        except OSError as error:
            return error
        return _rows(shard, rows.tobytes(), count)[first:last]


# ------------------------------------------------------------------ numbers of samples


def sizes(shards: Sequence[str], remote: Remote, processes: int) -> dict[str, tuple[int, str]]:
    """Number of samples of each shard, and what is wrong with it ("" if nothing is known to be).

    Local shards without an index are indexed by so many processes, with a progress bar.

    Raises:
        FileError: if an index is damaged or of another file, or a remote shard has none.
        OSError: if it cannot be read.
    """
    places = {shard: _place(shard) for shard in shards}
    manifests = {folder: read_manifest(folder, remote) for folder in dict(places.values())}
    stated = {shard: manifests[folder].get(name, {}) for shard, (folder, name) in places.items()}
    listed = {folder: set(os.listdir(folder)) for folder in manifests if "://" not in folder}
    lacking = []
    for shard, (folder, name) in places.items():
        if is_remote(shard):
            continue
        if (entry := stated[shard]) and (size := os.stat(shard).st_size) != entry["bytes"]:
            raise FileError(
                f"{shard} has {size} bytes, {folder}/{MANIFEST} says {entry['bytes']}. Fetch the shard again, or write the "
                "index again with `stair doctor SHARDS --write_index`", shard,
            )  # fmt: skip
        if name + SUFFIX not in listed[folder] and not os.path.exists(_cached(shard)):
            lacking.append(shard)
    counts = _make(lacking, processes)
    for shard, (count, problem) in counts.items():
        if (entry := stated[shard]) and entry["samples"] != count and not problem:
            raise FileError(f"{shard} holds {count} samples, {MANIFEST} says {entry['samples']}: {_REMEDY}", shard)
    counts |= {shard: (entry["samples"], "") for shard, entry in stated.items() if entry and shard not in counts}
    opened = [shard for shard in stated if shard not in counts]
    ranges = [(index_path(shard), 0, _position(0)) for shard in opened]
    for shard, data in zip(opened, read_ranges(ranges, replace(remote, cache=None)), strict=True):
        if isinstance(data, OSError):
            raise _no_index(shard, data, remote)
        counts[shard] = _checked(shard, data), ""
    return {s: (counts[s][0], counts[s][1] or ("" if counts[s][0] else f"{s} contains no sample")) for s in stated}


def _no_index(shard: str, error: OSError, remote: Remote) -> Exception:
    """What to raise where the index of a shard cannot be read."""
    if isinstance(error, PermissionError):
        return unreadable(index_path(shard))
    (beginning,) = read_ranges([(shard, 0, 1)], replace(remote, cache=None))
    if not isinstance(error, LastingError) or isinstance(beginning, OSError):
        return beginning if isinstance(beginning, OSError) else error
    return FileError(
        f"{shard} has no index ({MANIFEST} or {_place(shard)[1]}{SUFFIX} beside it: {error}). Write both by `stair doctor "
        "SHARDS --write_index` where shards are local; or set data.resample: true and data.train_samples", shard,
    )  # fmt: skip


def _make(shards: list[str], processes: int) -> dict[str, tuple[int, str]]:
    progress = partial(tqdm, desc="indexing shards", total=len(shards), unit="shard", delay=_SILENT)
    if processes < 2 or sum(map(os.path.getsize, shards)) < _IN_PARALLEL:
        return dict(zip(shards, progress(map(_count, shards)), strict=True))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, without_main():
        return dict(zip(shards, progress(pool.map(_count, shards)), strict=True))


def _count(shard: str) -> tuple[int, str]:
    rows, problem = _made(shard)
    return len(rows), str(problem or "")


def _place(shard: str) -> tuple[str, str]:
    """Folder and name of a shard."""
    folder, name = os.path.split(shard.partition("?")[0] if is_remote(shard) else shard)
    return folder or ".", name


def read_manifest(folder: str, remote: Remote = LOCAL) -> dict[str, dict[str, Any]]:
    """`samples`, `bytes` and perhaps `sha256` of each shard by its name, as `index.json` in a folder or under a URL states.

    FileError if it is damaged or of another format; OSError.
    """
    path = f"{folder}/{MANIFEST}"
    try:
        with open_shard(path, replace(remote, cache=None)) as file:
            text = file.read(_LONGEST + 1)
    except (FileNotFoundError, LastingError):
        return {}
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        content = json.loads(text)
        if "format" not in content:  # other tools call their own files so too
            return {}
        if content["format"] != MANIFEST_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, expected {MANIFEST_FORMAT}")
        entries = content["shards"].items()
        return {name: {**one, "samples": int(one["samples"]), "bytes": int(one["bytes"])} for name, one in entries}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{path} is not an index of shards ({error}); remove it or write it again", path) from error

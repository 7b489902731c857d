"""Where the samples of a shard lie: `NAME.tar.idx` beside `NAME.tar`, so that any sample is read alone.

The file holds two numpy arrays, one behind the other, without pickle: [format, size of the shard in bytes], then one
record a sample: its key, and offset and length in bytes of each member by type (length 0: no such member). A shard with
bad names has the fields `problem` and `warning` too. Records are read by pages, so an index costs nothing until it is used.
"""

import hashlib
import io
import json
import multiprocessing
import os
import posixpath
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from stair.data.remote import LastingError, Remote, is_remote, local_copy, read_ranges, read_small
from stair.data.samples import is_wanted
from stair.data.tars import walk
from stair.errors import FileError
from stair.files import atomic_write
from stair.processes import without_main

SUFFIX = ".idx"
FORMAT = 1
MANIFEST, MANIFEST_FORMAT = "index.json", 1

_LONGEST_TEXT = 250  # bytes of a key or a note
_HEADER = 2048  # bytes that hold the headers of both arrays; types of members are few
_PAGES = 8  # of an index that are kept: a window of shuffling has a few
_PAGE = 1024  # records that are read together
_IN_PARALLEL = 1 << 31  # bytes of shards from which on processes are started to index them
_NOTES = ("problem", "warning")
_TEXTS = ("key", *_NOTES)
_REMEDY = "delete it, or write it again with `stair doctor SHARDS --write_index`"

Rows = NDArray[Any]  # one record a sample


class Entry(NamedTuple):
    """A sample in a shard.

    Attributes:
        key: its `__key__`.
        members: offset and length in bytes by type.
        problem: reason to skip it, "" if there is none.
        warning: a note that is no reason to skip it, "" if there is none.
    """

    key: str
    members: dict[str, tuple[int, int]]
    problem: str = ""
    warning: str = ""


class BrokenShardError(FileError):
    """A shard that cannot be read to its end.

    Args:
        message: where it breaks off.
        path: of the shard.
        rows: records of the whole samples before that place.
    """

    def __init__(self, message: str, path: Path | str, rows: Rows | None = None) -> None:
        super().__init__(message, path)
        self.rows = np.zeros(0, [("key", "S1")]) if rows is None else rows


def build(path: Path | str) -> Rows:
    """Finds the samples of a local, uncompressed tar by its headers.

    Raises:
        BrokenShardError: if it is no such tar, or damaged, or cut short; names the byte.
    """
    entries: list[Entry] = []
    try:
        for sample in walk(str(path)):
            wanted = {kind: place for kind, place in sample.members.items() if is_wanted(f"k.{kind}")}
            entries.append(Entry(sample.key, wanted, "".join(sample.problems[:1]), "".join(sample.warnings[:1])))
    except FileError as error:
        raise BrokenShardError(str(error), path, _records(entries)) from error
    return _records(entries)


def _records(entries: Sequence[Entry]) -> Rows:
    texts = {
        name: [getattr(entry, name).encode(errors="surrogateescape")[:_LONGEST_TEXT] for entry in entries]
        for name in _TEXTS
    }
    kinds = sorted({kind for entry in entries for kind in entry.members})
    fields: list[Any] = [(name, f"S{max(map(len, found))}") for name, found in texts.items() if any(found)]
    fields += [(kind, [("offset", "<u8"), ("length", "<u4")]) for kind in kinds]
    rows = np.zeros(len(entries), fields or [("key", "S1")])
    for name in rows.dtype.names or ():
        rows[name] = texts[name] if name in texts else [entry.members.get(name, (0, 0)) for entry in entries]
    return rows


def index_shard(shard: Path) -> int:
    """Writes the index of a local shard beside it, and returns its number of samples.

    Raises:
        BrokenShardError: if it cannot be read to its end.
        OSError: if there is no room or no permission.
    """
    rows = build(shard)
    write(f"{shard}{SUFFIX}", rows, shard.stat().st_size)
    return len(rows)


def write(path: Path | str, rows: Rows, size: int) -> None:
    """Writes an index file, whole or not at all.

    Args:
        path: of the index.
        rows: as `build` returns.
        size: of the shard, in bytes.

    Raises:
        OSError: if there is no room or no permission.
    """
    with atomic_write(Path(path)) as part, part.open("wb") as file:
        np.save(file, np.array([FORMAT, size], "<u8"), allow_pickle=False)
        np.save(file, rows, allow_pickle=False)


class ShardIndex:
    """The samples of a shard, whose records are read by pages.

    Args:
        shard: path or URL, for messages.
        path: of the index file.
        remote: how to read it from afar.
        header: the beginning of the file.
        rows: all records, instead of a file.

    Raises:
        FileError: if the file is no index, or of another version.
    """

    def __init__(self, shard: str, path: str, remote: Remote, header: bytes = b"", rows: Rows | None = None) -> None:
        self.shard, self.size, self._path, self._remote = shard, -1, path, remote
        self._page, self._pages = _PAGE, dict[int, Rows | OSError]()
        if rows is not None:
            self._length = self._page = len(rows)
            self._pages[0] = rows
            return
        start = io.BytesIO(header)
        try:
            version, self.size = np.load(start, allow_pickle=False).tolist()
            if version != FORMAT:
                raise ValueError(f"its format is {version}, wanted {FORMAT}")
            np.lib.format.read_magic(start)
            (self._length,), _, self._type = np.lib.format.read_array_header_1_0(start)
        except (ValueError, TypeError, EOFError) as error:
            raise FileError(f"{path} is no index of a shard ({error}): {_REMEDY}", path) from error
        self._start = start.tell()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Entry:
        """The sample of a row.

        Raises:
            FileError: if the index is cut short.
            OSError: if the record cannot be read.
        """
        if not 0 <= row < self._length:
            raise IndexError(row)
        if row // self._page not in self._pages:
            prefetch([(self, row)], self._remote)
        records = self._pages[row // self._page]
        if isinstance(records, OSError):
            raise records
        values = dict(zip(records.dtype.names or (), records[row % self._page].item(), strict=True))
        texts = {name: values.pop(name).decode(errors="surrogateescape") for name in _TEXTS if name in values}
        return Entry(texts.pop("key", ""), {kind: place for kind, place in values.items() if place[0]}, **texts)

    def _range(self, page: int) -> tuple[str, int, int]:
        first, last = page * self._page, min((page + 1) * self._page, self._length)
        return self._path, self._start + first * self._type.itemsize, self._start + last * self._type.itemsize


def prefetch(rows: Iterable[tuple[ShardIndex, int]], remote: Remote) -> None:
    """Reads the records of rows, those from afar at once. What cannot be read is an error when it is used.

    Raises:
        FileError: if an index is cut short.
    """
    pages = {(id(index), row // index._page): (index, row // index._page) for index, row in rows}
    lacking = [(index, page) for index, page in pages.values() if page not in index._pages]
    ranges = [index._range(page) for index, page in lacking]
    for (index, page), (path, start, stop), data in zip(lacking, ranges, read_ranges(ranges, remote), strict=True):
        if not isinstance(data, OSError) and len(data) < stop - start:
            raise FileError(f"{path} is cut short: {_REMEDY}", path)
        while len(index._pages) >= _PAGES:
            del index._pages[next(iter(index._pages))]
        index._pages[page] = data if isinstance(data, OSError) else np.frombuffer(data, index._type)


def open_indexes(shards: Iterable[str], remote: Remote) -> dict[str, ShardIndex | OSError]:
    """The index of each shard: the file beside it or in the user's cache, else made now. Or why it cannot be read.

    Args:
        shards: paths and URLs; the indexes of the latter are read at once.
        remote: how to read what is not local. With a cache, a remote shard without an index is indexed in its copy.

    Raises:
        FileError: if an index is damaged or of another file.
    """
    found: dict[str, ShardIndex | OSError] = {}
    paths = {shard: _index_path(shard) for shard in shards}
    headers = read_ranges([(path, 0, _HEADER) for path in paths.values()], remote)
    for (shard, path), header in zip(paths.items(), headers, strict=True):
        try:
            found[shard] = _opened(shard, path, header, remote)
        except OSError as error:
            found[shard] = error
    return found


def _opened(shard: str, path: str, header: bytes | OSError, remote: Remote) -> ShardIndex:
    far = is_remote(shard)
    if far and remote.cache and isinstance(header, LastingError):
        with local_copy(shard, remote) as copy:
            return open_index(copy.name, remote)
    size = 0 if far else os.stat(shard).st_size
    if not far and isinstance(header, FileNotFoundError):
        return ShardIndex(shard, "", remote, rows=_indexed(shard)[0])
    if isinstance(header, OSError):
        raise header
    index = ShardIndex(shard, path, remote, header)
    if not far and index.size != size:
        raise FileError(
            f"{shard} has {size} bytes, and {path} was made for a file of {index.size} bytes: {_REMEDY}", shard
        )
    return index


def open_index(shard: str, remote: Remote) -> ShardIndex:
    """As `open_indexes`, of one shard.

    Raises:
        FileError: if the index is damaged or of another file.
        OSError: if shard or index cannot be read.
    """
    (index,) = open_indexes([shard], remote).values()
    if isinstance(index, OSError):
        raise index
    return index


def _index_path(shard: str) -> str:
    beside = shard + SUFFIX
    if is_remote(shard) or os.path.exists(beside):
        return beside
    try:
        return _cached(shard)
    except OSError:  # the shard is gone, which opening it says
        return beside


def _cached(shard: str) -> str:
    """Where the index of a shard lies whose folder is read-only; the name changes with the file."""
    state = os.stat(shard)
    name = f"{os.path.abspath(shard)}/{state.st_size}/{state.st_mtime_ns}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "stair", "index", hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32])


def _indexed(shard: str) -> tuple[Rows, str]:
    """Makes an index and keeps it where that is possible. That of a broken shard is not kept; the reason comes with it."""
    try:
        rows = build(shard)
    except BrokenShardError as error:
        return error.rows, str(error)
    size = os.stat(shard).st_size
    try:
        write(shard + SUFFIX, rows, size)
    except OSError:
        with suppress(OSError):  # a home that cannot be written to costs the next run its time, no more
            write(_cached(shard), rows, size)
    return rows, ""


def _index_length(shard: str) -> tuple[int, str]:
    rows, problem = _indexed(shard)
    return len(rows), problem


def sizes(shards: Sequence[str], remote: Remote, processes: int) -> dict[str, tuple[int, str]]:
    """Number of samples of each shard, and what is wrong with it ("" if nothing is known to be).

    Local shards without an index are indexed, in parallel, with a progress bar.

    Args:
        shards: paths and URLs.
        remote: how to read what is not local.
        processes: that index.

    Raises:
        FileError: if an index is damaged or of another file, or a remote shard has none.
        OSError: if it cannot be read.
    """
    stated = {folder: read_manifest(folder, remote) for folder in dict.fromkeys(map(_folder, shards))}
    entries = {shard: stated[_folder(shard)].get(_name(shard)) for shard in shards}
    found: dict[str, tuple[int, str]] = {}
    for shard, entry in entries.items():
        if entry and not is_remote(shard) and (size := os.stat(shard).st_size) != entry[1]:
            raise FileError(
                f"{shard} has {size} bytes, {_folder(shard)}/{MANIFEST} says {entry[1]}: it was written for another file, "
                "or this one is incomplete. Fetch the shard again, or write the index again with "
                "`stair doctor SHARDS --write_index`", shard,
            )  # fmt: skip
    listed = {folder: set(os.listdir(folder)) for folder in stated if "://" not in folder}
    local = [shard for shard in entries if not is_remote(shard)]
    lacking = [s for s in local if _name(s) + SUFFIX not in listed[_folder(s)] and not os.path.exists(_cached(s))]
    found |= _made(lacking, processes)
    for shard, (count, problem) in found.items():
        if (entry := entries[shard]) and entry[0] != count and not problem:
            raise FileError(
                f"{shard} holds {count} samples, {_folder(shard)}/{MANIFEST} says {entry[0]}: {_REMEDY}", shard
            )
    found |= {s: (entry[0], "") for s, entry in entries.items() if entry and s not in found}
    found |= _counted([s for s in entries if s not in found], replace(remote, cache=None))
    return {s: (count, problem or ("" if count else f"{s} holds no sample")) for s, (count, problem) in found.items()}


def _counted(shards: list[str], remote: Remote) -> dict[str, tuple[int, str]]:
    """Sizes of shards by the headers of their indexes."""
    found = {}
    for shard, index in open_indexes(shards, remote).items():
        if isinstance(index, LastingError):
            (there,) = read_ranges([(shard, 0, 1)], remote)
            if isinstance(there, OSError):
                raise there
            raise FileError(
                f"{shard} has no index: neither {MANIFEST} nor {_name(shard)}{SUFFIX} beside it states its samples "
                f"({index}). Write both with `stair doctor SHARDS --write_index` where the shards are local, and copy "
                "them beside the shards; or read shards from front to end with data.resample: true and data.train_samples",
                shard,
            )
        if isinstance(index, OSError):
            raise index
        found[shard] = len(index), ""
    return found


def _made(shards: list[str], processes: int) -> dict[str, tuple[int, str]]:
    if processes < 2 or sum(map(os.path.getsize, shards)) < _IN_PARALLEL:
        return {shard: _index_length(shard) for shard in shards}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, without_main():
        found = pool.map(_index_length, shards)
        return dict(zip(shards, tqdm(found, "indexing shards", len(shards), unit="shard"), strict=True))


# ------------------------------------------------------------------ index.json


def _folder(shard: str) -> str:
    return posixpath.dirname(shard.partition("?")[0]) if is_remote(shard) else str(Path(shard).parent)


def _name(shard: str) -> str:
    return posixpath.basename(shard.partition("?")[0] if is_remote(shard) else shard)


def read_manifest(folder: str, remote: Remote) -> dict[str, tuple[int, int]]:
    """Samples and bytes of each shard, by its name, as `index.json` states; nothing if there is none of ours.

    Args:
        folder: a local one, or a URL.
        remote: how to read the latter.

    Raises:
        FileError: if it is damaged, or of another format.
        OSError: if it cannot be read.
    """
    place = f"{folder}/{MANIFEST}"
    try:
        text = read_small(place, remote) if is_remote(place) else Path(place).read_bytes()
    except FileNotFoundError:
        text = None
    if text is None:
        return {}
    try:
        content = json.loads(text)
        if "format" not in content:  # other tools call their own files so too
            return {}
        if content["format"] != MANIFEST_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, wanted {MANIFEST_FORMAT}")
        return {name: (int(entry["samples"]), int(entry["bytes"])) for name, entry in content["shards"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileError(f"{place} is no index of shards ({error}); remove it or write it again", place) from error

"""Where the samples of a shard lie: `NAME.tar.idx` beside `NAME.tar`, so that any sample is read alone.

The file holds two numpy arrays, one behind the other, without pickle: [format, size of the shard in bytes], then one
record a sample: its key, and offset and length in bytes of each member by type (length 0: no such member). A shard with
bad names has the fields `problem` and `warning` too. A record is read alone, so an index costs nothing until it is used.
"""

import hashlib
import io
import json
import multiprocessing
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
_PAGE = 1024  # records that are fetched together from afar
_IN_PARALLEL = 1 << 31  # bytes of shards from which on processes are started to index them
_NOTES = ("problem", "warning")

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
        for name in ("key", *_NOTES)
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
    """The samples of a shard, read one by one.

    Args:
        shard: path or URL, for messages.
        rows: records, or None if they are fetched from `path`.
        path: of the index file.
        remote: how to read it from afar.
        header: the beginning of the file, where it was read already.

    Raises:
        FileError: if the file is no index, or of another version.
        OSError: if it cannot be read.
    """

    def __init__(
        self, shard: str, path: str, remote: Remote, rows: Rows | None = None, header: bytes | None = None
    ) -> None:
        self.shard, self.size, self._path, self._remote = shard, -1, path, remote
        self._pages: dict[int, Rows | OSError] = {}
        if rows is not None:
            self._rows: Rows | None = rows
            self._length = len(rows)
            return
        self._rows = None
        start = io.BytesIO(_content(path, 0, _HEADER, remote) if header is None else header)
        try:
            version, self.size = np.load(start, allow_pickle=False).tolist()
            if version != FORMAT:
                raise ValueError(f"its format is {version}, wanted {FORMAT}")
            np.lib.format.read_magic(start)
            (self._length,), _, self._type = np.lib.format.read_array_header_1_0(start)
        except (ValueError, TypeError, EOFError) as error:
            raise FileError(f"{path} is no index of a shard ({error}): {_REMEDY}", path) from error
        self._start = start.tell()
        if not is_remote(path):
            try:
                if self._length:  # nothing of an empty one can be mapped
                    self._rows = np.memmap(path, self._type, "r", self._start, (self._length,))
            except ValueError as error:
                raise FileError(f"{path} is cut short ({error}): {_REMEDY}", path) from error

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> Entry:
        """The sample of a row.

        Raises:
            OSError: if the record cannot be read.
        """
        record = self._rows[row] if self._rows is not None else self._fetched(row)
        values = dict(zip(record.dtype.names, record.item(), strict=True))
        texts = {name: values.pop(name).decode(errors="surrogateescape") for name in _TEXTS if name in values}
        return Entry(texts.pop("key", ""), {kind: place for kind, place in values.items() if place[0]}, **texts)

    def _fetched(self, row: int) -> Any:
        if row // _PAGE not in self._pages:
            prefetch([(self, row)], self._remote)
        page = self._pages[row // _PAGE]
        if isinstance(page, OSError):
            raise page
        return page[row % _PAGE]


def prefetch(rows: Iterable[tuple[ShardIndex, int]], remote: Remote) -> None:
    """Reads the records of rows from afar at once. What cannot be read is an error when it is used."""
    lacking = {(id(index), row // _PAGE): (index, row // _PAGE) for index, row in rows if index._rows is None}
    pages = [(index, page) for index, page in lacking.values() if page not in index._pages]
    ranges = []
    for index, page in pages:
        width, stop = index._type.itemsize, min((page + 1) * _PAGE, len(index))
        ranges.append((index._path, index._start + page * _PAGE * width, index._start + stop * width))
    for (index, page), data in zip(pages, read_ranges(ranges, remote), strict=True):
        while len(index._pages) >= _PAGES:
            del index._pages[next(iter(index._pages))]
        index._pages[page] = data if isinstance(data, OSError) else np.frombuffer(data, index._type)


def open_indexes(shards: Iterable[str], remote: Remote) -> dict[str, ShardIndex | OSError]:
    """As `open_index`, those of remote shards at once; or why one cannot be read.

    Raises:
        FileError: if an index is of another file.
    """
    found: dict[str, ShardIndex | OSError] = {}
    far = [shard for shard in dict.fromkeys(shards) if is_remote(shard) and not remote.cache]
    headers = read_ranges([(shard + SUFFIX, 0, _HEADER) for shard in far], remote)
    for shard, header in zip(far, headers, strict=True):
        if isinstance(header, OSError):
            found[shard] = header
        else:
            found[shard] = ShardIndex(shard, shard + SUFFIX, remote, header=header)
    for shard in shards:
        try:
            found[shard] = found[shard] if shard in found else open_index(shard, remote)
        except OSError as error:
            found[shard] = error
    return found


_TEXTS = ("key", *_NOTES)
_REMEDY = "delete it, or write it again with `stair doctor SHARDS --write_index`"


def _content(path: str, start: int, stop: int, remote: Remote) -> bytes:
    (data,) = read_ranges([(path, start, stop)], remote)
    if isinstance(data, Exception):
        raise data
    return data


def open_index(shard: str, remote: Remote) -> ShardIndex:
    """The index of a shard: the file beside it or in the user's cache, else made now.

    Args:
        shard: path or URL.
        remote: how to read what is not local. With a cache, a remote shard without an index is indexed in its copy.

    Raises:
        FileError: if the index is of another file.
        OSError: if shard or index cannot be read.
    """
    if is_remote(shard):
        if not remote.cache:
            return ShardIndex(shard, shard + SUFFIX, remote)
        try:
            with local_copy(shard + SUFFIX, remote) as copy:
                return ShardIndex(shard, copy.name, remote)
        except LastingError:
            with local_copy(shard, remote) as copy:
                return open_index(copy.name, remote)
    size = os.stat(shard).st_size
    for path in (shard + SUFFIX, _cached(shard)):
        if os.path.exists(path):
            index = ShardIndex(shard, path, remote)
            if index.size != size:
                raise FileError(
                    f"{shard} has {size} bytes, and {path} was made for a file of {index.size} bytes: {_REMEDY}", shard
                )
            return index
    return ShardIndex(shard, "", remote, _indexed(shard)[0])


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
    found |= {s: (len(open_index(s, remote)), "") for s in local if s not in found}
    found |= _far([s for s in entries if s not in found], remote)
    return {s: (count, problem or ("" if count else f"{s} holds no sample")) for s, (count, problem) in found.items()}


def _far(shards: list[str], remote: Remote) -> dict[str, tuple[int, str]]:
    """Sizes of remote shards by the headers of their indexes."""
    found = {}
    remote = replace(remote, cache=None)
    headers = read_ranges([(shard + SUFFIX, 0, _HEADER) for shard in shards], remote)
    for shard, header in zip(shards, headers, strict=True):
        if isinstance(header, LastingError):
            (there,) = read_ranges([(shard, 0, 1)], remote)
            if isinstance(there, OSError):
                raise there
            raise FileError(
                f"{shard} has no index: neither {MANIFEST} nor {_name(shard)}{SUFFIX} beside it states its samples "
                f"({header}). Write both with `stair doctor SHARDS --write_index` where the shards are local, and copy "
                "them beside the shards; or read shards from front to end with data.resample: true and data.train_samples",
                shard,
            )
        if isinstance(header, OSError):
            raise header
        found[shard] = len(ShardIndex(shard, shard + SUFFIX, remote, header=header)), ""
    return found


def _made(shards: list[str], processes: int) -> dict[str, tuple[int, str]]:
    if processes < 2 or sum(map(os.path.getsize, shards)) < _IN_PARALLEL:
        return {shard: _index_length(shard) for shard in shards}
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool, without_main():
        return dict(zip(shards, _shown(pool.map(_index_length, shards), len(shards)), strict=True))


def _shown(results: Iterable[Any], total: int) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(results, "indexing shards", total, unit="shard")


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

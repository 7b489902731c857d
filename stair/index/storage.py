"""An index on disk: immutable segments, and a manifest that names them.

A segment is a folder of up to `SEGMENT` documents with two Arrow files, which are memory-mapped: the arrays of
stair/index/postings.py, and a table of ids and metadata. A change writes new segments beside the old ones, then replaces
the manifest by a rename. A kill at any time leaves the old index or the new one. An open index keeps the segments that it
opened, also when they are removed.

N documents, V words.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from stair.embeddings import Embeddings, Space
from stair.errors import FileError, SettingError
from stair.files import lock, remove, removed_on_failure, sha256, sync, write_bytes
from stair.index.postings import Arrays, checked, invert
from stair.metadata import ID, Documents, to_table
from stair.plain import plain

FORMAT = 3
MANIFEST, WORDS = "manifest.json", "vocab.txt"
POSTINGS, DOCUMENTS = "postings.arrow", "documents.arrow"
SEGMENT = 1 << 18  # bounds the memory of a build, and what a small change has to write
SMALL = 8 << 20  # bytes up to which opening compares all checksums: some milliseconds
_NAME = re.compile(r"segment-[0-9a-f]{12}")
Record = dict[str, Any]
Rows = tuple[sparse.csr_matrix, pa.Table]


def record(path: Path) -> Record:
    """Waits until a new file is on disk and returns its `bytes` and `sha256`."""
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def check(path: Path, written: Record, content: bool) -> None:
    """Compares a file's length with its record, and its checksum too if `content`.

    Raises:
        FileError: if it is missing or differs.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != written["bytes"]:
        raise FileError(f"{path} has {size} bytes, {written['bytes']} were written: build the index again", path)
    if content and sha256(path) != written["sha256"]:
        raise FileError(f"{path} is not what was written (sha256 differs): build the index again", path)


def write_manifest(path: Path, content: Any) -> None:
    """Replaces a manifest: from here on its segments are the index."""
    body = json.dumps(content, sort_keys=True)
    write_bytes(path, json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode())


def read_manifest(path: Path) -> Record:
    """Reads a manifest.

    Raises:
        FileNotFoundError: if there is none.
        FileError: if it is damaged.
    """
    try:
        outer = json.loads(path.read_bytes())
        if hashlib.sha256(outer["body"].encode()).hexdigest() != outer["sha256"]:
            raise ValueError("sha256 differs")
        content: Record = json.loads(outer["body"])
        content.keys()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path} is no manifest of an index, or damaged: {error}", path) from error
    return content


def write_segment(folder: Path, rows: Rows) -> Record:
    """Writes a segment of (N, V) comparable rows and their table, and returns what the manifest keeps of it."""
    vectors, table = rows
    name = f"segment-{secrets.token_hex(6)}"
    place = folder / name
    place.mkdir()
    with removed_on_failure(folder, place):
        write_postings(place / POSTINGS, invert(vectors))
        _write(place / DOCUMENTS, table.combine_chunks().to_batches()[0])
        files = {file: record(place / file) for file in (POSTINGS, DOCUMENTS)}
        sync(place)
        sync(folder)
    return {"name": name, "documents": len(table), "files": files}


def write_postings(path: Path, arrays: Arrays) -> None:
    """Writes arrays as columns of one row, a list each."""
    lists = (pa.LargeListArray.from_arrays([0, len(array)], pa.array(array)) for array in arrays.values())
    _write(path, pa.RecordBatch.from_arrays(list(lists), list(arrays)))


def read_postings(path: Path) -> Arrays:
    """Maps what `write_postings` wrote."""
    batch = _mapped(path)
    return {name: batch[name].values.to_numpy() for name in batch.schema.names}


def _write(path: Path, batch: pa.RecordBatch) -> None:
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)


def _mapped(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


class Segment:
    """A segment that is open.

    Args:
        folder: of the index.
        written: what `write_segment` returned.
        first: number of its first document in the index.
        content: compare the checksums of its files.

    Raises:
        FileError: if a file is missing or damaged.
    """

    def __init__(self, folder: Path, written: Record, first: int = 0, content: bool = False) -> None:
        if not _NAME.fullmatch(written["name"]):
            raise FileError(
                f"{folder}: its manifest names {written['name']!r}, which is no segment of an index", folder
            )
        self.written, self.first, self._place = written, first, folder / written["name"]
        self._check(content)
        try:
            self.arrays = read_postings(self._place / POSTINGS)
            self.documents = Documents(_mapped(self._place / DOCUMENTS))
        except (ValueError, OSError, AttributeError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return len(self.documents)

    def _check(self, content: bool) -> None:
        for file in (POSTINGS, DOCUMENTS):
            check(self._place / file, self.written["files"][file], content)

    def _damaged(self, error: Exception) -> FileError:
        why = f"{type(error).__name__}: {plain(str(error))}"
        return FileError(f"{self._place} is no segment of an index ({why}); build the index again", self._place)

    def row(self, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The words, ascending, and the weights of a document."""
        row = slice(self.arrays["row_start"][n], self.arrays["row_start"][n + 1])
        return self.arrays["row_words"][row].astype(np.int64), self.arrays["row_weights"][row]

    def vectors(self, words: int) -> sparse.csr_matrix:
        """(N, V) rows, ready for the dot product."""
        parts = self.arrays["row_weights"], self.arrays["row_words"].astype(np.int32), self.arrays["row_start"]
        return sparse.csr_matrix(parts, shape=(len(self), words))

    def rows(self, words: int) -> Rows:
        """Vectors and table, checked: a damaged file would get a good checksum when it is written again.

        Raises:
            FileError: if a file is not what was written, or its numbers are out of range.
        """
        self._check(content=True)
        try:
            vectors = self.vectors(words)
            vectors.check_format(full_check=True)
            self.documents.batch.validate(full=True)
        except Exception as error:  # whatever wrong types and lengths lead to
            raise self._damaged(error) from error
        return vectors, pa.Table.from_batches([self.documents.batch])

    def verify(self, words: int) -> None:
        """Compares every file with its checksum, and all arrays with the rows.

        A checksum shows damage by accident. Numbers that point out of their arrays, which whoever made the index might
        have written, are detected by the second.

        Raises:
            FileError: if something differs.
        """
        vectors, _ = self.rows(words)
        arrays = invert(checked(vectors, words))
        # the type too: another one compares as equal, and the compiled search stops at it
        if wrong := [
            n for n, a in arrays.items() if self.arrays[n].dtype != a.dtype or not np.array_equal(self.arrays[n], a)
        ]:
            raise FileError(f"{self._place}: {wrong[0]} contradicts the rest of it; build the index again", self._place)


class Store:
    """One state of an index.

    Args:
        folder: of the index.

    Attributes:
        manifest: what the folder's manifest stated.
        segments: in the order of addition.
        documents: of each segment.
        space: what its vectors are comparable with.

    Raises:
        FileNotFoundError: if there is no index.
        FileError: if it is damaged, or of an unknown format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no index; `stair index` or SparseIndex.build makes one")
        self.manifest = read_manifest(path)
        while True:
            try:
                self._open()
                return
            except (KeyError, TypeError, AttributeError) as error:
                raise FileError(f"{path} is no manifest of an index: {type(error).__name__}: {error}", path) from error
            except (FileError, FileNotFoundError):
                # a writer may have removed segments since the manifest was read
                newer = read_manifest(path)
                if newer == self.manifest:
                    raise
                self.manifest = newer

    def _open(self) -> None:
        if self.manifest.get("format") != FORMAT:
            raise FileError(
                f"{self.folder} has format {self.manifest.get('format')!r}; this version reads {FORMAT}. Make it "
                "again from its embeddings with `stair index`",
                self.folder,
            )
        check(self.folder / WORDS, self.manifest["words"], content=True)
        tokens = (self.folder / WORDS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self.space = Space(self.manifest["space"]["model"], self.manifest["space"]["similarity"], tuple(tokens))
        self.segments: list[Segment] = []
        for written in self.manifest["segments"]:
            first = self.segments[-1].first + len(self.segments[-1]) if self.segments else 0
            self.segments.append(Segment(self.folder, written, first, content=self.bytes <= SMALL))
        self.documents = [segment.documents for segment in self.segments]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def bytes(self) -> int:
        """On disk."""
        files = (file for segment in self.manifest["segments"] for file in segment["files"].values())
        return int(sum(file["bytes"] for file in [*files, self.manifest["words"]]))


def build(folder: Path, parts: Iterable[Embeddings], space: Space) -> None:
    """Makes an index of some embeddings.

    Raises:
        FileExistsError: if there is one already.
        ValueError: as `change`.
    """
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} is an index already; open it and add, or choose another folder")
    with _one_writer(folder):
        segments = [written for written, _ in _written(folder, space, parts)]
        write_bytes(folder / WORDS, ("\n".join(space.tokens) + "\n").encode())
        about = {"model": space.model, "similarity": space.similarity, "vocabulary": space.vocabulary}
        manifest = {"format": FORMAT, "space": about, "words": record(folder / WORDS), "segments": segments}
        write_manifest(folder / MANIFEST, manifest)


def change(folder: Path, parts: Iterable[Embeddings] = (), delete: Iterable[str] = (), replace: bool = False) -> None:
    """Deletes and adds documents in one step, all or none of them.

    Full segments without a deleted document stay as they are. All others are written anew, joined with their neighbours.

    Args:
        folder: of the index.
        parts: what is added.
        delete: ids of documents to delete.
        replace: whether what is added replaces documents of the same id, which is refused otherwise.

    Raises:
        FileError: if another process is writing, or the index is damaged.
        SettingError: if there is no document to delete, or an id is there already or occurs twice.
        ValueError: if vectors are of another model, or no weights of documents.
    """
    with _one_writer(folder):
        store = Store(folder)
        keep = [np.ones(len(segment), np.bool_) for segment in store.segments]
        names = list(dict.fromkeys(delete))
        if missing := set(names) - set(_drop(store, keep, names)):
            name = next(name for name in names if name in missing)
            raise SettingError(f"{folder} has no document {name!r}", "delete")
        added = []
        for written, ids in _written(folder, store.space, parts):
            clash = _drop(store, keep, ids)
            if clash and not replace:
                raise SettingError(f"id {clash[0]!r} is in {folder} already; delete it first, or replace it", "ids")
            added.append(Segment(folder, written))
        pairs = [
            *zip(store.segments, keep, strict=True),
            *((segment, np.ones(len(segment), np.bool_)) for segment in added),
        ]
        segments = list(_joined(folder, pairs, len(store.space.tokens)))
        write_manifest(folder / MANIFEST, {**store.manifest, "segments": segments})


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Removes what is no part of the index when a change has ended, or failed: also what a killed writer left."""
    created = not folder.exists()
    try:
        with lock(folder / "lock", f"{folder}: another process is writing this index; try again later"):
            try:
                yield
            finally:
                _remove_unnamed(folder)
    finally:
        if created and not (folder / MANIFEST).exists():
            with suppress(OSError):
                folder.rmdir()


def _remove_unnamed(folder: Path) -> None:
    there = (folder / MANIFEST).exists()
    named = {segment["name"] for segment in read_manifest(folder / MANIFEST)["segments"]} if there else set()
    for path in folder.glob("segment-*"):
        if path.name not in named:
            remove(path)  # open maps stay readable
    if not there:
        remove(folder / WORDS)


def _drop(store: Store, keep: Sequence[NDArray[np.bool_]], names: Sequence[str]) -> list[str]:
    """Marks the documents of some ids as not kept, and returns the ids that there were."""
    dropped: list[str] = []
    wanted = pa.array([name for name in names if isinstance(name, str)], pa.large_string())
    for documents, keep_N in zip(store.documents, keep, strict=False):  # the first are those of the store
        there = pc.is_in(documents.ids, value_set=wanted).to_numpy(zero_copy_only=False) & keep_N
        keep_N &= ~there
        dropped += documents.ids.filter(pa.array(there)).to_pylist()
    return dropped


def _written(folder: Path, space: Space, parts: Iterable[Embeddings]) -> Iterator[tuple[Record, list[str]]]:
    """Writes embeddings as segments; gives each one's record and ids."""

    def rows() -> Iterator[Rows]:
        seen: set[str] = set()
        for part in parts:
            space.demand(part.space, f"vectors for {folder}")
            for name in part.ids:
                if name in seen:
                    raise SettingError(f"id {name!r} occurs twice", "ids")
                seen.add(name)
            table = to_table(part.ids, part.metadata, part.source)
            yield space.comparable(checked(part.vectors, len(space.tokens))), table

    for vectors, table in _cut(rows()):
        yield write_segment(folder, (vectors, table)), table[ID].to_pylist()


def _joined(folder: Path, pairs: Iterable[tuple[Segment, NDArray[np.bool_]]], words: int) -> Iterator[Record]:
    """Writes what is kept of segments, neighbours together; full segments of which all is kept stay."""
    for stays, group in groupby(pairs, lambda pair: bool(pair[1].all()) and len(pair[0]) == SEGMENT):
        run = list(group)
        if stays or (len(run) == 1 and run[0][1].all()):
            yield from (segment.written for segment, _ in run)
        else:
            for rows in _cut(_kept(segment.rows(words), keep_N) for segment, keep_N in run):
                yield write_segment(folder, rows)


def _kept(rows: Rows, keep_N: NDArray[np.bool_]) -> Rows:
    return rows[0][np.flatnonzero(keep_N)], rows[1].filter(pa.array(keep_N))


def _cut(parts: Iterable[Rows]) -> Iterator[Rows]:
    """Joins and cuts rows to `SEGMENT` documents; the last ones may be fewer."""
    waiting: list[Rows] = []
    for vectors, table in parts:
        start = 0
        while start < len(table):
            size = min(SEGMENT - sum(len(rows) for _, rows in waiting), len(table) - start)
            waiting.append((vectors[start : start + size], table.slice(start, size)))
            start += size
            if sum(len(rows) for _, rows in waiting) == SEGMENT:
                yield _one(waiting)
                waiting = []
    if waiting:
        yield _one(waiting)


def _one(parts: Sequence[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    tables = [table for _, table in parts]
    return sparse.vstack([rows for rows, _ in parts], format="csr"), pa.concat_tables(tables, promote_options="default")

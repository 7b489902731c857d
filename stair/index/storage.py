"""An index on disk: immutable segments, and a manifest that names them.

A segment is an Arrow file of up to `SEGMENT` documents, which is memory-mapped: the arrays of stair/index/postings.py and
the columns of stair/metadata.py, each one a list in a single row. A change writes all documents to new segments beside the
old ones, then replaces the manifest by a rename. A kill at any time leaves the old index or the new one. An open index
keeps the segments that it opened, also when they are removed.

N documents, V words.
"""

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import FileError, SettingError
from stair.files import lock, read_json, remove, removed_on_failure, sha256, sync, write_json, write_text
from stair.index.postings import Arrays, checked, invert
from stair.metadata import Documents, is_unicode, to_table
from stair.plain import plain

FORMAT = 4
MANIFEST, WORDS = "manifest.json", "vocab.txt"
SEGMENT = 1 << 18  # bounds the memory of a change
SMALL = 8 << 20  # bytes up to which opening compares all checksums: some milliseconds
_NAME = re.compile(r"segment-[0-9a-f]{12}\.arrow")
Record = dict[str, Any]
Rows = tuple[sparse.csr_matrix, pa.Table]


def record(path: Path) -> Record:
    """Waits until a new file is on disk and returns its `name`, `bytes` and `sha256`."""
    sync(path)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}


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


def write_manifest(path: Path, content: Record) -> None:
    """Replaces a manifest: from here on its segments are the index."""
    write_json(path, {**content, "sha256": _digest(content)})


def read_manifest(path: Path) -> Record:
    """Reads a manifest.

    Raises:
        FileError: if it is missing or damaged.
    """
    content = read_json(path)
    if content.pop("sha256", None) != _digest(content):
        raise FileError(f"{path} is no manifest of an index, or damaged (sha256 differs)", path)
    return content


def _digest(content: Record) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Writes arrays as columns of one row, a list each."""
    lists = [pa.LargeListArray.from_arrays([0, len(array)], array) for array in arrays.values()]
    batch = pa.RecordBatch.from_arrays(lists, list(arrays))
    with pa.ipc.new_file(str(path), batch.schema) as file:
        file.write_batch(batch)


def read_arrays(path: Path) -> dict[str, pa.Array]:
    """Maps what `write_arrays` wrote."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    return {name: batch[name].values for name in batch.schema.names}


class Segment:
    """A segment that is open.

    Args:
        folder: of the index.
        written: its record.
        first: number of its first document in the index.
        content: compare its checksum.

    Raises:
        FileError: if it is missing or damaged.
    """

    def __init__(self, folder: Path, written: Record, first: int, content: bool) -> None:
        if not _NAME.fullmatch(written["name"]):
            raise FileError(f"{folder / MANIFEST} names {written['name']!r}, which is no segment of an index", folder)
        self.first, self._written, self._path = first, written, folder / written["name"]
        check(self._path, written, content)
        try:
            arrays = read_arrays(self._path)
            table = {name: arrays.pop(name) for name in list(arrays) if ":" in name}
            self.documents = Documents(pa.RecordBatch.from_arrays(list(table.values()), list(table)))
            self.arrays: Arrays = {name: array.to_numpy() for name, array in arrays.items()}
        except (ValueError, OSError, AttributeError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def __len__(self) -> int:
        return len(self.documents)

    def _damaged(self, error: Exception) -> FileError:
        why = f"{type(error).__name__}: {plain(str(error))}"
        return FileError(f"{self._path} is no segment of an index ({why}); build the index again", self._path)

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
            FileError: if the file is not what was written, or its numbers are out of range.
        """
        check(self._path, self._written, content=True)
        try:
            vectors = self.vectors(words)
            vectors.check_format(full_check=True)
            self.documents.batch.validate(full=True)
        except Exception as error:  # whatever wrong types and lengths lead to
            raise self._damaged(error) from error
        return vectors, pa.Table.from_batches([self.documents.batch])

    def verify(self, words: int) -> None:
        """Compares the file with its checksum, and all arrays with the rows.

        A checksum shows damage by accident. Numbers that point out of their arrays, which whoever made the index might
        have written, are detected by the second.

        Raises:
            FileError: if something differs.
        """
        arrays = invert(checked(self.rows(words)[0], words))
        # the type too: another one compares as equal, and the compiled search stops at it
        if wrong := [
            n for n, a in arrays.items() if self.arrays[n].dtype != a.dtype or not np.array_equal(self.arrays[n], a)
        ]:
            raise FileError(f"{self._path}: {wrong[0]} contradicts the rest of it; build the index again", self._path)


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
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no index; `stair index` or SparseIndex.build makes one")
        self.manifest = read_manifest(path)
        while True:
            try:
                self._open(folder)
                return
            except (KeyError, TypeError, AttributeError) as error:
                raise FileError(f"{path} is no manifest of an index: {type(error).__name__}: {error}", path) from error
            except (FileError, FileNotFoundError):
                # a writer may have removed segments since the manifest was read, or since their length was
                newer = read_manifest(path)
                if newer == self.manifest:
                    raise
                self.manifest = newer

    def _open(self, folder: Path) -> None:
        if self.manifest.get("format") != FORMAT:
            raise FileError(
                f"{folder} has format {self.manifest.get('format')!r}; this version reads {FORMAT}. Make it again from "
                "its embeddings with `stair index`",
                folder,
            )
        check(folder / WORDS, self.manifest["words"], content=True)
        tokens = (folder / WORDS).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        self.space = EmbeddingSpace(
            self.manifest["space"]["model"], self.manifest["space"]["similarity"], tuple(tokens)
        )
        self.segments: list[Segment] = []
        for written in self.manifest["segments"]:
            self.segments.append(Segment(folder, written, len(self), content=self.bytes <= SMALL))
        self.documents = [segment.documents for segment in self.segments]

    def __len__(self) -> int:
        return sum(map(len, self.segments))

    @property
    def bytes(self) -> int:
        """On disk."""
        return int(sum(file["bytes"] for file in [*self.manifest["segments"], self.manifest["words"]]))

    def present(self, names: Iterable[str]) -> set[str]:
        """Those of some ids that its documents have."""
        wanted = pa.array([name for name in names if isinstance(name, str) and is_unicode(name)], pa.large_string())
        ids = (documents.ids for documents in self.documents)
        return {name for each in ids for name in each.filter(pc.is_in(each, value_set=wanted)).to_pylist()}


def build(folder: Path, parts: Iterable[Embeddings], space: EmbeddingSpace) -> None:
    """Makes an index of some embeddings.

    Raises:
        FileExistsError: if there is one already.
        ValueError: as `change`.
    """
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} is an index already; open it and add, or choose another folder")
    with _one_writer(folder):
        segments = _write(folder, _new_rows(folder, space, parts, {}))
        write_text(folder / WORDS, "\n".join(space.tokens) + "\n")
        about = {"model": space.model, "similarity": space.similarity, "vocabulary": space.vocabulary}
        manifest = {"format": FORMAT, "space": about, "words": record(folder / WORDS), "segments": segments}
        write_manifest(folder / MANIFEST, manifest)


def change(folder: Path, parts: Iterable[Embeddings] = (), delete: Iterable[str] = (), replace: bool = False) -> None:
    """Deletes and adds documents in one step, all or none of them.

    Args:
        folder: of the index.
        parts: what is added.
        delete: ids of documents to delete.
        replace: whether what is added replaces documents of the same id, which is an error otherwise.

    Raises:
        FileError: if another process is writing, or the index is damaged.
        SettingError: if there is no document to delete, or an id is there already or occurs twice.
        ValueError: if vectors are of another model, or no weights of documents.
    """
    with _one_writer(folder):
        store, gone, ids = Store(folder), dict.fromkeys(delete), dict[str, None]()
        if missing := gone.keys() - store.present(gone):
            name = next(name for name in gone if name in missing)
            raise SettingError(f"{folder} has no document {name!r}", "delete")
        added = _write(folder, _new_rows(folder, store.space, parts, ids))
        clash = store.present(ids) - gone.keys()
        if clash and not replace:
            name = next(name for name in ids if name in clash)
            raise SettingError(f"id {name!r} is in {folder} already; delete it first, or replace it", "ids")
        kept = _write(folder, _kept_rows(store, [*gone, *clash]))
        write_manifest(folder / MANIFEST, {**store.manifest, "segments": [*kept, *added]})


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
    exists = (folder / MANIFEST).exists()
    named = {segment["name"] for segment in read_manifest(folder / MANIFEST)["segments"]} if exists else set()
    for path in folder.glob("segment-*"):
        if path.name not in named:
            remove(path)  # open maps stay readable
    if not exists:
        remove(folder / WORDS)


def _new_rows(folder: Path, space: EmbeddingSpace, parts: Iterable[Embeddings], ids: dict[str, None]) -> Iterator[Rows]:
    """Rows of embeddings, checked; `ids` grows by theirs."""
    for part in parts:
        space.demand(part.space, f"vectors for {folder}")
        for name in part.ids:
            if name in ids:
                raise SettingError(f"id {name!r} occurs twice", "ids")
            ids[name] = None
        table = to_table(part.ids, part.metadata, part.source)
        yield space.comparable(checked(part.vectors, len(space.tokens))), table


def _kept_rows(store: Store, gone: list[str]) -> Iterator[Rows]:
    for segment in store.segments:
        vectors, table = segment.rows(len(store.space.tokens))
        keep = pc.invert(pc.is_in(segment.documents.ids, value_set=pa.array(gone, pa.large_string())))
        yield vectors[keep.to_numpy(zero_copy_only=False)], table.filter(keep)


def _write(folder: Path, parts: Iterable[Rows]) -> list[Record]:
    """Writes rows as segments of `SEGMENT` documents; the last one may have fewer."""
    written: list[Record] = []
    waiting: list[Rows] = []
    for vectors, table in parts:
        for start in range(0, len(table), SEGMENT):
            waiting.append((vectors[start : start + SEGMENT], table.slice(start, SEGMENT)))
            if sum(len(rows) for _, rows in waiting) >= SEGMENT:
                vectors_N, table_N = _joined(waiting)
                written.append(_write_segment(folder, vectors_N[:SEGMENT], table_N.slice(0, SEGMENT)))
                waiting = [(vectors_N[SEGMENT:], table_N.slice(SEGMENT))] if len(table_N) > SEGMENT else []
    return [*written, _write_segment(folder, *_joined(waiting))] if waiting else written


def _joined(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    tables = [table for _, table in parts]
    return sparse.vstack([rows for rows, _ in parts], format="csr"), pa.concat_tables(tables, promote_options="default")


def _write_segment(folder: Path, vectors: sparse.csr_matrix, table: pa.Table) -> Record:
    path = folder / f"segment-{secrets.token_hex(6)}.arrow"
    with removed_on_failure(folder, path):
        columns = zip(table.column_names, (column.combine_chunks() for column in table.columns), strict=True)
        write_arrays(path, {**{name: pa.array(array) for name, array in invert(vectors).items()}, **dict(columns)})
        written = record(path)
        sync(folder)
    return written

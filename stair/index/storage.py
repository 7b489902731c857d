"""An index on disk: a folder with one immutable Arrow file, which is memory-mapped.

A record batch is a segment: the arrays of stair/index/postings.py, a list each in a single row, `order`, and `table`, an
Arrow stream with the table of stair/index/metadata.py. Segments of a lower order come first. The schema states format,
model, similarity and tokens. The last 32 bytes are the sha256 of all others. A change writes a new file beside the old one
and renames it: a kill leaves one of the two, and an open index keeps the file that it opened.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import FileError, SettingError
from stair.files import atomic_write, lock, sha256
from stair.index.metadata import Documents, to_table
from stair.index.postings import canonical, frequency, invert
from stair.plain import plain

FILE, FORMAT = "index.arrow", "stair-index-5"
SEGMENT = 1 << 18  # documents, at least, of all segments but the last; bounds the memory of a change
SMALL = 8 << 20  # bytes up to which opening compares the checksum: some milliseconds
_DIGEST = 32
Rows = tuple[sparse.csr_matrix, pa.Table]


class State:
    """An index file that is open; FileNotFoundError if there is none, FileError if it is damaged or of another format.

    `segments`: arrays of each, in the order of addition; `first`: number of each one's first document, and of all.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        if not self.path.is_file():
            raise FileNotFoundError(f"{folder} is not an index; `stair index` or SparseIndex.build makes one")
        with self._damage():
            self._data = pa.memory_map(str(self.path)).read_buffer()
            self.size = self._data.size
            if self.size <= SMALL:
                self.check_digest()
            file = pa.ipc.open_file(self._data.slice(0, self.size - _DIGEST))
            about = {key.decode(): value.decode() for key, value in file.schema.metadata.items()}
            if about["format"] != FORMAT:
                versions = f"format {about['format']!r}; this version reads {FORMAT!r}"
                raise FileError(f"{self.path} has {versions}. Build it again with `stair index`", self.path)
            self.space = EmbeddingSpace(about["model"], about["similarity"], tuple(about["tokens"].split("\n")))
            batches = [file.get_batch(n) for n in range(file.num_record_batches)]
            self.segments = [{name: batch[name].values.to_numpy() for name in batch.schema.names} for batch in batches]
            self.segments.sort(key=lambda arrays: int(arrays["order"][0]))
            tables = [pa.ipc.open_stream(pa.py_buffer(arrays["table"])).read_all() for arrays in self.segments]
            self.documents = Documents(pa.concat_tables(tables, promote_options="default"))
            self.first = [0, *accumulate(map(len, tables))]
            if [len(arrays["row_start"]) - 1 for arrays in self.segments] != [len(table) for table in tables]:
                raise ValueError("vectors and metadata are of different lengths")

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except Exception as error:  # whatever wrong types and lengths lead to
            why = f"{type(error).__name__}: {plain(str(error))}"
            raise FileError(f"{self.path} is damaged ({why}); build the index again", self.path) from error

    def check_digest(self) -> None:
        """Compares the file with its checksum; FileError if it differs."""
        at = max(0, self.size - _DIGEST)
        if hashlib.sha256(self._data.slice(0, at)).digest() != self._data.slice(at).to_pybytes():
            raise FileError(f"{self.path} is not what was written (sha256 differs); build the index again", self.path)

    def verify(self, postings: bool = True) -> None:
        """Reads everything: the checksum, the metadata, the rows, and that the postings agree; FileError if not.

        A checksum shows damage by accident; the rest, numbers that point out of their arrays, whoever wrote them.
        """
        self.check_digest()
        with self._damage():
            self.documents.table.validate(full=True)
            for segment, arrays in enumerate(self.segments):
                vectors = self.vectors(segment)
                vectors.check_format(full_check=True)
                for name, array in invert(canonical(vectors, len(self.space.tokens))).items() if postings else ():
                    # the type too: another one compares as equal, and the compiled search stops at it
                    if arrays[name].dtype != array.dtype or not np.array_equal(arrays[name], array):
                        raise ValueError(f"array {name} of segment {segment} contradicts the rows")

    def row(self, number: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Terms, ascending, and weights of a document."""
        segment = bisect_right(self.first, number) - 1
        arrays, n = self.segments[segment], number - self.first[segment]
        row = slice(arrays["row_start"][n], arrays["row_start"][n + 1])
        return arrays["row_terms"][row].astype(np.int64), arrays["row_weights"][row]

    def frequency(self, terms: Sequence[int] | NDArray[Any]) -> NDArray[Any]:
        """How many documents have each of some terms."""
        counts: NDArray[Any] = np.sum([frequency(each, np.asarray(terms, np.int64)) for each in self.segments], axis=0)
        return counts

    def vectors(self, segment: int) -> sparse.csr_matrix:
        """The rows of a segment, ready for the dot product."""
        arrays = self.segments[segment]
        parts = arrays["row_weights"], arrays["row_terms"].astype(np.int32), arrays["row_start"]
        return sparse.csr_matrix(parts, shape=(len(arrays["row_start"]) - 1, len(self.space.tokens)))

    def without(self, names: Sequence[Any]) -> Iterator[Rows]:
        """Rows of all documents but some."""
        keep = pc.invert(self.documents.has(names))
        for segment, (start, end) in enumerate(pairwise(self.first)):
            keep_N, table = keep.slice(start, end - start), self.documents.table.slice(start, end - start)
            yield self.vectors(segment)[keep_N.to_numpy()], table.filter(keep_N)


def write_index(
    folder: Path,
    parts: Iterable[Embeddings] = (),
    delete: Iterable[str] = (),
    replace: bool = False,
    space: EmbeddingSpace | None = None,
) -> None:
    """Deletes and adds documents in one step, all or none of them; with the `space` of a new index, builds it.

    Raises:
        FileExistsError: if there is an index already, and a space is given.
        FileError: if another process is writing, or the index is damaged.
        SettingError: if an id or a vector cannot be used.
    """
    created = not folder.exists()
    try:
        with lock(folder / "lock", f"{folder}: another process is writing this index; try again later"):
            old = None
            if space is not None and (folder / FILE).exists():
                raise FileExistsError(f"{folder} is an index already; open it and add, or choose another folder")
            if space is None:
                old = State(folder)
                old.verify(postings=False)  # damage would get a matching checksum in the new file
                space = old.space
            _write(folder / FILE, space, _changed(folder, old, space, parts, list(delete), replace))
    finally:
        if created:
            with suppress(OSError):  # not empty if all went well
                folder.rmdir()


def _changed(
    folder: Path,
    old: State | None,
    space: EmbeddingSpace,
    parts: Iterable[Embeddings],
    delete: list[str],
    replace: bool,
) -> Iterator[tuple[int, Rows]]:
    """Order and rows of each segment. Old rows come last in the file: what replaces them is known only then."""
    documents = old.documents if old is not None else Documents(to_table([]))
    ids = dict[str, None]()
    if missing := set(delete) - documents.present(delete):
        name = next(name for name in delete if name in missing)
        raise SettingError(f"{folder} has no document {name!r}", "delete")
    yield from ((1, rows) for rows in _segments(_new_rows(folder, space, parts, ids)))
    clash = documents.present(ids) - set(delete)
    if clash and not replace:
        name = next(name for name in ids if name in clash)
        raise SettingError(f"id {name!r} is in {folder} already; add --replace, or delete it with --delete ID", "ids")
    if old is not None:
        yield from ((0, rows) for rows in _segments(old.without([*delete, *clash])))


def _new_rows(folder: Path, space: EmbeddingSpace, parts: Iterable[Embeddings], ids: dict[str, None]) -> Iterator[Rows]:
    """Rows of embeddings, checked; `ids` grows by theirs."""
    for part in parts:
        space.check_same(part.space, f"vectors for {folder}")
        for name in part.ids:
            if name in ids:
                raise SettingError(f"id {name!r} occurs twice", "ids")
            ids[name] = None
        table = to_table(part.ids, part.metadata, part.source)
        yield space.comparable(canonical(part.vectors, len(space.tokens))), table


def _segments(parts: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows, as segments."""
    waiting: list[Rows] = []
    for vectors, table in parts:
        for start in range(0, max(1, len(table)), SEGMENT):
            waiting.append((vectors[start : start + SEGMENT], table.slice(start, SEGMENT)))
            if sum(len(rows) for _, rows in waiting) >= SEGMENT:
                yield _joined(waiting)
                waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Rows]) -> Rows:
    vectors, tables = zip(*parts, strict=True)
    return sparse.vstack(vectors, format="csr"), pa.concat_tables(tables, promote_options="default")


def _write(path: Path, space: EmbeddingSpace, segments: Iterator[tuple[int, Rows]]) -> None:
    about = {"format": FORMAT, "model": space.model, "similarity": space.similarity, "tokens": "\n".join(space.tokens)}
    with atomic_write(path) as part:
        batches = (_batch(order, *rows) for order, rows in segments)
        first = next(batches)  # there is always one
        with pa.ipc.new_file(str(part), first.schema.with_metadata(about)) as file:
            for batch in chain([first], batches):
                file.write_batch(batch)
        with part.open("ab") as end:
            end.write(bytes.fromhex(sha256(part)))


def _batch(order: int, vectors: sparse.csr_matrix, table: pa.Table) -> pa.RecordBatch:
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    arrays = {"order": np.array([order]), **invert(vectors), "table": np.frombuffer(stream.getvalue(), np.uint8)}
    lists = [pa.LargeListArray.from_arrays([0, len(array)], pa.array(array)) for array in arrays.values()]
    return pa.RecordBatch.from_arrays(lists, list(arrays))

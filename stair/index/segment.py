"""A segment: some documents, written once, never changed; which of them are deleted is a file of its own.

All arrays are memory-mapped: opening reads a few headers, whatever the size.

N documents.
"""

import hashlib
import re
import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stair.files import sync
from stair.index.columns import Columns, Condition, Texts, texts_to_arrays, write_columns
from stair.index.files import Record, check, write_array
from stair.index.postings import Arrays, checked, invert
from stair.plain import plain

_NAME = re.compile(r"segment-[0-9a-f]+/[a-z]+[a-z0-9_]*(-[0-9a-f]+)?\.npy")


def write_segment(
    folder: Path, vectors: sparse.csr_matrix, ids: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Record:
    """Writes a segment beside the others; it counts once a manifest names it.

    Args:
        folder: of the index.
        vectors: (N, V), as `checked` returns it, comparable.
        ids: N strings.
        metadata: N dictionaries, or none at all.

    Returns:
        What the manifest keeps of it.
    """
    schema, columns = write_columns(metadata)
    arrays = {**invert(vectors), **texts_to_arrays("id", ids), **_lookup(ids), **columns}
    name = f"segment-{secrets.token_hex(6)}"
    (folder / name).mkdir()
    files = {f"{name}/{key}.npy": write_array(folder / name / f"{key}.npy", array) for key, array in arrays.items()}
    sync(folder / name)
    sync(folder)
    return {"name": name, "documents": len(ids), "columns": schema, "files": files, "deleted": None}


def write_deleted(folder: Path, segment: Record, deleted_N: NDArray[np.bool_]) -> Record:
    """Writes which documents of a segment are deleted, and returns what the manifest keeps of the segment now."""
    path = Path(segment["name"]) / f"deleted-{secrets.token_hex(6)}.npy"
    record = write_array(folder / path, deleted_N)
    sync(folder / segment["name"])
    return {**segment, "deleted": {"file": str(path), "count": int(deleted_N.sum()), **record}}


def records_of(segment: Record) -> dict[str, Record]:
    """All files of a segment, by path within the index."""
    deleted = segment["deleted"]
    return {**segment["files"], **({deleted["file"]: deleted} if deleted else {})}


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class Segment:
    """A segment that lies on disk.

    Args:
        folder: of the index.
        record: what `write_segment` returned.
        first: number of its first document in the index.

    Raises:
        ValueError: if a file is missing or has another length.
    """

    def __init__(self, folder: Path, record: Record, first: int) -> None:
        for path, file in records_of(record).items():
            if not _NAME.fullmatch(path):
                raise ValueError(f"{folder}: its manifest names {path!r}, which is no file of an index")
            check(folder / path, file, content=False)
        self._folder = folder
        self.record, self.first = record, first
        self.arrays: Arrays = {Path(path).stem: _mapped(folder / path) for path in record["files"]}
        deleted = record["deleted"]
        self.deleted: NDArray[np.bool_] = _mapped(folder / deleted["file"]) if deleted else np.zeros(0, np.bool_)
        self.ids = Texts(self.arrays["id_start"], self.arrays["id_text"])

    def __len__(self) -> int:
        return int(self.record["documents"])

    @property
    def alive(self) -> int:
        """Documents that are not deleted."""
        return len(self) - int((self.record["deleted"] or {"count": 0})["count"])

    @cached_property
    def columns(self) -> Columns:
        """The metadata."""
        return Columns(self.record["columns"], self.arrays)

    def row(self, document: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The words, ascending, and the weights of a document."""
        row = slice(self.arrays["row_start"][document], self.arrays["row_start"][document + 1])
        return self.arrays["row_words"][row].astype(np.int64), self.arrays["row_weights"][row]

    def find(self, name: str) -> int | None:
        """The document of an id; None if there is none, or it is deleted."""
        wanted = np.uint64(_hash(name))
        place = int(np.searchsorted(self.arrays["id_hash"], wanted))
        while place < len(self) and self.arrays["id_hash"][place] == wanted:
            document = int(self.arrays["id_order"][place])
            if self.ids[document] == name and not (len(self.deleted) and self.deleted[document]):
                return document
            place += 1
        return None

    def allowed(self, conditions: Sequence[Condition]) -> NDArray[np.bool_]:
        """(N,) bool, which documents may be found; empty where all may."""
        if not conditions and not len(self.deleted):
            return np.zeros(0, np.bool_)
        allowed_N = ~self.deleted if len(self.deleted) else np.ones(len(self), np.bool_)
        for condition in conditions:
            allowed_N &= self.columns.matching(condition, len(self))
        return allowed_N

    def content(self, words: int) -> tuple[sparse.csr_matrix, list[str], list[dict[str, Any]]]:
        """Vectors (comparable), ids and metadata of all that is not deleted, in order."""
        parts = self.arrays["row_weights"], self.arrays["row_words"].astype(np.int32), self.arrays["row_start"]
        vectors = sparse.csr_matrix(parts, shape=(len(self), words))
        if len(self.deleted):
            vectors = vectors[np.flatnonzero(~self.deleted)]
        keep = [d for d in range(len(self)) if not (len(self.deleted) and self.deleted[d])]
        return vectors, [self.ids[d] for d in keep], [self.columns.row(d) for d in keep] if self.columns.keys else []

    def verify(self, words: int) -> None:
        """Compares every file with its checksum, and all that is derived from rows and ids with these.

        A checksum shows damage by accident. Numbers that point out of their arrays, which whoever made the index might have
        put there, are found by the second.

        Raises:
            ValueError: naming what differs.
        """
        for path, record in records_of(self.record).items():
            check(self._folder / path, record, content=True)
        where = self._folder / self.record["name"]
        try:
            wrong = self._contradiction(words)
        except Exception as error:  # whatever wrong types and lengths lead to
            raise ValueError(f"{where} is no segment of an index: {type(error).__name__}: {error}") from error
        if wrong:
            raise ValueError(f"{where}: {wrong} contradicts the rest of it; build the index again")

    def _contradiction(self, words: int) -> str | None:
        parts = self.arrays["row_weights"], self.arrays["row_words"].astype(np.int64), self.arrays["row_start"]
        vectors = sparse.csr_matrix(parts, shape=(len(self), words))
        vectors.check_format(full_check=True)
        for name, texts in self._texts():
            if not (np.diff(texts) >= 0).all() or texts[0] != 0 or texts[-1] != len(self.arrays[f"{name}_text"]):
                return f"{name}_start"
        ids = [self.ids[document] for document in range(len(self))]
        wanted = {**invert(checked(vectors, words)), **_lookup(ids), **texts_to_arrays("id", ids)}
        if odd := [name for name, array in wanted.items() if not _same(self.arrays[name], array)]:
            return odd[0]
        deleted = self.record["deleted"]
        if deleted and not (
            self.deleted.dtype == np.bool_
            and self.deleted.shape == (len(self),)
            and self.deleted.sum() == deleted["count"]
        ):
            return "the list of deleted documents"
        return next((column["key"] for column in self.record["columns"] if self._column_is_wrong(column)), None)

    def _texts(self) -> Iterator[tuple[str, NDArray[Any]]]:
        names = [key.removesuffix("_text") for key in self.arrays if key.endswith("_text")]
        return ((name, self.arrays[f"{name}_start"]) for name in names)

    def _column_is_wrong(self, column: dict[str, str]) -> bool:
        if column["kind"] == "number":
            return len(self.arrays[column["name"] + "_number"]) != len(self)
        codes, start = (self.arrays[f"{column['name']}_{part}"] for part in ("code", "start"))
        return len(codes) != len(self) or bool((codes < -1).any() or (codes >= len(start) - 1).any())


def _same(array: NDArray[Any], wanted: NDArray[Any]) -> bool:
    # the type too: another one compares as equal, and the compiled search stops at it
    return array.dtype == wanted.dtype and np.array_equal(array, wanted)


def _lookup(ids: Sequence[str]) -> dict[str, NDArray[Any]]:
    hash_N = np.array([_hash(name) for name in ids], np.uint64)
    order_N = np.argsort(hash_N, kind="stable")
    return {"id_hash": hash_N[order_N], "id_order": order_N.astype(np.uint32)}


def _mapped(path: Path) -> NDArray[Any]:
    try:
        # asarray: a plain array over the map, for which numba compiles one form only
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, SyntaxError, TokenError, EOFError) as error:  # of a damaged header, which numpy reads as Python
        raise ValueError(f"{path} is no array ({plain(str(error))}): the index is damaged, build it again") from error

"""Changes of an index: add, delete, merge. Each is one new manifest, so that a kill leaves the old state or the new."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from scipy import sparse

from stair.embeddings import Embeddings, Space
from stair.index.columns import SOURCE
from stair.index.files import Record, one_writer, read_manifest, write_bytes, write_manifest
from stair.index.postings import checked
from stair.index.segment import Segment, records_of, write_deleted, write_segment
from stair.index.store import FORMAT, MANIFEST, WORDS, Store

#: documents a segment holds at most: bounds the memory that building takes
SEGMENT = 1 << 18


def create(folder: Path, parts: Iterable[Embeddings], space: Space) -> None:
    """Makes an index of some embeddings.

    Raises:
        FileExistsError: if there is one already.
        ValueError: as `Writer.add`.
    """
    if (folder / MANIFEST).exists():
        raise FileExistsError(f"{folder} holds an index already; open it and add, or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    with one_writer(folder):
        _remove_unnamed(folder, [])
        try:
            segments = [record for record, _ in _write_parts(folder, space, parts)]
        except BaseException:
            _remove_unnamed(folder, [])
            raise
        words = write_bytes(folder / WORDS, ("\n".join(space.tokens) + "\n").encode())
        about = {"model": space.model, "similarity": space.similarity, "vocabulary": space.vocabulary}
        write_manifest(folder / MANIFEST, {"format": FORMAT, "space": about, "words": words, "segments": segments})


class Writer:
    """The one writer of an index, for as long as a `with` lasts; begins from what is on disk.

    Args:
        folder: of the index.

    Raises:
        ValueError: if another process is writing it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._lock = folder, one_writer(folder)

    def __enter__(self) -> "Writer":
        self._lock.__enter__()
        self.store = Store(self.folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # what this change replaced, or an earlier writer left when it was killed; open maps stay readable
            _remove_unnamed(self.folder, read_manifest(self.folder / MANIFEST)["segments"])
        finally:
            self._lock.__exit__(kind, error, trace)

    def change(self, parts: Iterable[Embeddings] = (), delete: Iterable[str] = (), replace: bool = False) -> None:
        """Deletes and adds documents in one step, all or nothing; `compact` frees the space of the deleted.

        Args:
            parts: what is added.
            delete: ids of documents that go.
            replace: whether what is added takes the place of documents of the same id; refused otherwise.

        Raises:
            ValueError: if there is no document to delete, an id is there already or occurs twice, or the vectors are of
                another model.
        """
        gone = {name: self.store.document(name) for name in delete}
        added = []
        for record, ids in _write_parts(self.folder, self.store.space, parts):
            for name in ids:
                if name in gone or (found := self.store.find(name)) is None:
                    continue
                if not replace:
                    raise ValueError(f"id {name!r} is in {self.folder} already; delete it first, or replace it")
                gone[name] = found
            added.append(record)
        places: dict[str, list[int]] = {}
        for segment, document in gone.values():
            places.setdefault(segment.record["name"], []).append(document)
        self._commit([*(self._without(segment, places) for segment in self.store.segments), *added])

    def _without(self, segment: Segment, places: Mapping[str, list[int]]) -> Record:
        if segment.record["name"] not in places:
            return segment.record
        deleted_N = np.array(segment.deleted) if len(segment.deleted) else np.zeros(len(segment), np.bool_)
        deleted_N[places[segment.record["name"]]] = True
        return write_deleted(self.folder, segment.record, deleted_N)

    def compact(self) -> None:
        """Merges small segments and leaves deleted documents out; ids, scores and order stay."""
        records: list[Record] = []
        merging: list[Segment] = []
        for segment in self.store.segments:
            whole = segment.alive == len(segment) and len(segment) > SEGMENT // 2
            if whole or sum(s.alive for s in merging) + segment.alive > SEGMENT:
                records += self._merged(merging)
                merging = []
            if whole:
                records.append(segment.record)
            else:
                merging.append(segment)
        self._commit(records + self._merged(merging))

    def _merged(self, segments: Sequence[Segment]) -> list[Record]:
        if not sum(segment.alive for segment in segments):
            return []
        if len(segments) == 1 and segments[0].alive == len(segments[0]):
            return [segments[0].record]
        for segment in segments:
            segment.verify(len(self.store.space.tokens))  # a merge would give damage a good checksum
        parts = [segment.content(len(self.store.space.tokens)) for segment in segments]
        rows = sparse.vstack([vectors for vectors, _, _ in parts], format="csr")
        metadata = [row for _, ids, some in parts for row in some or [{}] * len(ids)]
        return [write_segment(self.folder, rows, [name for _, ids, _ in parts for name in ids], metadata)]

    def _commit(self, segments: Sequence[Record]) -> None:
        write_manifest(self.folder / MANIFEST, {**self.store.manifest, "segments": list(segments)})


def _write_parts(folder: Path, space: Space, parts: Iterable[Embeddings]) -> Iterator[tuple[Record, Sequence[str]]]:
    """Writes segments; gives each one's record and the ids in it."""
    seen: set[str] = set()
    for part in parts:
        space.demand(part.space, f"vectors for {folder}")
        for name in part.ids:
            if name in seen:
                raise ValueError(f"id {name!r} occurs twice")
            seen.add(name)
        rows = space.comparable(checked(part.vectors, len(space.tokens)))
        for i in range(0, len(part), SEGMENT):
            piece: Any = slice(i, i + SEGMENT)
            yield write_segment(folder, rows[piece], part.ids[piece], _records(part)[piece]), part.ids[piece]


def _records(part: Embeddings) -> list[dict[str, Any]]:
    """What the columns hold of each document: the user's metadata, and its source under keys of their own."""
    none: list[dict[str, Any]] = [{}] * len(part)
    pairs = zip(part.metadata or none, part.source or none, strict=True)
    return [{**metadata, **{f"{SOURCE}{key}": value for key, value in source.items()}} for metadata, source in pairs]


def _remove_unnamed(folder: Path, segments: Sequence[Record]) -> None:
    named = {path for segment in segments for path in records_of(segment)}
    for path in folder.glob("segment-*"):
        if path.name not in {segment["name"] for segment in segments}:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("segment-*/deleted-*.npy"):
        if str(path.relative_to(folder)) not in named:
            path.unlink(missing_ok=True)

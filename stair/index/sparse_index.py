"""`SparseIndex`: exact search of sparse embeddings, on disk, memory-mapped.

    index = SparseIndex.build("birds.index", model.encode(images=pictures), ids=names, model=model)
    for hit in index.search("red bicycle", k=10):
        print(hit.id, hit.score, hit.words[:3])

A folder with a manifest, the words, and segments (stair/index/segment.py). Additions write a new segment, deletions a new
list of the deleted, `compact` merges; then the manifest is replaced, so that whoever opens the folder sees all of a change
or nothing of it. An index that is open keeps what it opened until it makes a change itself.

N documents, V words.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from stair.embeddings import Embeddings, Space, to_csr
from stair.index.columns import Condition, conditions, split_record
from stair.index.hits import Hit
from stair.index.query import parse_words, weights_query, words_query
from stair.index.scoring import Best, Query, search_segment
from stair.index.store import WORDS, Store
from stair.index.writing import Writer, create

if TYPE_CHECKING:
    from stair.model import Stair


class SparseIndex:
    """An index that is open.

    Args:
        folder: of the index.
        model: encodes texts and images of queries; must be the model of the documents.

    Attributes:
        folder: the same.

    Raises:
        FileNotFoundError: if there is no index.
        ValueError: if it is damaged, or of another model.
    """

    def __init__(self, folder: str | Path, model: "Stair | None" = None) -> None:
        self.folder = Path(folder)
        self._store = Store(self.folder)
        self._model: Stair | None = None
        if model is not None:
            self.use(model)

    @classmethod
    def open(cls, folder: str | Path, model: "Stair | None" = None) -> "SparseIndex":
        """Opens an index, at once whatever its size. See the class."""
        return cls(folder, model)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        vectors: Any,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] = (),
        model: "Stair | None" = None,
    ) -> "SparseIndex":
        """Makes a new index.

        Args:
            folder: where; must not hold an index yet.
            vectors: (N, V) CSR as `Stair.encode` returns it; or `Embeddings`, which bring ids and metadata along, or an
                iterable of them.
            ids: N strings, all different; `0`, `1`, … where left out.
            metadata: N dictionaries of plain values, for filters and to come back with hits.
            model: the model of the vectors; may be left out for `Embeddings`.

        Raises:
            FileExistsError: if there is an index already.
            ValueError: if parts do not fit together.
        """
        parts = iter(_parts(vectors, ids, metadata, model.space if model is not None else None))
        first = next(parts, None)
        if first is None:
            raise ValueError("no embeddings to build an index of")
        create(Path(folder), _chain(first, parts), first.space)
        return cls(folder, model)

    def use(self, model: "Stair") -> None:
        """Takes a model to encode texts and images of queries.

        Raises:
            ValueError: if the documents are of another model.
        """
        self.space.demand(model.space, f"model for {self.folder}")
        self._model = model

    # ------------------------------------------------------------------ reading

    @property
    def space(self) -> Space:
        """What its vectors are comparable with."""
        return self._store.space

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, name: str) -> bool:
        return self._store.find(name) is not None

    @property
    def ids(self) -> Iterator[str]:
        """The ids of all documents, in the order of addition."""
        for segment in self._store.segments:
            for document, name in enumerate(segment.ids):
                if not (len(segment.deleted) and segment.deleted[document]):
                    yield name

    @property
    def keys(self) -> list[str]:
        """The metadata keys that some document has."""
        return sorted({key for segment in self._store.segments for key in segment.columns.keys})

    @property
    def facts(self) -> dict[str, Any]:
        """Size and make: documents, deleted ones, segments, non-zeros, bytes on disk, model, similarity."""
        return self._store.facts

    def verify(self) -> None:
        """Reads every file and compares its checksum. Opening compares lengths only.

        Raises:
            ValueError: naming the first that differs.
        """
        self._store.verify()

    def vector(self, name: str) -> dict[str, float]:
        """The words of a document, heaviest first; scaled to length 1 where the similarity is cosine.

        Raises:
            ValueError: if there is no such document.
        """
        segment, document = self._store.document(name)
        words, weights = segment.row(document)
        return {self.space.tokens[words[i]]: float(weights[i]) for i in np.argsort(-weights, kind="stable")}

    def metadata(self, name: str) -> dict[str, Any]:
        """What was added with a document.

        Raises:
            ValueError: if there is no such document.
        """
        segment, document = self._store.document(name)
        return split_record(segment.columns.row(document))[0]

    def source(self, name: str) -> dict[str, Any]:
        """Where a document came from, as `Embeddings.source`.

        Raises:
            ValueError: if there is no such document.
        """
        segment, document = self._store.document(name)
        return split_record(segment.columns.row(document))[1]

    def content(self) -> Iterator[Embeddings]:
        """All documents, segment by segment, vectors as they are compared."""
        for segment in self._store.segments:
            vectors, ids, records = segment.content(len(self.space.tokens))
            pairs = [split_record(record) for record in records]
            metadata, source = ([pair[n] for pair in pairs] for n in (0, 1))
            yield Embeddings(vectors, ids, self.space, metadata, source)

    # ---------------------------------------------------------------- searching

    def search(
        self,
        query: Any = None,
        k: int = 10,
        *,
        words: str | Mapping[str, float] | None = None,
        like: str | None = None,
        where: str | Sequence[str] = (),
    ) -> list[Hit]:
        """The k documents of highest dot product with a query, exactly.

        Args:
            query: a text or a picture (PIL), which the index's model encodes; or a vector: one row of CSR, a tensor or
                array of V weights, as the model gave it.
            k: how many at most. Only documents of a score above 0 are hits.
            words: weighted words, such as `dog:2 beach -people`, or weights by word.
            like: id of a document whose vector is the query; it is left out of the hits.
            where: conditions on metadata that all must hold: one text such as `split=test and year>=2010`, or a list
                with a text for each. A value with ` and ` in it stands between double quotes.

        Returns:
            Hits, best first; equal scores in the order of addition.

        Raises:
            ValueError: if not exactly one of query, words and like is given, or it cannot be read.
        """
        if k < 1:
            raise ValueError(f"k is {k}; give a number of hits from 1 up")
        encoded = self.query(query, words=words, like=like)
        hits = self.top(encoded, k + (like is not None), where)
        return [hit for hit in hits if hit.id != like][:k]

    def query(
        self, query: Any = None, *, words: str | Mapping[str, float] | None = None, like: str | None = None
    ) -> Query:
        """What `search` looks for: words and weights, ready for the dot product. Arguments and errors as there."""
        if sum(value is not None for value in (query, words, like)) != 1:
            raise ValueError("give one of: a query, words, or the id of a document to search like")
        if like is not None:
            segment, document = self._store.document(like)
            return Query(*segment.row(document), len(self.space.tokens))
        if words is not None:
            return words_query(parse_words(words) if isinstance(words, str) else words, self.space, self._pieces)
        row = self._row(query)
        return weights_query(row.indices, row.data, self.space)

    def top(self, query: Query, k: int, where: str | Sequence[str] = ()) -> list[Hit]:
        """As `search`, for a query that is ready."""
        wanted = self._conditions(where)
        best, dense_V = Best(max(1, min(k, len(self)))), query.dense()
        for segment in self._store.segments:
            search_segment(segment.arrays, query, dense_V, segment.allowed(wanted), segment.first, best)
        count = int(best.count[0])
        found = zip(best.documents[:count].tolist(), best.scores[:count].tolist(), strict=True)
        return [self._hit(document, score, query) for document, score in found]

    def _hit(self, number: int, score: float, query: Query) -> Hit:
        segment = next(s for s in reversed(self._store.segments) if s.first <= number)
        document = number - segment.first
        return Hit(segment.ids[document], score, segment, document, query, self.space.tokens)

    def _conditions(self, where: str | Sequence[str]) -> list[Condition]:
        wanted = conditions(where)
        if unknown := sorted({condition.key for condition in wanted} - set(self.keys if wanted else ())):
            raise ValueError(f"filter on {unknown}: no document has it; known are {self.keys}")
        return wanted

    def _row(self, query: Any) -> sparse.csr_matrix:
        from PIL.Image import Image
        from torch import Tensor

        if isinstance(query, (str, Image)):
            if self._model is None:
                raise ValueError(
                    "a text or a picture needs the model to encode it: SparseIndex.open(folder, model=...); "
                    "weighted words need none: search(words='dog:2 beach')"
                )
            row = self._model.encode(texts=[query]) if isinstance(query, str) else self._model.encode(images=[query])
        elif isinstance(query, Tensor):
            row = to_csr(query.to_dense().reshape(1, -1), threshold=-math.inf)
        elif sparse.issparse(query) or isinstance(query, np.ndarray):
            row = sparse.csr_matrix(query, dtype=np.float32, copy=True)
        else:
            raise ValueError(
                f"query is a {type(query).__name__}; give a text, a picture (PIL.Image.open(path)), or one row of weights"
            )
        if row.shape != (1, len(self.space.tokens)):
            raise ValueError(f"query of shape {row.shape}; wanted one row of {len(self.space.tokens)} words")
        if not np.isfinite(row.data).all():
            raise ValueError("a weight of the query is not finite")
        row.sum_duplicates()
        return row

    def _pieces(self, word: str) -> list[int]:
        vocabulary = self._model.vocabulary if self._model is not None else self._vocabulary
        pieces: list[int] = vocabulary.pieces(word)
        return pieces

    @cached_property
    def _vocabulary(self) -> Any:
        from stair.vocabulary import Vocabulary

        return Vocabulary(self.folder / WORDS)

    # ------------------------------------------------------------------ writing

    def add(
        self,
        vectors: Any,
        ids: Sequence[str] | None = None,
        metadata: Sequence[dict[str, Any]] = (),
        replace: bool = False,
    ) -> "SparseIndex":
        """Adds documents, all or none; those there stay as they are. Arguments as for `build`, and

        Args:
            replace: whether a document takes the place of one with the same id; refused otherwise. Readers see the old
                ones or the new ones, never neither.

        Raises:
            ValueError: if an id is there already or occurs twice, or the vectors are of another model.
        """
        model = self._model.space if self._model is not None else None
        with Writer(self.folder) as writer:
            writer.change(_parts(vectors, ids, metadata, model), replace=replace)
        return self._again()

    def delete(self, ids: Sequence[str]) -> "SparseIndex":
        """Deletes documents, all or none; `compact` frees their space.

        Raises:
            ValueError: if there is no such document.
        """
        with Writer(self.folder) as writer:
            writer.change(delete=[ids] if isinstance(ids, str) else ids)
        return self._again()

    def compact(self) -> "SparseIndex":
        """Merges small segments and leaves deleted documents out; ids, scores and order stay."""
        with Writer(self.folder) as writer:
            writer.compact()
        return self._again()

    def _again(self) -> "SparseIndex":
        self._store = Store(self.folder)
        return self


def _parts(
    vectors: Any, ids: Sequence[str] | None, metadata: Sequence[dict[str, Any]], space: Space | None
) -> Iterable[Embeddings]:
    if isinstance(vectors, Embeddings):
        return [vectors]
    if not hasattr(vectors, "shape"):
        parts: Iterable[Embeddings] = vectors
        return parts
    if space is None:
        raise ValueError("whose vectors are these? Give Embeddings, or the model that made them")
    if not sparse.issparse(vectors):
        raise ValueError(f"vectors are a {type(vectors).__name__}; give scipy's CSR, as `model.encode(...)` returns it")
    names = list(ids) if ids is not None else [str(n) for n in range(vectors.shape[0])]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"id {wrong[0]!r} is a {type(wrong[0]).__name__}; ids are texts: str(...)")
    return [Embeddings(sparse.csr_matrix(vectors), names, space, metadata)]


def _chain(first: Embeddings, rest: Iterable[Embeddings]) -> Iterator[Embeddings]:
    yield first
    yield from rest

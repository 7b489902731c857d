"""`SparseIndex`: exact search of sparse embeddings, on disk, memory-mapped. N documents, V terms."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL.Image import Image
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import SettingError, require
from stair.index.calibration import Calibration
from stair.index.hits import Hit, Hits, missing
from stair.index.query import Query, idf, problem_of, queries_of_rows, query_of_words
from stair.index.storage import State, write_index

if TYPE_CHECKING:
    from stair.model import Stair
    from stair.vocabulary import Vocabulary

Metadata = Sequence[dict[str, Any]]
_BATCH = 1024  # queries of a call, of which the best are kept at the same time


class SparseIndex:
    """An open index. It keeps the file that it opened until it makes a change itself; any number of threads can search it.

        index = SparseIndex.build("birds.index", model.encode(images=pictures), ids=names, model=model)
        for hit in index.search("red bicycle", k=10):
            print(hit.id, hit.score, hit.terms[:3])

    Args:
        folder: of the index; FileNotFoundError if there is none, FileError if it is damaged.
        model: encodes texts and images of queries; SettingError if the documents are of another one.
    """

    def __init__(self, folder: str | Path, model: "Stair | None" = None) -> None:
        self.folder = Path(folder)
        self._state = State(self.folder)
        self.model: Stair | None = None
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
        metadata: Metadata = (),
        model: "Stair | None" = None,
    ) -> "SparseIndex":
        """Makes a new index.

        Args:
            folder: where; must not be an index yet.
            vectors: (N, V) CSR of `Stair.encode`; or `Embeddings`, which have ids, metadata and model, or an iterable.
            ids: N strings, all different; `0`, `1`, … by default.
            metadata: N dictionaries of text, finite numbers, booleans, dates, None, or lists and dictionaries of these.
            model: the model of the vectors.

        Raises:
            FileExistsError: if there is an index already.
            SettingError: if an id or a value of the metadata cannot be stored: with id and key.
            ValueError: if lengths differ.
        """
        parts = iter(_parts(vectors, ids, metadata, model))
        first = next(parts, None)
        if first is None:
            raise SettingError("no embeddings to build an index of", "vectors")
        write_index(Path(folder), chain([first], parts), space=first.space)
        return cls(folder, model)

    def use(self, model: "Stair") -> None:
        """Takes a model to encode texts and images of queries; SettingError if the documents are of another one."""
        self.space.check_same(model.space, f"model for {self.folder}")
        self.model = model

    @property
    def space(self) -> EmbeddingSpace:
        """What its vectors are comparable with."""
        return self._state.space

    def __len__(self) -> int:
        return len(self._state.documents)

    def __contains__(self, name: str) -> bool:
        return self._state.documents.find(name) is not None

    @property
    def ids(self) -> Iterator[str]:
        """The ids of all documents, in the order of addition."""
        return (name for chunk in self._state.documents.ids.chunks for name in chunk.to_pylist())

    @property
    def keys(self) -> list[str]:
        """Names that filters take: of the metadata of any document, and of its source with `stair:` before."""
        return self._state.documents.keys

    @property
    def facts(self) -> dict[str, Any]:
        """Size and make: documents, non-zeros, bytes on disk, model, similarity."""
        nonzeros = sum(len(arrays["row_terms"]) for arrays in self._state.segments)
        about = {"model": self.space.model, "similarity": self.space.similarity}
        return {"documents": len(self), "nonzeros": nonzeros, "bytes": self._state.size, **about}

    def verify(self) -> None:
        """Compares the checksum and all numbers; FileError if something differs. Opening does so for small files only."""
        self._state.verify()

    def vector(self, name: str) -> dict[str, float]:
        """The terms of a document, heaviest first, of length 1 for cosine; SettingError if there is no such document."""
        terms, weights = self._state.row(self._number(name))
        return {self.space.tokens[terms[i]]: float(weights[i]) for i in np.argsort(-weights, kind="stable")}

    def metadata(self, name: str) -> dict[str, Any]:
        """The user's values of a document, without missing ones. Errors as for `vector`."""
        return self._state.documents.rows("user", self._number(name), 1)[0]

    def source(self, name: str) -> dict[str, Any]:
        """Where a document came from, as `Embeddings.source`. Errors as for `vector`."""
        return self._state.documents.rows("stair", self._number(name), 1)[0]

    def _number(self, name: str) -> int:
        number = self._state.documents.find(name)
        if number is None:
            raise SettingError(f"{self.folder} has no document {name!r}", "id")
        return number

    def content(self) -> Iterator[Embeddings]:
        """All documents, segment by segment, vectors as they are compared."""
        state = self._state
        for segment, (start, end) in enumerate(pairwise(state.first)):
            ids = state.documents.ids.slice(start, end - start).to_pylist()
            user, ours = (state.documents.rows(owner, start, end - start) for owner in ("user", "stair"))
            yield Embeddings(state.vectors(segment), ids, state.space, user, ours)

    def search(
        self,
        query: Any = None,
        k: int = 10,
        *,
        words: str | Mapping[str, float] | None = None,
        like: str | None = None,
        where: str | Sequence[str] = (),
        max_error: float | None = None,
        weighting: Literal["plain", "idf"] = "plain",
    ) -> Hits:
        """The k documents of highest dot product with a query, exactly.

        Args:
            query: a text or a picture (PIL) for the index's model; or V weights: one row of CSR, a tensor or an array.
            k: how many at most. Only documents of a score above 0 are hits, best first.
            words: weighted words, such as `dog:2 beach -people`, or weights by word.
            like: id of a document whose vector is the query; it is left out of the hits.
            where: conditions on metadata, such as `split=test and year>=2010`, or a list of them (docs/guides/search.md).
            max_error: leave out hits below the threshold of `Calibration`, for a text and a model with a calibration.
            weighting: `idf` multiplies the query's weights by `stair.index.query.idf`, so that rare terms count more.

        Raises:
            SettingError: if not exactly one of query, words and like is given, or one of the arguments cannot be used.
        """
        require(weighting in ("plain", "idf"), "weighting", weighting, "plain or idf")
        threshold = 0.0
        if max_error is not None:
            if not isinstance(query, str):
                raise SettingError("max_error is calibrated on texts; give a text, or leave it out", "max_error")
            if weighting != "plain":
                raise SettingError(f"max_error is calibrated without weighting {weighting!r}", "max_error")
            threshold = self.calibration.threshold(max_error)
        asked = self.query(query, words=words, like=like)
        if weighting == "idf":
            asked = idf(asked, self._state.frequency(asked.terms), len(self), self.space)
        hits = self.top(asked, k + (like is not None and k > 0), where)
        return hits.only(lambda hit: hit.id != like, threshold).first(k)

    @property
    def calibration(self) -> Calibration:
        """That of the index's model; SettingError if there is none."""
        return Calibration.load(self.model.folder if self.model is not None else None, self.space.model)

    def search_many(
        self, queries: Any, k: int = 10, *, where: str | Sequence[str] = (), threads: int = 1
    ) -> list[Hits]:
        """The hits of many queries, those of `search` for each, without the cost of a call for each.

        Args:
            queries: texts or images (PIL), encoded in batches; weights (B, V): CSR, a tensor or an array; or a list of
                results of `query`.
            k: hits of a query at most.
            where: conditions on metadata, the same for all queries.
            threads: how many search at the same time.

        Raises:
            SettingError: as in `search`.
        """
        if isinstance(queries, str):
            raise SettingError("queries is one text; give a list, also for a single query", "query")
        rows = queries if hasattr(queries, "shape") else list(queries)
        if not isinstance(rows, list) or any(not isinstance(row, Query) for row in rows):
            rows = self._encoded(rows) if isinstance(rows, list) else queries_of_rows(rows, self.space)
        size = max(1, min(_BATCH, -(-len(rows) // max(1, threads))))
        parts = [rows[n : n + size] for n in range(0, len(rows), size)]
        with ThreadPoolExecutor(max(1, threads)) as pool:
            return list(chain.from_iterable(pool.map(lambda part: self._top(part, k, where), parts)))

    def query(
        self, query: Any = None, *, words: str | Mapping[str, float] | None = None, like: str | None = None
    ) -> Query:
        """What `search` looks for: terms and weights, ready for the dot product. Arguments and errors as there."""
        if sum(value is not None for value in (query, words, like)) != 1:
            raise SettingError("give one of query, words and like (the id of a document)", "query")
        if like is not None:
            return Query(*self._state.row(self._number(like)), len(self.space.tokens))
        if words is not None:
            return query_of_words(words, self.space, self.vocabulary.token_ids)
        if isinstance(query, (str, Image)):
            return self._encoded([query])[0]
        found = queries_of_rows(query, self.space)
        if len(found) != 1:
            raise SettingError(f"query has {len(found)} rows; use search_many", "query")
        return found[0]

    def _encoded(self, items: list[Any]) -> list[Query]:
        texts = all(isinstance(item, str) for item in items)
        if other := [item for item in items if not isinstance(item, (str, Image))]:
            given = f"query is a {type(other[0]).__name__}"
            raise SettingError(f"{given}; give texts, images (PIL.Image.open(path)), or rows of weights", "query")
        if not texts and any(isinstance(item, str) for item in items):
            raise SettingError("queries mix texts and images; give only one kind", "query")
        if self.model is None:
            raise SettingError(
                "a text or an image needs the model: --model MODEL, or SparseIndex.open(folder, model=...); weighted "
                "words need none: --words 'dog:2 beach'",
                "model",
            )
        if not texts:
            return queries_of_rows(self.model.encode(images=items), self.space)
        typed = [self.vocabulary.words(text) for text in items]
        problems = [problem_of(text, words, self.space.tokens) for text, words in zip(items, typed, strict=True)]
        found = queries_of_rows(self.model.encode(texts=items), self.space)
        nothing = np.empty(0, np.int64), np.empty(0, np.float32), len(self.space.tokens)
        return [
            Query(*nothing, words, problem) if problem else replace(query, typed=words)
            for query, words, problem in zip(found, typed, problems, strict=True)
        ]

    def typed(self, text: str) -> tuple[list[str], list[str]]:
        """The tokens of a text's words, and `Hits.missing`; SettingError if it has no word of the vocabulary."""
        words = self.vocabulary.words(text)
        if problem := problem_of(text, words, self.space.tokens):
            raise SettingError(problem, "text")
        return [self.space.tokens[v] for ids in words.values() for v in ids], missing(words, self._state)

    def top(self, query: Query, k: int, where: str | Sequence[str] = ()) -> Hits:
        """As `search`, for a query that is ready."""
        return self._top([query], k, where)[0]

    def _top(self, queries: list[Query], k: int, where: str | Sequence[str]) -> list[Hits]:
        from stair.index.scoring import Best, search_segment  # with numba, which only searches need

        if k < 1:
            raise SettingError(f"k is {k}; give a number of hits from 1 up", "k")
        state = self._state
        allowed_N, not_comparable = state.documents.matching(where)
        best = Best(len(queries), max(1, min(k, len(state.documents))))
        start = np.cumsum([0, *(len(query.terms) for query in queries)])
        terms, weights = (np.concatenate([getattr(query, name) for query in queries]) for name in ("terms", "weights"))
        for arrays, (begin, end) in zip(state.segments, pairwise(state.first), strict=True):
            search_segment(arrays, (start, terms, weights), len(self.space.tokens), allowed_N[begin:end], begin, best)
        which, place = np.nonzero(best.documents >= 0)
        numbers, scores = best.documents[which, place], best.scores[which, place].tolist()
        ids = state.documents.ids
        # `take` would copy all ids, where they lie in several chunks
        names = [ids[n].as_py() for n in numbers.tolist()]
        hits = [
            Hit(name, score, n, queries[b], state)
            for name, score, n, b in zip(names, scores, numbers.tolist(), which.tolist(), strict=True)
        ]
        ends = pairwise([0, *accumulate(best.count.tolist())])
        return [Hits(hits[a:b], not_comparable, query, state) for query, (a, b) in zip(queries, ends, strict=True)]

    @property
    def vocabulary(self) -> "Vocabulary":
        """Cuts texts into terms: the model's, or one of the index's terms."""
        return self._own_vocabulary if self.model is None else self.model.vocabulary

    @cached_property
    def _own_vocabulary(self) -> "Vocabulary":
        from stair.vocabulary import Vocabulary

        with TemporaryDirectory() as folder:
            path = Path(folder) / "vocab.txt"
            path.write_text("\n".join(self.space.tokens) + "\n", encoding="utf-8")
            return Vocabulary(path)

    def add(
        self, vectors: Any, ids: Sequence[str] | None = None, metadata: Metadata = (), replace: bool = False
    ) -> "SparseIndex":
        """Adds documents, all or none; readers see the index before or after it. Arguments and errors as for `build`.

        Args:
            replace: whether a document replaces the one of the same id; a SettingError otherwise.
        """
        write_index(self.folder, _parts(vectors, ids, metadata, self.model), replace=replace)
        self._state = State(self.folder)
        return self

    def delete(self, ids: str | Sequence[str]) -> "SparseIndex":
        """Deletes documents, all or none; SettingError if one does not exist."""
        write_index(self.folder, delete=[ids] if isinstance(ids, str) else ids)
        self._state = State(self.folder)
        return self


def _parts(vectors: Any, ids: Sequence[str] | None, metadata: Metadata, model: "Stair | None") -> Iterable[Embeddings]:
    if isinstance(vectors, Embeddings):
        return [vectors]
    if not hasattr(vectors, "shape"):
        parts: Iterable[Embeddings] = vectors
        return parts
    if model is None:
        raise SettingError("the model of the vectors is unknown; give Embeddings, or the model that made them", "model")
    if not sparse.issparse(vectors):
        given = type(vectors).__name__
        raise SettingError(f"vectors are a {given}; give scipy's CSR, as `model.encode(...)` returns it", "vectors")
    names = list(ids) if ids is not None else [str(n) for n in range(vectors.shape[0])]
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise SettingError(f"id {wrong[0]!r} is a {type(wrong[0]).__name__}; ids are texts: str(...)", "ids")
    return [Embeddings(sparse.csr_matrix(vectors), names, model.space, metadata)]

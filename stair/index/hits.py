"""What a search returns: documents, and the words that explain each score."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stair.index.scoring import Query
from stair.index.storage import Segment


@dataclass(frozen=True)
class SharedWord:
    """What one word adds to a score.

    Attributes:
        word: the piece.
        query: its weight in the query.
        document: its weight in the document.
    """

    word: str
    query: float
    document: float

    @property
    def contribution(self) -> float:
        """The product of both weights; exact, as both are float32."""
        return self.query * self.document


@dataclass(repr=False, eq=False)  # not frozen: that makes ten hits cost as much as the search
class Hit:
    """A document of a result.

    Attributes:
        id: as it was added.
        score: dot product of query and document: the contributions of `words`, added up in the order of the vocabulary
            in float64.
    """

    id: str
    score: float
    _segment: Segment
    _document: int
    _query: Query
    _tokens: Sequence[str]

    def __repr__(self) -> str:
        return f"Hit(id={self.id!r}, score={self.score:.6g})"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The user's values, each of the type that was added. Missing values (None, NaN) are left out."""
        return self._segment.documents.row(self._document, "user")

    @cached_property
    def source(self) -> dict[str, Any]:
        """Where it came from, as `Embeddings.source`."""
        return self._segment.documents.row(self._document, "stair")

    @cached_property
    def words(self) -> list[SharedWord]:
        """The words that query and document share, largest contribution first, equal ones in the vocabulary's order."""
        dense_V = self._query.dense()
        words, weights = self._segment.row(self._document)
        shared = [
            SharedWord(self._tokens[v], float(dense_V[v]), float(weight))
            for v, weight in zip(words, weights, strict=True)
            if dense_V[v] != 0
        ]
        return sorted(shared, key=lambda word: -word.contribution)


class Hits(list[Hit]):
    """Hits, best first.

    Attributes:
        not_comparable: for each condition with `<`, `<=`, `>` or `>=` of the filter, how many documents have no value that
            compares with it, if there are any. These do not match.
    """

    def __init__(self, hits: Iterable[Hit] = (), not_comparable: dict[str, int] | None = None) -> None:
        super().__init__(hits)
        self.not_comparable = not_comparable or {}

"""What a search returns: documents, and the terms that explain each score."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stair.index.query import Query
from stair.index.storage import State


@dataclass(frozen=True)
class SharedTerm:
    """What one term adds to a score: its token, and its weights in query and document."""

    token: str
    query: float
    document: float

    @property
    def contribution(self) -> float:
        """The product of both weights; exact, as both are float32."""
        return self.query * self.document


@dataclass(repr=False, eq=False)  # not frozen: that makes ten hits cost as much as the search
class Hit:
    """A document of a result. The score is the sum of `terms`, in the order of the vocabulary in float64."""

    id: str
    score: float
    _number: int
    _query: Query
    _state: State

    def __repr__(self) -> str:
        return f"Hit(id={self.id!r}, score={self.score:.6g})"

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The user's values, each of the type that was added. Missing values (None, NaN) are left out."""
        return self._state.documents.rows("user", self._number, 1)[0]

    @cached_property
    def source(self) -> dict[str, Any]:
        """Where it came from, as `Embeddings.source`."""
        return self._state.documents.rows("stair", self._number, 1)[0]

    @cached_property
    def terms(self) -> list[SharedTerm]:
        """The terms that query and document share, largest contribution first, equal ones in the vocabulary's order."""
        dense_V, tokens = self._query.dense(), self._state.space.tokens
        row = zip(*self._state.row(self._number), strict=True)
        shared = [SharedTerm(tokens[v], float(dense_V[v]), float(weight)) for v, weight in row if dense_V[v] != 0]
        return sorted(shared, key=lambda term: -term.contribution)


class Hits(list[Hit]):
    """Hits, best first.

    `not_comparable`: for each condition of the filter with `<`, `<=`, `>` or `>=`, how many documents have no value that
    compares with it, if there are any. These do not match.
    """

    def __init__(self, hits: Iterable[Hit] = (), not_comparable: dict[str, int] | None = None) -> None:
        super().__init__(hits)
        self.not_comparable = not_comparable or {}

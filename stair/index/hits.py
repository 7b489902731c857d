"""What a search returns: documents, and the terms that explain each score."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.errors import SettingError
from stair.index.query import Query, is_known
from stair.index.storage import State
from stair.vocabulary import is_stop_word


@dataclass(frozen=True)
class SharedTerm:
    """What one term adds to a score: its token, and its weights in query and document.

    `expansion`: the term is no token of the typed words.
    """

    token: str
    query: float
    document: float
    expansion: bool = False

    @property
    def contribution(self) -> float:
        """The product of both weights; exact, as both are float32."""
        return self.query * self.document


@dataclass(frozen=True)
class Refinement:
    """A term that divides hits: how many of them have it, and how many times as often as all documents."""

    token: str
    hits: int
    lift: float


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

    @property
    def term_ids(self) -> NDArray[Any]:
        """The terms of the document, ascending."""
        return self._state.row(self._number)[0]

    @cached_property
    def terms(self) -> list[SharedTerm]:
        """The terms that query and document share, largest contribution first, equal ones in the vocabulary's order."""
        dense_V, tokens, own = self._query.dense(), self._state.space.tokens, self._query.own
        row = zip(*self._state.row(self._number), strict=True)
        shared = [
            SharedTerm(tokens[v], float(dense_V[v]), float(weight), bool(own) and v not in own)
            for v, weight in row
            if dense_V[v] != 0
        ]
        return sorted(shared, key=lambda term: -term.contribution)


class Hits(list[Hit]):
    """Hits, best first.

    `not_comparable`: for each condition of the filter with `<`, `<=`, `>` or `>=`, how many documents have no value that
    compares with it, if there are any. These do not match. `threshold`: the score that `max_error` asked for, else 0.
    """

    def __init__(
        self,
        hits: Iterable[Hit] = (),
        not_comparable: dict[str, int] | None = None,
        query: Query | None = None,
        state: State | None = None,
        threshold: float = 0.0,
    ) -> None:
        super().__init__(hits)
        self.not_comparable = not_comparable or {}
        self.threshold, self._query, self._state = threshold, query, state

    def first(self, k: int) -> "Hits":
        """The k best."""
        return Hits(self[:k], self.not_comparable, self._query, self._state, self.threshold)

    def only(self, keep: Callable[[Hit], bool], threshold: float = 0.0) -> "Hits":
        """Those that a function is true for and that reach a score."""
        found = [hit for hit in self if hit.score >= threshold and keep(hit)]
        return Hits(found, self.not_comparable, self._query, self._state, threshold or self.threshold)

    @property
    def message(self) -> str:
        """Why there are no hits; "" if there are any."""
        if self or self._query is None:
            return ""
        least = f"no match: no document scores {self.threshold:.4g} or more" if self.threshold else ""
        nothing = "no document scores above 0: none shares a term that has a positive weight in the query"
        return self._query.problem or least or nothing

    def having(self, tokens: Sequence[str]) -> "Hits":
        """Those that have all of some terms; SettingError if one is no term."""
        if self._state is None:
            return self
        ids = self._state.space.term_ids
        if wrong := [token for token in tokens if token not in ids]:
            raise SettingError(f"{wrong[0]!r} is not a term of the index", "having")
        wanted = {ids[token] for token in tokens}
        return self.only(lambda hit: wanted <= set(hit.term_ids.tolist()))

    def refine(self, n: int = 8) -> list[Refinement]:
        """The n terms that divide these hits best, without those that all have, function words and parts of words.

        A share p of the hits has a term. The best have the greatest p · (1 - p) · log(1 + lift): half of the hits have
        them, and few of all documents. Of terms that the same hits have, the best is offered. Terms of one hit come last.
        """
        if self._state is None or len(self) < 2:
            return []
        state, tokens, rows = self._state, self._state.space.tokens, [hit.term_ids for hit in self]
        ids_U = np.unique(np.concatenate(rows))
        held_HU = np.array([np.isin(ids_U, row, assume_unique=True) for row in rows])
        readable_U = [not (is_stop_word(tokens[v]) or tokens[v].startswith("##")) for v in ids_U.tolist()]
        offered_U = np.array(readable_U, bool) & ~held_HU.all(0)
        ids_U, held_HU = ids_U[offered_U], held_HU[:, offered_U]
        count_U = held_HU.sum(0)
        share_U = count_U / len(self)
        lift_U = share_U * len(state.documents) / state.frequency(ids_U)
        order = np.lexsort((-share_U * (1 - share_U) * np.log1p(lift_U), count_U == 1))
        best = {held_HU[:, i].tobytes(): i for i in order[::-1]}  # of equal columns the first in the order
        chosen = [i for i in order if best[held_HU[:, i].tobytes()] == i][:n]
        return [Refinement(tokens[ids_U[i]], int(count_U[i]), float(lift_U[i])) for i in chosen]

    @cached_property
    def missing(self) -> list[str]:
        """The typed words that no document has: a token of them is in none. Function words and numbers are left out."""
        return missing(self._query.typed, self._state) if self._query and self._state else []


def missing(typed: Mapping[str, Sequence[int]], state: State) -> list[str]:
    """See `Hits.missing`; words with the ids of their tokens."""
    return [
        word
        for word, ids in typed.items()
        if not is_stop_word(word.lower()) and not (is_known(ids, state.space.tokens) and state.frequency(ids).all())
    ]

"""The k best documents of a segment, exactly.

Block by block, every posting of the query's words adds its rounded weight to an integer bound of its document. The bound
is never below the true score, so a document whose bound does not reach the k-th best score so far is out, with proof;
each other one is scored exactly from its row, in float64, in the order of the vocabulary. (The product of two float32 is
exact in float64.) Words of negative weight round the other way: down, so that the bound stays one.

Equal scores rank by the order of addition. numba compiles the loops where it is installed; without it, numpy runs the
same plan, some ten times slower.

Q words of the query, U words of the segment, R blocks, K wanted.
"""

import importlib.util
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.index.postings import BLOCK, Arrays

Array = NDArray[Any]
Arrays2 = tuple[Array, Array]
Arrays3 = tuple[Array, Array, Array]
Arrays4 = tuple[Array, Array, Array, Array]


@dataclass(frozen=True)
class Query:
    """Words and weights.

    Attributes:
        words: (Q,) int64, ascending.
        weights: (Q,) float32; negative ones keep documents away.
        size: V.
    """

    words: Array
    weights: Array
    size: int

    def dense(self) -> Array:
        """(V,) float32."""
        dense_V = np.zeros(self.size, np.float32)
        dense_V[self.words] = self.weights
        return dense_V


class Best:
    """The best documents so far, over all segments: scores falling, equal ones in the order of addition.

    Args:
        k: how many at most.
    """

    def __init__(self, k: int) -> None:
        self.scores = np.full(k, -np.inf)
        self.documents = np.full(k, -1, np.int64)
        self.count = np.zeros(1, np.int64)


def search_segment(arrays: Arrays, query: Query, dense_V: Array, allowed: Array, first: int, best: Best) -> None:
    """Adds a segment's documents to the best.

    Args:
        arrays: of the segment, as `invert` made them.
        query: what to look for.
        dense_V: `query.dense()`, made once for all segments.
        allowed: (N,) bool, or empty where all documents are.
        first: number of the segment's first document.
        best: grows in place. Only scores above 0 enter.
    """
    if len(query.words) == 0 or len(arrays["words"]) == 0:
        return
    _search(
        (arrays["words"], arrays["scale"]),
        (query.words, query.weights),
        (arrays["run_start"], arrays["number_start"], arrays["documents"], arrays["bytes"]),
        (arrays["row_start"], arrays["row_words"], arrays["row_weights"]),
        dense_V,
        allowed,
        first,
        (best.scores, best.documents, best.count),
        _zeros(),
    )


def _zeros() -> Array:
    """(BLOCK + _CHUNK,) int32 zeros, this thread's own: fresh ones would cost more than a small search."""
    if not hasattr(_own, "bound"):
        _own.bound = np.zeros(BLOCK + _CHUNK, np.int32)
    bound: Array = _own.bound
    return bound


def _factors(known: Arrays2, query: Arrays2) -> tuple[Array, Array, float]:
    """The query's words that the segment has: their ranks in it, integer factors of their bytes, and the factors' unit."""
    words_U, scale_U = known
    words_Q, weights_Q = query
    rank_Q = np.minimum(np.searchsorted(words_U, words_Q), len(words_U) - 1)
    found_Q = words_U[rank_Q] == words_Q
    rank_Q = rank_Q[found_Q]
    value_Q = weights_Q[found_Q].astype(np.float64) * scale_U[rank_Q]
    # all words at 255 stay within 31 bits
    unit = np.abs(value_Q).sum() * 255 / (1 << 30)
    if unit == 0:
        return rank_Q[:0], rank_Q[:0].astype(np.int32), 1.0
    # ceil: up for what adds, towards 0 for what takes away
    return rank_Q, np.ceil(value_Q / unit).astype(np.int32), unit


def _floor(score: float, unit: float) -> int:
    # a bound up to this cannot belong to a score above `score`, float rounding of unit and factors included
    return int(score / unit * (1 - 1e-9)) - 1


def _insert(score: float, document: int, scores: Array, documents: Array, count: Array) -> None:
    """Puts a document in its place; the worst falls out when there are more than k."""
    k = len(scores)
    if count[0] < k:
        place = count[0]
        count[0] += 1
    elif score > scores[k - 1] or (score == scores[k - 1] and document < documents[k - 1]):
        place = k - 1
    else:
        return
    while place > 0 and (scores[place - 1] < score or (scores[place - 1] == score and documents[place - 1] > document)):
        scores[place], documents[place] = scores[place - 1], documents[place - 1]
        place -= 1
    scores[place], documents[place] = score, document


def _exact(document: int, rows: Arrays3, dense_V: Array) -> float:
    row_start, row_words, row_weights = rows
    score = 0.0
    for i in range(row_start[document], row_start[document + 1]):
        score += np.float64(dense_V[row_words[i]]) * np.float64(row_weights[i])
    return score


def _compiled_search(
    known: Arrays2,
    query: Arrays2,
    postings: Arrays4,
    rows: Arrays3,
    dense_V: Array,
    allowed: Array,
    first: int,
    best: Arrays3,
    bound: Array,
) -> None:
    rank_Q, factor_Q, unit = _factors(known, query)
    if len(rank_Q) == 0:
        return
    scores, found, count = best
    total, k = len(rows[0]) - 1, len(scores)
    blocks = (total + BLOCK - 1) // BLOCK
    floor = _floor(scores[k - 1], unit) if count[0] == k else 0
    # a true score is less than this below its bound: one step of each byte, one of each factor
    slack = np.abs(factor_Q).sum() + 256 * len(factor_Q) + 1
    highest_K, peak_K, peaks = np.full(k, _LOWEST), np.full(k, _LOWEST), np.empty(BLOCK // _CHUNK, np.int32)
    # room for all, of which few pages are ever touched; arrays that grow would cost the loops most of their speed
    candidates, bounds, waiting = np.empty(total, np.int32), np.empty(total, np.int32), 0
    for block in range(blocks):
        size = min(BLOCK, total - block * BLOCK)
        for q in range(len(rank_Q)):
            _add(bound, _run(postings, rank_Q[q] * blocks + block), factor_Q[q])
        for i in range(len(allowed[block * BLOCK : block * BLOCK + size])):
            bound[i] *= allowed[block * BLOCK + i]
        chunks = (size + _CHUNK - 1) // _CHUNK
        for chunk in range(chunks):
            highest = np.int32(0)
            for i in range(chunk * _CHUNK, chunk * _CHUNK + _CHUNK):
                highest = max(highest, bound[i])
            peaks[chunk] = highest
            if highest > peak_K[k - 1]:
                _raise(peak_K, highest)
        # the k highest chunks hold k documents that score at least this
        floor = max(floor, peak_K[k - 1] - slack)
        for chunk in range(chunks):
            if peaks[chunk] <= floor:
                continue
            for i in range(chunk * _CHUNK, min(chunk * _CHUNK + _CHUNK, size)):
                if bound[i] > floor:
                    candidates[waiting], bounds[waiting] = block * BLOCK + i, bound[i]
                    waiting += 1
                    if bound[i] > highest_K[k - 1]:
                        _raise(highest_K, bound[i])
                        # and so do these k
                        floor = max(floor, highest_K[k - 1] - slack)
        bound[:size] = 0
    for i in range(waiting):
        if bounds[i] > floor:
            score = _exact(candidates[i], rows, dense_V)
            if score > 0:
                _insert(score, first + candidates[i], scores, found, count)
                if count[0] == k:
                    floor = max(floor, _floor(scores[k - 1], unit))


def _run(postings: Arrays4, run: int) -> Arrays2:
    """Documents and bytes of a run; a full one, or an empty one, has no documents."""
    run_start, number_start, documents, bytes_S = postings
    return documents[number_start[run] : number_start[run + 1]], bytes_S[run_start[run] : run_start[run + 1]]


def _add(bound: Array, run: Arrays2, factor: int) -> None:
    documents, bytes_S = run
    # of a negative factor only byte - 1 is certain, and of a byte of 0, which is no posting, nothing at all
    down, least = (factor, np.int32(1)) if factor < 0 else (np.int32(0), np.int32(0))
    if len(documents):
        for i in range(min(len(documents), len(bytes_S))):
            bound[documents[i]] += factor * np.int32(bytes_S[i]) - down
    else:
        for i in range(min(len(bytes_S), BLOCK)):
            bound[i] += factor * max(np.int32(bytes_S[i]), least) - down


def _raise(highest_K: Array, bound: int) -> None:
    """Puts a bound among the k highest, which are falling."""
    place = len(highest_K) - 1
    while place > 0 and highest_K[place - 1] < bound:
        highest_K[place] = highest_K[place - 1]
        place -= 1
    highest_K[place] = bound


def _numpy_search(
    known: Arrays2,
    query: Arrays2,
    postings: Arrays4,
    rows: Arrays3,
    dense_V: Array,
    allowed: Array,
    first: int,
    best: Arrays3,
    bound: Array,
) -> None:
    rank_Q, factor_Q, unit = _factors(known, query)
    if len(rank_Q) == 0:
        return
    scores, found, count = best
    total, k = len(rows[0]) - 1, len(scores)
    blocks = -(-total // BLOCK)
    for block in range(blocks):
        start = block * BLOCK
        bound[:] = 0
        size = min(BLOCK, total - start)
        for rank, factor in zip(rank_Q, factor_Q, strict=True):
            documents, bytes_S = _run(postings, rank * blocks + block)
            # a document occurs once in a run, so the sum by index is right
            there: Any = documents if len(documents) else slice(len(bytes_S))
            bound[there] += factor * np.maximum(bytes_S, factor < 0).astype(np.int32) - min(factor, 0)
        if len(allowed):
            bound[:size][~allowed[start : start + size]] = 0
        candidates = np.flatnonzero(bound > (_floor(scores[k - 1], unit) if count[0] == k else 0))
        for i in candidates[np.argsort(-bound[candidates], kind="stable")]:
            if count[0] == k and bound[i] <= _floor(scores[k - 1], unit):
                break
            score = _exact_row(start + i, rows, dense_V)
            if score > 0:
                _insert(score, first + start + i, scores, found, count)
    bound[:] = 0


def _exact_row(document: int, rows: Arrays3, dense_V: Array) -> float:
    row_start, row_words, row_weights = rows
    row: Any = slice(row_start[document], row_start[document + 1])
    products = dense_V[row_words[row]].astype(np.float64) * row_weights[row]
    # cumsum adds one after another, as the compiled loop does; sum would add by pairs
    return float(products.cumsum()[-1]) if len(products) else 0.0


_CHUNK = 128
_own = threading.local()
_LOWEST = -(1 << 40)  # far below any bound
compiled = importlib.util.find_spec("numba") is not None
_search: Any = _numpy_search
if compiled:
    from numba import njit

    _factors = njit(cache=True)(_factors)
    _floor = njit(cache=True)(_floor)
    _insert = njit(cache=True)(_insert)
    _exact = njit(cache=True)(_exact)
    _raise = njit(cache=True)(_raise)
    _run = njit(cache=True)(_run)
    _add = njit(cache=True)(_add)
    _search = njit(cache=True, nogil=True)(_compiled_search)

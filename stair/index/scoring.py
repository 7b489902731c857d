"""The k best documents of a segment, exactly, by loops that numba compiles.

Block by block, every posting of the query's terms adds its rounded weight to an integer bound of its document. The bound
is never below the true score, so a document whose bound does not reach the k-th best score so far is excluded. Each other
document is scored exactly from its row, in float64, in the order of the vocabulary (the product of two float32 is exact in
float64). Terms of negative weight are rounded down, so that the bound stays an upper one. Equal scores rank by the order
of addition.

Q terms of the query, U terms of the segment, R blocks, K hits wanted.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.errors import import_extra
from stair.index.postings import BLOCK, Arrays

Array = NDArray[Any]
Arrays2 = tuple[Array, Array]
Arrays3 = tuple[Array, Array, Array]
Arrays4 = tuple[Array, Array, Array, Array]


class Best:
    """The k best documents so far, over all segments: scores falling, equal ones in the order of addition."""

    def __init__(self, k: int) -> None:
        self.scores = np.full(k, -np.inf)
        self.documents = np.full(k, -1, np.int64)
        self.count = np.zeros(1, np.int64)


def search_segment(arrays: Arrays, query: Arrays2, dense_V: Array, allowed: Array, first: int, best: Best) -> None:
    """Adds a segment's documents with scores above 0 to the best.

    Args:
        arrays: of the segment, as `invert` made them.
        query: terms (Q,) int64 ascending, and weights (Q,) float32.
        dense_V: the same weights, made once for all segments.
        allowed: (N,) bool, or empty where all documents are.
        first: number of the segment's first document.
        best: grows in place.
    """
    if len(query[0]) == 0 or len(arrays["terms"]) == 0:
        return
    if not hasattr(_own, "bound"):  # one for each thread: fresh zeros would cost more than a small search
        _own.bound = np.zeros(BLOCK + _CHUNK, np.int32)
    _search(
        (arrays["terms"], arrays["scale"]),
        query,
        (arrays["run_start"], arrays["number_start"], arrays["documents"], arrays["bytes"]),
        (arrays["row_start"], arrays["row_terms"], arrays["row_weights"]),
        dense_V,
        allowed,
        first,
        (best.scores, best.documents, best.count),
        _own.bound,
    )


def _factors(known: Arrays2, query: Arrays2) -> tuple[Array, Array, float]:
    """The query's terms that the segment has: their ranks in it, integer factors of their bytes, and the factors' unit."""
    terms_U, scale_U = known
    terms_Q, weights_Q = query
    rank_Q = np.minimum(np.searchsorted(terms_U, terms_Q), len(terms_U) - 1)
    present_Q = terms_U[rank_Q] == terms_Q
    rank_Q = rank_Q[present_Q]
    value_Q = weights_Q[present_Q].astype(np.float64) * scale_U[rank_Q]
    # all terms at 255 stay within 31 bits
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
        i = count[0]
        count[0] += 1
    elif score > scores[k - 1] or (score == scores[k - 1] and document < documents[k - 1]):
        i = k - 1
    else:
        return
    while i > 0 and (scores[i - 1] < score or (scores[i - 1] == score and documents[i - 1] > document)):
        scores[i], documents[i] = scores[i - 1], documents[i - 1]
        i -= 1
    scores[i], documents[i] = score, document


def _exact(document: int, rows: Arrays3, dense_V: Array) -> float:
    row_start, row_terms, row_weights = rows
    score = 0.0
    for i in range(row_start[document], row_start[document + 1]):
        score += np.float64(dense_V[row_terms[i]]) * np.float64(row_weights[i])
    return score


def _search_all(
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
    scores, documents, count = best
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
                _insert(score, first + candidates[i], scores, documents, count)
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
    i = len(highest_K) - 1
    while i > 0 and highest_K[i - 1] < bound:
        highest_K[i] = highest_K[i - 1]
        i -= 1
    highest_K[i] = bound


_CHUNK = 128
_own = threading.local()
_LOWEST = -(1 << 40)  # far below any bound
_njit = import_extra("numba", "numba", "search").njit
for _function in (_factors, _floor, _insert, _exact, _raise, _run, _add):
    globals()[_function.__name__] = _njit(cache=True)(_function)
_search: Any = _njit(cache=True, nogil=True)(_search_all)

"""The k best documents of a segment for each query of a batch, exactly, by loops that numba compiles.

Block by block, every posting of a query's terms adds its rounded weight to an integer bound of its document. The bound is
never below the true score, and above it by a known `slack` at most. So a document is excluded if its bound does not reach
the k-th best score, or the k-th highest bound less the slack. The others, highest bounds first, are scored exactly from
their rows, in float64, in the order of the vocabulary (the product of two float32 is exact in float64). Terms of negative
weight are rounded down, so that the bound stays an upper one. Equal scores rank by the order of addition.

Q terms of a query, P of all queries, U terms of the segment, R blocks.
"""

import threading
from typing import Any

import numpy as np

from stair.index.compiled import njit
from stair.index.postings import BLOCK, Array, Arrays, Arrays2, Arrays3

Arrays4 = tuple[Array, Array, Array, Array]
Factors = tuple[Array, Array, float, float, float]  # see `_factors`


class Best:
    """The k best documents of each query so far, over all segments: scores falling, equal ones in the order of addition."""

    def __init__(self, queries: int, k: int) -> None:
        self.scores = np.full((queries, k), -np.inf)
        self.documents = np.full((queries, k), -1, np.int64)
        self.count = np.zeros(queries, np.int64)


def search_segment(arrays: Arrays, queries: Arrays3, num_terms: int, allowed: Array, first: int, best: Best) -> None:
    """Adds a segment's documents with scores above 0 to the best.

    Args:
        arrays: of the segment, as `invert` made them.
        queries: CSR of the queries: starts and terms int64, ascending in a query, and weights float32.
        num_terms: V.
        allowed: (N,) bool, or empty where all documents are.
        first: number of the segment's first document.
        best: grows in place.
    """
    if not hasattr(_own, "bound"):  # one for each thread: fresh zeros would cost more than a small search
        _own.bound = np.zeros((BLOCK // _CHUNK, _CHUNK), np.int16)
        _own.found = np.empty(2 * BLOCK, np.int16), np.empty(2 * BLOCK, np.int64)
    if len(getattr(_own, "dense_V", ())) != num_terms:
        _own.dense_V = np.zeros(num_terms, np.float32)
    known = arrays["terms"], arrays["scale"]
    rows = arrays["row_start"], arrays["row_terms"], arrays["row_weights"]
    postings = arrays["run_start"], arrays["number_start"], arrays["documents"], arrays["bytes"]
    scratch, own = (_own.dense_V, _own.bound, *_own.found), (best.scores, best.documents, best.count)
    _search(known, queries, postings, rows, allowed, first, own, scratch)


def _search_all(
    known: Arrays2, queries: Arrays3, postings: Arrays4, rows: Arrays3, allowed: Array, first: int, best: Arrays3,
    scratch: Arrays4,
) -> None:  # fmt: skip
    """`scratch`: the query's weights (V,), bounds of a block, bounds and numbers of candidates."""
    start, terms_P, weights_P = queries
    scores, documents, count = best
    dense_V = scratch[0]
    for b in range(len(start) - 1):
        terms, weights = terms_P[start[b] : start[b + 1]], weights_P[start[b] : start[b + 1]]
        counted = _factors(known, len(dense_V) - len(known[0]), terms, weights)
        if len(counted[0]):
            dense_V[terms] = weights
            own = scores[b], documents[b], count[b : b + 1]
            _search_blocks(counted, postings, rows, allowed, first, own, scratch)
            dense_V[terms] = 0


def _factors(known: Arrays2, missing: int, terms_Q: Array, weights_Q: Array) -> Factors:
    """Ranks in the segment of the terms that are counted, integer factors of their bytes, and the factors' unit.

    In units: what terms that are not counted add to a score at most, and by how much a bound is above a score at most.
    """
    terms_U, scale_U = known
    rank_Q = np.zeros(len(terms_Q), np.int64)
    for q in range(len(terms_Q)):  # few terms are missing: the rank is nearly the term itself
        low = max(terms_Q[q] - missing, 0)
        rank_Q[q] = min(low + np.searchsorted(terms_U[low : terms_Q[q] + 1], terms_Q[q]), len(terms_U) - 1)
    present_Q = terms_U[rank_Q] == terms_Q if len(terms_U) else np.zeros(len(terms_Q), np.bool_)
    rank_Q = rank_Q[present_Q]
    value_Q = weights_Q[present_Q].astype(np.float64) * scale_U[rank_Q] * 255
    total, rest, below = np.abs(value_Q).sum(), 0.0, 0.0
    unit = total / _RANGE if total > 0 else 1.0
    if len(rank_Q) > _TERMS:  # one step up for each would exceed 16 bits
        order = np.argsort(-np.abs(value_Q))
        others = value_Q[order[_TERMS:]] / unit
        rest, below = np.maximum(others, 0).sum(), np.minimum(others, 0).sum()
        rank_Q, value_Q = rank_Q[order[:_TERMS]], value_Q[order[:_TERMS]]
    # ceil: up for what adds, towards 0 for what takes away
    factor_Q = np.ceil(value_Q / unit * (256 / 255)).astype(np.int32)
    # a step of each byte, of each factor and of each sum
    return rank_Q, factor_Q, unit, rest, np.abs(factor_Q).sum() / 256 + 2 * len(factor_Q) - below


def _search_blocks(
    counted: Factors, postings: Arrays4, rows: Arrays3, allowed: Array, first: int, best: Arrays3, scratch: Arrays4
) -> None:
    rank_Q, factor_Q, unit, rest, slack = counted
    dense_V, bound_CC, bounds, numbers = scratch
    total, k = len(rows[0]) - 1, len(best[0])
    blocks = (total + BLOCK - 1) // BLOCK
    bound_B, held = bound_CC.ravel(), 0
    floor = _floor(best, unit, rest)
    for block in range(blocks):
        begin, size = block * BLOCK, min(BLOCK, total - block * BLOCK)
        ahead = 0
        for q in range(len(rank_Q)):  # so that the runs come into the cache at the same time, not one after the other
            ahead += _read(_run(postings, rank_Q[q] * blocks + block))
        for q in range(len(rank_Q)):
            _add(bound_B, _run(postings, rank_Q[q] * blocks + block), factor_Q[q])
        for i in range(len(allowed[begin : begin + size])):
            bound_B[i] *= allowed[begin + i]
        held += min(ahead, 0)  # 0, but the compiler cannot leave out the reads
        chunks = (size + _CHUNK - 1) // _CHUNK
        if block == 0 and best[2][0] < k < chunks:  # the k highest chunks hold k documents
            floor = max(floor, _lower(np.array([_peak(bound_CC, chunk) for chunk in range(chunks)]), k, slack + rest))
        for chunk in range(chunks):
            for i in range(_CHUNK if _peak(bound_CC, chunk) > floor else 0):
                n = begin + chunk * _CHUNK + i
                if bound_CC[chunk, i] > floor and n < total and (len(allowed) == 0 or allowed[n]):
                    bounds[held], numbers[held] = bound_CC[chunk, i], n
                    held += 1
            for i in range(_CHUNK):  # loops: slices of so few cost more
                bound_CC[chunk, i] = 0
        if held > k:
            floor = max(floor, _lower(bounds[:held], k, slack + rest))
            held = _drop(bounds, numbers, held, floor)
        if held > BLOCK or block == blocks - 1:
            high = _lower(bounds[:held], k, 0.0) if held > k else 0
            for highest in (True, False):  # first, since what these score excludes most of the others
                for i in range(held):
                    if bounds[i] > floor and (bounds[i] > high) == highest:
                        _insert(_exact(numbers[i], rows, dense_V), first + numbers[i], best)
                        floor = max(floor, _floor(best, unit, rest))
            held = 0


def _peak(bound_CC: Array, chunk: int) -> int:
    peak = np.int16(0)
    for i in range(_CHUNK):
        peak = max(peak, bound_CC[chunk, i])
    return int(peak)


def _lower(bounds: Array, k: int, slack: float) -> int:
    """What k documents score at least: the k-th highest bound less what a bound is too high at most."""
    return int(np.partition(bounds, len(bounds) - k)[len(bounds) - k] - slack) - 2


def _drop(bounds: Array, numbers: Array, held: int, floor: int) -> int:
    """Keeps what is above the floor; how many these are."""
    kept = 0
    for i in range(held):
        if bounds[i] > floor:
            bounds[kept], numbers[kept] = bounds[i], numbers[i]
            kept += 1
    return kept


def _floor(best: Arrays3, unit: float, rest: float) -> int:
    """The highest bound that cannot belong to one of the best, float rounding of unit and factors included."""
    scores, _, count = best
    worst = scores[-1] if count[0] == len(scores) else 0.0
    return int(worst / unit * (1 - 1e-9) - rest * (1 + 1e-9)) - 1 if worst > 0 or rest > 0 else 0


def _insert(score: float, document: int, best: Arrays3) -> None:
    """Puts a document of a score above 0 in its place; the worst falls out when there are more than k."""
    scores, documents, count = best
    i = last = min(count[0], len(scores) - 1)
    full = count[0] > last
    if score <= 0 or (full and (scores[last] > score or (scores[last] == score and documents[last] < document))):
        return
    while i > 0 and (scores[i - 1] < score or (scores[i - 1] == score and documents[i - 1] > document)):
        scores[i], documents[i] = scores[i - 1], documents[i - 1]
        i -= 1
    scores[i], documents[i] = score, document
    count[0] = last + 1


def _exact(document: int, rows: Arrays3, dense_V: Array) -> float:
    row_start, row_terms, row_weights = rows
    score = 0.0
    for i in range(row_start[document], row_start[document + 1]):
        score += np.float64(dense_V[row_terms[i]]) * np.float64(row_weights[i])
    return score


def _run(postings: Arrays4, run: int) -> Arrays2:
    """Documents and bytes of a run; a full one, or an empty one, has no documents."""
    run_start, number_start, documents, bytes_S = postings
    return documents[number_start[run] : number_start[run + 1]], bytes_S[run_start[run] : run_start[run + 1]]


def _add(bound: Array, run: Arrays2, factor: int) -> None:
    numbers, held = run
    # of a negative factor only byte - 1 is certain, and of a byte of 0, which is no posting, nothing at all
    down = np.int32(1) if factor < 0 else np.int32(0)
    up = np.int32(255 - factor * down)
    if len(numbers):
        for i in range(min(len(numbers), len(held))):
            bound[numbers[i]] += (factor * np.int32(held[i]) + up) >> 8
    else:
        for i in range(min(len(held), BLOCK)):
            bound[i] += np.int32(np.int32(factor * max(np.int32(held[i]), down)) + up) >> 8


def _read(run: Arrays2) -> int:
    """Reads something of each cache line of a run."""
    numbers, held = run
    total = 0
    for i in range(0, len(numbers), 32):
        total += numbers[i]
    for i in range(0, len(held), 64):
        total += held[i]
    return total


_CHUNK = 128
_RANGE, _TERMS = 30_000, 512  # sum of all terms at most, and the most terms, so that a bound stays within 16 bits
_own = threading.local()
for _function in (_factors, _peak, _lower, _drop, _floor, _insert, _exact, _run, _add, _read, _search_blocks):
    globals()[_function.__name__] = njit()(cache=True)(_function)
_search: Any = njit()(cache=True, nogil=True)(_search_all)

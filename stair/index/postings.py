"""From rows to an inverted index: for each term the documents that hold it, with weights rounded up to 8 bits.

Rounded up, a sum over a query's terms is never below the true score. What it excludes is excluded with proof; the rest is
scored exactly from the rows (stair/index/scoring.py). With 16-bit document numbers within blocks of 65,536, a posting has
three bytes, and the sums of a block stay in the processor's cache. The postings of a term in a block are a run. If more
than one in `FULL` of the block's documents hold the term, the run is full: one byte for each document, zeros included, and
no document numbers. Adding a full run is plain arithmetic on neighbours, eight or more at a time.

N documents, V terms, U terms that occur, R = ceil(N / 65,536) blocks, P non-zeros, S bytes of all runs.
"""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stair.errors import SettingError
from stair.index.compiled import njit

BLOCK = 1 << 16
FULL = 5
Array = NDArray[Any]
Arrays = dict[str, Array]
Arrays2 = tuple[Array, Array]
Arrays3 = tuple[Array, Array, Array]


def canonical(vectors: Any, num_terms: int) -> sparse.csr_matrix:
    """CSR as an index stores it: float32, terms of a row ascending, no explicit zeros, no duplicates.

    SettingError if the shape is not (N, num_terms), or a weight is negative or not finite.
    """
    csr = sparse.csr_matrix(vectors, dtype=np.float32)
    if csr is vectors or np.shares_memory(csr.data, getattr(vectors, "data", np.empty(0))):
        csr = csr.copy()
    if csr.shape[1] != num_terms:
        raise SettingError(f"vectors have {csr.shape[1]} terms, the index has {num_terms}", "vectors")
    if not np.isfinite(csr.data).all() or (csr.data < 0).any():
        raise SettingError("weights of documents must be finite and not negative; STAIR's are", "vectors")
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def invert(csr: sparse.csr_matrix) -> Arrays:
    """Arrays of a segment, from (N, V) as `canonical` returns it.

    Returns:
        `row_start` (N+1,), `row_terms` (P,), `row_weights` (P,): the rows as they are;
        `terms` (U,) ascending, `scale` (U,): a weight is at most its byte times its term's scale;
        `run_start` (U·R+1,): where the bytes of a term in a block begin in `bytes` (S,) uint8, `number_start` (U·R+1,): and
        its documents in `documents` uint16, counted within the block; a full run has none there.
    """
    rows, (count, fill) = (csr.indptr.astype(np.int64), csr.indices, csr.data), _compiled()
    size_R = np.diff(np.append(np.arange(0, max(1, csr.shape[0]), BLOCK), csr.shape[0]))
    count_RV, scale_V = count(*rows, csr.shape[1], len(size_R))
    terms_U = np.flatnonzero(count_RV.any(0))
    count_UR = count_RV.T[terms_U]
    full_UR = count_UR * FULL > size_R
    run_start = _starts(np.where(full_UR, size_R, count_UR))
    number_start = _starts(np.where(full_UR, 0, count_UR))
    documents, bytes_S = np.empty(number_start[-1], np.uint16), np.zeros(run_start[-1], np.uint8)
    begin_RU, number_RU = (starts[:-1].reshape(full_UR.shape).T.copy() for starts in (run_start, number_start))
    number_RU[full_UR.T] = -1
    fill(rows, (terms_U, scale_V), (begin_RU, number_RU), (documents, bytes_S))
    return {
        "row_start": rows[0],
        "row_terms": csr.indices.astype(np.uint16 if csr.shape[1] <= 1 << 16 else np.uint32),
        "row_weights": csr.data,
        "terms": terms_U.astype(np.int64),
        "scale": scale_V[terms_U],
        "run_start": run_start,
        "number_start": number_start,
        "documents": documents,
        "bytes": bytes_S,
    }


def frequency(arrays: Arrays, terms: Array) -> Array:
    """How many documents of a segment have each of some terms."""
    known, start, counts = arrays["terms"], arrays["run_start"], []
    blocks = (len(start) - 1) // max(1, len(known))
    for rank, v in zip(np.searchsorted(known, terms), terms, strict=True):
        first, end = (rank, rank + 1) if v in known[rank : rank + 1] else (0, 0)
        counts.append(np.count_nonzero(arrays["bytes"][start[first * blocks] : start[end * blocks]]))
    return np.array(counts, np.int64)


def _starts(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _count(row_start: Array, terms_P: Array, weights_P: Array, num_terms: int, blocks: int) -> tuple[Array, Array]:
    """How many documents of each block hold a term (R, V), and the scale of each term (V,)."""
    count_RV, scale_V = np.zeros((blocks, num_terms), np.int64), np.zeros(num_terms)
    for n in range(len(row_start) - 1):
        for i in range(row_start[n], row_start[n + 1]):
            count_RV[n // BLOCK, terms_P[i]] += 1
            scale_V[terms_P[i]] = max(scale_V[terms_P[i]], weights_P[i])
    return count_RV, scale_V * ((1 + 1e-9) / 255)  # a little above, so that rounding up never needs 256


def _fill(rows: Arrays3, known: Arrays2, begins: Arrays2, runs: Arrays2) -> None:
    """Writes the runs: that of rank u in block r begins at the given places; `number_RU` is -1 for a full one."""
    (row_start, terms_P, weights_P), (terms_U, scale_V) = rows, known
    (begin_RU, number_RU), (documents, bytes_S) = begins, runs
    rank_V = np.zeros(len(scale_V), np.int64)
    rank_V[terms_U] = np.arange(len(terms_U))
    for n in range(len(row_start) - 1):
        at_U, number_U = begin_RU[n // BLOCK], number_RU[n // BLOCK]
        for i in range(row_start[n], row_start[n + 1]):
            rank, byte = rank_V[terms_P[i]], np.ceil(weights_P[i] / scale_V[terms_P[i]])
            if number_U[rank] < 0:
                bytes_S[at_U[rank] + n % BLOCK] = byte
            else:
                bytes_S[at_U[rank]] = byte
                documents[number_U[rank]] = n % BLOCK
                at_U[rank] += 1
                number_U[rank] += 1


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """`_count` and `_fill`, by numba, which reading an index does not need."""
    return njit()(cache=True)(_count), njit()(cache=True)(_fill)

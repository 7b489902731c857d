"""From rows to an inverted index: for each term the documents that hold it, with weights rounded up to 8 bits.

Rounded up, a sum over a query's terms is never below the true score. What it excludes is excluded with proof; the rest is
scored exactly from the rows (stair/index/scoring.py). With 16-bit document numbers within blocks of 65,536, a posting has
three bytes, and the sums of a block stay in the processor's cache. The postings of a term in a block are a run. If more
than one in `FULL` of the block's documents hold the term, the run is full: one byte for each document, zeros included, and
no document numbers. Adding a full run is plain arithmetic on neighbours, eight or more at a time.

N documents, V terms, U terms that occur, R = ceil(N / 65,536) blocks, P non-zeros, S bytes of all runs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from stair.errors import SettingError

BLOCK = 1 << 16
FULL = 5
Arrays = dict[str, NDArray[Any]]


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
    columns = csr.tocsc()
    terms_U = np.flatnonzero(np.diff(columns.indptr))
    starts_U = columns.indptr[terms_U]
    scale_U = np.maximum.reduceat(columns.data, starts_U).astype(np.float64) if len(terms_U) else np.empty(0)
    # a little above max / 255, so that rounding up never needs 256
    scale_U *= (1 + 1e-9) / 255
    rank_P = np.repeat(np.arange(len(terms_U), dtype=np.int64), np.diff(columns.indptr)[terms_U])
    byte_P = np.ceil(columns.data / scale_U[rank_P]).astype(np.uint8)
    document_P = (columns.indices % BLOCK).astype(np.uint16)
    blocks = max(1, -(-csr.shape[0] // BLOCK))
    run_P = rank_P * blocks + columns.indices // BLOCK
    count = np.bincount(run_P, minlength=len(terms_U) * blocks)
    size = np.tile(np.minimum(BLOCK, csr.shape[0] - np.arange(blocks) * BLOCK), len(terms_U))
    full = count * FULL > size
    run_start, number_start = _starts(np.where(full, size, count)), _starts(np.where(full, 0, count))
    full_P = full[run_P]
    # a byte's position: that of its run, plus the document's own in a full run, else the next one
    position_P = (run_start[:-1] - np.where(full, 0, _starts(count)[:-1]))[run_P]
    position_P += np.where(full_P, document_P, np.arange(len(run_P)))
    bytes_S = np.zeros(run_start[-1], np.uint8)
    bytes_S[position_P] = byte_P
    return {
        "row_start": csr.indptr.astype(np.int64),
        "row_terms": csr.indices.astype(np.uint16 if csr.shape[1] <= 1 << 16 else np.uint32),
        "row_weights": csr.data,
        "terms": terms_U.astype(np.int64),
        "scale": scale_U,
        "run_start": run_start,
        "number_start": number_start,
        "documents": document_P[~full_P],
        "bytes": bytes_S,
    }


def _starts(lengths: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

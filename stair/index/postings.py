"""From rows to an inverted index: for each word the documents that hold it, with weights rounded up to 8 bits.

Rounded up, a sum over a query's words is never below the true score: whatever it rules out is out, and the rest is scored
exactly from the rows (stair/index/scoring.py). Eight bits and 16-bit document numbers within blocks of 65,536 make three
bytes a posting, and accumulators of a block that stay in the processor's cache. The postings of a word in a block are a
run. A word that more than one in `FULL` of a block's documents hold has a *full* run: a byte for each document, zeros
included, and no numbers. Adding it up is plain arithmetic on neighbours, eight or more at a time; frequent words are most
of the work of a short query, and their runs hardly grow.

N documents, V words, U words that occur, R = ceil(N / 65,536) blocks, P non-zeros, S bytes of all runs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

BLOCK = 1 << 16
FULL = 5
Arrays = dict[str, NDArray[Any]]


def checked(vectors: Any, words: int) -> sparse.csr_matrix:
    """CSR as an index stores it: float32, words of a row in ascending order, no zeros, no doubles.

    Raises:
        ValueError: if the shape is not (N, words), or a weight is negative or not finite.
    """
    csr = sparse.csr_matrix(vectors, dtype=np.float32)
    if csr is vectors or np.shares_memory(csr.data, getattr(vectors, "data", np.empty(0))):
        csr = csr.copy()
    if csr.shape[1] != words:
        raise ValueError(f"vectors of {csr.shape[1]} words for an index of {words} words")
    if not np.isfinite(csr.data).all() or (csr.data < 0).any():
        raise ValueError("weights of documents must be finite and not negative; STAIR's are")
    csr.sum_duplicates()
    csr.eliminate_zeros()
    return csr


def invert(csr: sparse.csr_matrix) -> Arrays:
    """Arrays of a segment.

    Args:
        csr: (N, V), as `checked` returns it.

    Returns:
        `row_start` (N+1,), `row_words` (P,), `row_weights` (P,): the rows as they are;
        `words` (U,) ascending, `scale` (U,): a weight is at most its byte times its word's scale;
        `run_start` (U·R+1,): where the bytes of a word in a block begin in `bytes` (S,) uint8, `number_start` (U·R+1,): and
        its documents in `documents` uint16, counted within the block; a full run has none there.
    """
    columns = csr.tocsc()
    words_U = np.flatnonzero(np.diff(columns.indptr))
    starts_U = columns.indptr[words_U]
    scale_U = np.maximum.reduceat(columns.data, starts_U).astype(np.float64) if len(words_U) else np.empty(0)
    # a hair above max / 255, so that rounding up never needs 256
    scale_U *= (1 + 1e-9) / 255
    rank_P = np.repeat(np.arange(len(words_U), dtype=np.int64), np.diff(columns.indptr)[words_U])
    byte_P = np.ceil(columns.data / scale_U[rank_P]).astype(np.uint8)
    document_P = (columns.indices % BLOCK).astype(np.uint16)
    blocks = max(1, -(-csr.shape[0] // BLOCK))
    run_P = rank_P * blocks + columns.indices // BLOCK
    count = np.bincount(run_P, minlength=len(words_U) * blocks)
    size = np.tile(np.minimum(BLOCK, csr.shape[0] - np.arange(blocks) * BLOCK), len(words_U))
    full = count * FULL > size
    run_start, number_start = _starts(np.where(full, size, count)), _starts(np.where(full, 0, count))
    full_P = full[run_P]
    # a byte's place: that of its run, and in it the document's own or, where documents have numbers, the next
    place_P = (run_start[:-1] - np.where(full, 0, _starts(count)[:-1]))[run_P]
    place_P += np.where(full_P, document_P, np.arange(len(run_P)))
    bytes_S = np.zeros(run_start[-1], np.uint8)
    bytes_S[place_P] = byte_P
    return {
        "row_start": csr.indptr.astype(np.int64),
        "row_words": csr.indices.astype(np.uint16 if csr.shape[1] <= 1 << 16 else np.uint32),
        "row_weights": csr.data,
        "words": words_U.astype(np.int64),
        "scale": scale_U,
        "run_start": run_start,
        "number_start": number_start,
        "documents": document_P[~full_P],
        "bytes": bytes_S,
    }


def _starts(lengths: NDArray[Any]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

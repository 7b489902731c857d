"""Random sparse rows for tests of the index."""

import numpy as np
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace

V = 300


TOKENS = tuple(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "beach", "people", "##s", *(f"w{v}" for v in range(8, V))])


SPACE = EmbeddingSpace("m" * 64, "dot", TOKENS)


def rows(count, seed=0, density=0.05, words=V):
    """Random sparse rows; few distinct weights, so that scores tie."""
    generator = np.random.default_rng(seed)
    dense = (generator.random((count, words)) < density) * generator.integers(1, 9, (count, words)) / 4
    return sparse.csr_matrix(dense.astype(np.float32))


def embeddings(count, seed=0, prefix="d", space=SPACE, **extra):
    return Embeddings(rows(count, seed), [f"{prefix}{n}" for n in range(count)], space, **extra)

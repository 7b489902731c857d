"""Exact search over sparse embeddings: an inverted index on disk, and what its hits share with a query."""

from stair.index.hits import Hit, SharedTerm
from stair.index.sparse_index import SparseIndex

__all__ = ["Hit", "SharedTerm", "SparseIndex"]

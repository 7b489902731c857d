"""Queries: weighted words as people type them (`dog:2 beach -people`), or a vector, ready for the dot product."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from stair.embeddings import EmbeddingSpace, to_csr
from stair.errors import SettingError

_LARGEST = 1e30  # products with weights of documents stay within float32


@dataclass(frozen=True)
class Query:
    """Term ids (Q,) int64, ascending; their weights (Q,) float32, negative ones keep documents away; V."""

    terms: NDArray[Any]
    weights: NDArray[Any]
    size: int

    def dense(self) -> NDArray[Any]:
        """(V,) float32."""
        dense_V = np.zeros(self.size, np.float32)
        dense_V[self.terms] = self.weights
        return dense_V


def parse_words(text: str) -> dict[str, float]:
    """Reads weighted words: `word:2` weighs 2, `word` 1, `-word` -1, `-word:0.5` -0.5; weights of one word add up.

    Raises:
        SettingError: if there is no word, or a weight is no number.
    """
    weights: dict[str, float] = {}
    for part in text.split():
        sign, rest = (-1.0, part[1:]) if part.startswith("-") and len(part) > 1 else (1.0, part)
        word, colon, number = rest.rpartition(":")
        if not (colon and word):
            word, number = rest, "1"
        try:
            weights[word] = weights.get(word, 0.0) + sign * float(number)
        except ValueError as error:
            wrong = f"weighted word {part!r}: {number!r} is no number; write it as word:1.5"
            raise SettingError(wrong, "words") from error
    if not weights:
        raise SettingError("no words; write some as `dog:2 beach -people`", "words")
    return weights


def query_of_words(
    words: str | Mapping[str, float], space: EmbeddingSpace, tokenize: Callable[[str], list[int]]
) -> Query:
    """The query of weighted words: text for `parse_words`, or weights. A word is a term, or its tokens.

    Raises:
        SettingError: if a word has no token that can be active, or a weight is not finite.
    """
    weights: dict[int, float] = {}
    for word, weight in (parse_words(words) if isinstance(words, str) else words).items():
        if not abs(weight) <= _LARGEST:
            raise SettingError(f"weight {weight} of {word!r} is not a number up to {_LARGEST:g}", "words")
        ids = [space.term_ids[word]] if word in space.term_ids else tokenize(word)
        if not ids:
            raise SettingError(f"the vocabulary has no token of {word!r}", "words")
        for v in ids:
            weights[v] = weights.get(v, 0.0) + weight
    return _query(list(weights), list(weights.values()), space)


def query_of_vector(vector: Any, space: EmbeddingSpace) -> Query:
    """The query of V finite weights: one row of CSR, a tensor or an array; SettingError if it is none of these."""
    if isinstance(vector, Tensor):
        row = to_csr(vector.to_dense().reshape(1, -1), threshold=-math.inf)
    elif sparse.issparse(vector) or isinstance(vector, np.ndarray):
        row = sparse.csr_matrix(vector, dtype=np.float32, copy=True)
    else:
        given = f"query is a {type(vector).__name__}"
        raise SettingError(f"{given}; give a text, a picture (PIL.Image.open(path)), or one row of weights", "query")
    if row.shape != (1, len(space.tokens)):
        raise SettingError(f"query of shape {row.shape}; give one row of {len(space.tokens)} weights", "query")
    if not np.isfinite(row.data).all():
        raise SettingError("a weight of the query is not finite", "query")
    row.sum_duplicates()
    return _query(row.indices, row.data, space)


def _query(terms: Sequence[int], weights: Sequence[float], space: EmbeddingSpace) -> Query:
    terms_Q, weights_Q = np.asarray(terms, np.int64), np.asarray(weights, np.float32)
    terms_Q, weights_Q = terms_Q[weights_Q != 0], weights_Q[weights_Q != 0]
    if space.similarity == "cosine" and len(weights_Q):
        weights_Q = weights_Q / np.float32(np.sqrt(np.sum(weights_Q.astype(np.float64) ** 2)))
    order = np.argsort(terms_Q)
    return Query(terms_Q[order], weights_Q[order], len(space.tokens))

"""Queries: weighted words as people type them (`dog:2 beach -people`), or a vector, ready for the dot product."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from stair.embeddings import EmbeddingSpace
from stair.errors import SettingError

_LARGEST = 1e30  # products with weights of documents stay within float32


@dataclass(frozen=True)
class Query:
    """Term ids (Q,) int64, ascending; their weights (Q,) float32, negative ones keep documents away; V.

    `typed`: words as typed, with the ids of their tokens; empty for an image or a vector. `problem`: why a text has none.
    """

    terms: NDArray[Any]
    weights: NDArray[Any]
    size: int
    typed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    problem: str = ""

    @cached_property
    def own(self) -> frozenset[int]:
        """The tokens of the typed words; all other terms are expansions."""
        return frozenset(v for ids in self.typed.values() for v in ids)

    def dense(self) -> NDArray[Any]:
        """(V,) float32."""
        dense_V = np.zeros(self.size, np.float32)
        dense_V[self.terms] = self.weights
        return dense_V


def is_known(ids: Sequence[int], tokens: Sequence[str]) -> bool:
    """Whether the tokens of a word can mean it: it is one token, or a part of it has three letters or more."""
    return len(ids) == 1 or any(len(tokens[v].removeprefix("##")) >= 3 for v in ids)


def problem_of(text: str, typed: Mapping[str, Sequence[int]], tokens: Sequence[str]) -> str:
    """Why a text finds nothing: it is empty, or the vocabulary knows none of its words; "" if neither."""
    if any(is_known(ids, tokens) for ids in typed.values()):
        return ""
    return f"the vocabulary has no word of {text!r:.80}" if text.strip() else "the query is empty; write some words"


def idf_factor(counts: NDArray[Any], documents: int) -> NDArray[Any]:
    """`log((N + 1) / (n + 0.5))` for terms that n of N documents have, float32; that of BM25 in Lucene (recalled).

    It is above 0 for each term, also for one that all documents have.
    """
    factors: NDArray[Any] = np.log((documents + 1) / (counts + 0.5)).astype(np.float32)
    return factors


def idf(query: Query, counts_Q: NDArray[Any], documents: int, space: EmbeddingSpace) -> Query:
    """The query with weights multiplied by the `idf_factor` of their terms; `counts_Q` of N documents have each."""
    weighted = _query(query.terms, query.weights * idf_factor(counts_Q, documents), space)
    return replace(weighted, typed=query.typed, problem=query.problem)


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
            wrong = f"weighted word {part!r}: {number!r} is not a number; write it as word:1.5"
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
    typed: dict[str, list[int]] = {}
    for word, weight in (parse_words(words) if isinstance(words, str) else words).items():
        if not abs(weight) <= _LARGEST:
            raise SettingError(f"weight {weight} of {word!r} is not a number up to {_LARGEST:g}", "words")
        ids = [space.term_ids[word]] if word in space.term_ids else tokenize(word)
        if not ids:
            raise SettingError(f"the vocabulary has no token of {word!r}", "words")
        typed[word] = ids
        for v in ids:
            weights[v] = weights.get(v, 0.0) + weight
    terms = sorted(v for v, weight in weights.items() if np.float32(weight) != 0)
    found = _query(np.asarray(terms, np.int64), np.asarray([weights[v] for v in terms], np.float32), space)
    return replace(found, typed=typed)


def queries_of_rows(rows: Any, space: EmbeddingSpace) -> list[Query]:
    """The queries of rows of V finite weights, one row alone or (B, V): CSR, a tensor or an array; SettingError if none."""
    if isinstance(rows, Tensor):
        rows = rows.detach().float().cpu().to_dense().numpy()
    if not (sparse.issparse(rows) or isinstance(rows, np.ndarray)):
        given = f"query is a {type(rows).__name__}"
        raise SettingError(f"{given}; give a text, an image (PIL.Image.open(path)), or rows of weights", "query")
    csr = sparse.csr_matrix(rows, dtype=np.float32)
    if csr.shape[1] != len(space.tokens):
        raise SettingError(f"query of shape {csr.shape}; give rows of {len(space.tokens)} weights", "query")
    if not np.isfinite(csr.data).all():
        wrong = np.flatnonzero(~np.isfinite(csr.data))[0]
        row = int(np.searchsorted(csr.indptr, wrong, side="right"))
        raise SettingError(f"a weight of query {row} is not finite", "query")
    if not csr.has_canonical_format or not csr.data.all():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    terms = csr.indices.astype(np.int64)
    return [_query(terms[a:b], csr.data[a:b], space) for a, b in pairwise(csr.indptr.tolist())]


def _query(terms_Q: NDArray[Any], weights_Q: NDArray[Any], space: EmbeddingSpace) -> Query:
    if space.similarity == "cosine" and len(weights_Q):
        weights_Q = weights_Q / np.float32(np.sqrt(np.sum(weights_Q.astype(np.float64) ** 2)))
    return Query(terms_Q, weights_Q, len(space.tokens))

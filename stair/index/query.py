"""What people type into a word search: `dog:2 beach -people`, words with weights, without any encoder."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from stair.embeddings import EmbeddingSpace
from stair.index.scoring import Query

_LARGEST = 1e30  # products with weights of documents stay within float32


def parse_words(text: str) -> dict[str, float]:
    """Reads weighted words.

    Args:
        text: words between spaces; `word:2` weighs 2, `word` 1, `-word` -1, `-word:0.5` -0.5. Twice the same word adds up.

    Raises:
        ValueError: if there is no word, or a weight is no number.
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
            raise ValueError(f"weighted word {part!r}: {number!r} is no number; write it as word:1.5") from error
    if not weights:
        raise ValueError("no words; write some as `dog:2 beach -people`")
    return weights


def words_query(
    words: str | Mapping[str, float], space: EmbeddingSpace, pieces_of: Callable[[str], list[int]]
) -> Query:
    """The query of weighted words.

    Args:
        words: weights by word, or a text for `parse_words`. A word that is a piece of the vocabulary is that piece, another
            one its word pieces.
        space: of the index.
        pieces_of: gives the word pieces of a word, by id.

    Raises:
        ValueError: if a word has no piece that can be active, or a weight is not finite.
    """
    weights: dict[int, float] = {}
    for word, weight in (parse_words(words) if isinstance(words, str) else words).items():
        if not abs(weight) <= _LARGEST:
            raise ValueError(f"weight {weight} of {word!r} is not a number up to {_LARGEST:g}")
        pieces = [space.place[word]] if word in space.place else pieces_of(word)
        if not pieces:
            raise ValueError(f"the vocabulary has no piece of {word!r}")
        for v in pieces:
            weights[v] = weights.get(v, 0.0) + weight
    return weights_query(list(weights), list(weights.values()), space)


def weights_query(words: Sequence[int], weights: Sequence[float], space: EmbeddingSpace) -> Query:
    """A query of words by id, scaled to length 1 where the space compares by cosine; weights of 0 are left out."""
    word_Q, weight_Q = np.asarray(words, np.int64), np.asarray(weights, np.float32)
    word_Q, weight_Q = word_Q[weight_Q != 0], weight_Q[weight_Q != 0]
    if space.similarity == "cosine" and len(weight_Q):
        weight_Q = weight_Q / np.float32(np.sqrt(np.sum(weight_Q.astype(np.float64) ** 2)))
    order = np.argsort(word_Q)
    return Query(word_Q[order], weight_Q[order], len(space.tokens))

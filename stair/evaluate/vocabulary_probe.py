"""The vocabulary test: is the right word the first of all words for an image? STAIR's weights against CLIP's nearest words.

A STAIR embedding is read straight off: its words in the order of their weights. For a dense model every word of the
vocabulary is embedded as a text of its own, without a template, and the words are ordered by cosine with the image.

Right words of an image are the words of its class name, or of all its captions: those that are whole in the vocabulary (not
cut into pieces), in letters, at least three of them, and none of scikit-learn's English stop words. An image without such a
word is left out, and counted. The rank is that of the best right word among all words that are not right ones; ties count
against, so a right word that is not active ranks behind the whole vocabulary.

Dense models choose among whole words only (continuations such as `##ing` would be doubles of others), sparse ones among all
V dimensions.

N images, V words, W words a dense model chooses among, Q images of a block.
"""

import re
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from stair.errors import import_extra
from stair.evaluate.models import EvaluatedModel
from stair.ranking import QUERIES, SparseRows
from stair.vocabulary import Vocabulary

_KS = (1, 5, 10)
_LETTERS = re.compile(r"[^\W\d_]{3,}")


def right_words(vocabulary: Vocabulary, texts: Sequence[str]) -> list[int]:
    """Sorted ids of the whole words of these texts that name something."""
    stop = _stop_words()
    found = set()
    for text in texts:
        ids = vocabulary.pieces(text)
        continues = [vocabulary.tokens[i].startswith("##") for i in ids] + [False]
        for place, i in enumerate(ids):
            word = vocabulary.tokens[i]
            if not (continues[place] or continues[place + 1]) and _LETTERS.fullmatch(word) and word not in stop:
                found.add(i)
    return sorted(found)


def _stop_words() -> frozenset[str]:
    text = import_extra("sklearn.feature_extraction.text", "scikit-learn", "evaluate")
    return frozenset(text.ENGLISH_STOP_WORDS)


def word_rows(evaluated: EvaluatedModel, batch_size: int = 256) -> tuple[SparseRows, Tensor]:
    """Every whole word of the vocabulary embedded as a text: comparable rows, and (W,) int64 which words they are."""
    vocabulary = evaluated.vocabulary
    assert vocabulary is not None
    never = set(vocabulary.never_active)
    ids = [v for v, token in enumerate(vocabulary.tokens) if v not in never and not token.startswith("##")]
    rows = []
    for first in range(0, len(ids), batch_size):
        words = vocabulary.words(ids[first : first + batch_size])
        rows.append(SparseRows.of(evaluated.encoder.encode_text(words).float().cpu()).unit())
    return SparseRows.cat(rows), torch.tensor(ids)


def vocabulary_probe(
    images: SparseRows, right: Sequence[Sequence[int]], width: int, words: tuple[SparseRows, Tensor] | None = None
) -> dict[str, float]:
    """Ranks each image's right words.

    Args:
        images: N comparable rows.
        right: ids of the right words of each image (`right_words`).
        width: V, or the width of a dense embedding.
        words: of a dense model (`word_rows`); None: the columns of `images` are the words.

    Returns:
        `top1`, `top5`, `top10`, in 0 to 1, `median_rank`; numbers of `images` ranked and `skipped`; under
        `frequency_baseline/` the same shares if every image had the same words, the most frequent right ones first.
    """
    place = {} if words is None else {int(v): row for row, v in enumerate(words[1])}
    word_WV = None if words is None else words[0].matrix(width)
    ranks: list[int] = []
    for first in range(0, len(right), QUERIES):
        last = min(first + QUERIES, len(right))
        block = images.columns(first, last, width)
        score_QW = (block if word_WV is None else word_WV @ block).T
        for score_W, wanted in zip(score_QW, right[first:last], strict=True):
            at = list(wanted) if words is None else [place[v] for v in wanted if v in place]
            if at:
                # what is no number counts against: as a right word it is last, as another it is ahead
                best = score_W[at].nan_to_num(float("-inf")).max()
                ranks.append(1 + int((~(score_W < best)).sum()) - int((~(score_W[at] < best)).sum()))
    found = torch.tensor(ranks, dtype=torch.float64)
    median = statistics.median(ranks) if ranks else float("nan")
    figures = {"median_rank": median, "images": float(len(found)), "skipped": float(len(right) - len(found))}
    guessed = torch.tensor(_commonest(right), dtype=torch.float64)
    return _shares(found) | {f"frequency_baseline/{key}": share for key, share in _shares(guessed).items()} | figures


def _shares(rank_N: Tensor) -> dict[str, float]:
    return {f"top{k}": float((rank_N <= k).double().mean()) for k in _KS}


def _commonest(right: Sequence[Sequence[int]]) -> list[int]:
    """The ranks if the same words were said of every image, those right for most images first."""
    count = Counter(i for wanted in right for i in set(wanted))
    times = sorted(count.values())
    ranks = []
    for wanted in filter(None, right):
        best = max(count[i] for i in wanted)
        as_common = len(times) - bisect_left(times, best)
        ranks.append(1 + as_common - sum(count[i] == best for i in set(wanted)))
    return ranks

"""The vocabulary probe: is the heaviest term of an image a correct one?

A sparse model's terms are ranked by weight, over all V dimensions. For a dense model each whole word of the vocabulary is
embedded as a text, without a template, and ranked by cosine. Correct terms of an image are those of its class name, or of
all its captions: whole words of at least three letters, no English stop words (scikit-learn). The rank is that of the best
correct term among all incorrect ones; ties count against the model, so an inactive term ranks behind all others.

N images, V terms, W candidates, Q images of a block.
"""

import re
import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from stair.evaluate.models import EvaluatedModel
from stair.ranking import QUERIES, SparseRows
from stair.vocabulary import STOP_WORDS, Vocabulary

_LETTERS = re.compile(r"[^\W\d_]{3,}")


def correct_terms(vocabulary: Vocabulary, texts: Sequence[str]) -> list[int]:
    """Sorted ids of the whole words of these texts that name something."""
    terms = set()
    for text in texts:
        ids = vocabulary.token_ids(text)
        for v, (token, following) in zip(ids, pairwise([*vocabulary.tokens_of(ids), ""]), strict=True):
            if _LETTERS.fullmatch(token) and not following.startswith("##") and token not in STOP_WORDS:
                terms.add(v)
    return sorted(terms)


def term_rows(evaluated: EvaluatedModel, batch_size: int = 256) -> tuple[SparseRows, Tensor]:
    """Each whole word of the vocabulary, embedded as a text: W unit rows, and (W,) int64 their ids."""
    vocabulary = evaluated.vocabulary
    assert vocabulary is not None
    never = set(vocabulary.never_active)
    ids = [v for v, token in enumerate(vocabulary.tokens) if v not in never and not token.startswith("##")]
    rows = []
    for first in tqdm(range(0, len(ids), batch_size), "vocabulary", unit="batch", disable=None):
        words = vocabulary.tokens_of(ids[first : first + batch_size])
        rows.append(SparseRows.of(evaluated.encoder.encode_text(words).float().cpu()).unit())
    return SparseRows.cat(rows), torch.tensor(ids)


def vocabulary_probe(
    images: SparseRows, correct: Sequence[Sequence[int]], width: int, terms: tuple[SparseRows, Tensor] | None = None
) -> dict[str, float]:
    """Ranks each image's correct terms.

    Args:
        images: N comparable rows of a width.
        correct: ids of the correct terms of each image (`correct_terms`).
        width: of the rows.
        terms: candidates of a dense model (`term_rows`); None: the columns of `images`.

    Returns:
        `top1`, `top5`, `top10`, in 0 to 1, `median_rank`; `images` ranked, and `skipped` without a correct term; under
        `frequency_baseline/` the same shares if each term scored the number of images for which it is correct.
    """
    candidate = {} if terms is None else {v: w for w, v in enumerate(terms[1].tolist())}
    frequency_V = torch.bincount(torch.tensor([v for ids in correct for v in ids], dtype=torch.int64))
    ranks, baseline = [], []
    for first in range(0, len(correct), QUERIES):
        score_WQ = images.columns(first, min(first + QUERIES, len(correct)), width)
        score_WQ = score_WQ if terms is None else terms[0].matrix(width) @ score_WQ
        for score_W, ids in zip(score_WQ.T, correct[first : first + QUERIES], strict=True):
            if ids:
                ranks.append(_rank(score_W, [candidate.get(v, v) for v in ids]))
                baseline.append(_rank(frequency_V.float(), list(ids)))
    return {
        **_shares(ranks),
        **{f"frequency_baseline/{key}": share for key, share in _shares(baseline).items()},
        "median_rank": statistics.median(ranks) if ranks else float("nan"),
        "images": float(len(ranks)),
        "skipped": float(len(correct) - len(ranks)),
    }


def _rank(score_W: Tensor, correct: list[int]) -> int:
    """NaN counts against the model: a correct term with it is last, another one ahead."""
    best = score_W[correct].nan_to_num(float("-inf")).max()
    return 1 + int((~(score_W < best)).sum()) - int((~(score_W[correct] < best)).sum())


def _shares(ranks: list[int]) -> dict[str, float]:
    return {f"top{k}": float((torch.tensor(ranks) <= k).double().mean()) for k in (1, 5, 10)}

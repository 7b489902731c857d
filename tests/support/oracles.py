"""Retrieval metrics by their definition, in plain loops."""

import math

import numpy as np

KS = (1, 2, 5)


def oracle_ranks(image, text, owner) -> tuple[list[int], list[int]]:
    """image (N, V), text (C, V), owner (C,) row of each caption's image: ranks i2t and t2i, by counting."""
    i2t, t2i = [], []
    for i in range(len(image)):
        own = [float(image[i] @ text[c]) for c in range(len(text)) if owner[c] == i]
        others = [float(image[i] @ text[c]) for c in range(len(text)) if owner[c] != i]
        if own:
            i2t.append(1 + sum(s >= max(own) for s in others))
    for c in range(len(text)):
        own_score = float(image[owner[c]] @ text[c])
        t2i.append(1 + sum(float(image[i] @ text[c]) >= own_score for i in range(len(image)) if i != owner[c]))
    return i2t, t2i


def oracle_gain(scores: np.ndarray, own: np.ndarray) -> float:
    """nDCG@10 of one query with the pessimistic order: of equal scores, wrong answers first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], own[i]))
    gain = sum(own[i] / math.log2(2 + place) for place, i in enumerate(order[:10]))
    return gain / sum(1 / math.log2(2 + place) for place in range(min(10, own.sum())))


def oracle(image, text, owner, ks=KS) -> dict[str, float]:
    figures = {}
    score, own = image @ text.T, np.arange(len(image))[:, None] == owner[None, :]
    gains = (
        [oracle_gain(score[i], own[i]) for i in range(len(image)) if own[i].any()],
        [oracle_gain(score[:, c], own[:, c]) for c in range(len(text))],
    )
    for name, ranks, gain in zip(("i2t", "t2i"), oracle_ranks(image, text, owner), gains, strict=True):
        figures |= {f"{name}/recall@{k}": np.mean([r <= k for r in ranks]) for k in ks}
        figures[f"{name}/median_rank"] = np.median(ranks)
        figures[f"{name}/mrr"] = np.mean([1 / r for r in ranks])
        figures[f"{name}/ndcg@10"] = np.mean(gain)
    return figures

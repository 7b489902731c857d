"""What a trained model or a baseline reaches on a split: recall, active terms, vocabulary probe, pruned images.

N images, C captions, V terms, codes, or the width of the dense embedding.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from benchmarks.real_encoders.embedders import Embedder
from benchmarks.real_encoders.model import Data
from stair.evaluate.term_evidence import Share, class_of
from stair.evaluate.vocabulary_probe import vocabulary_probe
from stair.ranking import SparseRows, retrieval_ranks

WEIGHED = ("grounded", "related", "unproven", "code", "stop word")  # classes of `stair dictionary`


def _ranks(images: SparseRows, texts: SparseRows, owner_C: Tensor) -> dict[str, Tensor]:
    return {way: ranks.first for way, ranks in retrieval_ranks(images, texts, owner_C).items()}


def _recalls(ranks: dict[str, Tensor]) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and their sum."""
    found = {f"{way}@{k}": 100 * float((ranks[way] <= k).float().mean()) for way in ("t2i", "i2t") for k in (1, 5, 10)}
    return found | {"sum": sum(found.values())}


@torch.inference_mode()
def measure(embedder: Embedder, split: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a split, in percent or terms, and the rank of each query's best right answer."""
    images, texts, scores_NC = embedder.images(split), embedder.texts(split), embedder.scores(split)
    owner_C = torch.tensor([i for i, captions in enumerate(embedder.data.ids[split]) for _ in captions])
    if scores_NC is not None:  # a text is then the column of its number
        pair = SparseRows.of(scores_NC), SparseRows.of(torch.eye(len(owner_C)))
    else:
        pair = SparseRows.of(images).unit(), SparseRows.of(texts).unit()
    ranks = _ranks(*pair, owner_C)
    found = _recalls(ranks)
    if embedder.columns != "dense":
        found |= {f"terms_{side}": _active(rows) for side, rows in (("image", images), ("text", texts))}
    if scores_NC is None:
        found |= _named(embedder, split, images)
        if embedder.columns != "dense":
            for k in (64, 16):
                cut = _recalls(_ranks(SparseRows.of(images).largest(k).unit(), pair[1], owner_C))
                found |= {f"{key} of {k}": cut[key] for key in ("t2i@1", "i2t@1", "sum")}
                found |= {f"kept {key} of {k}": 100 * cut[key] / max(found[key], 1e-9) for key in ("t2i@1", "i2t@1")}
    return found, ranks


def _active(rows_NV: Tensor) -> float:
    return float((rows_NV > 0).sum(1).float().mean())


def _named(embedder: Embedder, split: str, images_NV: Tensor) -> dict[str, float]:
    """Whether names of columns are right: the heaviest one, and the share of the ten heaviest that are in captions."""
    words, found = embedder.words(), {}
    if embedder.columns == "terms" or words is not None:
        correct = embedder.data.correct[split]
        probe = vocabulary_probe(SparseRows.of(images_NV).unit(), correct, images_NV.shape[1], words)
        found |= {"heaviest": 100 * probe["top1"], "heaviest_baseline": 100 * probe["frequency_baseline/top1"]}
    if embedder.columns == "terms":
        best = images_NV.topk(min(10, images_NV.shape[1]))
        hits = embedder.data.held(split).gather(1, best.indices) & (best.values > 0)
        found["grounding"] = 100 * float(hits.float().mean())
        found |= _weights(embedder.data, split, images_NV)
    return found


def _weights(data: Data, split: str, images_NV: Tensor) -> dict[str, float]:
    """The share of the weight on images that terms of each class have, in percent."""
    rows_NV = csr_matrix(images_NV.numpy())
    own, related = (Share.of(rows_NV, held[split]) for held in (data.in_captions, data.near_captions))
    weight_V, found = images_NV.sum(0).tolist(), dict.fromkeys(WEIGHED, 0.0)
    for v in np.flatnonzero(own.active_V).tolist():
        found["stop word" if data.stop_V[v] else class_of(own, related, v)] += weight_V[v]
    return {f"weight {name}": 100 * weight / max(sum(weight_V), 1e-9) for name, weight in found.items()}

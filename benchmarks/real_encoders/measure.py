"""What a trained model reaches on a split: recall, active terms, vocabulary probe, pruned images.

B images, K captions of each, P positions, D width, V terms (or the width of the dense embedding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.real_encoders.model import Data, Model, images_of, texts_of, unit
from stair.evaluate.vocabulary_probe import vocabulary_probe
from stair.ranking import SparseRows, retrieval_ranks


@torch.inference_mode()
def embed(model: Model, data: Data, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) images, (C, V) texts, (C,) the image of each text."""
    ids = data.ids[split]
    owner = torch.tensor([i for i, image in enumerate(ids) for _ in image])
    images_NV = images_of(model.eval(), data.maps[split][0])
    texts_CV = texts_of(model, data, [caption for image in ids for caption in image])
    return images_NV.float(), texts_CV.float(), owner


def _word_rows(model: Model, data: Data) -> tuple[SparseRows, Tensor]:
    """Each whole word of the vocabulary, embedded by a dense model as a text, with its id."""
    never = set(data.never)
    ids = [v for v, token in enumerate(data.tokens) if v not in never and not token.startswith("##")]
    first, last = (data.tokens.index(token) for token in ("[CLS]", "[SEP]"))
    return SparseRows.of(unit(texts_of(model, data, [[first, v, last] for v in ids]))), torch.tensor(ids)


def _ranks(images: SparseRows, texts_CV: Tensor, owner_C: Tensor) -> dict[str, Tensor]:
    found = retrieval_ranks(images.unit(), SparseRows.of(texts_CV).unit(), owner_C)
    return {way: ranks.first for way, ranks in found.items()}


def _recalls(ranks: dict[str, Tensor]) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and their sum."""
    found = {f"{way}@{k}": 100 * float((ranks[way] <= k).float().mean()) for way in ("t2i", "i2t") for k in (1, 5, 10)}
    return found | {"sum": sum(found.values())}


@torch.inference_mode()
def measure(model: Model, data: Data, split: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a split, in percent or terms, and the rank of each query's best right answer."""
    images, texts, owner = embed(model, data, split)
    rows = SparseRows.of(images)
    ranks = _ranks(rows, texts, owner)
    found = _recalls(ranks) | {"train_loss": model.last_loss}
    terms = _word_rows(model, data) if model.settings.kind == "clip" else None
    probe = vocabulary_probe(rows.unit(), data.correct[split], images.shape[1], terms)
    found |= {"heaviest": 100 * probe["top1"], "heaviest_baseline": 100 * probe["frequency_baseline/top1"]}
    if model.settings.kind == "clip":
        return found, ranks
    order = images.topk(min(10, images.shape[1]))
    hits = data.held(split).gather(1, order.indices) & (order.values > 0)
    found |= {
        "terms_image": float((images > 0).sum(1).float().mean()),
        "terms_text": float((texts > 0).sum(1).float().mean()),
        "grounding": 100 * float(hits.float().mean()),
    }
    for k in (64, 16):
        cut = _recalls(_ranks(rows.largest(k), texts, owner))
        found |= {f"{key} of {k}": cut[key] for key in ("t2i@1", "i2t@1", "sum")}
        found |= {f"kept {key} of {k}": 100 * cut[key] / max(found[key], 1e-9) for key in ("t2i@1", "i2t@1")}
    return found, ranks

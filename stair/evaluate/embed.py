"""One pass over a set: embeds everything, keeps it sparse, and measures the words on the way.

N images, C captions, V words (or the width of a dense embedding), B images of a batch.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stair.evaluate.models import Cutting, EvaluatedModel
from stair.evaluate.sets import EvaluationSet, Sample, batches
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.ranking import SparseRows
from stair.set_counts import SetCounts, image_hashes, text_captions, token_captions
from stair.towers import TwoTowers


@dataclass(frozen=True)
class Embedded:
    """What one pass leaves."""

    images: SparseRows  # N rows of weights as the model gives them; dense models have no zeros
    texts: SparseRows  # C rows
    owner: Tensor  # (C,) int64, the image of each caption
    captions: list[list[str]]  # of each image
    labels: Tensor  # (N,) int64, -1 where an image has no class
    width: int  # V
    figures: dict[str, float]  # of words, sparsity and expansion; empty for dense models
    image_hash: Tensor  # (N,) int64, equal for images of equal pixels
    counts: dict[str, int]  # of `SetCounts`
    seconds: float  # spent on reading and embedding

    def comparable(self, similarity: str) -> tuple[SparseRows, SparseRows]:
        """Images and texts, ready for the dot product."""
        return (self.images.unit(), self.texts.unit()) if similarity == "cosine" else (self.images, self.texts)


def embed(evaluated: EvaluatedModel, what: EvaluationSet, batch_size: int = 64, words: int = 10) -> Embedded:
    """Embeds a set.

    Args:
        evaluated: the model.
        what: the set.
        batch_size: images at a time, with all their captions.
        words: K of grounding@K.
    """
    start = time.perf_counter()
    images: list[SparseRows] = []
    texts: list[SparseRows] = []
    metrics, counts = _Words(evaluated, words), SetCounts()
    hashes: list[Tensor] = []
    captions: list[list[str]] = []
    labels: list[int] = []
    width = 1
    with torch.no_grad():
        for batch in batches(what.samples, batch_size):
            own = [list(sample.captions) if what.retrieval else [] for sample in batch]
            flat = [text for texts_of_image in own for text in texts_of_image]
            image_BV = evaluated.encoder.encode_image([sample.image for sample in batch]).float().cpu()
            text_CV = evaluated.encoder.encode_text(flat).float().cpu() if flat else image_BV[:0]
            images.append(SparseRows.of(image_BV))
            texts.append(SparseRows.of(text_CV))
            metrics.add(image_BV, text_CV, flat, [len(texts_of_image) for texts_of_image in own])
            hashes.append(image_hashes([sample.image for sample in batch]))
            _count(counts, evaluated, batch, hashes[-1], len(captions))
            captions += [list(sample.captions) for sample in batch]
            labels += [-1 if sample.label is None else sample.label for sample in batch]
            width = image_BV.shape[1]
    captions_N = torch.tensor([len(own) if what.retrieval else 0 for own in captions])
    return Embedded(
        images=SparseRows.cat(images),
        texts=SparseRows.cat(texts),
        owner=torch.arange(len(captions)).repeat_interleave(captions_N),
        captions=captions,
        labels=torch.tensor(labels),
        width=width,
        figures=metrics.figures(),
        image_hash=torch.cat(hashes),
        counts=_known(counts.compute(), evaluated),
        seconds=time.perf_counter() - start,
    )


def _count(counts: SetCounts, evaluated: EvaluatedModel, batch: list[Sample], image_hash: Tensor, first: int) -> None:
    texts = [text for sample in batch for text in sample.captions]
    encoder = evaluated.encoder
    if isinstance(encoder, TwoTowers):
        longest, encoded = encoder.config.text.max_tokens, encoder.vocabulary.encode(texts)
        cut = torch.tensor([len(ids) > longest for ids in encoded], dtype=torch.bool)
        read = token_captions(encoder.vocabulary, *encoder.vocabulary.pad(encoded, longest), cut)
    else:
        read = text_captions(texts, encoder.cut(texts) if isinstance(encoder, Cutting) else None)
    image_id = torch.arange(first, first + len(batch))
    owner = image_id.repeat_interleave(torch.tensor([len(sample.captions) for sample in batch]))
    counts.update(image_hash, read, image_id, owner)


def _known(counts: dict[str, int], evaluated: EvaluatedModel) -> dict[str, int]:
    """Without counts that a model with another tokenizer does not state."""
    if not isinstance(evaluated.encoder, TwoTowers):
        del counts["captions_with_unknown_tokens"]
        if not isinstance(evaluated.encoder, Cutting):
            del counts["cut_captions"]
    return counts


class _Words:
    """The metrics of words, fed batch by batch; nothing for models whose dimensions have no names."""

    def __init__(self, evaluated: EvaluatedModel, words: int) -> None:
        self.vocabulary, self.seen = evaluated.words, 0
        self.metrics: dict[str, Any] = {}
        if self.vocabulary is not None:
            size = len(self.vocabulary)
            self.metrics = {
                "sparsity": SparsityStats(size),
                "grounding": Grounding(size, min(words, size)),
                "expansion": Expansion(size),
            }

    def add(self, image_BV: Tensor, text_CV: Tensor, captions: list[str], counts: list[int]) -> None:
        if self.vocabulary is None:
            return
        image_id = torch.arange(self.seen, self.seen + len(image_BV))
        self.seen += len(image_BV)
        caption_image = image_id.repeat_interleave(torch.tensor(counts))
        self.metrics["sparsity"].update(image_BV, text_CV)
        if captions:
            ids_CT, mask_CT = self.vocabulary.tokenize(captions, 10_000)
            own_CV = self.vocabulary.in_caption_terms(ids_CT, mask_CT)
            self.metrics["grounding"].update(image_BV, own_CV, image_id, caption_image)
            self.metrics["expansion"].update(text_CV, own_CV, image_id, caption_image)

    def figures(self) -> dict[str, float]:
        told = {group: metric for group, metric in self.metrics.items() if metric.update_called}
        return {f"{group}/{k}": float(v) for group, metric in told.items() for k, v in metric.compute().items()}

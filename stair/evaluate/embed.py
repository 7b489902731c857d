"""One pass over a set: embeds everything, keeps it sparse, and measures the words on the way.

N images, C captions, V words (or the width of a dense embedding), B images of a batch.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stair.evaluate.scored import Scored
from stair.evaluate.sets import EvaluationSet, Samples, batches
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.ranking import SparseRows


@dataclass(frozen=True)
class Embedded:
    """What one pass leaves.

    Attributes:
        images, texts: weights as the model gives them, N and C rows; dense models have no zeros.
        owner: (C,) int64, the image of each caption.
        captions: of each image.
        labels: (N,) int64, -1 where an image has no class.
        width: V.
        figures: of words, sparsity and expansion; empty for dense models.
        seconds: spent on reading and embedding.
    """

    images: SparseRows
    texts: SparseRows
    owner: Tensor
    captions: list[list[str]]
    labels: Tensor
    width: int
    figures: dict[str, float]
    seconds: float

    def comparable(self, similarity: str) -> tuple[SparseRows, SparseRows]:
        """Images and texts, ready for the dot product."""
        return (self.images.unit(), self.texts.unit()) if similarity == "cosine" else (self.images, self.texts)


def embed(scored: Scored, what: EvaluationSet, batch_size: int = 64, words: int = 10) -> Embedded:
    """Embeds a set.

    Args:
        scored: the model.
        what: the set.
        batch_size: images at a time, with all their captions.
        words: K of grounding@K.
    """
    start = time.perf_counter()
    images: list[SparseRows] = []
    texts: list[SparseRows] = []
    metrics = _Words(scored, words)
    captions: list[list[str]] = []
    labels: list[int] = []
    width = 1
    with torch.no_grad():
        for batch in batches(what.samples, batch_size):
            image_BV = scored.encoder.encode_image([sample.image for sample in batch]).float().cpu()
            told = [text for sample in batch for text in sample.captions] if what.retrieval else []
            text_CV = scored.encoder.encode_text(told).float().cpu() if told else image_BV[:0]
            images.append(SparseRows.of(image_BV))
            texts.append(SparseRows.of(text_CV))
            metrics.add(image_BV, text_CV, told, [len(s.captions) if what.retrieval else 0 for s in batch])
            captions += [list(sample.captions) for sample in batch]
            labels += [-1 if sample.label is None else sample.label for sample in batch]
            width = image_BV.shape[1]
    counts = torch.tensor([len(own) if what.retrieval else 0 for own in captions])
    owner = torch.arange(len(captions)).repeat_interleave(counts)
    seconds = time.perf_counter() - start
    rows = SparseRows.cat(images), SparseRows.cat(texts)
    return Embedded(*rows, owner, captions, torch.tensor(labels), width, metrics.figures(), seconds)


def embed_images(scored: Scored, samples: Samples, batch_size: int = 64) -> tuple[SparseRows, Tensor]:
    """Comparable embeddings of those images that have a label, and (N,) int64 their labels."""
    rows: list[SparseRows] = []
    labels: list[int] = []
    for batch in batches(samples, batch_size):
        rows.append(SparseRows.of(scored.encoder.encode_image([sample.image for sample in batch]).float().cpu()))
        labels += [-1 if sample.label is None else sample.label for sample in batch]
    all_rows, label_N = SparseRows.cat(rows), torch.tensor(labels)
    comparable = all_rows.unit() if scored.encoder.similarity == "cosine" else all_rows
    return comparable.only(label_N >= 0), label_N[label_N >= 0]


class _Words:
    """The metrics of words, fed batch by batch; nothing for models whose dimensions have no names."""

    def __init__(self, scored: Scored, words: int) -> None:
        self.vocabulary, self.seen = scored.words, 0
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
            own_CV = self.vocabulary.own_words(ids_CT, mask_CT)
            self.metrics["grounding"].update(image_BV, own_CV, image_id, caption_image)
            self.metrics["expansion"].update(text_CV, own_CV, image_id, caption_image)

    def figures(self) -> dict[str, float]:
        told = {group: metric for group, metric in self.metrics.items() if metric.update_called}
        return {f"{group}/{k}": float(v) for group, metric in told.items() for k, v in metric.compute().items()}

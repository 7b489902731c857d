"""Evaluates a model on sets: embeds each set once, then computes plain values for tables, JSON and pages.

N images, C captions, V terms (or the width of a dense embedding).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stair.evaluate.classify import TEMPLATES, class_rows, linear_probe, zero_shot
from stair.evaluate.models import EvaluatedModel
from stair.evaluate.prune import cost, curve
from stair.evaluate.sets import EvaluationSet
from stair.evaluate.vocabulary_probe import correct_terms, term_rows, vocabulary_probe
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.ranking import QUERIES, SparseRows, rank_figures, retrieval_ranks
from stair.set_counts import Captions, SetCounts, class_counts, image_hashes, text_captions, token_captions
from stair.towers import TwoTowers
from stair.vocabulary import Vocabulary

KS = (1, 5, 10)
TIES = "ties count against: an answer ranks behind all wrong ones that score the same"


@dataclass(frozen=True)
class EmbeddedSet:
    """Embeddings and counts of a set."""

    images: SparseRows  # N rows of weights as the model gives them; dense models have no zeros
    texts: SparseRows  # C rows
    owner: Tensor  # (C,) int64, the image of each caption
    captions: list[list[str]]  # of each image
    labels: Tensor  # (N,) int64, -1 for images without class
    width: int  # V
    figures: dict[str, float]  # of sparsity, grounding and expansion; empty for dense models
    image_hash: Tensor  # (N,) int64, equal for images of equal pixels
    counts: dict[str, int]  # of `SetCounts`
    seconds: float  # to read and embed

    def comparable(self, similarity: str) -> tuple[SparseRows, SparseRows]:
        """Images and texts, ready for the dot product."""
        return (self.images.unit(), self.texts.unit()) if similarity == "cosine" else (self.images, self.texts)


@torch.no_grad()
def embed(evaluated: EvaluatedModel, what: EvaluationSet, batch_size: int = 64, top_k: int = 10) -> EmbeddedSet:
    """Embeds a set, `batch_size` images at a time with all their captions; `top_k` is the K of grounding@K."""
    start, encoder, vocabulary, counts = time.perf_counter(), evaluated.encoder, evaluated.terms, SetCounts()
    V = len(vocabulary) if vocabulary else 1
    sparsity, grounding, expansion = SparsityStats(V), Grounding(V, min(top_k, V)), Expansion(V)
    images, texts, owners, hashes, width = [], [], [], [], 1
    captions: list[list[str]] = []
    labels: list[int] = []
    for first in tqdm(range(0, len(what.samples), batch_size), what.name, unit="batch", disable=None):
        batch = [what.samples[i] for i in range(first, min(first + batch_size, len(what.samples)))]
        image_id = torch.arange(first, first + len(batch))
        own = [list(sample.captions) for sample in batch]
        flat = [text for of_image in own for text in of_image]
        owner = image_id.repeat_interleave(torch.tensor([len(of_image) for of_image in own]))
        hashes.append(image_hashes([sample.image for sample in batch]))
        counts.update(hashes[-1], _captions(encoder, flat), image_id, owner)
        captions += own
        labels += [-1 if sample.label is None else sample.label for sample in batch]
        if not what.retrieval:  # captions only name the class
            flat, owner = [], owner[:0]
        image_BV = encoder.encode_image([sample.image for sample in batch]).float().cpu()
        text_CV = encoder.encode_text(flat).float().cpu() if flat else image_BV[:0]
        images.append(SparseRows.of(image_BV))
        texts.append(SparseRows.of(text_CV))
        owners.append(owner)
        width = image_BV.shape[1]
        if vocabulary is not None:
            sparsity.update(image_BV, text_CV)
        if vocabulary is not None and flat:
            in_caption_CV = vocabulary.in_caption_terms(*vocabulary.tokenize(flat, 10_000))
            grounding.update(image_BV, in_caption_CV, image_id, owner)
            expansion.update(text_CV, in_caption_CV, image_id, owner)
    metrics = {"sparsity": sparsity, "grounding": grounding, "expansion": expansion}
    computed = {group: metric.compute() for group, metric in metrics.items() if metric.update_called}
    stated = counts.compute()
    if not isinstance(encoder, TwoTowers):  # another tokenizer
        del stated["captions_with_unknown_tokens"]
        if not hasattr(encoder, "cut"):
            del stated["cut_captions"]
    return EmbeddedSet(
        images=SparseRows.cat(images),
        texts=SparseRows.cat(texts),
        owner=torch.cat(owners),
        captions=captions,
        labels=torch.tensor(labels),
        width=width,
        figures={f"{group}/{k}": float(v) for group, figures in computed.items() for k, v in figures.items()},
        image_hash=torch.cat(hashes),
        counts=stated,
        seconds=time.perf_counter() - start,
    )


def _captions(encoder: Any, texts: list[str]) -> Captions:
    if not isinstance(encoder, TwoTowers):
        return text_captions(texts, encoder.cut(texts) if hasattr(encoder, "cut") else None)
    max_tokens, ids = encoder.config.text.max_tokens, encoder.vocabulary.encode(texts)
    cut = torch.tensor([len(each) > max_tokens for each in ids], dtype=torch.bool)
    return token_captions(encoder.vocabulary, *encoder.vocabulary.pad(ids, max_tokens), cut)


def evaluate(
    evaluated: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    ks: Sequence[int] = KS,
    batch_size: int = 64,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, EmbeddedSet]]:
    """Measures a model.

    Args:
        evaluated: the model.
        sets: to measure it on.
        ks: the K of recall@K.
        batch_size: images at a time.
        progress: called with a line before each step.

    Returns:
        `model` and `sets`, JSON-ready, and the embeddings of each set by its name.
    """
    names = [what.name for what in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"sets are named {names}; give each a name of its own, as in val=shards/val-*.tar")

    @cache
    def candidates() -> tuple[SparseRows, Tensor] | None:
        if evaluated.terms is not None:
            return None
        progress("embedding every word of the vocabulary")
        return term_rows(evaluated)

    results: dict[str, Any] = {}
    embedded: dict[str, EmbeddedSet] = {}
    for what in sets:
        if not len(what.samples):
            raise ValueError(f"set {what.name!r} has no images")
        if not what.retrieval and not what.classes:
            raise ValueError(f"set {what.name!r} has neither captions that distinguish images nor class names")
        progress(f"embedding {what.name}: {len(what.samples)} images")
        rows = embedded[what.name] = embed(evaluated, what, batch_size)
        result: dict[str, Any] = {}
        if what.retrieval:
            progress(f"ranking {what.name}")
            result |= _retrieval(evaluated, rows, ks)
        if rows.figures:
            result["terms"] = {k: v for k, v in rows.figures.items() if v == v}
        if what.classes:
            progress(f"classifying {what.name}")
            result |= _classification(evaluated, what, rows, batch_size, progress)
        if evaluated.vocabulary is not None:
            images, _ = rows.comparable(evaluated.encoder.similarity)
            result["vocabulary_probe"] = {
                source: vocabulary_probe(images, correct, rows.width, candidates())
                for source, correct in _correct_terms(evaluated.vocabulary, what, rows).items()
            }
        results[what.name] = {"protocol": _protocol(evaluated, what, rows, ks), **result}
    model = {"name": evaluated.name, "kind": evaluated.kind, "similarity": evaluated.encoder.similarity}
    return {"model": model | {"training": evaluated.facts}, "sets": results}, embedded


def _correct_terms(vocabulary: Vocabulary, what: EvaluationSet, rows: EmbeddedSet) -> dict[str, list[list[int]]]:
    """Of each image, by its class name and by its captions."""
    correct = {}
    if what.classes:
        of_class = [correct_terms(vocabulary, [name]) for name in what.classes]
        correct["class"] = [of_class[label] if label >= 0 else [] for label in rows.labels.tolist()]
    if what.retrieval:
        correct["captions"] = [correct_terms(vocabulary, captions) for captions in rows.captions]
    return correct


def _protocol(evaluated: EvaluatedModel, what: EvaluationSet, rows: EmbeddedSet, ks: Sequence[int]) -> dict[str, Any]:
    counts = [len(captions) for captions in rows.captions]
    score_block = 4 * QUERIES * max(len(rows.texts.entries), len(rows.images.entries))
    return {
        "split": what.split,
        **rows.counts,
        "captions_per_image": {"min": min(counts), "max": max(counts)},
        "similarity": evaluated.encoder.similarity,
        "truncation": evaluated.truncation,
        "ties": TIES,
        "recall_at": list(ks),
        "queries": "image → text: a hit is any caption of the image; text → image: its one image",
        "memory_bytes": {
            "embeddings": rows.images.nbytes + rows.texts.nbytes,
            "one_block_of_scores": score_block + 4 * QUERIES * rows.width,
        },
        "seconds_to_embed": round(rows.seconds, 3),
    }


def _retrieval(evaluated: EvaluatedModel, rows: EmbeddedSet, ks: Sequence[int]) -> dict[str, Any]:
    similarity, sparse = evaluated.encoder.similarity, evaluated.kind == "sparse"
    images, texts = rows.comparable(similarity)
    ranks = retrieval_ranks(images, texts, rows.owner)
    rows.counts.update({f"tied_{way}": int(each.tied.sum()) for way, each in ranks.items()})
    result: dict[str, Any] = {"retrieval": {name: float(value) for name, value in rank_figures(ranks, ks).items()}}
    result["cost"] = cost(images, texts, rows.width, sparse)
    return result | ({"pruned": curve(rows.images, rows.texts, rows.owner, similarity)} if sparse else {})


def _classification(
    evaluated: EvaluatedModel, what: EvaluationSet, rows: EmbeddedSet, batch_size: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    similarity, labelled = evaluated.encoder.similarity, rows.labels >= 0
    if int(rows.labels.max()) >= len(what.classes):
        raise ValueError(f"set {what.name!r} has label {int(rows.labels.max())} and {len(what.classes)} classes")
    if not labelled.any():
        raise ValueError(f"set {what.name!r} has class names but no image with a class")
    test = rows.comparable(similarity)[0].only(labelled), rows.labels[labelled]
    rows.counts.update(class_counts(what.classes, rows.labels.tolist(), rows.image_hash.tolist()))
    result = {"zero_shot": zero_shot(*test, class_rows(evaluated, what.classes), what.classes, rows.width)}
    result["zero_shot"]["templates"] = list(TEMPLATES)
    rows.counts["tied_classes"] = result["zero_shot"]["tied"]
    if not (len(what.train) and len(what.val)):
        return result
    parts = []
    for part, samples in (("train", what.train), ("val", what.val)):
        own = embed(evaluated, EvaluationSet(part, samples, retrieval=False), batch_size)
        chosen = own.labels >= 0
        parts.append((own.comparable(similarity)[0].only(chosen), own.labels[chosen]))
        rows.counts[f"images_also_in_{part}"] = int(torch.isin(rows.image_hash, own.image_hash[chosen]).sum())
    train, val = parts
    if len(train[1].unique()) < 2 or not len(val[1]):
        progress(f"no linear probe of {what.name}: its train part has one class, or its val part no image with a class")
    elif not all(np.isfinite(part.scipy(rows.width).data).all() for part, _ in (train, val, test)):
        progress(f"no linear probe of {what.name}: an embedding is not finite")
    else:
        result["linear_probe"] = linear_probe(train, val, test, rows.width)
    return result

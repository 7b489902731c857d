"""The whole evaluation of a model on some sets, as plain values that tables, JSON and pages are made of.

N images, C captions.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from stair.evaluate.classify import TEMPLATES, class_rows, linear_probe, zero_shot
from stair.evaluate.embed import Embedded, embed
from stair.evaluate.models import EvaluatedModel
from stair.evaluate.prune import cost, curve
from stair.evaluate.sets import EvaluationSet
from stair.evaluate.vocabulary_probe import right_words, vocabulary_probe, word_rows
from stair.ranking import QUERIES, SparseRows, rank_figures, retrieval_ranks
from stair.set_counts import class_counts

KS = (1, 5, 10)
MOST = (8, 16, 32, 64, 128, 256, 512)  # words of an embedding that pruning keeps
SHARES = (0.05, 0.1, 0.2, 0.4)  # of the heaviest weight, below which pruning cuts
TIES = "ties count against: an answer ranks behind all wrong ones that score the same"


def evaluate(
    evaluated: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    ks: Sequence[int] = KS,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Embedded]]:
    """Measures a model.

    Args:
        evaluated: the model.
        sets: what on.
        ks: the K of recall@K.
        batch_size: images at a time.
        say: told what is being done.

    Returns:
        `model` and `sets`, JSON-ready, and the embeddings of each set by its name.

    Raises:
        ValueError: if a set has no images, neither captions nor classes, or a label beyond them, or two have one name.
    """
    names = [what.name for what in sets]
    if len(set(names)) < len(names):
        raise ValueError(f"sets are named {names}; give each a name of its own, as in val=shards/val-*.tar")

    @cache
    def dense_words() -> tuple[SparseRows, torch.Tensor] | None:
        if evaluated.words is not None:
            return None
        say("embedding every word of the vocabulary")
        return word_rows(evaluated)

    results: dict[str, Any] = {}
    embedded: dict[str, Embedded] = {}
    for what in sets:
        if not len(what.samples):
            raise ValueError(f"set {what.name!r} has no images")
        if not what.retrieval and not what.classes:
            raise ValueError(
                f"set {what.name!r} has neither captions that tell images apart nor class names: nothing to measure it by"
            )
        say(f"embedding {what.name}: {len(what.samples)} images")
        found = embedded[what.name] = embed(evaluated, what, batch_size)
        result: dict[str, Any] = {}
        if what.retrieval:
            say(f"ranking {what.name}")
            result |= _retrieval(evaluated, found, ks)
        if found.figures:
            result["words"] = {k: v for k, v in found.figures.items() if v == v}
        if what.classes:
            say(f"classifying {what.name}")
            result |= _classification(evaluated, what, found, batch_size, say)
        if evaluated.vocabulary is not None:
            result["vocabulary_probe"] = _vocabulary_probe(evaluated, what, found, dense_words)
        results[what.name] = {"protocol": _protocol(evaluated, what, found, ks), **result}
    model = {"name": evaluated.name, "kind": evaluated.kind, "similarity": evaluated.encoder.similarity}
    return {"model": model | {"training": evaluated.facts}, "sets": results}, embedded


def _protocol(evaluated: EvaluatedModel, what: EvaluationSet, found: Embedded, ks: Sequence[int]) -> dict[str, Any]:
    counts = [len(captions) for captions in found.captions]
    score_block = 4 * QUERIES * max(len(found.texts.entries), len(found.images.entries))
    return {
        "split": what.split,
        **found.counts,
        "captions_an_image": {"least": min(counts, default=0), "most": max(counts, default=0)},
        "similarity": evaluated.encoder.similarity,
        "truncation": evaluated.truncation,
        "ties": TIES,
        "recall_at": list(ks),
        "queries": "image → text: a hit is any caption of the image; text → image: its one image",
        "memory_bytes": {
            "embeddings": found.images.nbytes + found.texts.nbytes,
            "one_block_of_scores": score_block + 4 * QUERIES * found.width,
        },
        "seconds_to_embed": round(found.seconds, 3),
    }


def _retrieval(evaluated: EvaluatedModel, found: Embedded, ks: Sequence[int]) -> dict[str, Any]:
    similarity = evaluated.encoder.similarity
    images, texts = found.comparable(similarity)
    ranks = retrieval_ranks(images, texts, found.owner)
    found.counts.update({f"tied_{way}": int(each.tied.sum()) for way, each in ranks.items()})
    result: dict[str, Any] = {"retrieval": {name: float(value) for name, value in rank_figures(ranks, ks).items()}}
    sparse = evaluated.kind == "sparse"
    result["cost"] = cost(images, texts, found.width, sparse)
    if sparse:
        result["pruned"] = curve(found.images, found.texts, found.owner, similarity, MOST, SHARES)
    return result


def _classification(
    evaluated: EvaluatedModel, what: EvaluationSet, found: Embedded, batch_size: int, say: Callable[[str], None]
) -> dict[str, Any]:
    images, _ = found.comparable(evaluated.encoder.similarity)
    known = found.labels >= 0
    if int(found.labels.max()) >= len(what.classes):
        raise ValueError(f"set {what.name!r} has label {int(found.labels.max())} and {len(what.classes)} classes")
    if not known.any():
        raise ValueError(f"set {what.name!r} has class names but no image with a class")
    test = images.only(known), found.labels[known]
    found.counts.update(class_counts(what.classes, found.labels.tolist(), found.image_hash.tolist()))
    classes = class_rows(evaluated, what.classes)
    result: dict[str, Any] = {"zero_shot": zero_shot(*test, classes, what.classes, found.width)}
    result["zero_shot"]["templates"] = list(TEMPLATES)
    found.counts["tied_classes"] = result["zero_shot"]["tied"]
    if len(what.train) and len(what.val):
        learned: list[tuple[SparseRows, torch.Tensor]] = []
        for part, samples in (("train", what.train), ("val", what.val)):
            own = embed(evaluated, EvaluationSet(part, samples, retrieval=False), batch_size)
            labelled = own.labels >= 0
            rows, _ = own.comparable(evaluated.encoder.similarity)
            learned.append((rows.only(labelled), own.labels[labelled]))
            seen = torch.isin(found.image_hash, own.image_hash[labelled])
            found.counts[f"images_also_in_{part}"] = int(seen.sum())
        train, val = learned
        if len(train[1].unique()) < 2 or not len(val[1]):
            say(f"no linear probe of {what.name}: its train part has one class, or its val part no image with a class")
        elif not all(np.isfinite(rows.scipy(found.width).data).all() for rows, _ in (train, val, test)):
            say(f"no linear probe of {what.name}: an embedding is not finite")
        else:
            result["linear_probe"] = linear_probe(train, val, test, found.width)
    return result


def _vocabulary_probe(
    evaluated: EvaluatedModel,
    what: EvaluationSet,
    found: Embedded,
    dense_words: Callable[[], tuple[SparseRows, torch.Tensor] | None],
) -> dict[str, Any]:
    assert evaluated.vocabulary is not None
    images, _ = found.comparable(evaluated.encoder.similarity)
    result = {}
    if what.classes:
        of_class = [right_words(evaluated.vocabulary, [name]) for name in what.classes]
        right = [of_class[label] if label >= 0 else [] for label in found.labels.tolist()]
        result["class"] = vocabulary_probe(images, right, found.width, dense_words())
    if what.retrieval:
        right = [right_words(evaluated.vocabulary, captions) for captions in found.captions]
        result["captions"] = vocabulary_probe(images, right, found.width, dense_words())
    return result

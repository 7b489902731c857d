"""Zero-shot classification by class names, and a linear probe on frozen image embeddings.

N images, L classes, T templates, V terms (or the width of a dense embedding).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stair.errors import import_extra
from stair.evaluate.models import EvaluatedModel
from stair.ranking import SparseRows, rank

#: `{}` is the class name
TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a picture showing a {}.",
    "there is a {} in the picture.",
    "this is what a {} looks like.",
    "a {} seen from nearby.",
    "a {} seen from far away.",
    "a dark picture of a {}.",
    "a drawing of a {}.",
    "a small {}.",
    "a big {}.",
)
_CLASSES_PER_BATCH = 23
_INVERSE_PENALTIES = tuple(10.0**power for power in range(-3, 5))


def class_rows(evaluated: EvaluatedModel, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> SparseRows:
    """L comparable embeddings, each the mean over its templates, term by term: a term active in 1 of T keeps 1/T.

    For cosine, rows have length 1 before and after the mean. ValueError if a template has no `{}`.
    """
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates are {list(templates)}; give some, each with {{}} where the class name goes")
    cosine, parts = evaluated.encoder.similarity == "cosine", []
    for first in range(0, len(classes), _CLASSES_PER_BATCH):
        names = classes[first : first + _CLASSES_PER_BATCH]
        texts = [template.format(name) for name in names for template in templates]
        text_TV = evaluated.encoder.encode_text(texts).float().cpu()
        text_TV = nn.functional.normalize(text_TV, dim=1) if cosine else text_TV
        parts.append(SparseRows.of(text_TV.view(len(names), len(templates), -1).mean(1)))
    rows = SparseRows.cat(parts)
    return rows.unit() if cosine else rows


def zero_shot(
    images: SparseRows, labels: Tensor, classes: SparseRows, names: Sequence[str], width: int
) -> dict[str, Any]:
    """Accuracy of the class embedding with the highest score, of N and L comparable rows; ties count as errors.

    Returns:
        `top1`, `top5`, `mean_class_top1` (over classes with images), `images`, `classes`, `tied` (images that score a wrong
        class as high as their own), and `per_class`: `name`, `top1` (NaN without images) and `images` of each.
    """
    ranks = rank(images, labels, classes, torch.arange(len(names)), width)
    hit_N = (ranks.first == 1).float()
    hit_per_class = [hit_N[labels == label] for label in range(len(names))]
    return {
        "top1": float(hit_N.mean()),
        "top5": float((ranks.first <= 5).float().mean()),
        "mean_class_top1": float(torch.stack([hits.mean() for hits in hit_per_class]).nanmean()),
        "images": len(labels),
        "classes": len(names),
        "tied": int(ranks.tied.sum()),
        "per_class": [
            {"name": name, "top1": float(hits.mean()), "images": len(hits)}
            for name, hits in zip(names, hit_per_class, strict=True)
        ],
    }


def linear_probe(
    train: tuple[SparseRows, Tensor], val: tuple[SparseRows, Tensor], test: tuple[SparseRows, Tensor], width: int
) -> dict[str, Any]:
    """Logistic regression (scikit-learn) on rows and labels of `train`; `val` chooses its L2 penalty.

    Returns:
        `top1` on test, `val_top1`, the chosen `inverse_penalty` (scikit-learn's C), `swept`: validation accuracy of each
        penalty, `images` of each part.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    linear_model = import_extra("sklearn.linear_model", "scikit-learn", "evaluate")
    preprocessing = import_extra("sklearn.preprocessing", "scikit-learn", "evaluate")
    # weights of `dot` models have no common scale; this one keeps zeros
    scaler = preprocessing.MaxAbsScaler().fit(train[0].scipy(width))
    features = [scaler.transform(rows.scipy(width)) for rows, _ in (train, val, test)]
    best: dict[str, Any] = {"val_top1": -1.0}
    swept = {}
    for inverse_penalty in _INVERSE_PENALTIES:
        probe = linear_model.LogisticRegression(C=inverse_penalty, max_iter=500).fit(features[0], train[1].numpy())
        accuracy = swept[f"{inverse_penalty:g}"] = float(probe.score(features[1], val[1].numpy()))
        if accuracy > best["val_top1"]:
            top1 = float(probe.score(features[2], test[1].numpy()))
            best = {"top1": top1, "val_top1": accuracy, "inverse_penalty": inverse_penalty}
    return best | {"swept": swept, "images": {"train": len(train[1]), "val": len(val[1]), "test": len(test[1])}}

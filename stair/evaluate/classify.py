"""Classification without and with training: class names as texts, and a linear probe on frozen image features.

N images, L classes, T templates, V words (or the width of a dense embedding).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stair.errors import import_extra
from stair.evaluate.models import EvaluatedModel
from stair.ranking import SparseRows, rank

#: our own; `{}` is the class name
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
_TEXTS = 256  # encoded at a time
_INVERSE_PENALTIES = tuple(10.0**power for power in range(-3, 5))


def class_rows(evaluated: EvaluatedModel, classes: Sequence[str], templates: Sequence[str] = TEMPLATES) -> SparseRows:
    """One comparable embedding a class: the mean over its templates, of rows of length 1 where the model compares by
    cosine, brought back to length 1 there. For a sparse model the mean is taken word by word: a word that one template of
    T lights up keeps 1/T of its weight, and nothing else becomes active.

    Raises:
        ValueError: if a template has no place for the name, or there are none.
    """
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"templates are {list(templates)}; give some, each with {{}} where the class name goes")
    cosine = evaluated.encoder.similarity == "cosine"
    rows = []
    at_once = max(1, _TEXTS // len(templates))
    for first in range(0, len(classes), at_once):
        names = classes[first : first + at_once]
        text_TV = evaluated.encoder.encode_text([template.format(name) for name in names for template in templates])
        text_TV = nn.functional.normalize(text_TV.float().cpu(), dim=1) if cosine else text_TV.float().cpu()
        rows.append(SparseRows.of(text_TV.view(len(names), len(templates), -1).mean(1)))
    found = SparseRows.cat(rows)
    return found.unit() if cosine else found


def zero_shot(
    images: SparseRows, labels: Tensor, classes: SparseRows, names: Sequence[str], width: int
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy by the class embedding that scores highest; ties count against.

    Args:
        images: N comparable rows.
        labels: (N,) int64.
        classes: L comparable rows (`class_rows`).
        names: of the classes.
        width: V.

    Returns:
        `top1`, `top5`, `mean_class_top1` (each class that has images of equal weight), `images`, `classes`, `tied` (images
        that score a wrong class as high as their own), and `per_class`: by the place of a class its `name`, `top1` (NaN
        without images) and `images`.
    """
    ranks = rank(images, labels, classes, torch.arange(len(names)), width)
    first = ranks.first
    per_class: list[dict[str, Any]] = [
        {"name": name, "top1": float((first[own] == 1).float().mean()), "images": int(own.sum())}
        for label, name in enumerate(names)
        for own in [labels == label]
    ]
    accuracies = [found["top1"] for found in per_class if found["images"]]
    return {
        "top1": float((first == 1).float().mean()),
        "top5": float((first <= 5).float().mean()),
        "mean_class_top1": sum(accuracies) / max(len(accuracies), 1),
        "images": len(labels),
        "classes": len(names),
        "tied": int(ranks.tied.sum()),
        "per_class": per_class,
    }


def linear_probe(
    train: tuple[SparseRows, Tensor], val: tuple[SparseRows, Tensor], test: tuple[SparseRows, Tensor], width: int
) -> dict[str, Any]:
    """Logistic regression on frozen image features (scikit-learn), its L2 penalty chosen on validation.

    Args:
        train: rows to learn from, and their labels.
        val: rows that choose the penalty; they are not learned from.
        test: rows that give the figure.
        width: V.

    Returns:
        `top1` on test, `val_top1`, the chosen `inverse_penalty` (scikit-learn's C), `swept`: validation accuracy of each.

    Raises:
        MissingPackageError: if scikit-learn is not installed.
    """
    linear_model = import_extra("sklearn.linear_model", "scikit-learn", "evaluate")
    preprocessing = import_extra("sklearn.preprocessing", "scikit-learn", "evaluate")
    # weights of `dot` models have no common size; this keeps zeros zero
    scale = preprocessing.MaxAbsScaler().fit(train[0].scipy(width))
    features = [scale.transform(rows.scipy(width)) for rows, _ in (train, val, test)]
    best: tuple[float, float, Any] = (-1.0, 0.0, None)
    swept = {}
    for inverse_penalty in _INVERSE_PENALTIES:
        probe = linear_model.LogisticRegression(C=inverse_penalty, max_iter=500).fit(features[0], train[1].numpy())
        swept[inverse_penalty] = float(probe.score(features[1], val[1].numpy()))
        best = max(best, (swept[inverse_penalty], inverse_penalty, probe), key=lambda found: found[0])
    return {
        "top1": float(best[2].score(features[2], test[1].numpy())),
        "val_top1": best[0],
        "inverse_penalty": best[1],
        "swept": {f"{penalty:g}": accuracy for penalty, accuracy in swept.items()},
        "images": {"train": len(train[1]), "val": len(val[1]), "test": len(test[1])},
    }

"""Whether a search can say that nothing matches, and what IDF at search time changes. Prints Markdown.

    python -m benchmarks.no_match 'demo=runs/demo/stage3/stair;runs/demo/clip/clip;runs/demo/data/val-0000.tar' ...

Each set is NAME=SPARSE;DENSE;DATA: two exported models, and images with captions that neither has seen. A model can also be
PLAN:OUT:VARIANT of benchmarks/real_encoders, with a split of the plan as DATA; it is trained if OUT has no embeddings.

AUROC: half of the images are removed; does the best score tell captions whose image is left from the others? The same 20
halves for both models. False "no match": the threshold is calibrated on half of the images, and measured on captions of
the other half, of which no image is removed; mean of 200 halves. True "no match": captions whose image is removed.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.ratios import header
from stair.errors import SettingError
from stair.evaluate import open_model
from stair.evaluate.open_set import open_set
from stair.evaluate.run import embed
from stair.index.calibration import Calibration
from stair.index.query import idf_factor
from stair.ranking import SparseRows, retrieval_figures

_RATES, _HALVES, _SPLITS = (0.05, 0.1, 0.2), 20, 200


class Rows(NamedTuple):
    """Rows ready for the dot product: N images, C captions; the image of each caption."""

    image_NV: np.ndarray
    text_CV: np.ndarray
    owner_C: np.ndarray


def rows_of(model: str, data: str) -> Rows:
    if model.count(":") == 2:
        return _real_encoders(*model.split(":"), data)
    evaluated = open_model(model)
    embedded = embed(evaluated, open_set(data), 64)
    images, texts = (rows.scipy(embedded.width).toarray() for rows in embedded.comparable(evaluated.encoder.similarity))
    return Rows(images, texts, embedded.owner.numpy())


def _real_encoders(plan_path: str, out: str, variant: str, split: str) -> Rows:
    from benchmarks.real_encoders.run import Runs, read_plan

    path = Path(out) / variant.replace(" ", "_") / "seed0" / "embeddings.npz"
    if not path.is_file():
        embedder, found = Runs(read_plan(Path(plan_path)), Path(out)).maker(variant, 0)(), {}
        for part in ("val", "test"):
            owner_C = [i for i, captions in enumerate(embedder.data.ids[part]) for _ in captions]
            with torch.inference_mode():
                sides = {"images": embedder.images(part).numpy(), "texts": embedder.texts(part).numpy()}
            found |= {f"{part}_{side}": each for side, each in {**sides, "owner": np.array(owner_C)}.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    with np.load(path, allow_pickle=False) as file:
        images, texts, owner = (file[f"{split}_{side}"] for side in ("images", "texts", "owner"))
    unit = (each / np.linalg.norm(each, axis=1, keepdims=True).clip(1e-12) for each in (images, texts))
    return Rows(*unit, owner)


def auroc(rows: Rows) -> np.ndarray:
    """Of each half of the images, in percent."""
    draw, score_CN = np.random.default_rng(0), rows.text_CV @ rows.image_NV.T
    found = []
    for _ in range(_HALVES):
        left_N = draw.permutation(len(rows.image_NV)) < len(rows.image_NV) // 2
        found.append(100 * roc_auc_score(left_N[rows.owner_C], score_CN[:, left_N].max(1)))
    return np.array(found)


def no_match(rows: Rows, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of false and of true "no match" on each half, in percent; none if the rate cannot be kept."""
    draw, score_CN, owner_C = np.random.default_rng(0), rows.text_CV @ rows.image_NV.T, rows.owner_C
    own_C, count = score_CN[np.arange(len(owner_C)), owner_C], len(rows.image_NV)
    false, true = [], []
    for _ in range(_SPLITS):
        fitted_N = draw.permutation(count) < count // 2
        fitted_C = fitted_N[owner_C]
        try:
            threshold = Calibration.fit("", "", own_C[fitted_C], owner_C[fitted_C]).threshold(rate)
        except SettingError:
            continue
        weight_C = 1 / np.bincount(owner_C, minlength=count)[owner_C]  # each image counts alike
        false.append(100 * np.average(own_C[~fitted_C] < threshold, weights=weight_C[~fitted_C]))
        best_C = score_CN[~fitted_C][:, fitted_N].max(1)  # the images of the first half, so none is right
        true.append(100 * np.average(best_C < threshold, weights=weight_C[~fitted_C]))
    return np.array(false), np.array(true)


def recall(rows: Rows, idf: bool) -> dict[str, float]:
    """Recall text to image at 1 and 10, in percent."""
    text_CV = rows.text_CV
    if idf:
        text_CV = text_CV * idf_factor((rows.image_NV > 0).sum(0), len(rows.image_NV))
    sides = (SparseRows.of(torch.from_numpy(each)) for each in (rows.image_NV, text_CV))
    figures = retrieval_figures(*sides, torch.from_numpy(rows.owner_C), (1, 10))
    return {f"R@{k}": 100 * float(figures[f"t2i/recall@{k}"]) for k in (1, 10)}


def main(sets: list[str]) -> None:
    print(header("No match", torch.device("cpu")))
    print(f"## AUROC\n\nOf the best score as a sign that there is an answer; %, mean of {_HALVES} halves.\n")
    print("| set | images | captions | sparse | dense CLIP | difference |\n|---|---|---|---|---|---|")
    sparse = {}
    for each in sets:
        name, _, rest = each.partition("=")
        ours, theirs, data = rest.split(";")
        sparse[name] = rows_of(ours, data)
        found = auroc(sparse[name]), auroc(rows_of(theirs, data))
        sizes = f"{len(sparse[name].image_NV)} | {len(sparse[name].text_CV)}"
        more = found[0] - found[1]
        print(f"| {name} | {sizes} | {found[0].mean():.1f} | {found[1].mean():.1f} | {more.mean():+.1f} |", flush=True)
    print(f"\n## No match\n\nThe sparse model; %, mean (5th to 95th percentile) of {_SPLITS} halves.\n")
    print("| set | max_error | false | true | halves in which the rate can be kept |\n|---|---|---|---|---|")
    for name, rows in sparse.items():
        for rate in _RATES:
            false, true = no_match(rows, rate)
            print(
                f"| {name} | {rate:.0%} | {_spread(false)} | {_spread(true)} | {len(false)} of {_SPLITS} |", flush=True
            )
    print("\n## IDF\n\nRecall text → image of the sparse model, %.\n")
    print("| set | R@1 | with IDF | R@10 | with IDF |\n|---|---|---|---|---|")
    for name, rows in sparse.items():
        figures = recall(rows, False), recall(rows, True)
        cells = [f"{each[at]:.1f}" for at in ("R@1", "R@10") for each in figures]
        print(f"| {name} | {' | '.join(cells)} |")


def _spread(shares: np.ndarray) -> str:
    return (
        f"{shares.mean():.1f} ({np.percentile(shares, 5):.1f}–{np.percentile(shares, 95):.1f})" if len(shares) else "–"
    )


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all(each.count(";") == 2 and "=" in each for each in sys.argv[1:]):
        sys.exit(__doc__)
    main(sys.argv[1:])

"""Recall with one caption an image, its first: for comparison with figures that were measured so.

    python benchmarks/first_caption.py runs/emoji/stage3/stair 'SHARDS' ['SHARDS' ...]

During training and in docs/results/experiments.md all captions of an image count; this metric uses fewer captions.
"""

import sys

import torch

from stair.data.pairs import EvaluationPairs
from stair.images import MAX_PIXELS
from stair.metrics import RetrievalRecall
from stair.model import Stair


def main(model_folder: str, specs: list[str]) -> None:
    """Prints recall in both directions for each set."""
    model = Stair.from_pretrained(model_folder)
    for spec in specs:
        pairs = EvaluationPairs(spec, model.config.image.image_size, MAX_PIXELS)
        recall = RetrievalRecall()
        for first in range(0, len(pairs), 64):
            part = [pairs[i] for i in range(first, min(first + 64, len(pairs)))]
            place = torch.arange(first, first + len(part))
            image_BV = model.encode_image(torch.stack([pair.pixels for pair in part]))
            text_BV = model.encode_text([pair.captions[0] for pair in part])
            recall.update(model.comparable(image_BV), model.comparable(text_BV), place, place)
        values = recall.compute()
        for way in ("i2t", "t2i"):
            print(
                f"{spec} {way} R@1/5/10: " + " / ".join(f"{100 * values[f'{way}/recall@{k}']:.1f}" for k in (1, 5, 10))
            )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])

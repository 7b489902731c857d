"""The command `stair calibrate`: the score below which "no match" is the answer, fitted on captioned images."""

from typing import Any

import numpy as np
from tqdm import tqdm

from stair.embeddings import to_csr
from stair.errors import SettingError, require
from stair.evaluate.open_set import open_set
from stair.index.calibration import FILE, Calibration
from stair.index.query import problem_of
from stair.model import Stair
from stair.towers import folder_of

_SHOWN = 0.01, 0.02, 0.05, 0.1, 0.2


def calibrate(
    model: str,
    data: str,
    split: str | None = None,
    budget: int | None = None,
    threshold: float = 0.0,
    limit: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Measures the scores of captions with their own images, and writes calibration.json into the model's folder.

    `stair search --max_error 0.05` then leaves out hits below a threshold. At most 5 % of texts lose their right image,
    if texts and images are like those of DATA. Use images that training has not seen.

    Args:
        model: the folder of an exported model.
        data: images with captions: tars (a path, a glob, a brace pattern), or a folder of tars.
        split: the part of a folder to use; by default the first of test, val, train that exists, else all.
        budget: maximum number of terms per image: the `--budget` of the index.
        threshold: keep only weights above this value: the `--threshold` of `stair embed` for the index.
        limit: use the first N images; by default all.
        batch_size: number of images encoded at a time.

    Raises:
        FileNotFoundError: if the model or the data is missing.
        SettingError: if the set has no captions.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit), ("budget", budget)):
        require(value is None or value >= 1, name, value, "at least 1")
    what = open_set(data, split)
    if not what.samples[0].captions:
        raise SettingError(f"data: set {what.name!r} has no captions. Give tars of images with captions", "data")
    stair = Stair.from_pretrained(model)
    space, size = stair.space, min(limit or len(what.samples), len(what.samples))
    scores, owners = [], []
    for first in tqdm(range(0, size, batch_size), what.name, unit="batch", disable=None):
        batch = [what.samples[n] for n in range(first, min(first + batch_size, size))]
        texts = [text for sample in batch for text in sample.captions]
        owner = np.repeat(np.arange(len(batch)), [len(sample.captions) for sample in batch])
        images = to_csr(stair.encode_image([sample.image for sample in batch]), budget, threshold)
        rows = [space.comparable(rows).astype(np.float64) for rows in (images[owner], stair.encode(texts=texts))]
        scores.append(_known(stair, texts) * np.asarray(rows[0].multiply(rows[1]).sum(1)).ravel())
        owners.append(first + owner)
    found = Calibration.fit(space.model, what.name, np.concatenate(scores), np.concatenate(owners))
    found.save(folder := folder_of(model))
    print(f"{folder / FILE}: {found.images} images, {found.pairs} captions of {found.data}")
    thresholds = {}
    for rate in _SHOWN:
        try:
            thresholds[rate] = found.threshold(rate)
            print(f"max_error {rate:g}: no match below {thresholds[rate]:.4f}")
        except SettingError as error:
            print(error)
    return {"model": model, "data": found.data, "images": found.images, "pairs": found.pairs, "thresholds": thresholds}


def _known(stair: Stair, texts: list[str]) -> Any:
    """Whether the vocabulary knows a word of each text; a search for others has no hits."""
    vocabulary = stair.vocabulary
    return np.array([not problem_of(text, vocabulary.words(text), vocabulary.tokens) for text in texts])

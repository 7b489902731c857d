"""The score below which "no match" is the answer, from scores of captions with their own images.

The error is: the right image of a query is in the index, and its score is below the threshold. For captions and images
drawn as those of the calibration, at most a share `max_error` of queries has it, whatever the size of the index (split
conformal prediction: Angelopoulos and Bates, "Conformal Prediction: A Gentle Introduction", 2023, section 1; several
captions of an image: Lee, Barber and Willett, "Distribution-free inference with hierarchical data", 2023; both recalled).
With K images, of which image k has N_k captions, the threshold for an error rate e is the greatest score t with

    1 + sum over k of (share of the N_k scores that are below t)  <=  e · (K + 1)

With one caption of each image it is the floor(e · (K + 1))-th lowest score. K images, C captions.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.errors import FileError, SettingError, require
from stair.files import read_json, write_json

FILE, _FORMAT = "calibration.json", "stair-calibration-1"
_STEPS = 1000  # error rates at most for which a threshold is kept


@dataclass(frozen=True)
class Calibration:
    """Thresholds of a model.

    Args:
        model: its fingerprint.
        data: the set of captions and images.
        images, pairs: their numbers, K and C.
        thresholds: ascending; the n-th of S is for an error rate of n / (S + 1).
    """

    model: str
    data: str
    images: int
    pairs: int
    thresholds: Sequence[float]

    @classmethod
    def fit(cls, model: str, data: str, scores_C: NDArray[Any], owner_C: NDArray[Any]) -> "Calibration":
        """The calibration of the scores of captions with their own images, whose number is the `owner` of each."""
        size_K = np.unique(owner_C, return_counts=True)[1]
        share_C = 1 / size_K[np.unique(owner_C, return_inverse=True)[1]]
        order = np.argsort(scores_C, kind="stable")
        below_C = np.concatenate([[0], np.cumsum(share_C[order])[:-1]])  # sum of the shares below each score
        steps = min(len(size_K), _STEPS)
        allowed_S = np.arange(1, steps + 1) / (steps + 1) * (len(size_K) + 1) - 1
        at_S = np.searchsorted(below_C, allowed_S + 1e-9, side="right") - 1
        thresholds = scores_C[order][at_S].tolist()
        return cls(model, data, len(size_K), len(scores_C), thresholds)

    def threshold(self, max_error: float) -> float:
        """The score that a hit must reach.

        Raises:
            SettingError: if the rate is not between 0 and 1, or too low for the number or the scores of the images.
        """
        require(0 < max_error < 1, "max_error", max_error, "a rate between 0 and 1, such as 0.05")
        steps = len(self.thresholds)
        step = math.floor(max_error * (steps + 1) + 1e-9)
        if step < 1:
            few = f"max_error {max_error:g} needs a calibration on {math.ceil(1 / max_error - 1)} images or more"
            raise SettingError(f"{few}; this one has {self.images}", "max_error")
        threshold = self.thresholds[step - 1]
        if threshold <= 0:  # hits have scores above 0
            least = 1 + sum(each <= 0 for each in self.thresholds)
            none = f"{self.data}: too many captions share no term with their image for max_error {max_error:g}"
            raise SettingError(f"{none}; give {least / (steps + 1):.3g} or more", "max_error")
        return threshold

    def save(self, folder: Path) -> None:
        """Writes `calibration.json` into the folder of the model."""
        write_json(folder / FILE, {"format": _FORMAT, **asdict(self)})

    @classmethod
    def load(cls, folder: Path | None, model: str) -> "Calibration":
        """The calibration in the folder of a model.

        Raises:
            SettingError: if there is none, or it is of another model.
            FileError: if it is damaged.
        """
        if folder is None or not (folder / FILE).is_file():
            where = f"{folder or 'the model'} has no {FILE}"
            raise SettingError(f"{where}; `stair calibrate MODEL DATA` writes it", "max_error")
        content = read_json(folder / FILE)
        try:
            found = cls(**{key: value for key, value in content.items() if key != "format"})
            rates = np.array(found.thresholds, float)
            if content["format"] != _FORMAT or rates.ndim != 1 or not len(rates) or not np.isfinite(rates).all():
                raise ValueError(f"format {content['format']!r}, {rates.shape} thresholds")
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"{folder / FILE} is damaged ({error}); calibrate again", folder / FILE) from error
        if found.model != model:
            other = f"{folder / FILE} is of model {found.model[:12]}, not of {model[:12]}"
            raise SettingError(f"{other}; calibrate again", "max_error")
        return found

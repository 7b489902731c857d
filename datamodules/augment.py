"""Random resized crop and flip of training images, decoded no larger than they are needed.

S is the side of the square images.
"""

import math
import random
from dataclasses import dataclass

from torch import Tensor

from stair.images import box_pixels, decode_image, eval_pixels


@dataclass(frozen=True)
class Augment:
    """Makes a training image of a picture's bytes.

    Attributes:
        size: side S of the square, in pixels.
        scale: least and greatest share of the area that is kept; (1, 1) is the crop of evaluation.
        flip: mirror half of the images.
        max_pixels: largest width × height that is decoded.
    """

    size: int
    scale: tuple[float, float]
    flip: bool
    max_pixels: int

    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        """(3, S, S) uint8.

        Raises:
            ValueError: if it cannot be decoded; the message begins with the cause and a colon.
        """
        # the smallest crop still has twice the pixels it is scaled to: scaling finds nothing missing
        least = math.ceil(2 * self.size / math.sqrt(self.scale[0] * 3 / 4))
        image = decode_image(data, self.max_pixels, least)
        if self.scale[0] == 1:
            pixels = eval_pixels(image, self.size)
        else:
            pixels = box_pixels(image, _random_box(*image.size, self.scale, rng), self.size)
        return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random
) -> tuple[float, float, float, float]:
    """RandomResizedCrop: area uniform in `scale`, aspect ratio log-uniform in 3/4 to 4/3, ten tries to fit it."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2

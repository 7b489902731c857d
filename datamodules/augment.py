"""Random crop, flip and colours of training images, which are decoded no larger than needed.

An upright JPEG goes from libjpeg-turbo to torch without Pillow: the same decoded pixels, and scaled ones that differ from
Pillow's by rounding. All other files go through `stair.images`. S is the side of the square images.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from stair.images import decode_image, eval_pixels, reduction

_EXIF_OR_XMP, _SCAN = 0xE1, 0xDA  # segments of a JPEG: where an orientation may stand, and where the header ends


@dataclass(frozen=True)
class Augment:
    """Makes a training image of a picture's bytes. The settings are those of `ImageTextShards`.

    No hue is changed: at 224 px that alone would take three times as long as decoding.
    """

    size: int
    scale: tuple[float, float]
    flip: bool
    max_pixels: int
    color_jitter: float = 0.0
    grayscale: float = 0.0

    def __call__(
        self, data: bytes, rng: random.Random, converted: list[str] | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The training image of an image file's bytes, (3, S, S) uint8, in `out` if given. Errors as of `decode_image`.

        `rng` is that of crop, flip and colours. What had to be converted is added to `converted`, see `decode_image`.
        """
        # the smallest crop still has twice the pixels it is scaled to: scaling finds nothing missing
        enough = math.ceil(2 * self.size / math.sqrt(self.scale[0] * 3 / 4))
        image_HW3 = upright_jpeg(data, self.max_pixels, enough)
        if image_HW3 is None:
            image_HW3 = np.array(decode_image(data, self.max_pixels, enough, converted))
        if self.scale[0] == 1:
            pixels = eval_pixels(Image.fromarray(image_HW3), self.size)
        else:
            left, top, right, bottom = _random_box(image_HW3.shape[1], image_HW3.shape[0], self.scale, rng)
            pixels = scaled(image_HW3[top:bottom, left:right], self.size)
        if self.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        if self.color_jitter or self.grayscale:  # what is off draws nothing
            pixels = self._recoloured(pixels, rng)
        return pixels.contiguous() if out is None else out.copy_(pixels)

    def _recoloured(self, pixels: Tensor, rng: random.Random) -> Tensor:
        from torchvision.transforms.v2 import functional as colours  # seconds, which most runs need not wait

        if self.color_jitter > 0:
            for adjust in (colours.adjust_brightness, colours.adjust_contrast, colours.adjust_saturation):
                pixels = adjust(pixels, rng.uniform(1 - self.color_jitter, 1 + self.color_jitter))
        if self.grayscale > 0 and rng.random() < self.grayscale:
            pixels = colours.rgb_to_grayscale(pixels, 3)
        return pixels


def upright_jpeg(data: bytes, max_pixels: int, enough: int) -> NDArray[np.uint8] | None:
    """The (H, W, 3) RGB pixels that `stair.images.decode_image` decodes (see there for the arguments), sooner.

    None for what needs a closer look: no JPEG, a damaged, CMYK or too large one, or one that EXIF or XMP may turn.
    """
    if not _may_be_plain(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or width * height > max_pixels:
            return None
        scale = reduction(width, height, enough)
        least = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        pixels_HW3: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return None
    return pixels_HW3


def _may_be_plain(data: bytes) -> bool:
    """Whether the data begin as a JPEG's header and have neither EXIF nor XMP in it."""
    at = 2
    while data[:2] == b"\xff\xd8" and data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        segment = data[at + 1]
        if segment in (_SCAN, _EXIF_OR_XMP):
            return segment == _SCAN
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def scaled(image_HW3: NDArray[np.uint8], size: int) -> Tensor:
    """Scales an RGB image to (3, S, S) uint8 as `stair.images.box_pixels` does, by torch's faster kernel."""
    pixels_13HW = torch.from_numpy(image_HW3).permute(2, 0, 1)[None]
    square_3SS: Tensor = interpolate(pixels_13HW, (size, size), mode="bicubic", antialias=True)[0]
    return square_3SS


def _random_box(width: int, height: int, scale: tuple[float, float], rng: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop: area uniform in `scale`, aspect ratio log-uniform in 3/4 to 4/3, ten tries to fit it."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(height * 4 // 3, 1)), min(height, max(width * 4 // 3, 1))
    return (width - w) // 2, (height - h) // 2, (width - w) // 2 + w, (height - h) // 2 + h

"""From the bytes of a picture to the pixels a model sees: one road for evaluation, search and a user's own pictures.

A model that was measured on one preprocessing and used with another is worse for no visible reason, so the evaluation
sets and the encoder both call `eval_pixels`. H × W pixels, S the side of the square a model takes.
"""

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 89_478_485  # Pillow's own warning limit: 256 MiB of RGB

# what the web serves; Pillow's other formats include some that start external programs
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

_ORIENTATION = 0x0112  # EXIF: how a camera was held
_HOLD_ORIENTATION = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # where Pillow looks for it
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, enough: int | None = None, converted: list[str] | None = None
) -> Image.Image:
    """Decodes a picture as a viewer would show it: upright, on white, eight bits a channel.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        max_pixels: largest width × height that is decoded; checked on the header, before any pixel is.
        enough: pixels that suffice for the shorter side. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size if no side
            becomes shorter than that. None for full size.
        converted: a list to which is added what else than 8-bit grayscale or RGB the picture was: some of `CMYK`,
            `16 bits`, `palette`, `transparency`, `animation`, `EXIF orientation`.

    Returns:
        An RGB image. The EXIF orientation has been applied, transparency laid over white; grayscale, palette, CMYK and
        16-bit images are converted, of an animation it is the first frame. Colour profiles are not applied.

    Raises:
        ValueError: if it cannot be. The message begins with the cause and a colon: `image empty`, `image too large`
            or `image undecodable`.
    """
    if not data:
        raise ValueError("image empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                if image.mode in ("F", "I") and image.format == "TIFF":
                    raise ValueError("its pixels are 32-bit numbers, and nothing says which of them is white")
                if (scale := reduction(width, height, enough)) > 1:
                    # rounded down: rounded up, Pillow would decode odd sizes in full. Other formats ignore it
                    image.draft(None, (width // scale, height // scale))
                deep = ";16" in str(image.tile)
                image.load()
                if converted is not None:
                    converted += _peculiar(image, deep)
                return as_rgb(image)
    except UnidentifiedImageError as error:  # whose own words are an address in memory, another one each time
        raise ValueError(f"image undecodable: by its content no readable {', '.join(_FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"image too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their parser met: OSError, SyntaxError, struct.error
        raise ValueError(f"image undecodable: {type(error).__name__}: {error}") from error
    raise ValueError(f"image too large: {width} x {height} pixels, the limit is {max_pixels} (max_pixels)")


def image_format(data: bytes) -> str:
    """The format of an image file by its first bytes, whatever its name says: `jpg`, `png`, `webp`, or `` for others."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else ""


def reduction(width: int, height: int, enough: int | None) -> int:
    """By how much (1, 2, 4 or 8) a JPEG may be decoded smaller such that no side becomes shorter than `enough`."""
    # Pillow's own choice would be held by one side only
    return next((scale for scale in (8, 4, 2) if enough and min(width, height) // scale >= enough), 1)


def _peculiar(image: Image.Image, deep: bool) -> Iterator[str]:
    if image.mode == "CMYK":
        yield "CMYK"
    if deep:
        yield "16 bits"
    if image.mode in ("P", "PA"):
        yield "palette"
    if image.has_transparency_data:
        yield "transparency"
    if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        yield "animation"
    if _orientation(image) in _TURNS:
        yield "EXIF orientation"


def _orientation(image: Image.Image) -> int | None:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return None  # most JPEGs; asking would take as long as a tenth of decoding a small one
    return image.getexif().get(_ORIENTATION)


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture as a viewer would show it to 8-bit RGB: upright, 16 bits scaled, transparency laid over white.

    The EXIF orientation is applied and taken out, so that a picture from here comes through unchanged.
    """
    turn = _TURNS.get(_orientation(image) or 1)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255, which turns such images white
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.new("RGBA", over.size, "white")
        image.alpha_composite(over)
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    for key in _HOLD_ORIENTATION:
        upright.info.pop(key, None)
    return upright


def box_pixels(image: Image.Image, box: tuple[float, float, float, float], size: int) -> Tensor:
    """Scales a box of an image to a square, bicubic with antialiasing.

    Crop and resize are one step: resizing first would blow a picture of 10,000 × 1 pixels up to gigabytes.

    Args:
        image: RGB.
        box: left, top, right, bottom in pixels of the image.
        size: side S of the square.

    Returns:
        (3, S, S) uint8.
    """
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels_HWC = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels_HWC.permute(2, 0, 1).contiguous()


def eval_pixels(image: Image.Image, size: int) -> Tensor:
    """The preprocessing of every picture outside training: short side to `size`, centre crop.

    Args:
        image: RGB, any size.
        size: side S of the square the model takes.

    Returns:
        (3, S, S) uint8; the model normalises.
    """
    width, height = image.size
    short = min(width, height)
    left, top = (width - short) / 2, (height - short) / 2
    return box_pixels(image, (left, top, left + short, top + short), size)

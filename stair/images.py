"""From the bytes of an image to the pixels of a model, the same in evaluation, search and `Stair.encode`.

H × W pixels, S the side of the square that a model takes.
"""

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 89_478_485  # Pillow's own warning limit: 256 MiB of RGB

# what the web serves; Pillow's other formats include some that start external programs
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
# by EXIF orientation, from 2
_NAMES = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
_TURNS: dict[Any, Image.Transpose] = {n: Image.Transpose[name] for n, name in enumerate(_NAMES, 2)}


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, enough: int | None = None, converted: list[str] | None = None
) -> Image.Image:
    """Decodes an image as a viewer shows it: upright, on white, eight bits a channel.

    Args:
        data: the bytes of a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        max_pixels: largest width × height that is decoded; checked on the header.
        enough: pixels that suffice for the shorter side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if no side
            becomes shorter. None for full size.
        converted: a list to which is added what else than 8-bit grayscale or RGB the image was: some of `CMYK`,
            `16 bits`, `palette`, `transparency`, `animation` (the first frame is taken), `EXIF orientation`.

    Returns:
        An RGB image. Colour profiles are not applied.

    Raises:
        ValueError: `image empty: ...`, `image too large: ...` or `image undecodable: ...`.
    """
    if not data:
        raise ValueError("image empty: 0 bytes")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
            if width * height <= max_pixels:
                if image.mode in ("F", "I") and image.format == "TIFF":
                    raise ValueError("its pixels are 32-bit numbers without a defined white")
                if (scale := reduction(width, height, enough)) > 1:
                    # rounded down: rounded up, Pillow would decode odd sizes in full. Other formats ignore it
                    image.draft(None, (width // scale, height // scale))
                is_deep = ";16" in str(image.tile)
                image.load()
                if converted is not None:
                    converted += _conversions(image, is_deep)
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


def _conversions(image: Image.Image, is_deep: bool) -> Iterator[str]:
    if image.mode == "CMYK":
        yield "CMYK"
    if is_deep:
        yield "16 bits"
    if image.mode in ("P", "PA"):
        yield "palette"
    if image.has_transparency_data:
        yield "transparency"
    if image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        yield "animation"
    if _turn(image) is not None:
        yield "EXIF orientation"


def _turn(image: Image.Image) -> Image.Transpose | None:
    if image.format == "JPEG" and not image.info.keys() & {"exif", "xmp"}:
        return None  # most JPEGs; asking would take as long as a tenth of decoding a small one
    return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to 8-bit RGB as a viewer shows it: upright, 16 bits scaled, transparency laid over white.

    The EXIF orientation is applied and removed, so a second call changes nothing.
    """
    if (turn := _turn(image)) is not None:
        image = image.transpose(turn)  # `ImageOps.exif_transpose` fails on damaged EXIF, which it writes again
        for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):  # where Pillow looks for it
            image.info.pop(key, None)
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255, which turns such images white
        image = Image.fromarray((np.asarray(image).clip(0, 65_535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.new("RGBA", over.size, "white")
        image.alpha_composite(over)
    return image if image.mode == "RGB" else image.convert("RGB")


def box_pixels(image: Image.Image, box: tuple[float, float, float, float], size: int) -> "Tensor":
    """Scales a box of an image to a square, bicubic with antialiasing.

    Crop and resize are one step: resizing first would enlarge an image of 10,000 × 1 pixels to gigabytes.

    Args:
        image: RGB.
        box: left, top, right, bottom in pixels of the image.
        size: side S of the square.

    Returns:
        (3, S, S) uint8.
    """
    import torch  # here, as `stair prepare` does without it

    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels_HWC = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels_HWC.permute(2, 0, 1).contiguous()


def eval_pixels(image: Image.Image, size: int) -> "Tensor":
    """The preprocessing of every image outside training: short side to `size`, centre crop.

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

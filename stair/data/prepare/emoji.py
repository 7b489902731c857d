"""Emoji of fonts on this machine, with their Unicode names: a real data set without a network.

An emoji is drawn several times for training, on backgrounds of several colours that its caption names. Validation has each
emoji once, upright on white, in a drawing that training does not have.
"""

import functools
import io
import random
import subprocess
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from stair.data.prepare.writer import DEFAULTS, Input, ShardSettings, Source, write_shards
from stair.errors import FileError, SettingError, import_extra, require
from stair.files import sha256

_BLOCKS = ((0x2300, 0x23FF), (0x25A0, 0x27BF), (0x2B00, 0x2BFF), (0x1F000, 0x1F0FF), (0x1F300, 0x1FAFF))
_GRINNING_FACE = 0x1F600  # a font without it draws no emoji
_BACKGROUNDS = {  # light: black ink shows on all of them
    "white": (255, 255, 255),
    "yellow": (255, 236, 110),
    "pink": (255, 190, 205),
    "light green": (175, 230, 165),
    "light blue": (170, 210, 250),
    "orange": (255, 185, 100),
    "grey": (205, 205, 205),
}


class Font(NamedTuple):
    """A font with its checksum."""

    path: Path
    name: str
    size: int  # in pixels, at which it is drawn; bitmap fonts have no other
    digest: str


@dataclass(frozen=True)
class Drawings:
    """Draws views (font, code point, number) as PNG of `image_size` pixels a side; number 0 is upright on white."""

    image_size: int

    def __call__(self, view: tuple[Font, int, int]) -> bytes:
        """The image of a view."""
        font, point, number = view
        background, rng = _background(*view)
        glyph = _glyph(font, point)
        share, angle = (rng.uniform(0.55, 0.85), rng.uniform(-15, 15)) if number else (0.8, 0.0)
        scale = self.image_size * share / max(glyph.size)
        glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
        glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        slack = [self.image_size - side for side in glyph.size]
        left, top = (round(free * (rng.uniform(0.2, 0.8) if number else 0.5)) for free in slack)
        image = Image.new("RGBA", (self.image_size, self.image_size), _BACKGROUNDS[background])
        image.paste(glyph, (left, top), glyph)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        return buffer.getvalue()


def _background(font: Font, point: int, number: int) -> tuple[str, random.Random]:
    rng = random.Random(f"{font.name}/{point}/{number}")
    return rng.choice(list(_BACKGROUNDS)) if number else "white", rng


@functools.lru_cache(maxsize=32)
def _loaded(font: Font) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, font.size, layout_engine=ImageFont.Layout.BASIC)


def _glyph(font: Font, point: int) -> Image.Image:
    """The emoji alone, cut to its edges."""
    left, top, right, bottom = (round(edge) for edge in _loaded(font).getbbox(chr(point)))
    margin = font.size // 4  # the box that a font states is not always the one it draws
    canvas = Image.new("RGBA", (right - left + 2 * margin, bottom - top + 2 * margin))
    start = (margin - left, margin - top)
    ImageDraw.Draw(canvas).text(start, chr(point), "black", _loaded(font), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"glyph blank: {font.name} draws nothing for U+{point:04X} (a colour format FreeType lacks?)")
    return canvas.crop(box)


def emoji(
    out: Path, font: list[Path] | None = None, image_size: int = 64, views: int = 8, settings: ShardSettings = DEFAULTS
) -> None:
    """Makes shards from the emoji of fonts on this machine, with captions from Unicode names. Needs no download.

    Args:
        out: folder of the shards.
        font: font files; by default all fonts with emoji that fontconfig finds on this machine.
        image_size: side of the images, in pixels.
        views: drawings of each emoji in each font; one of them is used for validation.
        settings: how shards are written, as of `ShardSettings`.
    """
    require(image_size >= 16, "image_size", image_size, "at least 16 pixels")
    require(views >= 2, "views", views, "at least 2: validation takes one")
    files = font or _installed()
    glyphs = [(drawn, point) for drawn, points in map(_read, files) for point in points]
    if not glyphs:
        remedy = "install one (Debian: fonts-noto-color-emoji) or give --font FILE"
        raise SettingError(f"no font of {list(map(str, files))} has emoji: {remedy}", "font")
    first = {point: drawn for drawn, point in reversed(glyphs)}
    names = {point: unicodedata.name(chr(point)).lower() for point in sorted(first)}
    labels = {point: label for label, point in enumerate(names)}
    views_of = {"train": [(*glyph, number) for glyph in glyphs for number in range(1, views)]}
    views_of["val"] = [(first[point], point, 0) for point in names]
    splits: dict[str, list[Input]] = {split: [] for split in views_of}
    for split, all_views in views_of.items():
        for drawn, point, number in all_views:
            name, code = names[point], f"U+{point:04X}"
            captions = (name, f"{name} on {_background(drawn, point, number)[0]}")
            fields = {"class": name, "label": labels[point], "unicode": code, "style": drawn.name}
            splits[split].append(Input(f"{drawn.path}:{code}:{number}", (drawn, point, number), captions, fields))
    fonts = ", ".join(dict.fromkeys(drawn.name for drawn, _ in glyphs))
    write_shards(Source(fonts, splits, Drawings(image_size), classnames=list(names.values())), out, settings)


def _installed() -> list[Path]:
    command = ["fc-list", "--format", "%{file}\n", f":charset={_GRINNING_FACE:x}"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    except FileNotFoundError as error:
        raise SettingError("fontconfig (fc-list), which lists fonts, is missing; give --font FILE", "font") from error
    return sorted({Path(line) for line in listed.splitlines() if line})


def _read(path: Path) -> tuple[Font, list[int]]:
    """The font of a file and its emoji."""
    fonts = import_extra("fontTools.ttLib", "fonttools", "prepare")
    try:
        with fonts.TTFont(path, lazy=True, fontNumber=0) as font:
            characters = font.getBestCmap() or {}
            sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes] if "CBLC" in font else []
            sizes += list(font["sbix"].strikes) if "sbix" in font else []
    except (fonts.TTLibError, OSError) as error:
        raise FileError(f"{path} is not a font ({error})", path) from error
    blocks = (point for low, high in _BLOCKS for point in range(low, high + 1) if point in characters)
    points = [point for point in blocks if unicodedata.category(chr(point)) == "So"]
    size = max(sizes, default=128)
    name = " ".join(filter(None, ImageFont.truetype(path, size).getname()))
    return Font(path, name, size, sha256(path)), points

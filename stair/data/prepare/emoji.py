"""Emoji of fonts on this machine, with their Unicode names: a real data set without a network.

An emoji is drawn several times for training, on backgrounds of several colours that its caption names. Validation has each
emoji once, upright on white, in a drawing that training does not have.
"""

import functools
import io
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from stair.data.prepare.writer import Raw, Source, write_shards
from stair.data.specs import require
from stair.errors import FileError, SettingError, import_extra
from stair.files import sha256

_BLOCKS = ((0x2300, 0x23FF), (0x25A0, 0x27BF), (0x2B00, 0x2BFF), (0x1F000, 0x1F0FF), (0x1F300, 0x1FAFF))
_GRINNING_FACE = 0x1F600  # a font without it draws no emoji
# light, so that black ink shows on all of them
_BACKGROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 110),
    "pink": (255, 190, 205),
    "light green": (175, 230, 165),
    "light blue": (170, 210, 250),
    "orange": (255, 185, 100),
    "grey": (205, 205, 205),
}


class Font(NamedTuple):
    """A font that draws emoji, at the size at which it is drawn (bitmap fonts have no other), with its checksum."""

    path: Path
    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Drawings:
    """Draws references (number of a font, code point, view); view 0 is the plain one. `image_size` is in pixels."""

    fonts: tuple[Font, ...]
    labels: tuple[tuple[int, int], ...]
    image_size: int

    def __call__(self, reference: tuple[int, int, int]) -> Raw:
        """The input of a reference."""
        number, point, view = reference
        font, name = self.fonts[number], unicodedata.name(chr(point)).lower()
        rng = random.Random(f"{font.name}/{point}/{view}")
        background = rng.choice(list(_BACKGROUNDS)) if view else "white"
        glyph = _glyph(font, point)
        share, angle = (rng.uniform(0.55, 0.85), rng.uniform(-15, 15)) if view else (0.8, 0.0)
        scale = self.image_size * share / max(glyph.size)
        glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
        glyph = glyph.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        slack = [self.image_size - side for side in glyph.size]
        left, top = (round(free * (rng.uniform(0.2, 0.8) if view else 0.5)) for free in slack)
        image = Image.new("RGBA", (self.image_size, self.image_size), _BACKGROUNDS[background])
        image.paste(glyph, (left, top), glyph)
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        facts = {"class": name, "label": dict(self.labels)[point], "unicode": f"U+{point:04X}", "style": font.name}
        return Raw(buffer.getvalue(), [name, f"{name} on {background}"], facts)


@functools.lru_cache(maxsize=32)
def _loaded(font: Font) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, font.size, layout_engine=ImageFont.Layout.BASIC)


def _glyph(font: Font, point: int) -> Image.Image:
    """The emoji alone, cut to its edges."""
    left, top, right, bottom = (round(edge) for edge in _loaded(font).getbbox(chr(point)))
    margin = font.size // 4  # the box that a font states is not always the one it draws
    canvas = Image.new("RGBA", (right - left + 2 * margin, bottom - top + 2 * margin))
    place = (margin - left, margin - top)
    ImageDraw.Draw(canvas).text(place, chr(point), "black", _loaded(font), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"glyph blank: {font.name} draws nothing for U+{point:04X} (a colour format FreeType lacks?)")
    return canvas.crop(box)


def emoji(
    out: Path, font: Path | list[Path] | None = None, image_size: int = 64, views: int = 8, **settings: Any
) -> None:
    """Emoji of fonts on this machine with their Unicode names: a data set without a network.

    Args:
        out: folder of the shards.
        font: font files; without, all on this machine that have emoji, as fontconfig knows them.
        image_size: side of the images, in pixels.
        views: drawings of each emoji in each font; one is kept for validation.
        settings: of the writer.
    """
    require(image_size >= 16, "image_size", image_size, "at least 16 pixels")
    require(views >= 2, "views", views, "at least 2: validation takes one")
    files = [font] if isinstance(font, Path) else font
    found = [(drawn, points) for path in files or _installed() for drawn, points in _read(path)]
    if not found:
        raise SettingError(
            f"no emoji font in {[str(path) for path in files]}"
            if files
            else "no font on this machine has emoji: install one (Debian: fonts-noto-color-emoji) or give --font FILE",
            "font",
        )
    fonts = tuple(drawn for drawn, _ in found)
    covered = [(number, point) for number, (_, points) in enumerate(found) for point in points]
    labels = {point: label for label, point in enumerate(sorted({point for _, point in covered}))}
    first = {point: number for number, point in reversed(covered)}
    splits: dict[str, list[Any]] = {
        "train": [(number, point, view) for number, point in covered for view in range(1, views)],
        "val": [(number, point, 0) for point, number in sorted(first.items())],
    }
    names = [unicodedata.name(chr(point)).lower() for point in labels]
    read = Drawings(fonts, tuple(labels.items()), image_size)
    write_shards(Source(", ".join(font.name for font in fonts), splits, read, classnames=names), out, **settings)


def _installed() -> list[Path]:
    if not shutil.which("fc-list"):
        raise SettingError("fc-list of fontconfig, which lists the fonts, is not installed; give --font FILE", "font")
    command = ["fc-list", "--format", "%{file}\n", f":charset={_GRINNING_FACE:x}"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return sorted({Path(line) for line in listed.splitlines() if line})


def _read(path: Path) -> Iterator[tuple[Font, list[int]]]:
    """The font of a file and the emoji it has, if it has any."""
    fonts = import_extra("fontTools.ttLib", "fonttools", "prepare")
    try:
        with fonts.TTFont(path, lazy=True, fontNumber=0) as font:
            covered = font.getBestCmap() or {}
            sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes] if "CBLC" in font else []
            sizes += list(font["sbix"].strikes) if "sbix" in font else []
    except (fonts.TTLibError, OSError) as error:
        raise FileError(f"{path} is no font ({error})", path) from error
    points = [p for low, high in _BLOCKS for p in range(low, high + 1) if p in covered and _is_named(chr(p))]
    if points:
        size = max(sizes, default=128)
        name = " ".join(filter(None, ImageFont.truetype(path, size).getname()))
        yield Font(path, name, size, sha256(path)), points


def _is_named(character: str) -> bool:
    return unicodedata.category(character) == "So" and bool(unicodedata.name(character, ""))

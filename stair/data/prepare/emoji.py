"""Pictographs of fonts on this machine, with their Unicode names: a real data set that anyone can make without a network.

A picture is drawn several times for training, on grounds of several colours that its caption names. Validation holds each
pictograph once, upright on white, in a drawing that training has not.
"""

import functools
import hashlib
import io
import random
import shutil
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from stair.data.prepare.shard import Raw
from stair.data.prepare.shards import Source

_BLOCKS = ((0x2300, 0x23FF), (0x25A0, 0x27BF), (0x2B00, 0x2BFF), (0x1F000, 0x1F0FF), (0x1F300, 0x1FAFF))
_A_FACE = 0x1F600  # a font without this one draws no emoji
# light, so that black ink shows on all of them
_GROUNDS = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 110),
    "pink": (255, 190, 205),
    "light green": (175, 230, 165),
    "light blue": (170, 210, 250),
    "orange": (255, 185, 100),
    "grey": (205, 205, 205),
}


@dataclass(frozen=True)
class Font:
    """A font that draws pictographs.

    Attributes:
        path: its file.
        name: family and style.
        size: the one at which it is drawn: fonts of bitmaps have no other.
        digest: of the file, so that another version of a font gives other shards.
    """

    path: Path
    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Pictographs:
    """Draws references (number of a font, code point, view); view 0 is the plain one.

    Attributes:
        fonts: those that are drawn from.
        labels: code point and label of each pictograph.
        image_size: side of the square images, in pixels.
    """

    fonts: tuple[Font, ...]
    labels: tuple[tuple[int, int], ...]
    image_size: int

    def __call__(self, reference: tuple[int, int, int]) -> Raw:
        """The input of a reference.

        Raises:
            ValueError: `glyph blank: ...`.
        """
        number, point, view = reference
        font, name = self.fonts[number], unicodedata.name(chr(point)).lower()
        rng = random.Random(f"{font.name}/{point}/{view}")
        ground = rng.choice(list(_GROUNDS)) if view else "white"
        glyph = _glyph(font, point)
        share, turn = (rng.uniform(0.55, 0.85), rng.uniform(-15, 15)) if view else (0.8, 0.0)
        scale = self.image_size * share / max(glyph.size)
        glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.LANCZOS)
        glyph = glyph.rotate(turn, Image.Resampling.BICUBIC, expand=True)
        slack = [self.image_size - side for side in glyph.size]
        place = [round(free * (rng.uniform(0.2, 0.8) if view else 0.5)) for free in slack]
        picture = Image.new("RGBA", (self.image_size, self.image_size), _GROUNDS[ground])
        picture.paste(glyph, (place[0], place[1]), glyph)
        buffer = io.BytesIO()
        picture.convert("RGB").save(buffer, "PNG")
        facts = {"class": name, "label": dict(self.labels)[point], "unicode": f"U+{point:04X}", "style": font.name}
        return Raw(buffer.getvalue(), [name, f"{name} on {ground}"], facts)


@functools.lru_cache(maxsize=32)
def _loaded(font: Font) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font.path, font.size, layout_engine=ImageFont.Layout.BASIC)


def _glyph(font: Font, point: int) -> Image.Image:
    """The pictograph alone, cut to its edges."""
    left, top, right, bottom = (round(edge) for edge in _loaded(font).getbbox(chr(point)))
    margin = font.size // 4  # the box that a font states is not always the one it draws
    canvas = Image.new("RGBA", (right - left + 2 * margin, bottom - top + 2 * margin))
    place = (margin - left, margin - top)
    ImageDraw.Draw(canvas).text(place, chr(point), "black", _loaded(font), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"glyph blank: {font.name} draws nothing for U+{point:04X} (a colour format FreeType lacks?)")
    return canvas.crop(box)


def emoji_source(fonts: list[Path] | None, image_size: int, views: int) -> Source:
    """Named pictographs of fonts.

    Raises:
        ValueError: if no font draws any, or a number is out of its range.
    """
    if image_size < 16 or views < 2:
        raise ValueError(
            f"{image_size=}, {views=}: wanted at least 16 pixels, and at least 2 views: validation takes one"
        )
    found = [(font, points) for path in fonts or _installed() for font, points in _read(path)]
    if not found:
        raise ValueError(
            f"no emoji font in {[str(path) for path in fonts]}"
            if fonts
            else "no font on this machine has emoji: install one (Debian: fonts-noto-color-emoji) or give --font FILE"
        )
    covered = [(number, point) for number, (_, points) in enumerate(found) for point in points]
    labels = {point: label for label, point in enumerate(sorted({point for _, point in covered}))}
    first = {point: number for number, point in reversed(covered)}
    splits: dict[str, list[Any]] = {
        "train": [(number, point, view) for number, point in covered for view in range(1, views)],
        "val": [(number, point, 0) for point, number in sorted(first.items())],
    }
    drawn = tuple(font for font, _ in found)
    names = [unicodedata.name(chr(point)).lower() for point in labels]
    read = Pictographs(drawn, tuple(labels.items()), image_size)
    return Source(", ".join(font.name for font in drawn), splits, read, classnames=names)


def _installed() -> list[Path]:
    if not shutil.which("fc-list"):
        raise ValueError(
            "fontconfig's fc-list, which knows the fonts of this machine, is not installed; give --font FILE"
        )
    command = ["fc-list", "--format", "%{file}\n", f":charset={_A_FACE:x}"]
    said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
    return sorted({Path(line) for line in said.splitlines() if line})


def _read(path: Path) -> Iterator[tuple[Font, list[int]]]:
    """The font of a file and the pictographs it has, if it has any."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise ValueError("reading fonts needs fonttools: pip install -e '.[prepare]'") from error
    try:
        with TTFont(path, lazy=True, fontNumber=0) as font:
            covered = font.getBestCmap() or {}
            sizes = [strike.bitmapSizeTable.ppemY for strike in font["CBLC"].strikes] if "CBLC" in font else []
            sizes += list(font["sbix"].strikes) if "sbix" in font else []
    except (TTLibError, OSError) as error:
        raise ValueError(f"{path} is no font ({error})") from error
    points = [p for low, high in _BLOCKS for p in range(low, high + 1) if p in covered and _is_named(chr(p))]
    if points:
        size = max(sizes, default=128)
        name = " ".join(filter(None, ImageFont.truetype(path, size).getname()))
        yield Font(path, name, size, hashlib.sha256(path.read_bytes()).hexdigest()), points


def _is_named(character: str) -> bool:
    return unicodedata.category(character) == "So" and bool(unicodedata.name(character, ""))

"""Random scenes, and the tables of what they can hold (scenes.yaml)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import yaml
from PIL import ImageDraw

Point = tuple[float, float]
Colour = tuple[int, ...]  # red, green, blue
Box = tuple[float, float, float, float]

TABLES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("scenes.yaml").read_text(encoding="utf-8"))


def _arc(x: float, y: float, radius: float, start: float = 0, end: float = 360) -> list[Point]:
    steps = max(8, round(abs(end - start) / 10))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _star(tips: float, inner: float) -> list[Point]:
    angles = [math.pi * i / int(tips) - math.pi / 2 for i in range(2 * int(tips))]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip([1, inner] * int(tips), angles, strict=True)]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    heights = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) + 2 for a in angles]
    return [(math.sin(a) ** 3, -height / 15) for a, height in zip(angles, heights, strict=True)]


def _petal(number: float) -> list[Point]:
    angle = math.radians(72 * number - 90)
    return _arc(0.36 * math.cos(angle), -0.3 + 0.36 * math.sin(angle), 0.31)


_FORMS: dict[str, Callable[..., list[Point]]] = {
    "arc": _arc,
    "arc_back": lambda *numbers: _arc(*numbers)[::-1],
    "star": _star,
    "rectangle": _rectangle,
    "heart": _heart,
    "petal": _petal,
}


def _polygon(text: str) -> list[Point]:
    points: list[Point] = []
    for part in text.split("+"):
        name, *numbers = part.split()
        if name in _FORMS:
            points += _FORMS[name](*map(float, numbers))
        else:
            points += [(float(x), float(y)) for x, y in (pair.split(",") for pair in part.split())]
    return points


class Shape(NamedTuple):
    """An object: (singular, plural) of its nouns, polygons of its body, tone and polygon of its details."""

    nouns: list[tuple[str, str]]
    body: list[list[Point]]
    details: list[tuple[str, list[Point]]]


SHAPES = {
    name: Shape(
        [(noun.split()[0], noun.split()[1]) for noun in entry["nouns"]],
        [_polygon(text) for text in entry["body"]],
        [(tone, _polygon(text)) for tone, text in entry.get("details", [])],
    )
    for name, entry in TABLES["shapes"].items()
}
MATERIALS: dict[str, Colour] = {name: tuple(rgb) for name, rgb in TABLES["materials"].items()}
COLOURS: dict[str, tuple[Colour, list[str]]] = {
    name: (tuple(rgb), words) for name, (rgb, words) in TABLES["colours"].items()
}
SIZES: dict[str, list[str]] = TABLES["sizes"]
COUNTS: dict[int, list[str]] = TABLES["counts"]


def _specks(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    for _ in range(26):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.006, 0.014) * side
        draw.ellipse((x - r, y - r, x + r, y + r), fill=rng.choice(tones[1:]))


def _blades(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    for _ in range(60):
        x, y, lean = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(-0.02, 0.02) * side
        draw.line((x, y, x + lean, y - 0.06 * side), fill=rng.choice(tones[1:]), width=max(1, side // 90))


def _waves(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    step, phase = side / 7, rng.uniform(0, math.tau)
    for row in range(8):
        xs = [side * i / 40 for i in range(41)]
        wave = [(x, (row + 0.5) * step + 0.016 * side * math.sin(math.tau * x * 4 / side + phase + row)) for x in xs]
        draw.line(wave, fill=tones[1], width=max(1, side // 50))


def _tiles(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    step, shift = side / 8, rng.uniform(0, side / 8)
    for row in range(-1, 9):
        for column in range(-1 + row % 2, 9, 2):
            x, y = column * step + shift, row * step + shift
            draw.rectangle((x, y, x + step, y + step), fill=tones[1])


def _stripes(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    step, shift = side / 12, rng.uniform(0, side / 6)
    for i in range(-1, 7):
        draw.rectangle((2 * i * step + shift, 0, (2 * i + 1) * step + shift, side), fill=tones[1])


def _bricks(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    height, width, shift = side / 9, side / 4, rng.uniform(0, side / 4)
    line = max(1, side // 70)
    for row in range(10):
        draw.line((0, row * height, side, row * height), fill=tones[1], width=line)
        for column in range(-1, 5):
            x = column * width + shift + (row % 2) * width / 2
            draw.line((x, row * height, x, (row + 1) * height), fill=tones[1], width=line)


PATTERNS = {paint.__name__[1:]: paint for paint in (_specks, _blades, _waves, _tiles, _stripes, _bricks)}


class Background(NamedTuple):
    """What is behind the objects: its colours (the first fills it), what captions call it, and its pattern."""

    tones: list[Colour]
    phrases: list[str]
    pattern: str = ""


class Layout(NamedTuple):
    """Where the groups of a scene stand (scenes.yaml)."""

    boxes: list[Box]
    large: int
    small: int
    weight: int
    alone: int = 0


BACKGROUNDS = {name: Background(**entry) for name, entry in TABLES["backgrounds"].items()}
LAYOUTS = {name: Layout(**entry) for name, entry in TABLES["layouts"].items()}


@dataclass(frozen=True)
class Group:
    """`count` equal objects; the strings are keys of `SHAPES`, `COLOURS` and `SIZES`."""

    shape: str
    colour: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """Everything that a caption can say of an image. `groups` stand in the boxes of `LAYOUTS[layout]`, in that order."""

    layout: str
    background: str
    groups: tuple[Group, ...]


def random_scene(rng: Random) -> Scene:
    """Draws a scene whose objects fit their boxes and stand out from their background."""
    name = rng.choices(list(LAYOUTS), [layout.weight for layout in LAYOUTS.values()])[0]
    layout, background = LAYOUTS[name], rng.choice(list(BACKGROUNDS))
    fill = BACKGROUNDS[background].tones[0]
    # a distance below 95 (black to white: 442) can hardly be seen at 64 pixels
    visible = [colour for colour, (rgb, _) in COLOURS.items() if math.dist(rgb, fill) > 95]
    groups = []
    for shape in rng.sample(list(SHAPES), len(layout.boxes)):
        size = rng.choice(list(SIZES))
        most = layout.large if size == "large" else layout.small
        groups.append(Group(shape, rng.choice(visible), size, rng.choice([1, 1, *range(1, most + 1)])))
    return Scene(name, background, tuple(groups))

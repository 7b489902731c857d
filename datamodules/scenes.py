"""What a drawn scene can hold: shapes, colours, sizes, counts, backgrounds, layouts; and random scenes.

A `Scene` states everything that a caption can say of an image, by the first noun, colour or size word of the tables below.
Captions use the other words too (circle, disc, ball).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from PIL import ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]
Painter = Callable[[ImageDraw.ImageDraw, int, tuple[Colour, ...], Random], None]


class Shape(NamedTuple):
    """An object to draw. Polygons lie in [-1, 1]², y points down.

    Attributes:
        nouns: (singular, plural) pairs, all of which captions use.
        body: polygons in the object's colour, outlined as one.
        details: polygons on top, each with its colour: "dark", "light" or "body" (tones of the object's), or a fixed one.
    """

    nouns: tuple[tuple[str, str], ...]
    body: tuple[list[Point], ...]
    details: tuple[tuple[str | Colour, list[Point]], ...] = ()


def _nouns(*singulars: str, **plurals: str) -> tuple[tuple[str, str], ...]:
    return tuple((singular, plurals.get(singular, singular + "s")) for singular in singulars)


def _arc(x: float, y: float, radius: float, start: float = 0, end: float = 360) -> list[Point]:
    """Points on a circle, in degrees clockwise from the right."""
    steps = max(8, round(abs(end - start) / 10))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _star(tips: int, inner: float) -> list[Point]:
    angles = [math.pi * i / tips - math.pi / 2 for i in range(2 * tips)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip([1, inner] * tips, angles, strict=True)]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _heart(a: float) -> Point:
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return math.sin(a) ** 3, -(y + 2) / 15


_WOOD, _GLASS, _STEM, _WHITE, _TYRE, _METAL = (
    (110, 74, 46), (208, 232, 244), (46, 122, 52), (250, 250, 250), (30, 30, 34), (190, 190, 190),
)  # fmt: skip
_ROOF = [(0, -0.98), (1, -0.1), (-1, -0.1)]

# fmt: off
SHAPES: dict[str, Shape] = {
    "circle": Shape(_nouns("circle", "disc", "ball"), (_arc(0, 0, 0.95),)),
    "square": Shape(_nouns("square", "block", "box", box="boxes"), (_rectangle(-0.82, -0.82, 0.82, 0.82),)),
    "triangle": Shape(_nouns("triangle", "pyramid"), ([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],)),
    "star": Shape(_nouns("star"), (_star(5, 0.42),)),
    "heart": Shape(_nouns("heart"), ([_heart(2 * math.pi * i / 40) for i in range(40)],)),
    "cross": Shape(
        _nouns("cross", "plus", cross="crosses", plus="pluses"),
        (_rectangle(-0.32, -0.95, 0.32, 0.95), _rectangle(-0.95, -0.32, 0.95, 0.32)),
    ),
    "ring": Shape(_nouns("ring", "hoop", "loop"), (_arc(0, 0, 0.97) + _arc(0, 0, 0.52, 360, 0),)),
    "diamond": Shape(
        _nouns("diamond", "gem", "jewel"), ([(-0.55, -0.7), (0.55, -0.7), (1, -0.15), (0, 0.95), (-1, -0.15)],),
        (("light", [(-0.55, -0.7), (0.55, -0.7), (0.38, -0.15), (-0.38, -0.15)]),
         ("dark", [(0.38, -0.15), (1, -0.15), (0, 0.95)])),
    ),
    "moon": Shape(_nouns("moon", "crescent"), (_arc(0.1, 0, 0.97, 55, 305) + _arc(0.5, 0, 0.8, 273, 87),)),
    "arrow": Shape(
        _nouns("arrow", "pointer"),
        ([(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)],),
    ),
    "tree": Shape(
        _nouns("tree", "pine", "fir"),
        ([(0, -1), (0.55, -0.3), (-0.55, -0.3)], [(0, -0.65), (0.7, 0.15), (-0.7, 0.15)],
         [(0, -0.2), (0.85, 0.62), (-0.85, 0.62)]),
        ((_WOOD, _rectangle(-0.16, 0.62, 0.16, 1)),),
    ),
    "house": Shape(
        _nouns("house", "home", "cottage"), (_rectangle(-0.75, -0.15, 0.75, 0.92), _ROOF),
        (("dark", _ROOF), (_WOOD, _rectangle(-0.5, 0.3, -0.08, 0.92)), (_GLASS, _rectangle(0.15, 0.18, 0.55, 0.55))),
    ),
    "fish": Shape(
        _nouns("fish", fish="fish"),
        (_arc(-0.05, 0.72, 1.1, 222, 318) + _arc(-0.05, -0.72, 1.1, 42, 138),
         [(0.5, 0), (1, -0.6), (0.88, 0), (1, 0.6)], [(-0.1, -0.3), (0.2, -0.65), (0.35, -0.2)]),
        ((_WHITE, _arc(-0.5, -0.1, 0.15)), ((20, 20, 20), _arc(-0.52, -0.1, 0.08))),
    ),
    "flower": Shape(
        _nouns("flower", "blossom", "bloom"),
        tuple(_arc(0.36 * math.cos(math.radians(72 * i - 90)), -0.3 + 0.36 * math.sin(math.radians(72 * i - 90)), 0.31)
              for i in range(5)),
        ((_STEM, _rectangle(-0.06, 0.25, 0.06, 1)), (_STEM, [(0, 0.8), (0.25, 0.45), (0.5, 0.4), (0.35, 0.68)]),
         ((250, 214, 70), _arc(0, -0.3, 0.2))),
    ),
    "sun": Shape(_nouns("sun"), (_star(12, 0.68),), (("dark", _arc(0, 0, 0.6)), ("body", _arc(0, 0, 0.54)))),
    "cloud": Shape(
        _nouns("cloud"),
        (_arc(-0.55, 0.18, 0.42), _arc(-0.1, -0.12, 0.55), _arc(0.5, 0.15, 0.45), _rectangle(-0.55, 0.1, 0.5, 0.6)),
    ),
    "boat": Shape(
        _nouns("boat", "ship", "sailboat"),
        ([(-1, 0.4), (1, 0.4), (0.6, 0.92), (-0.6, 0.92)], [(0.08, -1), (0.85, 0.25), (0.08, 0.25)]),
        (((244, 244, 240), [(-0.08, -0.8), (-0.08, 0.25), (-0.75, 0.25)]), (_WOOD, _rectangle(-0.07, -1, 0.07, 0.4))),
    ),
    "car": Shape(
        _nouns("car", "automobile", "vehicle"),
        (_rectangle(-1, -0.05, 1, 0.5), [(-0.62, -0.05), (-0.38, -0.55), (0.38, -0.55), (0.66, -0.05)]),
        ((_GLASS, [(-0.46, -0.08), (-0.3, -0.42), (-0.04, -0.42), (-0.04, -0.08)]),
         (_GLASS, [(0.06, -0.08), (0.06, -0.42), (0.3, -0.42), (0.48, -0.08)]),
         (_TYRE, _arc(-0.52, 0.5, 0.26)), (_TYRE, _arc(0.52, 0.5, 0.26)),
         (_METAL, _arc(-0.52, 0.5, 0.11)), (_METAL, _arc(0.52, 0.5, 0.11))),
    ),
    "mushroom": Shape(
        _nouns("mushroom", "toadstool"), (_arc(0, 0.05, 0.95, 180, 360),),
        (((240, 230, 210), [(-0.26, 0.05), (0.26, 0.05), (0.34, 0.9), (-0.34, 0.9)]),
         (_WHITE, _arc(-0.4, -0.3, 0.17)), (_WHITE, _arc(0.15, -0.55, 0.15)), (_WHITE, _arc(0.5, -0.22, 0.14))),
    ),
    "umbrella": Shape(
        _nouns("umbrella", "parasol"),
        (_arc(0, 0, 0.97, 180, 360) + [p for x in (0.65, 0.0, -0.65) for p in reversed(_arc(x, 0, 0.325, 180, 360))],),
        ((_WOOD, _rectangle(-0.06, -0.2, 0.06, 0.8)),
         (_WOOD, _arc(0.17, 0.75, 0.23, 0, 180) + _arc(0.17, 0.75, 0.1, 180, 0))),
    ),
}

COLOURS: dict[str, tuple[Colour, tuple[str, ...]]] = {
    "red": ((214, 38, 40), ("red", "scarlet", "crimson")),
    "orange": ((246, 136, 20), ("orange",)),
    "yellow": ((250, 220, 40), ("yellow", "golden")),
    "green": ((46, 158, 62), ("green", "emerald")),
    "blue": ((36, 92, 214), ("blue", "azure")),
    "purple": ((136, 54, 176), ("purple", "violet")),
    "pink": ((248, 140, 186), ("pink", "rosy")),
    "brown": ((128, 78, 40), ("brown", "chocolate")),
    "black": ((26, 26, 28), ("black",)),
    "white": ((250, 250, 250), ("white",)),
}
# fmt: on

SIZES: dict[str, tuple[str, ...]] = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}

COUNTS: dict[int, tuple[str, ...]] = {
    1: ("a", "a", "a", "a", "a", "a", "one", "a single"),
    2: ("two", "two", "a pair of", "a couple of"),
    3: ("three", "three", "a trio of"),
    4: ("four", "four", "a group of four"),
}


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


class Background(NamedTuple):
    """What is behind the objects: its colours (the first fills it), what captions call it, and how the rest is drawn."""

    tones: tuple[Colour, ...]
    phrases: tuple[str, ...]
    paint: Painter | None = None


# fmt: off
BACKGROUNDS: dict[str, Background] = {
    "grey": Background(((194, 195, 197),), ("on a grey background", "on a gray background", "on plain grey")),
    "cream": Background(((250, 240, 210),), ("on a cream background", "on cream paper", "on beige")),
    "mint": Background(((200, 240, 218),), ("on a mint background", "on mint paper")),
    "lavender": Background(((222, 212, 246),), ("on a lavender background", "on lilac paper")),
    "night": Background(
        ((24, 28, 72), (230, 230, 250), (170, 180, 220)), ("at night", "in the night sky", "in the dark"), _specks),
    "grass": Background(
        ((122, 196, 92), (98, 176, 74), (146, 214, 112)), ("on the grass", "on a lawn", "in a meadow", "in a field"),
        _blades),
    "sea": Background(
        ((82, 164, 214), (140, 200, 234)), ("on the water", "at sea", "in the ocean", "on the waves"), _waves),
    "sand": Background(
        ((232, 204, 148), (210, 178, 120), (246, 224, 178)), ("on the sand", "on a beach", "in the desert"), _specks),
    "snow": Background(
        ((240, 246, 252), (206, 220, 238), (222, 232, 244)), ("in the snow", "in winter", "on the ice"), _specks),
    "checkered": Background(
        ((236, 236, 236), (200, 204, 214)), ("on a checkered background", "on a chessboard", "on tiles"), _tiles),
    "striped": Background(
        ((246, 238, 226), (214, 222, 206)), ("on a striped background", "in front of stripes"), _stripes),
    "bricks": Background(
        ((186, 108, 84), (222, 200, 188)), ("on a brick wall", "in front of bricks", "against a wall"), _bricks),
}
# fmt: on


class Layout(NamedTuple):
    """Where the groups of a scene stand.

    Attributes:
        boxes: left, top, right, bottom of each group, as shares of the image, in reading order.
        large, small: most objects of that size in a box.
        weight: relative probability.
        alone: index of the group that stands apart, if there are three.
    """

    boxes: tuple[Box, ...]
    large: int
    small: int
    weight: int
    alone: int = 0


LAYOUTS: dict[str, Layout] = {
    "single": Layout(((0, 0, 1, 1),), 4, 4, 4),
    "row": Layout(((0, 0, 0.5, 1), (0.5, 0, 1, 1)), 2, 4, 3),
    "column": Layout(((0, 0, 1, 0.5), (0, 0.5, 1, 1)), 2, 4, 3),
    "row over one": Layout(((0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 1, 1)), 1, 3, 1, alone=2),
    "one over row": Layout(((0, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)), 1, 3, 1, alone=0),
    "column then one": Layout(((0, 0, 0.5, 0.5), (0, 0.5, 0.5, 1), (0.5, 0, 1, 1)), 1, 3, 1, alone=2),
    "one then column": Layout(((0, 0, 0.5, 1), (0.5, 0, 1, 0.5), (0.5, 0.5, 1, 1)), 1, 3, 1, alone=0),
}


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

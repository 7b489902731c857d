"""Drawn scenes with captions: a data set that needs no download, to train and to test all stages on a laptop.

Every scene is drawn from a `Scene`, and so are its captions, so what an image shows is known exactly. Two properties
make it a test of STAIR rather than of any classifier:

* Captions name the same thing by several words (circle, disc, ball) and leave most of a scene out. A text tower can
  therefore learn in the unmasked stages to add the words that a caption did not choose.
* Validation holds out whole combinations: no validation scene occurs in training, and no two are the same, so recall by
  index means something. The first caption of each image names all of it.

    python -m datamodules.synthetic FOLDER

writes `train-0000.tar` … `train-0003.tar` and `val-0000.tar` (WebDataset: KEY.png beside KEY.json with `captions` and
the `spec` they were drawn from), `vocab.txt` for `stair.Vocabulary`, and `manifest.json`. Same arguments, same bytes.
"""

import argparse
import hashlib
import io
import json
import math
import os
import string
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

Point = tuple[float, float]
Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

TRAIN_SHARDS = 4
_MANIFEST = "manifest.json"
_SUPERSAMPLE = 4
_SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# What can be drawn, and what it may be called. The first word of each tuple is the name used in `Scene`.


def _arc(x: float, y: float, radius: float, start: float = 0, end: float = 360) -> list[Point]:
    """Points on a circle, in degrees clockwise from the right (y points down)."""
    steps = max(8, round(abs(end - start) / 10))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _rays(count: int, outer: float, inner: float) -> list[Point]:
    """A star with `count` tips, one of them straight up."""
    radii = [outer, inner] * count
    angles = [math.pi * i / count - math.pi / 2 for i in range(2 * count)]
    return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _rectangle(left: float, top: float, right: float, bottom: float) -> list[Point]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) + 2) / 15)
        for a in angles
    ]


@dataclass(frozen=True)
class Shape:
    """One kind of object.

    Attributes:
        nouns: (singular, plural) pairs, all of which captions use.
        body: polygons in [-1, 1]² in the object's colour, outlined as one.
        details: polygons in another tone on top: "dark" or "light" (of the object's colour), or a colour of their own.
    """

    nouns: tuple[tuple[str, str], ...]
    body: tuple[list[Point], ...]
    details: tuple[tuple[str | Colour, list[Point]], ...] = ()


def _nouns(*singulars: str, **irregular: str) -> tuple[tuple[str, str], ...]:
    return tuple((one, irregular.get(one, one + "s")) for one in singulars)


_WOOD, _GLASS, _STEM = (110, 74, 46), (208, 232, 244), (46, 122, 52)

SHAPES: dict[str, Shape] = {
    "circle": Shape(_nouns("circle", "disc", "ball"), (_arc(0, 0, 0.95),)),
    "square": Shape(_nouns("square", "block", "box", box="boxes"), (_rectangle(-0.82, -0.82, 0.82, 0.82),)),
    "triangle": Shape(_nouns("triangle", "pyramid"), ([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)],)),
    "star": Shape(_nouns("star"), (_rays(5, 1, 0.42),)),
    "heart": Shape(_nouns("heart"), (_heart(),)),
    "cross": Shape(
        _nouns("cross", "plus", cross="crosses", plus="pluses"),
        (_rectangle(-0.32, -0.95, 0.32, 0.95), _rectangle(-0.95, -0.32, 0.95, 0.32)),
    ),
    "ring": Shape(_nouns("ring", "hoop", "loop"), (_arc(0, 0, 0.97) + _arc(0, 0, 0.52, 360, 0),)),
    "diamond": Shape(
        _nouns("diamond", "gem", "jewel"),
        ([(-0.55, -0.7), (0.55, -0.7), (1, -0.15), (0, 0.95), (-1, -0.15)],),
        (
            ("light", [(-0.55, -0.7), (0.55, -0.7), (0.38, -0.15), (-0.38, -0.15)]),
            ("dark", [(0.38, -0.15), (1, -0.15), (0, 0.95)]),
        ),
    ),
    "moon": Shape(_nouns("moon", "crescent"), (_arc(0.1, 0, 0.97, 55, 305) + _arc(0.5, 0, 0.8, 273, 87),)),
    "arrow": Shape(
        _nouns("arrow", "pointer"),
        ([(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)],),
    ),
    "tree": Shape(
        _nouns("tree", "pine", "fir"),
        (
            [(0, -1), (0.55, -0.3), (-0.55, -0.3)],
            [(0, -0.65), (0.7, 0.15), (-0.7, 0.15)],
            [(0, -0.2), (0.85, 0.62), (-0.85, 0.62)],
        ),
        ((_WOOD, _rectangle(-0.16, 0.62, 0.16, 1)),),
    ),
    "house": Shape(
        _nouns("house", "home", "cottage"),
        (_rectangle(-0.75, -0.15, 0.75, 0.92), [(0, -0.98), (1, -0.1), (-1, -0.1)]),
        (
            ("dark", [(0, -0.98), (1, -0.1), (-1, -0.1)]),
            (_WOOD, _rectangle(-0.5, 0.3, -0.08, 0.92)),
            (_GLASS, _rectangle(0.15, 0.18, 0.55, 0.55)),
        ),
    ),
    "fish": Shape(
        _nouns("fish", fish="fish"),
        (
            _arc(-0.05, 0.72, 1.1, 222, 318) + _arc(-0.05, -0.72, 1.1, 42, 138),
            [(0.5, 0), (1, -0.6), (0.88, 0), (1, 0.6)],
            [(-0.1, -0.3), (0.2, -0.65), (0.35, -0.2)],
        ),
        (((250, 250, 250), _arc(-0.5, -0.1, 0.15)), ((20, 20, 20), _arc(-0.52, -0.1, 0.08))),
    ),
    "flower": Shape(
        _nouns("flower", "blossom", "bloom"),
        tuple(
            _arc(0.36 * math.cos(a), -0.3 + 0.36 * math.sin(a), 0.31)
            for a in [math.radians(72 * i - 90) for i in range(5)]
        ),
        (
            (_STEM, _rectangle(-0.06, 0.25, 0.06, 1)),
            (_STEM, [(0, 0.8), (0.25, 0.45), (0.5, 0.4), (0.35, 0.68)]),
            ((250, 214, 70), _arc(0, -0.3, 0.2)),
        ),
    ),
    "sun": Shape(_nouns("sun"), (_rays(12, 1, 0.68),), (("dark", _arc(0, 0, 0.6)), ("body", _arc(0, 0, 0.54)))),
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
        (
            (_GLASS, [(-0.46, -0.08), (-0.3, -0.42), (-0.04, -0.42), (-0.04, -0.08)]),
            (_GLASS, [(0.06, -0.08), (0.06, -0.42), (0.3, -0.42), (0.48, -0.08)]),
            ((30, 30, 34), _arc(-0.52, 0.5, 0.26)),
            ((30, 30, 34), _arc(0.52, 0.5, 0.26)),
            ((190, 190, 190), _arc(-0.52, 0.5, 0.11)),
            ((190, 190, 190), _arc(0.52, 0.5, 0.11)),
        ),
    ),
    "mushroom": Shape(
        _nouns("mushroom", "toadstool"),
        (_arc(0, 0.05, 0.95, 180, 360),),
        (
            ((240, 230, 210), [(-0.26, 0.05), (0.26, 0.05), (0.34, 0.9), (-0.34, 0.9)]),
            ((250, 250, 250), _arc(-0.4, -0.3, 0.17)),
            ((250, 250, 250), _arc(0.15, -0.55, 0.15)),
            ((250, 250, 250), _arc(0.5, -0.22, 0.14)),
        ),
    ),
    "umbrella": Shape(
        _nouns("umbrella", "parasol"),
        (_arc(0, 0, 0.97, 180, 360) + [p for x in (0.65, 0.0, -0.65) for p in reversed(_arc(x, 0, 0.325, 180, 360))],),
        (
            (_WOOD, _rectangle(-0.06, -0.2, 0.06, 0.8)),
            (_WOOD, _arc(0.17, 0.75, 0.23, 0, 180) + _arc(0.17, 0.75, 0.1, 180, 0)),
        ),
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

SIZES: dict[str, tuple[str, ...]] = {"large": ("large", "big", "huge"), "small": ("small", "little", "tiny")}

COUNTS: dict[int, tuple[str, ...]] = {
    1: ("a", "a", "a", "a", "a", "a", "one", "a single"),
    2: ("two", "two", "a pair of", "a couple of"),
    3: ("three", "three", "a trio of"),
    4: ("four", "four", "a group of four"),
}


@dataclass(frozen=True)
class Background:
    """A ground to draw on: its colours (the first fills it), how to draw the rest, and what it is called."""

    tones: tuple[Colour, ...]
    paint: Callable[[ImageDraw.ImageDraw, int, tuple[Colour, ...], Random], None]
    phrases: tuple[str, ...]


def _plain(draw: ImageDraw.ImageDraw, side: int, tones: tuple[Colour, ...], rng: Random) -> None:
    """The fill is all there is."""


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


BACKGROUNDS: dict[str, Background] = {
    "grey": Background(((194, 195, 197),), _plain, ("on a grey background", "on a gray background", "on plain grey")),
    "cream": Background(((250, 240, 210),), _plain, ("on a cream background", "on cream paper", "on beige")),
    "mint": Background(((200, 240, 218),), _plain, ("on a mint background", "on mint paper")),
    "lavender": Background(((222, 212, 246),), _plain, ("on a lavender background", "on lilac paper")),
    "night": Background(
        ((24, 28, 72), (230, 230, 250), (170, 180, 220)), _specks, ("at night", "in the night sky", "in the dark")
    ),
    "grass": Background(
        ((122, 196, 92), (98, 176, 74), (146, 214, 112)),
        _blades,
        ("on the grass", "on a lawn", "in a meadow", "in a field"),
    ),
    "sea": Background(
        ((82, 164, 214), (140, 200, 234)), _waves, ("on the water", "at sea", "in the ocean", "on the waves")
    ),
    "sand": Background(
        ((232, 204, 148), (210, 178, 120), (246, 224, 178)), _specks, ("on the sand", "on a beach", "in the desert")
    ),
    "snow": Background(
        ((240, 246, 252), (206, 220, 238), (222, 232, 244)), _specks, ("in the snow", "in winter", "on the ice")
    ),
    "checkered": Background(
        ((236, 236, 236), (200, 204, 214)), _tiles, ("on a checkered background", "on a chessboard", "on tiles")
    ),
    "striped": Background(
        ((246, 238, 226), (214, 222, 206)), _stripes, ("on a striped background", "in front of stripes")
    ),
    "bricks": Background(
        ((186, 108, 84), (222, 200, 188)), _bricks, ("on a brick wall", "in front of bricks", "against a wall")
    ),
}


@dataclass(frozen=True)
class Layout:
    """Where the groups of a scene stand.

    Attributes:
        boxes: left, top, right, bottom of each group's place, as shares of the image; in reading order, so that one
            arrangement has one description.
        alone: with three groups, the index of the one that stands apart from the other two.
        large, small: the most objects of that size that fit into each of the places.
        weight: how often it is drawn, relative to the others.
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

# the second relation is the first one read backwards: "A left of B" is "B right of A"
_BESIDE = (("to the left of", "left of"), ("to the right of", "right of"))
_STACKED = (("above", "over", "on top of"), ("below", "under", "beneath"))
_VAGUE = ("next to", "beside", "near", "and", "with")
_SIDES = {
    "left": ("on the left", "to the left"),
    "right": ("on the right", "to the right"),
    "above": ("above", "at the top"),
    "below": ("below", "at the bottom"),
}
_OPENERS = ("", "", "", "a picture of", "a drawing of", "an image of", "an illustration of", "we see", "look at")


# Scenes


@dataclass(frozen=True)
class Group:
    """`count` objects of one kind; the strings are keys of `SHAPES`, `COLOURS` and `SIZES`."""

    shape: str
    colour: str
    size: str
    count: int


@dataclass(frozen=True)
class Scene:
    """All that a caption can say about an image. `groups` stand in the places of `LAYOUTS[layout]`, in that order."""

    layout: str
    background: str
    groups: tuple[Group, ...]


def _stands_out(colour: Colour, ground: Colour) -> bool:
    # below 95 (black to white: 442) an object can hardly be told from its ground at 64 pixels
    return math.dist(colour, ground) > 95


def random_scene(rng: Random) -> Scene:
    """Draws a scene whose objects fit their places and can be seen on their background."""
    name = rng.choices(list(LAYOUTS), [layout.weight for layout in LAYOUTS.values()])[0]
    layout = LAYOUTS[name]
    background = rng.choice(list(BACKGROUNDS))
    visible = [c for c, (rgb, _) in COLOURS.items() if _stands_out(rgb, BACKGROUNDS[background].tones[0])]
    groups = []
    for shape in rng.sample(list(SHAPES), len(layout.boxes)):
        size = rng.choice(list(SIZES))
        most = layout.large if size == "large" else layout.small
        groups.append(Group(shape, rng.choice(visible), size, rng.choice([1, 1, *range(1, most + 1)])))
    return Scene(name, background, tuple(groups))


def _distinct_scenes(rng: Random, count: int, taken: set[Scene]) -> list[Scene]:
    """`count` scenes that are not in `taken`, which they join."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if scene not in taken:
            taken.add(scene)
            scenes.append(scene)
    return scenes


# Pictures


def _cells(box: Box, count: int) -> list[Box]:
    """Divides a group's place into equal rows and columns, one cell an object; a last row that is short is centred."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    columns = min(count, 2 if width <= height or count == 4 else count)
    if width < height and count == 2:
        columns = 1
    rows = math.ceil(count / columns)
    cells = []
    for i in range(count):
        row, column = divmod(i, columns)
        indent = (columns - min(columns, count - row * columns)) / 2
        x, y = left + (column + indent) * width / columns, top + row * height / rows
        cells.append((x, y, x + width / columns, y + height / rows))
    return cells


def _shifted(colour: Colour, shifts: Iterable[int]) -> Colour:
    red, green, blue = (min(255, max(0, c + shift)) for c, shift in zip(colour, shifts, strict=True))
    return red, green, blue


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return red, green, blue


def _draw_object(
    draw: ImageDraw.ImageDraw, shape: Shape, colour: Colour, middle: Point, radius: float, turn: float
) -> None:
    """Draws one object: outlines of all its body first and fills over them, so that only the outer edge stays."""

    def place(points: list[Point]) -> list[Point]:
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        return [(middle[0] + x * cos - y * sin, middle[1] + x * sin + y * cos) for x, y in points]

    dark, light = _mix(colour, (0, 0, 0), 0.4), _mix(colour, (255, 255, 255), 0.45)
    tones: dict[str | Colour, Colour] = {"dark": dark, "light": light, "body": colour}
    body = [place(points) for points in shape.body]
    edge = _mix(colour, (255, 255, 255), 0.4) if sum(colour) < 150 else dark
    for points in body:
        draw.line([*points, points[0]], fill=edge, width=max(2, round(radius / 9)), joint="curve")
    for points in body:
        draw.polygon(points, fill=colour)
    for tone, points in shape.details:
        draw.polygon(place(points), fill=tones.get(tone, tone))


def draw_scene(scene: Scene, rng: Random, image_size: int) -> Image.Image:
    """Draws a scene; `rng` decides what a caption does not tell: exact place, size, tint and tilt.

    Returns:
        An RGB image of `image_size` × `image_size` pixels.
    """
    side = image_size * _SUPERSAMPLE
    background = BACKGROUNDS[scene.background]
    # grounds vary in brightness only: a tint would turn grey into lavender
    brightness = [rng.randint(-7, 7)] * 3
    tones = tuple(_shifted(tone, brightness) for tone in background.tones)
    canvas = Image.new("RGB", (side, side), tones[0])
    draw = ImageDraw.Draw(canvas)
    background.paint(draw, side, tones, rng)
    for group, box in zip(scene.groups, LAYOUTS[scene.layout].boxes, strict=True):
        colour = _shifted(COLOURS[group.colour][0], [rng.randint(-10, 10) for _ in range(3)])
        for left, top, right, bottom in _cells(box, group.count):
            room = min(right - left, bottom - top)
            if group.size == "small":
                extent = rng.uniform(0.215, 0.24)
            else:
                extent = rng.uniform(0.42, 0.46) if room < 0.9 else rng.uniform(0.48, 0.7)
            slack_x, slack_y = (max(0.0, length - extent) * 0.35 for length in (right - left, bottom - top))
            middle = (
                ((left + right) / 2 + rng.uniform(-slack_x, slack_x)) * side,
                ((top + bottom) / 2 + rng.uniform(-slack_y, slack_y)) * side,
            )
            turn = math.radians(rng.uniform(-9, 9))
            _draw_object(draw, SHAPES[group.shape], colour, middle, extent * side / 2, turn)
    return canvas.resize((image_size, image_size), Image.Resampling.BOX)


# Captions


def _phrase(group: Group, rng: Random, detail: float) -> str:
    """Names a group; size and colour are each told with probability `detail`."""
    noun = rng.choice(SHAPES[group.shape].nouns)[group.count > 1]
    size = rng.choice(SIZES[group.size]) if rng.random() < detail else ""
    colour = rng.choice(COLOURS[group.colour][1]) if rng.random() < detail else ""
    count = rng.choice(COUNTS[group.count])
    if colour and rng.random() < 0.2:
        words = [count, size, noun, rng.choice(("in", "painted", "coloured")), colour]
    else:
        words = [count, size, colour, noun]
    words = [word for word in words if word]
    if words[0] == "a" and words[1][0] in "aeiou":
        words[0] = "an"
    return " ".join(words)


def _relation(scene: Scene, first: int, second: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is said between two groups with `first` < `second`, and what when they are named the other way round."""
    (left, _, right, _), (other_left, _, other_right, _) = (LAYOUTS[scene.layout].boxes[i] for i in (first, second))
    return _BESIDE if right <= other_left or other_right <= left else _STACKED


def _pair(scene: Scene, first: int, second: int, rng: Random, detail: float) -> str:
    a, b = (_phrase(scene.groups[i], rng, detail) for i in (first, second))
    forward, backward = _relation(scene, first, second)
    if rng.random() >= detail:
        forward = backward = _VAGUE
    a, b, words = (a, b, forward) if rng.random() < 0.6 else (b, a, backward)
    return f"{a} {rng.choice(words)} {b}"


def _everything(scene: Scene, rng: Random, detail: float) -> str:
    """Names all groups, and their relations with probability `detail`."""
    if len(scene.groups) == 1:
        return _phrase(scene.groups[0], rng, detail)
    if len(scene.groups) == 2:
        return _pair(scene, 0, 1, rng, detail)
    alone = LAYOUTS[scene.layout].alone
    first, second = (i for i in range(3) if i != alone)
    stacked = _relation(scene, *sorted((alone, first))) is _STACKED
    side = (("above", "below") if stacked else ("left", "right"))[alone > first]
    pair, third = _pair(scene, first, second, rng, detail), _phrase(scene.groups[alone], rng, detail)
    where = rng.choice(_SIDES[side]) if rng.random() < detail else ""
    return f"{pair} {rng.choice(('with', 'and'))} {third} {where}".strip()


def _caption(body: str, background: str, rng: Random) -> str:
    """Puts an opener before the body and the background (empty for none) behind or before both."""
    if body.count(" ") < 18:  # so that every caption fits into 32 tokens
        body = f"{rng.choice(_OPENERS)} {body}".strip()
    return f"{background} {body}".strip() if rng.random() < 0.2 else f"{body} {background}".strip()


def caption_scene(scene: Scene, rng: Random) -> list[str]:
    """Describes a scene in five distinct ways.

    Returns:
        Five captions in lower case without punctuation: all of the scene; most of it; some of it; one group alone; and
        what stands where, with hardly a word on looks.
    """
    phrases = BACKGROUNDS[scene.background].phrases

    def ground(probability: float) -> str:
        return rng.choice(phrases) if rng.random() < probability else ""

    forms: tuple[Callable[[], str], ...] = (
        lambda: _caption(_everything(scene, rng, 1), ground(1), rng),
        lambda: _caption(_everything(scene, rng, 0.75), ground(0.7), rng),
        lambda: _caption(_everything(scene, rng, 0.5), ground(0.3), rng),
        lambda: _caption(_phrase(rng.choice(scene.groups), rng, 0.8), "", rng),
        lambda: _caption(_everything(scene, rng, 0.15), ground(1), rng),
    )
    captions: list[str] = []
    for form in forms:
        caption = form()
        while caption in captions:
            caption = form()
        captions.append(caption)
    return captions


# Files


@dataclass(frozen=True)
class _Sample:
    key: str
    scene: Scene
    captions: list[str]
    seed: str


def _samples(split: str, scenes: list[Scene], seed: int) -> list[_Sample]:
    samples = []
    for i, scene in enumerate(scenes):
        name = f"{seed}/{split}/{i}"
        samples.append(_Sample(f"{split}-{i:06d}", scene, caption_scene(scene, Random(f"{name}/captions")), name))
    return samples


def _members(samples: Iterable[_Sample], image_size: int) -> Iterator[tuple[str, bytes]]:
    for sample in samples:
        buffer = io.BytesIO()
        draw_scene(sample.scene, Random(f"{sample.seed}/pixels"), image_size).save(buffer, "PNG")
        yield f"{sample.key}.png", buffer.getvalue()
        facts = {"captions": sample.captions, "spec": asdict(sample.scene)}
        yield f"{sample.key}.json", json.dumps(facts).encode()


def _tar(members: Iterable[tuple[str, bytes]]) -> bytes:
    """Packs members with nothing in their headers that changes from one run to the next (tarfile's mtime is 0)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _vocabulary(captions: Iterable[str]) -> list[str]:
    """WordPiece pieces: the special tokens, letters to spell any other word with, then words, frequent ones first.

    Words are counted by the BERT rules of the `tokenizers` library but not by its trainer: that one breaks ties by hash
    order, so two runs give two vocabularies, and keeps half-merged pieces (`autom`, `##brel`) that nobody can read.
    """
    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    counts = Counter(word for caption in captions for word, _ in split(normalize(caption)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    letters = [prefix + letter for prefix in ("", "##") for letter in string.ascii_lowercase]
    return list(dict.fromkeys([*_SPECIALS, *letters, *words]))


def _write(path: Path, content: bytes) -> str:
    """Writes by temporary name and rename, so that a broken-off run leaves no half file. Returns the sha256."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
    return hashlib.sha256(content).hexdigest()


def _is_complete(folder: Path, parameters: dict[str, int | str]) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return manifest["parameters"] == parameters and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
            for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_scenes(folder: Path, *, train: int = 4000, val: int = 300, seed: int = 0, image_size: int = 64) -> bool:
    """Writes the data set, unless the folder holds exactly this one already.

    The validation set depends on `val`, `seed` and `image_size` alone: it stays the same whatever the size of training.

    Args:
        folder: is created where missing; files of an earlier data set in it are replaced.
        train: training scenes, at least one a shard.
        val: validation scenes.
        seed: of everything random.
        image_size: side of the square images, in pixels.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: if a number is too small.
    """
    if train < TRAIN_SHARDS or val < 1 or image_size < 16:
        raise ValueError(
            f"train={train}, val={val}, image_size={image_size} cannot be drawn; "
            f"give train of {TRAIN_SHARDS} or more (one a shard), val of 1 or more and image_size of 16 or more"
        )
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    parameters: dict[str, int | str] = {
        "train": train,
        "val": val,
        "seed": seed,
        "image_size": image_size,
        "drawn_by": source,
    }
    if _is_complete(folder, parameters):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)

    taken: set[Scene] = set()
    held_out = _samples("val", _distinct_scenes(Random(f"{seed}/val"), val, taken), seed)
    training = _samples("train", _distinct_scenes(Random(f"{seed}/train"), train, taken), seed)
    shards = {f"train-{i:04d}.tar": training[i::TRAIN_SHARDS] for i in range(TRAIN_SHARDS)} | {"val-0000.tar": held_out}
    files = {name: _write(folder / name, _tar(_members(samples, image_size))) for name, samples in shards.items()}
    pieces = _vocabulary(caption for sample in training for caption in sample.captions)
    files["vocab.txt"] = _write(folder / "vocab.txt", ("\n".join(pieces) + "\n").encode())
    _write(folder / _MANIFEST, json.dumps({"parameters": parameters, "files": files}, indent=2).encode())
    return True


def main() -> None:
    """The command `python -m datamodules.synthetic`."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.synthetic", description="Draw the demo data set.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=300, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=64, help="pixels a side (default: %(default)s)")
    arguments = parser.parse_args()
    numbers = {name: value for name, value in vars(arguments).items() if name != "folder"}
    written = write_scenes(arguments.folder, **numbers)
    print(f"{arguments.folder}: {'written' if written else 'already holds exactly this data, nothing done'}")


if __name__ == "__main__":
    main()

"""A scene as its picture and as its captions, both drawn from the same `Scene`, so that they agree exactly."""

import math
from collections.abc import Callable, Iterable
from random import Random

from PIL import Image, ImageDraw

from datamodules.scenes import (
    BACKGROUNDS,
    COLOURS,
    COUNTS,
    LAYOUTS,
    SHAPES,
    SIZES,
    Box,
    Colour,
    Group,
    Point,
    Scene,
    Shape,
)

_SUPERSAMPLE = 4

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

"""The image and the captions of a scene."""

import math
from collections.abc import Iterable
from random import Random

from PIL import Image, ImageDraw

from datamodules import scenes
from datamodules.scenes import Box, Colour, Group, Point, Scene, Shape

_SUPERSAMPLE = 4
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def draw_scene(scene: Scene, rng: Random, image_size: int) -> tuple[Image.Image, list[list[Box]]]:
    """Draws a scene; `rng` decides what no caption states: exact position, size, tint and tilt.

    Returns:
        An RGB image of `image_size` × `image_size` pixels, and the boxes of each group's objects, in 0 to 1.
    """
    side, background = image_size * _SUPERSAMPLE, scenes.BACKGROUNDS[scene.background]
    # brightness only: a tint would turn grey into lavender
    brightness = [rng.randint(-7, 7)] * 3
    tones = tuple(_shifted(tone, brightness) for tone in background.tones)
    canvas = Image.new("RGB", (side, side), tones[0])
    draw = ImageDraw.Draw(canvas)
    if background.pattern:
        scenes.PATTERNS[background.pattern](draw, side, tones, rng)
    boxes: list[list[Box]] = [[] for _ in scene.groups]
    for group, box, own in zip(scene.groups, scenes.LAYOUTS[scene.layout].boxes, boxes, strict=True):
        colour = _shifted(scenes.COLOURS[group.colour][0], [rng.randint(-10, 10) for _ in range(3)])
        for left, top, right, bottom in _cells(box, group.count):
            if group.size == "small":
                extent = rng.uniform(0.215, 0.24)
            else:
                extent = rng.uniform(0.42, 0.46) if min(right - left, bottom - top) < 0.9 else rng.uniform(0.48, 0.7)
            slack_x, slack_y = (max(0.0, length - extent) * 0.35 for length in (right - left, bottom - top))
            x = ((left + right) / 2 + rng.uniform(-slack_x, slack_x)) * side
            y = ((top + bottom) / 2 + rng.uniform(-slack_y, slack_y)) * side
            edges = (x / side - extent / 2, y / side - extent / 2, x / side + extent / 2, y / side + extent / 2)
            own.append(tuple(round(min(1.0, max(0.0, edge)), 4) for edge in edges))  # type: ignore[arg-type]
            turn = math.radians(rng.uniform(-9, 9))
            _draw_object(draw, scenes.SHAPES[group.shape], colour, (x, y), extent * side / 2, turn)
    return canvas.resize((image_size, image_size), Image.Resampling.BOX), boxes


def _cells(box: Box, count: int) -> list[Box]:
    """Divides a box into equal rows and columns, one cell an object; a short last row is centred."""
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
    return tuple(min(255, max(0, c + shift)) for c, shift in zip(colour, shifts, strict=True))


def _mix(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def _draw_object(
    draw: ImageDraw.ImageDraw, shape: Shape, colour: Colour, centre: Point, radius: float, turn: float
) -> None:
    cos, sin = math.cos(turn) * radius, math.sin(turn) * radius

    def placed(points: list[Point]) -> list[Point]:
        return [(centre[0] + x * cos - y * sin, centre[1] + x * sin + y * cos) for x, y in points]

    tones = {**scenes.MATERIALS, "dark": _mix(colour, _BLACK, 0.4), "light": _mix(colour, _WHITE, 0.45), "body": colour}
    edge = _mix(colour, _WHITE, 0.4) if sum(colour) < 150 else tones["dark"]
    body = [placed(points) for points in shape.body]
    for points in body:  # all outlines before all fills: only the outer edge stays
        draw.line([*points, points[0]], fill=edge, width=max(2, round(radius / 9)), joint="curve")
    for points in body:
        draw.polygon(points, fill=colour)
    for tone, points in shape.details:
        draw.polygon(placed(points), fill=tones[tone])


def caption_scene(scene: Scene, rng: Random) -> list[str]:
    """Describes a scene in five distinct ways.

    Returns:
        Five captions in lower case without punctuation: all of the scene; most of it; some of it; one group; and the
        positions with few attributes.
    """
    captions: list[str] = []
    # probability that an attribute is stated, and that the background is
    for detail, ground in ((1.0, 1.0), (0.75, 0.7), (0.5, 0.3), (None, 0.0), (0.15, 1.0)):
        caption = _caption(scene, rng, detail, ground)
        while caption in captions:
            caption = _caption(scene, rng, detail, ground)
        captions.append(caption)
    return captions


def _caption(scene: Scene, rng: Random, detail: float | None, ground: float) -> str:
    """A caption of all groups, or of one of them if `detail` is None."""
    body = _phrase(rng.choice(scene.groups), rng, 0.8) if detail is None else _groups(scene, rng, detail)
    background = ""
    if detail is not None and rng.random() < ground:
        background = rng.choice(scenes.BACKGROUNDS[scene.background].phrases)
    if body.count(" ") < 18:  # so that every caption fits into 32 tokens
        body = f"{rng.choice(scenes.TABLES['openers'])} {body}".strip()
    return f"{background} {body}".strip() if rng.random() < 0.2 else f"{body} {background}".strip()


def _groups(scene: Scene, rng: Random, detail: float) -> str:
    """Names all groups; attributes and relations each with probability `detail`."""
    if len(scene.groups) == 1:
        return _phrase(scene.groups[0], rng, detail)
    if len(scene.groups) == 2:
        return _pair(scene, 0, 1, rng, detail)
    alone = scenes.LAYOUTS[scene.layout].alone
    first, second = (i for i in range(3) if i != alone)
    is_beside = _relation(scene, *sorted((alone, first))) == "beside"
    side = (("left", "right") if is_beside else ("above", "below"))[alone > first]
    pair, third = _pair(scene, first, second, rng, detail), _phrase(scene.groups[alone], rng, detail)
    where = rng.choice(scenes.TABLES["sides"][side]) if rng.random() < detail else ""
    return f"{pair} {rng.choice(('with', 'and'))} {third} {where}".strip()


def _pair(scene: Scene, first: int, second: int, rng: Random, detail: float) -> str:
    a, b = (_phrase(scene.groups[i], rng, detail) for i in (first, second))
    forward, backward = scenes.TABLES["relations"][_relation(scene, first, second)]
    if rng.random() >= detail:
        forward = backward = scenes.TABLES["vague"]
    a, b, relations = (a, b, forward) if rng.random() < 0.6 else (b, a, backward)
    return f"{a} {rng.choice(relations)} {b}"


def _relation(scene: Scene, first: int, second: int) -> str:
    (left, _, right, _), (other_left, _, other_right, _) = (
        scenes.LAYOUTS[scene.layout].boxes[i] for i in (first, second)
    )
    return "beside" if right <= other_left or other_right <= left else "stacked"


def _phrase(group: Group, rng: Random, detail: float) -> str:
    noun = rng.choice(scenes.SHAPES[group.shape].nouns)[group.count > 1]
    size = rng.choice(scenes.SIZES[group.size]) if rng.random() < detail else ""
    colour = rng.choice(scenes.COLOURS[group.colour][1]) if rng.random() < detail else ""
    parts = [rng.choice(scenes.COUNTS[group.count]), size, colour, noun]
    if colour and rng.random() < 0.2:
        parts[2:] = [noun, rng.choice(("in", "painted", "coloured")), colour]
    parts = [part for part in parts if part]
    if parts[0] == "a" and parts[1][0] in "aeiou":
        parts[0] = "an"
    return " ".join(parts)

"""`stair explain`: explanations as a PNG with heat maps, or as an HTML page without scripts and requests."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stair.explain import Explanation, ImageReading, Reading, TextReading, explain, read_image, read_text
from stair.files import atomic_write
from stair.images import decode_image
from stair.model import Stair
from stair.pages import document, render
from stair.plain import counted, one_line
from stair.report.terms import encode_png

_TILE, _MARGIN, _LINE, _COLUMNS = 192, 12, 22, 5
_HEAT, _INK, _SOFT = (214, 64, 20), (29, 33, 38), (93, 101, 110)


def explain_command(
    model: str,
    out: Path,
    image: Path | None = None,
    text: str | None = None,
    other_image: Path | None = None,
    other_text: str | None = None,
    num_terms: int = 12,
) -> None:
    """Shows why two items match, or the terms of one item: which patch or token produces which term.

    Args:
        model: folder of an exported model, or its name on the hub.
        out: file to write, `.png` or `.html`.
        image: an image.
        text: a text. With an image and a text, shows why they match.
        other_image: a second image.
        other_text: a second text.
        num_terms: number of terms shown.
    """
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"{out} ends in {out.suffix!r}; give a name that ends in .png or .html")
    items: list[Any] = [each for each in (text, other_text) if each is not None]
    items += [decode_image(path.read_bytes()) for path in (image, other_image) if path is not None]
    if not 1 <= len(items) <= 2:
        raise ValueError("give one or two of --image, --text, --other_image, --other_text")
    stair = Stair.from_pretrained(model)
    if len(items) == 2:
        subject: Explanation | Reading = explain(stair, items[0], items[1])
    else:
        subject = read_text(stair, items[0]) if isinstance(items[0], str) else read_image(stair, items[0])
    with atomic_write(out) as part:
        if out.suffix == ".png":
            draw(subject, num_terms).save(part, "PNG")
        else:
            part.write_text(page(subject, num_terms), encoding="utf-8")
    if isinstance(subject, Explanation):
        first, second = _kinds(subject)
        for term in subject.shared[:num_terms]:
            factors = f"{first} {term.query:.4f} x {second} {term.document:.4f}"
            print(f"{term.contribution:9.4f}  {one_line(term.token)}  ({factors})")
        print(f"{subject.score:9.4f}  score, of {counted(len(subject.shared), 'shared term')}")
    print(out)


def overlay(
    image: Image.Image, heat_RC: NDArray[Any], side: int = _TILE, mark: tuple[int, int] | None = None
) -> Image.Image:
    """Lays a heat map (R, C) over the square that the model sees; `mark` is row and column of a patch to outline."""
    heat_RC = np.clip(np.asarray(heat_RC, np.float64), 0, None)
    strength = (heat_RC / heat_RC.max() if heat_RC.max() > 0 else heat_RC) * 190
    mask = Image.fromarray(strength.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    # in grey, so that red objects do not hide the heat
    picture = image.convert("L").convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    picture.paste(Image.new("RGB", (side, side), _HEAT), mask=mask)
    if mark is not None:
        height, width = side / heat_RC.shape[0], side / heat_RC.shape[1]
        left, top = mark[1] * width, mark[0] * height
        ImageDraw.Draw(picture).rectangle((left, top, left + width - 1, top + height - 1), outline=_INK, width=2)
    return picture


def _readings(subject: Explanation | Reading) -> list[Reading]:
    return [subject.query, subject.document] if isinstance(subject, Explanation) else [subject]


def _kinds(subject: Explanation | Reading) -> list[str]:
    return ["image" if isinstance(side, ImageReading) else "text" for side in _readings(subject)]


def _values(subject: Explanation | Reading) -> list[tuple[str, float]]:
    if isinstance(subject, Explanation):
        return [(term.token, term.contribution) for term in subject.shared]
    return list(zip(subject.terms, subject.weights.tolist(), strict=True))


def _tiles(subject: Explanation | Reading, num_terms: int) -> list[tuple[str, Image.Image]]:
    """Each image, its heat map of the score, and one heat map a term, with titles."""
    tiles = []
    for side in _readings(subject):
        if isinstance(side, ImageReading):
            tiles.append(("image", side.image.resize((_TILE, _TILE), Image.Resampling.BICUBIC)))
            if isinstance(subject, Explanation):
                tiles.append((f"score {subject.score:.4f}", overlay(side.image, subject.heat(side))))
            for term, value in _values(subject)[:num_terms]:
                n = side.terms.index(term)
                tiles.append((f"{term} {value:.4f}", overlay(side.image, side.heat(n), mark=side.patch(n))))
    return tiles


def draw(subject: Explanation | Reading, num_terms: int = 12) -> Image.Image:
    """One picture: heat maps, and the terms of texts below."""
    tiles, lines = _tiles(subject, num_terms), _lines(subject, num_terms)
    columns = max(1, min(_COLUMNS, len(tiles)))
    height = -(-len(tiles) // columns) * (_TILE + _LINE + _MARGIN) + len(lines) * _LINE + 2 * _MARGIN
    sheet = Image.new("RGB", (max(columns * (_TILE + _MARGIN) + _MARGIN, 620), height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)

    def write(left: int, top: int, text: str, fill: tuple[int, int, int]) -> None:
        # Pillow's font has Latin letters only
        pen.text((left, top), text.encode("latin-1", "replace").decode("latin-1"), fill=fill, font=font)

    for n, (title, tile) in enumerate(tiles):
        left = _MARGIN + n % columns * (_TILE + _MARGIN)
        top = _MARGIN + n // columns * (_TILE + _LINE + _MARGIN)
        sheet.paste(tile, (left, top))
        write(left, top + _TILE + 3, title, _INK)
    for n, line in enumerate(lines):
        write(_MARGIN, height - _MARGIN - (len(lines) - n) * _LINE, line, _SOFT if n else _INK)
    return sheet


def _lines(subject: Explanation | Reading, num_terms: int) -> list[str]:
    lines = []
    if isinstance(subject, Explanation):
        values = _values(subject)
        rest = subject.score - sum(value for _, value in values[:4])
        terms = " + ".join(f"{term} {value:.4f}" for term, value in values[:4])
        lines.append(
            f"score {subject.score:.4f} = {terms}" + f" + {len(values) - 4} others {rest:.4f}" * (len(values) > 4)
        )
    for side in _readings(subject):
        if isinstance(side, TextReading):
            lines.append("tokens: " + " ".join(side.tokens))
            for n, term in enumerate(side.terms[:num_terms]):
                role = "expansion, from" if side.expands(n) else "from"
                lines.append(f"  {term} {side.weights[n]:.4f}: {role} {side.tokens[side.positions[n]]}")
    return lines


def page(subject: Explanation | Reading, num_terms: int = 12) -> str:
    """A page of HTML in one file."""
    match = subject if isinstance(subject, Explanation) else None
    content = render(
        "explanation.html",
        match=match,
        num_terms=num_terms,
        kinds=_kinds(subject),
        rest=sum(term.contribution for term in match.shared[num_terms:]) if match else 0.0,
        tiles=[(title, encode_png(tile)) for title, tile in _tiles(subject, num_terms)],
        texts=[_by_token(side, num_terms) for side in _readings(subject) if isinstance(side, TextReading)],
    )
    return document("Why these match" if match else "Terms of this item", [], [content])


def _by_token(side: TextReading, num_terms: int) -> list[tuple[str, list[tuple[bool, str, float]]]]:
    """Each token with the terms whose argmax position it is: whether an expansion, the term, its weight."""
    terms = [
        (side.positions[n], (side.expands(n), term, side.weights[n])) for n, term in enumerate(side.terms[:num_terms])
    ]
    return [(token, [term for position, term in terms if position == t]) for t, token in enumerate(side.tokens)]

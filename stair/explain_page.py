"""Explanations to look at: heat maps over the picture as PNG, or a page that needs no network; `stair explain`.

Words and sentences come from data, so all of them are escaped; the page has no script and a policy that forbids requests.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from stair.explain import Explanation, PictureReading, Reading, SentenceReading, explain, read_image, read_text
from stair.files import atomic_write
from stair.images import decode_image
from stair.model import Stair
from stair.pages import document, render
from stair.plain import one_line

_TILE, _MARGIN, _LINE = 192, 12, 22
_HEAT, _INK, _SOFT = (214, 64, 20), (29, 33, 38), (93, 101, 110)


def explain_command(
    model: str,
    out: Path,
    image: Path | None = None,
    text: str | None = None,
    other_image: Path | None = None,
    other_text: str | None = None,
    words: int = 12,
) -> None:
    """Shows why two items match, or what one says: which patch or token made which word.

    Args:
        model: folder of a saved model, or its name on the hub.
        out: file to write, `.png` or `.html`.
        image: a picture.
        text: a text. Image and text together: why these two match.
        other_image: a second picture.
        other_text: a second text.
        words: how many words are shown.
    """
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"{out} ends in {out.suffix!r}; wanted .png or .html")
    items = [decode_image(path.read_bytes()) for path in (image, other_image) if path is not None]
    both: list[Any] = [one for one in (text, other_text) if one is not None] + items
    if not 1 <= len(both) <= 2:
        raise ValueError("give one or two of --image, --text, --other_image, --other_text")
    stair = Stair.from_pretrained(model)
    if len(both) == 2:
        subject: Explanation | Reading = explain(stair, both[0], both[1])
    else:
        subject = read_text(stair, both[0]) if isinstance(both[0], str) else read_image(stair, both[0])
    with atomic_write(out) as part:
        if out.suffix == ".png":
            draw(subject, words).save(part, "PNG")
        else:
            part.write_text(page(subject, words), encoding="utf-8")
    shared = subject.shared if isinstance(subject, Explanation) else ()
    for word in shared[:words]:
        print(f"{word.contribution:9.4f}  {one_line(word.token)}  ({word.query:.4f} x {word.document:.4f})")
    if isinstance(subject, Explanation):
        print(f"{subject.score:9.4f}  score, of {len(shared)} shared words")
    print(out)


def overlay(
    image: Image.Image, heat_RC: NDArray[Any], side: int = _TILE, mark: tuple[int, int] | None = None
) -> Image.Image:
    """Lays a heat map over a picture.

    Args:
        image: the square the model saw.
        heat_RC: (R, C), not negative; the highest value is the strongest colour.
        side: of the result, in pixels.
        mark: row and column of a patch to outline.
    """
    heat_RC = np.clip(np.asarray(heat_RC, np.float64), 0, None)
    strength = (heat_RC / heat_RC.max() if heat_RC.max() > 0 else heat_RC) * 190
    mask = Image.fromarray(strength.astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    # without its own colours, so that red things do not hide the heat
    picture = image.convert("L").convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    picture.paste(Image.new("RGB", (side, side), _HEAT), mask=mask)
    if mark is not None:
        rows, columns = heat_RC.shape
        top, left = mark[0] * side / rows, mark[1] * side / columns
        box = (left, top, left + side / columns - 1, top + side / rows - 1)
        ImageDraw.Draw(picture).rectangle(box, outline=_INK, width=2)
    return picture


def _tiles(subject: Explanation | Reading, words: int) -> list[tuple[str, Image.Image]]:
    """Pictures with their titles: the whole match first, then one a word."""
    tiles = []
    sides = (subject.query, subject.document) if isinstance(subject, Explanation) else (subject,)
    for side in sides:
        if not isinstance(side, PictureReading):
            continue
        tiles.append(("picture", side.image.resize((_TILE, _TILE), Image.Resampling.BICUBIC)))
        if isinstance(subject, Explanation):
            tiles.append((f"score {subject.score:.4f}", overlay(side.image, subject.heat(side))))
        place = {word: n for n, word in enumerate(side.words)}
        for word, value in _values(subject)[:words]:
            n = place[word]
            tiles.append((f"{word} {value:.4f}", overlay(side.image, side.heat(n), mark=side.patch(n))))
    return tiles


def _values(subject: Explanation | Reading) -> list[tuple[str, float]]:
    if isinstance(subject, Explanation):
        return [(term.token, term.contribution) for term in subject.shared]
    return list(zip(subject.words, subject.weights.tolist(), strict=True))


def draw(subject: Explanation | Reading, words: int = 12) -> Image.Image:
    """One picture: tiles with heat maps, and the words of sentences below."""
    tiles, lines = _tiles(subject, words), _lines(subject, words)
    columns = max(1, min(5, len(tiles)))
    height = -(-len(tiles) // columns) * (_TILE + _LINE + _MARGIN) + len(lines) * _LINE + 2 * _MARGIN
    width = max(columns * (_TILE + _MARGIN) + _MARGIN, 620)
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for n, (title, tile) in enumerate(tiles):
        left = _MARGIN + n % columns * (_TILE + _MARGIN)
        top = _MARGIN + n // columns * (_TILE + _LINE + _MARGIN)
        sheet.paste(tile, (left, top))
        pen.text((left, top + _TILE + 3), _printable(title), fill=_INK, font=font)
    top = height - _MARGIN - len(lines) * _LINE
    for n, line in enumerate(lines):
        pen.text((_MARGIN, top + n * _LINE), _printable(line), fill=_SOFT if n else _INK, font=font)
    return sheet


def _printable(text: str) -> str:
    # the font that Pillow brings has Latin letters only
    return text.encode("latin-1", "replace").decode("latin-1")


def _lines(subject: Explanation | Reading, words: int) -> list[str]:
    values, lines = _values(subject), []
    if isinstance(subject, Explanation):
        lines += [f"score {subject.score:.4f} = " + " + ".join(f"{word} {value:.4f}" for word, value in values[:4])]
        rest = subject.score - sum(value for _, value in values[:4])
        lines[0] += f" + {len(values) - 4} others {rest:.4f}" if len(values) > 4 else ""
    sides = (subject.query, subject.document) if isinstance(subject, Explanation) else (subject,)
    for side in sides:
        if isinstance(side, SentenceReading):
            lines.append("tokens: " + " ".join(side.tokens))
            for n in range(min(words, len(side.words))):
                kind = "expansion, raised by" if side.expands(n) else "raised by"
                lines.append(f"  {side.words[n]} {side.weights[n]:.4f}: {kind} {side.tokens[side.winners[n]]}")
    return lines


def page(subject: Explanation | Reading, words: int = 12) -> str:
    """A page of HTML, all in one file."""
    match = isinstance(subject, Explanation)
    sides = (subject.query, subject.document) if isinstance(subject, Explanation) else (subject,)
    content = render(
        "explanation.html",
        score=subject.score if isinstance(subject, Explanation) else None,
        rows=_rows(subject, words) if isinstance(subject, Explanation) else [],
        tiles=[(name, _png(tile)) for name, tile in _tiles(subject, words)],
        sentences=[_raised(side, words) for side in sides if isinstance(side, SentenceReading)],
    )
    return document("Why these match" if match else "What this says", [], [content])


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _rows(subject: Explanation, words: int) -> list[tuple[str, str, str, str, float]]:
    """Shared words with both weights, their product, and the length of its bar; the lighter ones in one row."""
    most = max((word.contribution for word in subject.shared), default=1.0)
    shown, rest = subject.shared[:words], subject.shared[words:]
    rows = [(w.token, f"{w.query:.4f}", f"{w.document:.4f}", w.contribution) for w in shown]
    if rest:
        rows.append((f"{len(rest)} more", "", "", sum(word.contribution for word in rest)))
    return [(w, q, d, f"{value:.4f}", max(0.0, min(1.0, value / most))) for w, q, d, value in rows]


def _raised(side: SentenceReading, words: int) -> list[tuple[str, list[tuple[bool, str, float]]]]:
    """Each token with the words it raised: whether they are expansions, the words, their weights."""
    raised: dict[int, list[tuple[bool, str, float]]] = {}
    for n in range(min(words, len(side.words))):
        raised.setdefault(int(side.winners[n]), []).append((side.expands(n), side.words[n], float(side.weights[n])))
    return [(token, raised.get(t, [])) for t, token in enumerate(side.tokens)]

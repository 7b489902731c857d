"""A page that shows what a model learned: one HTML file to open, mail or keep, without a server or the network.

A sparse embedding is readable, so the page lets one read it: which words an image fired and whether its own captions
hold them, and for each search hit the words it shares with the query and what each adds to the score. Figures alone
hide a model that retrieves by arbitrary codes; this page does not.

Images are embedded as data, styles are inline, there is no script, and a content security policy forbids all requests.
Captions and words come from data, so all of them are escaped.

Shapes: V words of the vocabulary, H × W pixels.
"""

import base64
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image
from torch import Tensor

from stair.vocabulary import Vocabulary

Words = Sequence[tuple[str, float]]


@dataclass(frozen=True)
class StageRow:
    """A line of the results table.

    Attributes:
        name: what was measured, such as `stage 1, grounding`.
        metrics: figures by name, such as `t2i/recall@1`; lines may lack some. Recall and grounding, 0 to 1, are shown
            in percent.
    """

    name: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Picture:
    """A held-out image with the words it fired.

    Attributes:
        image: bytes of a PNG, JPEG, WebP or GIF file.
        captions: its own captions; the first is also the alternative text.
        words: what to show of its embedding, largest weight first (`top_words`).
        own: the pieces of its captions.
    """

    image: bytes
    captions: Sequence[str]
    words: Words
    own: frozenset[str]


@dataclass(frozen=True)
class Hit:
    """An image found for a query.

    Attributes:
        image: bytes of a PNG, JPEG, WebP or GIF file.
        score: dot product of query and image, the sum of all contributions.
        shared: contributions to the score, largest first (`shared_words`); those left out are shown as one remainder.
        caption: of the image found.
        wanted: whether it is the image that the query describes.
    """

    image: bytes
    score: float
    shared: Words
    caption: str = ""
    wanted: bool = False


@dataclass(frozen=True)
class Search:
    """A text query with the best images for it.

    Attributes:
        query: the sentence.
        words: of the query's embedding, largest weight first (`top_words`).
        own: the pieces of the sentence; all other words are expansions.
        hits: best first.
    """

    query: str
    words: Words
    own: frozenset[str]
    hits: Sequence[Hit]


def top_words(embedding: Tensor, vocabulary: Vocabulary, k: int) -> list[tuple[str, float]]:
    """The active words of an embedding with their weights.

    Args:
        embedding: (V,), any floating type.
        vocabulary: names the V dimensions.
        k: how many at most.

    Returns:
        Up to `k` pairs of piece and weight, largest first, equal ones in the order of the vocabulary. Words of weight
        0 are never among them.

    Raises:
        ValueError: if the embedding is not of this vocabulary.
    """
    if embedding.shape != (len(vocabulary),):
        raise ValueError(
            f"an embedding of shape {tuple(embedding.shape)} cannot be named by a vocabulary of {len(vocabulary)} "
            f"pieces; give one row of shape ({len(vocabulary)},) and the vocabulary of the model that made it"
        )
    weights, ids = embedding.detach().float().cpu().sort(descending=True, stable=True)
    active = min(k, int((weights > 0).sum()))
    return list(zip(vocabulary.words(ids[:active].tolist()), weights[:active].tolist(), strict=True))


def shared_words(a: Tensor, b: Tensor, vocabulary: Vocabulary, k: int) -> list[tuple[str, float]]:
    """Why two embeddings match: what each word adds to their dot product.

    Args:
        a: (V,), any floating type.
        b: (V,), of the same vocabulary.
        vocabulary: names the V dimensions.
        k: how many words at most; with all of them the contributions sum to the dot product.

    Returns:
        Up to `k` pairs of piece and product of its two weights, largest first.

    Raises:
        ValueError: if an embedding is not of this vocabulary.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings of shapes {tuple(a.shape)} and {tuple(b.shape)} share no words; give two of (V,)")
    return top_words(a.detach().float() * b.detach().float(), vocabulary, k)


def encode_png(pixels: Tensor) -> bytes:
    """Turns pixels as they travel in a batch into the bytes of a PNG file.

    Args:
        pixels: (3, H, W) uint8, 0 to 255.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels.cpu().permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def write_page(
    path: Path,
    *,
    title: str,
    stages: Sequence[StageRow] = (),
    pictures: Sequence[Picture] = (),
    searches: Sequence[Search] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes the page; a part without content is left out.

    Args:
        path: of the HTML file; written by temporary name and rename, its folder is created where missing.
        title: heading of the page.
        stages: lines of the results table, in the order to be read.
        pictures: held-out images.
        searches: text queries.
        notes: what a reader must know to judge the rest: data, hardware, sizes, seeds.

    Raises:
        ValueError: if an image is none of the formats a browser shows.
    """
    parts = [_results(stages), _gallery(pictures), _searches(searches)]
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{_list("notes", map(escape, notes))}</header>
<main>{"".join(parts)}</main>
</body>
</html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _list(kind: str, items: Iterable[str]) -> str:
    content = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="{kind}">{content}</ul>' if content else ""


_DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}


def _in_percent(metric: str) -> bool:
    return metric.rpartition("/")[2].startswith(("recall", "grounding"))


def _figure(metric: str, value: float) -> str:
    if math.isnan(value):
        return "—"
    if _in_percent(metric):
        return f"{100 * value:.1f}%"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _cell(metric: str, value: float, best: float) -> str:
    mark = ' class="best"' if value == best and _in_percent(metric) else ""
    return f"<td{mark}>{_figure(metric, value)}</td>"


def _results(stages: Sequence[StageRow]) -> str:
    """One line a stage, one column a metric, the best recall and grounding of each column marked."""
    if not stages:
        return ""
    metrics = list(dict.fromkeys(metric for stage in stages for metric in stage.metrics))
    best = {
        m: max((s.metrics[m] for s in stages if not math.isnan(s.metrics.get(m, math.nan))), default=0) for m in metrics
    }
    heads = []
    for metric in metrics:
        group, _, name = metric.rpartition("/")
        heads.append(
            f"<th scope=col><small>{escape(_DIRECTIONS.get(group, group))}</small>{escape(name.replace('_', ' '))}</th>"
        )
    lines = [
        f"<tr><th scope=row>{escape(stage.name)}</th>"
        + "".join(_cell(m, stage.metrics.get(m, math.nan), best[m]) for m in metrics)
        + "</tr>"
        for stage in stages
    ]
    return (
        '<section><h2>Results by stage</h2><div class="wide"><table>'
        f"<thead><tr><th></th>{''.join(heads)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


_MEDIA_TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))


def _image(data: bytes, text: str) -> str:
    kind = next((kind for start, kind in _MEDIA_TYPES if data.startswith(start)), None)
    if kind is None and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise ValueError(
            f"{len(data)} bytes that begin with {data[:8]!r} are no PNG, JPEG, WebP or GIF; "
            "give the bytes of such a file (`encode_png` makes them from pixels)"
        )
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _bars(words: Words, own: frozenset[str], longest: float, remainder: float = 0.0) -> str:
    """Words with bars as long as their weights; a bar over the full width stands for the weight `longest`."""
    if not words:
        return '<p class="none">no active words</p>'
    digits = 2 if longest >= 1 else 3
    rows = [
        f'<li class="{"own" if word in own else "added"}"><span class="word">{escape(word)}</span>'
        f'<span class="bar"><i style="width:{100 * weight / longest:.1f}%"></i></span>'
        f'<span class="weight">{weight:.{digits}f}</span></li>'
        for word, weight in words
    ]
    if remainder > 0.01 * longest:
        rows.append(f'<li class="rest"><span>other words</span><span class="weight">{remainder:.{digits}f}</span></li>')
    return f'<ol class="bars">{"".join(rows)}</ol>'


def _largest(words: Words) -> float:
    return max((weight for _, weight in words), default=0.0)


def _legend(own: str, added: str) -> str:
    keys = (("own", own), ("added", added))
    spans = "".join(f'<span class="{kind}"><i></i>{escape(text)}</span>' for kind, text in keys)
    return f'<p class="legend">{spans}</p>'


def _card(picture: Picture) -> str:
    image = _image(picture.image, next(iter(picture.captions), ""))
    bars = _bars(picture.words, picture.own, _largest(picture.words))
    captions = _list("captions", map(escape, picture.captions))
    return f'<article class="card"><div class="fired">{image}{bars}</div>{captions}</article>'


def _gallery(pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    return (
        "<section><h2>What held-out images say</h2>"
        "<p>The heaviest words of each image, read straight off its embedding, with their weights. The model is shown "
        "the image alone; the captions stand below only to compare.</p>"
        f"{_legend('in its own captions', 'not in its captions')}"
        f'<div class="gallery">{"".join(map(_card, pictures))}</div></section>'
    )


def _hit(rank: int, hit: Hit, own: frozenset[str], longest: float) -> str:
    wanted = '<span class="wanted">its own image</span>' if hit.wanted else ""
    remainder = hit.score - sum(weight for _, weight in hit.shared)
    caption = f'<p class="caption">{escape(hit.caption)}</p>' if hit.caption else ""
    return (
        f'<li class="hit{" is-wanted" if hit.wanted else ""}">{_image(hit.image, hit.caption)}'
        f'<p class="score"><b>{rank}</b><span>score {hit.score:.2f}</span>{wanted}</p>'
        f"{_bars(hit.shared, own, longest, remainder)}{caption}</li>"
    )


def _search(search: Search) -> str:
    # one measure for all hits, so that their bars can be compared
    longest = max((_largest(hit.shared) for hit in search.hits), default=0.0)
    hits = "".join(_hit(rank, hit, search.own, longest) for rank, hit in enumerate(search.hits, 1))
    return (
        f'<article class="card search"><div class="query"><h3>{escape(search.query)}</h3>'
        f'{_bars(search.words, search.own, _largest(search.words))}</div><ol class="hits">{hits}</ol></article>'
    )


def _searches(searches: Sequence[Search]) -> str:
    if not searches:
        return ""
    return (
        "<section><h2>What a search finds, and why</h2>"
        "<p>Beside each query stand the words it searches with; under each image, what every shared word adds to its "
        "score: weight in the query times weight in the image.</p>"
        f"{_legend('in the query itself', 'added by the model')}{''.join(map(_search, searches))}</section>"
    )


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d2126; --soft: #5d656e; --line: #e1e2dd;
  --own: #1f7a6d; --own-ink: #14594f; --added: #d9a441; --track: #eeeeea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1c2024; --ink: #e8eaec; --soft: #9ba4ad; --line: #2e343a;
    --own: #3aa394; --own-ink: #7fd6c9; --added: #b98a35; --track: #272c31;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 40px; }
section { margin: 44px 0 56px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 10px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 0 0 6px; }
h3 { font-size: 18px; line-height: 1.35; margin: 0 0 10px; }
section > p { margin: 0 0 10px; max-width: 68ch; color: var(--soft); }
ul, ol { list-style: none; margin: 0; padding: 0; }
.notes { color: var(--soft); font-size: 15px; max-width: 76ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px; }
img { display: block; width: 100%; border-radius: 6px; background: var(--track); }

.wide { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 14px; text-align: right; white-space: nowrap; }
tbody tr { border-top: 1px solid var(--line); }
thead th { font-size: 14px; font-weight: 600; vertical-align: bottom; }
thead small { display: block; font-weight: 400; color: var(--soft); }
th:first-child { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--card); }
.best { font-weight: 700; color: var(--own-ink); }

.legend { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; }
.legend span { display: flex; align-items: center; gap: 8px; color: var(--ink); }
.legend i { width: 22px; height: 10px; border-radius: 3px; }
.own i { background: var(--own); }
.added i { background: var(--added); }

.bars {
  display: grid; grid-template-columns: fit-content(60%) minmax(36px, 1fr) auto; gap: 4px 10px; align-items: center;
  font-size: 14px; line-height: 1.3;
}
.bars li { display: contents; }
.bar { height: 9px; background: var(--track); border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 3px; }
.weight { text-align: right; color: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums; }
.bars .own .word { font-weight: 650; color: var(--own-ink); }
.rest { color: var(--soft); }
.none { margin: 0; color: var(--soft); font-size: 14px; }

.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 16px; }
.fired { display: grid; grid-template-columns: 104px 1fr; gap: 14px; align-items: start; }
.captions {
  margin-top: 12px; padding-top: 10px; border-top: 1px solid var(--line);
  font-size: 13.5px; line-height: 1.4; color: var(--soft);
}
.captions li + li { margin-top: 3px; }

.search { margin-bottom: 16px; display: grid; grid-template-columns: 250px 1fr; gap: 26px; }
.query h3::before { content: "“"; } .query h3::after { content: "”"; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(134px, 1fr)); gap: 16px; }
.hit .bars { display: block; }
.hit .bars li { display: grid; grid-template-columns: 1fr auto; gap: 1px 6px; padding: 2px 0; align-items: baseline; }
.hit .bar { grid-row: 2; grid-column: 1 / -1; height: 5px; }
.hit.is-wanted img { outline: 3px solid var(--own); outline-offset: 2px; }
.score { display: flex; flex-wrap: wrap; gap: 0 8px; margin: 8px 0 4px; font-size: 14px; color: var(--soft); }
.score b { color: var(--ink); }
.wanted { white-space: nowrap; color: var(--own-ink); font-weight: 600; font-size: 13px; }
.caption { margin: 8px 0 0; font-size: 12.5px; line-height: 1.35; color: var(--soft); }

@media (max-width: 720px) {
  header, main { padding: 0 14px; }
  header { padding-top: 24px; }
  h1 { font-size: 25px; }
  th, td { padding: 8px 11px; }
  th:first-child { white-space: normal; min-width: 8.5em; }
  .gallery { grid-template-columns: 1fr; }
  .search { grid-template-columns: 1fr; gap: 18px; }
  .hits { grid-template-columns: repeat(2, 1fr); }
}
"""

"""A page that shows what a model learned: one HTML file to open, mail or keep, without a server or the network.

A sparse embedding is readable, so the page lets one read it: which words an image fired and whether its own captions
hold them, and for each search hit the words it shares with the query and what each adds to the score. Figures alone
hide a model that retrieves by arbitrary codes; this page does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stair.plain import escape
from stair.report.page import as_list, image_tag, write_html
from stair.report.words import Words


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
    write_html(path, title, notes, [_results(stages), gallery(pictures), _searches(searches)])


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
    image = image_tag(picture.image, next(iter(picture.captions), ""))
    bars = _bars(picture.words, picture.own, _largest(picture.words))
    captions = as_list("captions", map(escape, picture.captions))
    return f'<article class="card"><div class="fired">{image}{bars}</div>{captions}</article>'


def gallery(pictures: Sequence[Picture]) -> str:
    """A section of images with their words; nothing for none."""
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
        f'<li class="hit{" is-wanted" if hit.wanted else ""}">{image_tag(hit.image, hit.caption)}'
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

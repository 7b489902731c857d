"""A page that shows what a model learned: one HTML file to open, mail or keep, without a server or the network.

A sparse embedding is readable, so the page lets one read it: which words an image fired and whether its own captions
hold them, and for each search hit the words it shares with the query and what each adds to the score. Figures alone
hide a model that retrieves by arbitrary codes; this page does not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stair.pages import render, write_html
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
    metrics = list(dict.fromkeys(metric for stage in stages for metric in stage.metrics))
    content = render(
        "report.html",
        heads=[_head(metric) for metric in metrics],
        lines=_lines(stages, metrics),
        pictures=pictures,
        # one measure for all hits of a query, so that their bars can be compared
        searches=[(one, max((w for hit in one.hits for _, w in hit.shared), default=0.0)) for one in searches],
    )
    write_html(path, title, notes, [content])


_DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}


def _head(metric: str) -> tuple[str, str]:
    group, _, name = metric.rpartition("/")
    return _DIRECTIONS.get(group, group), name.replace("_", " ")


def _in_percent(metric: str) -> bool:
    return metric.rpartition("/")[2].startswith(("recall", "grounding"))


def _figure(metric: str, value: float) -> str:
    if math.isnan(value):
        return "—"
    if _in_percent(metric):
        return f"{100 * value:.1f}%"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def _lines(stages: Sequence[StageRow], metrics: Sequence[str]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Of each stage its name and its figures, and whether a figure is the best recall or grounding of its column."""
    values = [[stage.metrics.get(metric, math.nan) for metric in metrics] for stage in stages]
    best = [max((v for v in column if not math.isnan(v)), default=0.0) for column in zip(*values, strict=True)]
    return [
        (
            stage.name,
            [(_figure(m, v), v == top and _in_percent(m)) for m, v, top in zip(metrics, row, best, strict=True)],
        )
        for stage, row in zip(stages, values, strict=True)
    ]

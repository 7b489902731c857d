"""A page that shows what a model learned: metrics of its stages, images with their terms, searches.

It shows what figures hide: which terms an image activates, whether its own captions contain them, and what each shared
term adds to the score of a search hit.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stair.data.pairs import EvaluationPairs, Pair
from stair.model import Stair
from stair.pages import render, write_html
from stair.report.terms import Terms, encode_png, shared_terms, top_terms
from stair.vocabulary import Vocabulary

_IMAGES, _TERMS, _HITS = 24, 10, 5
_GROUPS = {"t2i": "text → image", "i2t": "image → text"}


class StageRow(NamedTuple):
    """A row of the results table: figures by name, such as `t2i/recall@1`. Recall and grounding are shown in percent."""

    name: str
    metrics: Mapping[str, float]


class Picture(NamedTuple):
    """A held-out image, the bytes of a PNG, JPEG, WebP or GIF file, with its active terms."""

    image: bytes
    captions: Sequence[str]  # the first is also the alternative text
    terms: Terms  # of its embedding (`top_terms`)
    in_caption: frozenset[str]  # tokens of the captions

    @classmethod
    def of(cls, image: bytes, captions: Sequence[str], embedding_V: Tensor, vocabulary: Vocabulary) -> "Picture":
        """An image with the terms of its embedding."""
        return cls(image, captions, top_terms(embedding_V, vocabulary, _TERMS), _tokens(vocabulary, captions))


class Hit(NamedTuple):
    """An image that a query retrieved."""

    image: bytes
    score: float  # the sum of all contributions
    shared: Terms  # contributions to the score (`shared_terms`); the others are shown as one remainder
    caption: str = ""
    is_target: bool = False  # whether the query describes this image


class Search(NamedTuple):
    """A text query with its best images."""

    query: str
    terms: Terms  # of the query's embedding (`top_terms`)
    in_caption: frozenset[str]  # tokens of the query; all other terms are expansions
    hits: Sequence[Hit]  # best first


def write_page(
    path: Path,
    *,
    title: str,
    stages: Sequence[StageRow] = (),
    pictures: Sequence[Picture] = (),
    searches: Sequence[Search] = (),
    notes: Sequence[str] = (),
) -> None:
    """Writes the page atomically, with `notes` below its title; a part without content is omitted.

    Raises:
        ValueError: if an image is of another format.
    """
    metrics = list(dict.fromkeys(metric for stage in stages for metric in stage.metrics))
    best = {metric: max(stage.metrics.get(metric, -math.inf) for stage in stages) for metric in metrics}
    content = render(
        "report.html",
        metrics=[(_GROUPS.get(g, g), name.replace("_", " ")) for g, _, name in (m.rpartition("/") for m in metrics)],
        stages=[(stage.name, [_cell(m, stage.metrics.get(m, math.nan), best[m]) for m in metrics]) for stage in stages],
        pictures=pictures,
        # one scale for the bars of all hits of a query
        searches=[(each, max((w for hit in each.hits for _, w in hit.shared), default=0.0)) for each in searches],
    )
    write_html(path, title, notes, [content])


def _cell(metric: str, value: float, best: float) -> tuple[str, bool]:
    """The text of a figure, and whether it is the best recall or grounding of its column."""
    if math.isnan(value):
        return "—", False
    if metric.rpartition("/")[2].startswith(("recall", "grounding", "shapes")):
        return f"{100 * value:.1f}%", value == best
    return (f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"), False


def write_model_page(
    path: Path,
    title: str,
    model: Stair,
    held_out: EvaluationPairs,
    stages: Sequence[StageRow],
    queries: Sequence[str],
    lead: str,
) -> None:
    """Writes the page of a model in eval mode: its `stages`, and searches of `held_out` images that fit into memory.

    The searches are by `queries` and by captions of three images. The first note, `lead`, states what was trained.
    """
    pairs = [held_out[i] for i in range(len(held_out))]
    image_NV = torch.cat([model.encode_image(part) for part in torch.stack([p.pixels for p in pairs]).split(100)])
    described = [len(pairs) * part // 3 for part in range(3)]
    searches = [_search(model, pairs[i].captions[0], image_NV, pairs, target=i) for i in described]
    shown = zip(pairs, image_NV[:_IMAGES], strict=False)
    write_page(
        path,
        title=title,
        stages=[StageRow(r.name, {m: v for m, v in r.metrics.items() if not m.endswith("@5")}) for r in stages],
        pictures=[Picture.of(encode_png(p.pixels), p.captions, image_V, model.vocabulary) for p, image_V in shown],
        searches=[*searches, *(_search(model, text, image_NV, pairs) for text in queries)],
        notes=(
            lead,
            "Most captions leave out most of a scene, so several images fit: text → image cannot reach 100%.",
            f"Frequency baseline: random order, and the {_TERMS} most common caption tokens for every image.",
            f"The vocabulary has {len(model.vocabulary)} tokens: the words of the training captions, and letters. The "
            "images below are the first of the held-out set, not selected.",
        ),
    )


def _search(model: Stair, text: str, image_NV: Tensor, pairs: Sequence[Pair], target: int | None = None) -> Search:
    """Ranks all images for a text; `target` is the image it describes."""
    text_1V, vocabulary = model.encode_text([text]), model.vocabulary
    query_V, gallery_NV = model.comparable(text_1V)[0], model.comparable(image_NV)
    score_N = gallery_NV @ query_V
    hits = [
        Hit(
            encode_png(pairs[i].pixels),
            float(score_N[i]),
            shared_terms(gallery_NV[i], query_V, vocabulary, _TERMS // 2),
            pairs[i].captions[0],
            i == target,
        )
        for i in score_N.topk(_HITS).indices.tolist()
    ]
    return Search(text, top_terms(text_1V[0], vocabulary, _TERMS), _tokens(vocabulary, [text]), hits)


def _tokens(vocabulary: Vocabulary, texts: Sequence[str]) -> frozenset[str]:
    return frozenset(vocabulary.tokens_of(v for text in texts for v in vocabulary.token_ids(text)))

"""A page that shows a trained model: metrics of its stages, pictures with their words, searches."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from stair.data.pairs import EvaluationPairs, Pair
from stair.model import Stair
from stair.report.parts import Hit, Picture, Search, StageRow, write_page
from stair.report.words import encode_png, shared_words, top_words
from stair.vocabulary import Vocabulary

_IMAGES, _WORDS, _HITS = 24, 10, 5


def write_model_page(
    path: Path,
    title: str,
    model: Stair,
    held_out: EvaluationPairs,
    stages: Sequence[StageRow],
    queries: Sequence[str],
    lead: str,
) -> None:
    """Writes the page.

    Args:
        path: the file.
        title: of the page.
        model: in eval mode.
        held_out: images and captions that the model never saw; small enough for memory.
        stages: a row of metrics for each stage; those at 5 are left out.
        queries: texts to search the images with, beside captions of three of the images.
        lead: what was trained and measured, the first note below the metrics.
    """
    pairs = [held_out[i] for i in range(len(held_out))]
    image_NV = torch.cat([model.encode_image(part) for part in torch.stack([p.pixels for p in pairs]).split(100)])
    described = [len(pairs) * part // 3 for part in range(3)]
    searches = [
        *(_search(model, pairs[i].captions[0], image_NV, pairs, wanted=i) for i in described),
        *(_search(model, text, image_NV, pairs) for text in queries),
    ]
    write_page(
        path,
        title=title,
        stages=[StageRow(r.name, {m: v for m, v in r.metrics.items() if not m.endswith("@5")}) for r in stages],
        pictures=[_picture(model.vocabulary, p, e) for p, e in zip(pairs, image_NV[:_IMAGES], strict=False)],
        searches=searches,
        notes=(
            lead,
            "Most captions leave out most of a scene, so several images fit: text → image cannot reach 100%.",
            f"Few words describe every scene, so always naming the {_WORDS} commonest caption words gives the "
            "grounding of the first line: compare with that, not with 0.",
            f"The vocabulary has {len(model.vocabulary)} pieces: the words of the training captions, and letters. The "
            "pictures below are the first of the held-out set, not chosen.",
        ),
    )


def _picture(vocabulary: Vocabulary, pair: Pair, embedding_V: Tensor) -> Picture:
    words = top_words(embedding_V, vocabulary, _WORDS)
    return Picture(encode_png(pair.pixels), pair.captions, words, _pieces(vocabulary, pair.captions))


def _pieces(vocabulary: Vocabulary, texts: Sequence[str]) -> frozenset[str]:
    return frozenset(vocabulary.words(i for text in texts for i in vocabulary.pieces(text)))


def _search(model: Stair, text: str, image_NV: Tensor, pairs: Sequence[Pair], wanted: int | None = None) -> Search:
    """Ranks all held-out images for a text; `wanted` is the image that the text describes, if it is one's caption."""
    text_1V, vocabulary = model.encode_text([text]), model.vocabulary
    query_V, gallery_NV = model.comparable(text_1V)[0], model.comparable(image_NV)
    score_N = gallery_NV @ query_V
    hits = [
        Hit(
            encode_png(pairs[i].pixels),
            float(score_N[i]),
            shared_words(gallery_NV[i], query_V, vocabulary, _WORDS // 2),
            pairs[i].captions[0],
            i == wanted,
        )
        for i in score_N.topk(_HITS).indices.tolist()
    ]
    return Search(text, top_words(text_1V[0], vocabulary, _WORDS), _pieces(vocabulary, [text]), hits)

"""What images and their captions say of each term of a model.

N images, C captions, V terms, K active terms of a text. A matrix is sparse, with a row for each image or caption. An image
holds a term if a caption of it contains the term's token, or a word of the same lemma.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_matrix, csr_matrix
from scipy.stats import binomtest
from tqdm import tqdm

from stair.errors import import_extra
from stair.vocabulary import Vocabulary, is_stop_word

CLASSES = {
    "grounded": "where it is active, captions contain its word",
    "related": "where it is active, captions contain a word that co-occurs with it",
    "code": "where it is active, captions contain neither clearly more often than elsewhere",
    "unproven": "neither shown nor excluded, often for lack of images",
    "stop word": "a function word of English, or without a letter",
    "dead": "never active in this set",
}
_WORD = re.compile(r"[^\W\d_]+")
_NEIGHBOURS = 10
_LEAST_TOGETHER, _LEAST_LIFT = (
    3,
    2.0,
)  # of a neighbour: images with both words, and how many times as often as by chance
_TOP_IMAGES = 5


class Evidence(NamedTuple):
    """Embeddings of a set, and what its captions and boxes say."""

    image_NV: csr_matrix  # weights
    position_NV: csr_matrix  # 1 + argmax position of active terms
    pointed_NV: csr_matrix  # of active terms whose word has a box: 1 if the argmax patch is in one, else -1
    text_CV: csr_matrix  # weights
    owner_C: NDArray[np.int64]  # the image of each caption
    held_NV: csr_matrix  # 1 where an image holds a term


class Lemmas:
    """Terms by the lemma of their token.

    Args:
        vocabulary: of the model.

    Raises:
        MissingPackageError: without simplemma.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        lemmatize = import_extra("simplemma", "simplemma", "evaluate").lemmatize
        self.of = cache(lambda word: lemmatize(word, lang="en").lower())
        self._terms = defaultdict[str, list[int]](list)
        for v, token in enumerate(vocabulary.tokens):
            if _WORD.fullmatch(token):
                self._terms[self.of(token)].append(v)

    def terms(self, texts: Sequence[str]) -> set[int]:
        """Ids of the terms that these texts contain, by token or by lemma."""
        lemmas = {self.of(word) for text in texts for word in _WORD.findall(text.lower())}
        tokens = {v for text in texts for v in self.vocabulary.token_ids(text)}
        return tokens.union(*(self._terms.get(lemma, ()) for lemma in lemmas))

    def held(self, captions: Sequence[Sequence[str]]) -> csr_matrix:
        """(N, V): 1 where an image's captions contain a term."""
        rows = [sorted(self.terms(texts)) for texts in captions]
        ends = np.cumsum([0, *map(len, rows)])
        columns = np.fromiter((v for row in rows for v in row), np.int64, ends[-1])
        return csr_matrix((np.ones(ends[-1]), columns, ends), (len(rows), len(self.vocabulary)))


def neighbours(held_NV: csr_matrix, stop_V: NDArray[np.bool_], lemmas: Sequence[str]) -> list[list[int]]:
    """Of each term the words whose co-occurrence with it in captions has the highest pointwise mutual information.

    Args:
        held_NV: 1 where an image holds a term.
        stop_V: True for stop words, which are no neighbours.
        lemmas: V, of each term; a word of the same lemma is no neighbour.
    """
    count_V = np.asarray(held_NV.sum(0)).ravel()
    together_VV = (held_NV.T @ held_NV).tocsr()
    found: list[list[int]] = []
    for v in range(len(count_V)):
        part = slice(*together_VV.indptr[v : v + 2])
        others, counts = together_VV.indices[part], together_VV.data[part]
        lift = counts * held_NV.shape[0] / (count_V[v] * count_V[others])
        usable = (counts >= _LEAST_TOGETHER) & (lift >= _LEAST_LIFT) & ~stop_V[others]
        ranked = others[usable][np.argsort(-lift[usable], kind="stable")]
        found.append([w for w in ranked.tolist() if lemmas[w] != lemmas[v]][:_NEIGHBOURS])
    return found


def holds_neighbour(held_NV: csr_matrix, near: Sequence[Sequence[int]]) -> csr_matrix:
    """(N, V): 1 where an image holds one of the `neighbours` of a term."""
    ends = np.cumsum([0, *map(len, near)])
    near_VV = csr_matrix((np.ones(ends[-1]), np.concatenate([*near, []]).astype(int), ends), (len(near),) * 2)
    return (held_NV @ near_VV.T > 0).astype(float)


class Share(NamedTuple):
    """Of the rows in which each term is active, how many have what is looked for, and how many of all rows."""

    active_V: NDArray[np.float64]
    hits_V: NDArray[np.float64]
    base_V: NDArray[np.float64]  # share of all rows
    rows: int

    @classmethod
    def of(cls, weight_XV: csr_matrix, looked_for_XV: csr_matrix) -> "Share":
        """Counts rows."""
        active_XV = (weight_XV > 0).astype(float)
        sums = (active_XV, active_XV.multiply(looked_for_XV), looked_for_XV)
        active_V, hits_V, all_V = (np.asarray(each.sum(0)).ravel() for each in sums)
        rows = weight_XV.shape[0]
        return cls(active_V, hits_V, all_V / max(1, rows), rows)

    def confirms(self, v: int) -> bool:
        """Whether the share is half or twice that of all rows, and the lower end of its interval above that of all rows."""
        if not self.active_V[v] or self.interval(v)[0] <= self.base_V[v]:
            return False
        return bool(self.hits_V[v] / self.active_V[v] >= self._wanted(v))

    def excludes(self, v: int) -> bool:
        """Whether the upper end of the interval is below that share, no row has what is sought, or all are active."""
        hopeless = not self.base_V[v] or self.active_V[v] == self.rows
        return bool(hopeless or self.interval(v)[1] < self._wanted(v))

    def _wanted(self, v: int) -> float:
        return min(0.5, 2 * float(self.base_V[v]))

    def interval(self, v: int) -> tuple[float, float]:
        """The 95 % Wilson interval of the share of active rows."""
        return _wilson(int(self.hits_V[v]), int(self.active_V[v]))

    def figures(self, v: int) -> dict[str, float | None]:
        """`precision`, `low`, `high` and `lift` of a term that is active somewhere."""
        precision, (low, high) = float(self.hits_V[v] / self.active_V[v]), self.interval(v)
        lift = precision / float(self.base_V[v]) if self.base_V[v] else None
        return {"precision": precision, "low": low, "high": high, "lift": lift}


@cache
def _wilson(hits: int, rows: int) -> tuple[float, float]:
    interval = binomtest(hits, rows).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def describe(lemmas: Lemmas, evidence: Evidence, corpus_MV: csr_matrix, similarity: str) -> list[dict[str, Any]]:
    """The terms that are active, those with the greatest weight on images first.

    Args:
        lemmas: of the model's vocabulary.
        evidence: of N images.
        corpus_MV: what the images of another set hold, from which co-occurrence is counted.
        similarity: `dot` or `cosine`, for recall.

    Returns:
        Of each term, JSON-ready: `term`, `class` (see `CLASSES`), active `images` and `texts`, share of all `weight` on
        images and `text_weight`; `precision` of "active, so held" with its 95 % interval `low`, `high`, and `lift` over all
        images (of texts, where no image is active); `average_precision` of the weight as a detector of the word;
        `recall_effect`, R@1 text → image in points that is lost without the term; `same_position`, the share of its argmax
        positions that are the most frequent one; `pointing`, the share of `boxed` images whose argmax patch is in a box of
        the word; `near`, words that co-occur with it; `top`, rows of the images with the greatest weights.
    """
    vocabulary = lemmas.vocabulary
    stop_V = np.array([is_stop_word(token) for token in vocabulary.tokens])
    near = neighbours(corpus_MV, stop_V, [lemmas.of(token) for token in vocabulary.tokens])
    near_NV = holds_neighbour(evidence.held_NV, near)
    weights, owner_C = {"images": evidence.image_NV, "texts": evidence.text_CV}, evidence.owner_C
    held = {"images": evidence.held_NV, "texts": evidence.held_NV[owner_C]}
    own = {side: Share.of(weights[side], held[side]) for side in weights}
    related = {side: Share.of(weights[side], near) for side, near in (("images", near_NV), ("texts", near_NV[owner_C]))}
    weight_of = {side: np.asarray(weight.sum(0)).ravel() / max(1e-12, weight.sum()) for side, weight in weights.items()}
    effect_V, columns = (
        recall_effect(evidence, similarity),
        {name: each.tocsc() for name, each in evidence._asdict().items() if name != "owner_C"},
    )
    terms = []
    for v in np.flatnonzero(own["images"].active_V + own["texts"].active_V).tolist():
        side = "images" if own["images"].active_V[v] else "texts"
        terms.append(
            {
                "term": vocabulary.tokens[v],
                "class": "stop word" if stop_V[v] else class_of(own[side], related[side], v),
                **{key: int(own[key].active_V[v]) for key in own},
                "weight": float(weight_of["images"][v]),
                "text_weight": float(weight_of["texts"][v]),
                **own[side].figures(v),
                "recall_effect": float(effect_V[v]),
                **_on_images(v, columns),
                "near": vocabulary.tokens_of(near[v]),
            }
        )
    return sorted(terms, key=lambda term: (-term["weight"], -term["text_weight"]))


def class_of(own: Share, related: Share, v: int) -> str:
    """The class of an active term that is no stop word: `own` counts its word in captions, `related` words near it."""
    if own.confirms(v):
        return "grounded"
    if related.confirms(v):
        return "related"
    return "code" if own.excludes(v) and related.excludes(v) else "unproven"


def _on_images(v: int, columns: dict[str, csc_matrix]) -> dict[str, Any]:
    """What is known of a term only where images have it."""
    weight_N, held_N = (columns[name][:, [v]].toarray().ravel() for name in ("image_NV", "held_NV"))
    position, pointed = (columns[name][:, [v]].data for name in ("position_NV", "pointed_NV"))
    score = import_extra("sklearn.metrics", "scikit-learn", "evaluate").average_precision_score
    return {
        "average_precision": float(score(held_N, weight_N)) if held_N.any() and weight_N.any() else None,
        "same_position": max(Counter(position).values()) / len(position) if len(position) else None,
        "pointing": float(np.mean(pointed > 0)) if len(pointed) else None,
        "boxed": len(pointed),
        "top": [n for n in np.argsort(-weight_N, kind="stable")[:_TOP_IMAGES].tolist() if weight_N[n] > 0],
    }


def recall_effect(evidence: Evidence, similarity: str) -> NDArray[np.float64]:
    """(V,): R@1 text → image, in points, that is lost if queries leave out a term. Ties count against.

    The index stays as it is: vectors of cosine models are not normalised again.
    """
    normalize = import_extra("sklearn.preprocessing", "scikit-learn", "evaluate").normalize
    sides = evidence.image_NV, evidence.text_CV
    image_NV, text_CV = map(normalize, sides) if similarity == "cosine" else sides
    image_VN, lost_V = image_NV.T.tocsr(), np.zeros(image_NV.shape[1])
    pairs = zip(text_CV, evidence.owner_C.tolist(), strict=True)
    for text_1V, owner in tqdm(pairs, "recall without terms", text_CV.shape[0], unit="caption", disable=None):
        part_KN = image_VN[text_1V.indices].toarray() * text_1V.data[:, None]
        score_N = part_KN.sum(0)
        without_KN = score_N - part_KN
        found = (score_N >= score_N[owner]).sum() == 1
        lost_V[text_1V.indices] += found * 1.0 - ((without_KN >= without_KN[:, [owner]]).sum(1) == 1)
    return 100 * lost_V / max(1, len(evidence.owner_C))


def summary(terms: Sequence[dict[str, Any]], vocabulary_size: int) -> dict[str, dict[str, float]]:
    """Of each class, the number of `terms` and their shares of the weight on `images` and on `texts`; see `describe`."""
    of_class = {name: [term for term in terms if term["class"] == name] for name in CLASSES}
    counts = {name: len(each) for name, each in of_class.items()} | {"dead": vocabulary_size - len(terms)}
    return {
        name: {
            "terms": counts[name],
            "images": sum(term["weight"] for term in each),
            "texts": sum(term["text_weight"] for term in each),
        }
        for name, each in of_class.items()
    }

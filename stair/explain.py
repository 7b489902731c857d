"""Why two items match, and where in a picture or a sentence each word comes from.

A score is a sum over shared words, and a weight is a maximum over positions. So each shared word names the patch and the
token that made it, and giving each word's contribution to the patch that won it divides the whole score over the picture.

T positions, W active terms, E width of the word embeddings, R × C patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from stair.head import VocabularyHead
from stair.images import as_rgb, eval_pixels
from stair.index import SharedTerm
from stair.model import Stair


@dataclass(frozen=True)
class Reading:
    """The words of one item and the positions that raised them.

    Attributes:
        words: W pieces, heaviest first.
        weights: (W,) float32, as the model gives them.
        winners: (W,) the position of the highest logit of each word; of equal ones the first.
        evidence: (W, T) the weight each position alone would give the word; `weights` is its maximum.
    """

    words: Sequence[str]
    weights: NDArray[np.float32]
    winners: NDArray[np.int64]
    evidence: NDArray[np.float32]


@dataclass(frozen=True)
class PictureReading(Reading):
    """The words of a picture.

    Attributes:
        image: the square the model saw.
        grid: R rows and C columns of patches.
        prefix: positions before the first patch (class and register tokens, where the model lets them speak).
    """

    image: Image
    grid: tuple[int, int]
    prefix: int

    def heat(self, word: int) -> NDArray[np.float32]:
        """(R, C) what each patch gives a word, by its place in `words`; zeros where the model lets no patch speak."""
        patches = self.evidence[word, self.prefix :]
        return patches.reshape(self.grid) if len(patches) else np.zeros(self.grid, np.float32)

    def patch(self, word: int) -> tuple[int, int] | None:
        """Row and column of the patch that won a word; None if a position outside the picture did."""
        place = int(self.winners[word]) - self.prefix
        return divmod(place, self.grid[1]) if place >= 0 else None


@dataclass(frozen=True)
class SentenceReading(Reading):
    """The words of a sentence.

    Attributes:
        tokens: T pieces as the encoder read them, [CLS] and [SEP] included.
    """

    tokens: Sequence[str]

    def expands(self, word: int) -> bool:
        """Whether a word, by its place in `words`, is not in the sentence itself."""
        return self.words[word] not in self.tokens


@dataclass(frozen=True)
class Explanation:
    """Why two items match.

    Attributes:
        score: their similarity: the contributions added up in the order of the vocabulary, in float64, as a search does.
        shared: the words both have, largest contribution first.
        query: reading of the one.
        document: reading of the other.
    """

    score: float
    shared: Sequence[SharedTerm]
    query: Reading
    document: Reading

    def heat(self, side: PictureReading) -> NDArray[np.float64]:
        """(R, C) the score divided over the patches of one of the two: each word's contribution goes to its winner.

        Words that no patch won are left out; where only patches speak, as by default, the patches sum to the score.
        """
        return shares_on_patches(side, {term.token: term.contribution for term in self.shared})


def shares_on_patches(side: PictureReading, shares: Mapping[str, float]) -> NDArray[np.float64]:
    """(R, C) the shares of words, each on the patch that won the word. Words that the picture lacks are left out."""
    heat_RC = np.zeros(side.grid)
    for n, word in enumerate(side.words):
        patch = side.patch(n)
        if patch is not None:
            heat_RC[patch] += shares.get(word, 0.0)
    return heat_RC


@torch.no_grad()
def read_image(model: Stair, image: Image) -> PictureReading:
    """The words of a picture and the patches that won them."""
    pixels = eval_pixels(as_rgb(image), model.config.image.image_size)
    hidden_1TD = model.image_encoder(pixels[None].to(model.log_scale.device))
    everywhere_T = torch.ones(hidden_1TD.shape[1], dtype=torch.bool)
    weights_V = model.encode_image(pixels[None])[0]
    parts = _read(model, model.image_head, hidden_1TD[0], everywhere_T, weights_V)
    rows, columns = model.image_encoder.grid
    from PIL import Image as Images

    square = Images.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return PictureReading(*parts, square, (rows, columns), hidden_1TD.shape[1] - rows * columns)


@torch.no_grad()
def read_text(model: Stair, text: str) -> SentenceReading:
    """The words of a sentence and the tokens that raised them."""
    ids_1T, mask_1T = model.vocabulary.tokenize([text], model.config.text.max_tokens)
    device = model.log_scale.device
    hidden_1TD = model.text_encoder(ids_1T.to(device), mask_1T.to(device))
    # where other words may be active, they lie behind by the model's lead
    behind_V = model.config.in_caption_margin * (~model.vocabulary.in_caption_terms(ids_1T, mask_1T)[0]).float().to(
        device
    )
    parts = _read(model, model.text_head, hidden_1TD[0], mask_1T[0], model.encode_text([text])[0], behind_V)
    return SentenceReading(*parts, model.vocabulary.words(ids_1T[0].tolist()))


def _read(
    model: Stair,
    head: VocabularyHead,
    hidden_TD: Tensor,
    mask_T: Tensor,
    weights_V: Tensor,
    behind_V: Tensor | None = None,
) -> tuple[list[str], NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]:
    # only the words that are active: W logits a position instead of V
    weight_V, ids_V = weights_V.sort(descending=True, stable=True)
    ids_W = ids_V[weight_V > 0]
    hidden_TE = head.norm(torch.nn.functional.gelu(head.dense(hidden_TD)))
    logits_WT = (head.words[ids_W] @ hidden_TE.T + head.bias[ids_W, None]).masked_fill(
        ~mask_T.to(ids_W.device), -torch.inf
    )
    if behind_V is not None:
        logits_WT = logits_WT - behind_V[ids_W, None]
    evidence_WT = torch.log1p(torch.relu(logits_WT))
    return (
        model.vocabulary.words(ids_W.tolist()),
        weight_V[weight_V > 0].cpu().numpy(),
        logits_WT.argmax(dim=1).cpu().numpy(),
        evidence_WT.cpu().numpy(),
    )


def explain(model: Stair, query: Image | str, document: Image | str) -> Explanation:
    """Explains the similarity of two items.

    Args:
        model: their model.
        query: a picture or a text.
        document: a picture or a text.
    """
    readings = [
        read_text(model, item) if isinstance(item, str) else read_image(model, item) for item in (query, document)
    ]
    a, b = (dict(zip(reading.words, _comparable(model, reading), strict=True)) for reading in readings)
    in_order = sorted(
        a.keys() & b.keys(), key={token: v for v, token in enumerate(model.vocabulary.tokens)}.__getitem__
    )
    shared = [SharedTerm(word, float(a[word]), float(b[word])) for word in in_order]
    score = 0.0
    for word in shared:
        score += word.contribution
    return Explanation(score, sorted(shared, key=lambda word: -word.contribution), readings[0], readings[1])


def _comparable(model: Stair, reading: Reading) -> NDArray[np.float32]:
    return model.comparable(torch.from_numpy(reading.weights)).numpy()

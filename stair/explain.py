"""Why two items match, and which patch or token produces each term.

A score is a sum over shared terms, and a weight is a maximum over positions. So each shared term belongs to one position of
each item: its argmax position. Assigning each contribution to its argmax patch divides the whole score over the image.

T positions, W active terms, R × C patches, E width of the word embeddings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stair.head import VocabularyHead
from stair.images import as_rgb, eval_pixels
from stair.index import SharedTerm
from stair.model import Stair


@dataclass(frozen=True)
class Reading:
    """The W active terms of one item, heaviest first."""

    terms: Sequence[str]  # tokens
    weights: NDArray[np.float32]  # (W,), as the model gives them
    positions: NDArray[np.int64]  # (W,) argmax position, the first of equal ones
    evidence: NDArray[np.float32]  # (W, T) the weight that each position alone would give; its maximum is the weight


@dataclass(frozen=True)
class ImageReading(Reading):
    """The active terms of an image."""

    image: Image.Image  # the square that the model sees
    grid: tuple[int, int]  # R rows and C columns of patches
    prefix: int  # positions before the first patch (class and register tokens)

    def heat(self, term: int) -> NDArray[np.float32]:
        """(R, C) evidence of each patch for a term, by its index in `terms`; zeros where patches are not read."""
        patches = self.evidence[term, self.prefix :]
        return patches.reshape(self.grid) if len(patches) else np.zeros(self.grid, np.float32)

    def patch(self, term: int) -> tuple[int, int] | None:
        """Row and column of a term's argmax patch; None if its argmax position is no patch."""
        position = int(self.positions[term]) - self.prefix
        return divmod(position, self.grid[1]) if position >= 0 else None

    def heat_of(self, values: Mapping[str, float]) -> NDArray[np.float64]:
        """(R, C) values of terms, each at its argmax patch. Terms that the image lacks are left out."""
        heat_RC = np.zeros(self.grid)
        for n, term in enumerate(self.terms):
            if (patch := self.patch(n)) is not None:
                heat_RC[patch] += values.get(term, 0.0)
        return heat_RC


@dataclass(frozen=True)
class TextReading(Reading):
    """The active terms of a text."""

    tokens: Sequence[str]  # T, as the encoder reads them, [CLS] and [SEP] included

    def expands(self, term: int) -> bool:
        """Whether a term, by its index in `terms`, is not in the text."""
        return self.terms[term] not in self.tokens


@dataclass(frozen=True)
class Explanation:
    """Why two items match."""

    score: float  # contributions added in float64 in the order of the vocabulary, as in a search
    shared: Sequence[SharedTerm]  # largest contribution first
    query: Reading
    document: Reading

    def heat(self, side: ImageReading) -> NDArray[np.float64]:
        """(R, C) the score divided over the patches of a side; its sum is the score if only patches are read."""
        return side.heat_of({each.token: each.contribution for each in self.shared})


@torch.no_grad()
def read_image(model: Stair, image: Image.Image) -> ImageReading:
    """The active terms of an image with their argmax patches."""
    pixels = eval_pixels(as_rgb(image), model.config.image.image_size)
    hidden_1TD = model.image_encoder(pixels[None].to(model.log_scale.device))
    square = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    rows, columns = model.image_encoder.grid
    parts = _read(model, model.image_head, hidden_1TD[0], model.encode_image(pixels[None])[0])
    return ImageReading(*parts, square, (rows, columns), hidden_1TD.shape[1] - rows * columns)


@torch.no_grad()
def read_text(model: Stair, text: str) -> TextReading:
    """The active terms of a text with their argmax tokens."""
    ids_1T, mask_1T = model.vocabulary.tokenize([text], model.config.text.max_tokens)
    hidden_1TD = model.text_encoder(ids_1T.to(model.log_scale.device), mask_1T.to(model.log_scale.device))
    margin_V = model.config.in_caption_margin * (~model.vocabulary.in_caption_terms(ids_1T, mask_1T)[0]).float()
    parts = _read(model, model.text_head, hidden_1TD[0], model.encode_text([text])[0], margin_V)
    return TextReading(*parts, model.vocabulary.tokens_of(ids_1T[0].tolist()))


def _read(
    model: Stair, head: VocabularyHead, hidden_TD: Tensor, weight_V: Tensor, margin_V: Tensor | None = None
) -> tuple[Any, Any, Any, Any]:
    weight_V, ids_V = weight_V.sort(descending=True, stable=True)
    ids_W = ids_V[weight_V > 0]  # W logits a position instead of V
    hidden_TE = head.norm(torch.nn.functional.gelu(head.dense(hidden_TD)))
    logits_WT = head.word_embeddings[ids_W] @ hidden_TE.T + head.bias[ids_W, None]
    if margin_V is not None:
        logits_WT -= margin_V.to(ids_W.device)[ids_W, None]
    tokens, weight_W = model.vocabulary.tokens_of(ids_W.tolist()), weight_V[weight_V > 0]
    evidence_WT = torch.log1p(torch.relu(logits_WT))
    return tokens, weight_W.cpu().numpy(), logits_WT.argmax(dim=1).cpu().numpy(), evidence_WT.cpu().numpy()


def explain(model: Stair, query: Image.Image | str, document: Image.Image | str) -> Explanation:
    """Explains the similarity of two items, each an image or a text."""
    readings = [
        read_text(model, item) if isinstance(item, str) else read_image(model, item) for item in (query, document)
    ]
    a, b = (
        dict(zip(each.terms, model.comparable(torch.from_numpy(each.weights)).tolist(), strict=True))
        for each in readings
    )
    shared = [SharedTerm(term, a[term], b[term]) for term in model.vocabulary.tokens if term in a and term in b]
    score = 0.0
    for each in shared:
        score += each.contribution
    return Explanation(score, sorted(shared, key=lambda each: -each.contribution), readings[0], readings[1])

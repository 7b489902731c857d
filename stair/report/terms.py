"""The terms of an embedding, and those that two embeddings share, by name and with their weights.

V terms of the vocabulary, H × W pixels.
"""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from stair.vocabulary import Vocabulary

Terms = Sequence[tuple[str, float]]


def top_terms(embedding: Tensor, vocabulary: Vocabulary, k: int) -> list[tuple[str, float]]:
    """Up to `k` pairs of token and weight above 0 of a (V,) embedding, largest first, equal ones in vocabulary order.

    Raises:
        ValueError: if the embedding is not of this vocabulary.
    """
    if embedding.shape != (len(vocabulary),):
        raise ValueError(f"embedding has shape {tuple(embedding.shape)}, its vocabulary {len(vocabulary)} terms")
    weights, ids = embedding.detach().float().cpu().sort(descending=True, stable=True)
    active = min(k, int((weights > 0).sum()))
    return list(zip(vocabulary.tokens_of(ids[:active].tolist()), weights[:active].tolist(), strict=True))


def shared_terms(a: Tensor, b: Tensor, vocabulary: Vocabulary, k: int) -> list[tuple[str, float]]:
    """Up to `k` pairs of token and contribution to the dot product of two (V,) embeddings, largest first.

    Raises:
        ValueError: if an embedding is not of this vocabulary.
    """
    if a.shape != b.shape:
        raise ValueError(f"embeddings have shapes {tuple(a.shape)} and {tuple(b.shape)}; give two of shape (V,)")
    return top_terms(a.detach().float() * b.detach().float(), vocabulary, k)


def encode_png(image: Tensor | Image.Image) -> bytes:
    """The bytes of a PNG file from an image, or from (3, H, W) uint8 pixels."""
    if isinstance(image, Tensor):
        image = Image.fromarray(image.cpu().permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()

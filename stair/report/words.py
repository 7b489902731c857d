"""Which words an embedding is made of, and which two of them share: with their weights, by name.

Shapes: V words of the vocabulary, H × W pixels.
"""

import io
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from stair.vocabulary import Vocabulary

Words = Sequence[tuple[str, float]]


def top_words(embedding: Tensor, vocabulary: Vocabulary, k: int) -> list[tuple[str, float]]:
    """The active terms of an embedding with their weights.

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

"""A model under evaluation, whatever it is: what it must be able to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from PIL.Image import Image
from torch import Tensor

from stair.vocabulary import Vocabulary


class Encoder(Protocol):
    """What embeds. B images or texts, V words (or the width of a dense embedding)."""

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared."""
        ...

    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings of RGB pictures of any size."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings of texts."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A model with its own tokenizer that states which texts it cuts."""

    def cut(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, True where a text is longer than the model takes."""
        ...


@dataclass(frozen=True)
class Scored:
    """A model with what tables say of it.

    Attributes:
        encoder: the model.
        name: what tables call it.
        kind: `sparse` or `dense`.
        words: names the dimensions; None where they have no names.
        vocabulary: words to choose among in the vocabulary test; that of `words`, or any other for a dense model.
        truncation: what becomes of long texts, as printed beside the figures.
        facts: about its training, for the model card.
    """

    encoder: Encoder
    name: str
    kind: Literal["sparse", "dense"]
    words: Vocabulary | None
    vocabulary: Vocabulary | None
    truncation: str
    facts: dict[str, object]

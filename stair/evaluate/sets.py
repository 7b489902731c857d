"""What an evaluation reads: images with captions, images with classes, or both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        image: RGB.
        captions: texts that describe it; may be empty.
        label: index of its class in the set's `classes`; None without a class.

    Raises:
        ValueError: if captions are one string.
    """

    image: Image
    captions: Sequence[str] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise ValueError(f"captions are the string {self.captions[:40]!r}; give a list of captions")


class Samples(Protocol):
    """N samples by index: a list, or an object that reads files on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class EvaluationSet:
    """A set to measure a model on.

    Attributes:
        name: of the set, in tables.
        samples: what is measured.
        split: which part of the data they are, for the protocol.
        classes: names of the classes; empty without classes.
        train, val: labelled samples of the linear probe: it trains on the first, its penalty is chosen on the second.
        retrieval: whether captions distinguish images. False if they only name the class.
    """

    name: str
    samples: Samples
    split: str = "all"
    classes: Sequence[str] = ()
    train: Samples = field(default_factory=list)
    val: Samples = field(default_factory=list)
    retrieval: bool = True

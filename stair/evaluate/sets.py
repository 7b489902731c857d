"""What an evaluation reads: images with captions, images with classes, or both."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image; ValueError if its captions are one string."""

    image: Image  # RGB
    captions: Sequence[str] = ()
    label: int | None = None  # index of its class in the set's `classes`
    key: str = ""  # its name in messages and results
    boxes: Any = ()  # the field `boxes` of its JSON, see `stair dictionary`

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise ValueError(f"captions are the string {self.captions[:40]!r}; give a list of captions")


class Samples(Protocol):
    """N samples by index: a list, or an object that reads files on access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class EvaluationSet:
    """A set to measure a model on."""

    name: str
    samples: Samples
    split: str = "all"  # which part of the data they are, for the protocol
    classes: Sequence[str] = ()  # names
    train: Samples = field(default_factory=list)  # labelled: the linear probe is trained on these
    val: Samples = field(default_factory=list)  # labelled: these choose its penalty
    retrieval: bool = True  # whether captions distinguish images; False if they only name the class

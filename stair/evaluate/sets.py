"""What an evaluation reads: images with captions, images with classes, or both."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        image: RGB.
        captions: what is said of it; may be empty.
        label: place of its class among the set's classes, None where it has none.

    Raises:
        ValueError: if captions are one text and no list of them.
    """

    image: Image
    captions: Sequence[str] = ()
    label: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.captions, str):
            raise ValueError(f"captions are the text {self.captions[:40]!r}; give a list, also of one")


def images_told_alike(captions: Iterable[Sequence[str]]) -> int:
    """How many images with captions have the same as another: nobody could tell them apart by text."""
    times = Counter(tuple(told) for told in captions if told)
    return sum(count for count in times.values() if count > 1)


class Samples(Protocol):
    """N samples, read when asked for: a list, or something that opens files."""

    def __len__(self) -> int:
        """N."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """Sample `index`, from 0."""
        ...


@dataclass(frozen=True)
class EvaluationSet:
    """A set to measure a model on.

    Attributes:
        name: what tables call it.
        samples: what is measured.
        split: which part of the data they are, as printed beside the figures.
        classes: names of the classes; empty where the set has none.
        train, val: labelled samples for the linear probe: it learns on the one, its regulariser is chosen on the other.
        retrieval: whether captions tell images apart. False for sets whose captions only name the class.
    """

    name: str
    samples: Samples
    split: str = "all"
    classes: Sequence[str] = ()
    train: Samples = field(default_factory=list)
    val: Samples = field(default_factory=list)
    retrieval: bool = True


def batches(samples: Samples, size: int) -> Iterator[list[Sample]]:
    """The samples in order, `size` at a time."""
    for first in range(0, len(samples), size):
        yield [samples[i] for i in range(first, min(first + size, len(samples)))]

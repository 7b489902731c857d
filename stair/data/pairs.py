"""Evaluation sets: every image once, with all its captions. A bad sample stops the run, so that figures compare models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from stair.data.remote import LOCAL, LastingError, Remote, is_remote
from stair.data.samples import (
    CAPTION_TYPES,
    IMAGE_TYPES,
    Grouped,
    caption_lines,
    captions,
    image_bytes,
    image_type,
    printable,
)
from stair.data.shard_index import Span, read_index, read_spans, spans_of
from stair.data.tars import expand, walk
from stair.errors import FileError, errors_name
from stair.images import decode_image, eval_pixels


@dataclass(frozen=True)
class Pair:
    """One image and its captions, read."""

    pixels: Tensor  # (3, S, S) uint8
    captions: list[str]  # at least one
    image_id: int  # number in the set, or -1 for a row that only evens out ranks
    key: str  # `tar/__key__`
    source: str = ""  # name of the source in a mixture


class EvaluationPairs(Dataset[Pair]):
    """A set of N images by index; indices from N on repeat images as padding. Errors as of `entries`."""

    def __init__(self, spec: str | list[str], image_size: int, max_pixels: int, remote: Remote = LOCAL) -> None:
        self.image_size, self.max_pixels, self.remote = image_size, max_pixels, remote
        self.entries = entries(spec, CAPTION_TYPES, remote)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """Reads one sample; ValueError, naming file, key and cause, if it is bad."""
        span = self.entries[index % len(self)]
        with opened(span, self.remote) as sample:
            texts = whole_captions(sample.members, span.lines)
            pixels = eval_pixels(decode_image(image_bytes(sample.members), self.max_pixels), self.image_size)
        image_id, stem = index if index < len(self) else -1, printable(Path(span.shard).stem)
        return Pair(pixels, texts, image_id, f"{stem}/{sample.key}")


@contextmanager
def opened(span: Span, remote: Remote = LOCAL) -> Iterator[Grouped[bytes]]:
    """A sample, while it is used; ValueError, naming file, key and cause, of whatever is wrong with it meanwhile."""
    sample = read_entry(span, remote)
    with errors_name(f"evaluation sample {sample.key!r} of {span.shard}"):
        if sample.problems:
            raise ValueError(sample.problems[0])
        yield sample


def read_entry(span: Span, remote: Remote = LOCAL) -> Grouped[bytes]:
    """The members of a sample; OSError if they cannot be read."""
    (sample,) = read_spans([span], remote)
    if isinstance(sample, OSError):
        raise sample
    return sample


def whole_captions(members: Mapping[str, bytes], lines: bool = False) -> list[str]:
    """The captions of a sample; ValueError also if one is blank: training skips such, a measure must not."""
    texts = captions(members, lines)
    if not all(texts):
        raise ValueError(f"no caption: one of the {len(texts)} is blank")
    return texts


def entries(spec: str | list[str], beside: Sequence[str], remote: Remote = LOCAL) -> list[Span]:
    """Where the samples of a set of uncompressed tars lie. A member of one of the types `beside` must be beside each image.

    Raises:
        FileNotFoundError: if the spec matches nothing.
        ValueError: if it names a command, a broken tar, a set without samples, or one without image or what must be beside.
            Samples of a remote tar with an index are checked when they are read.
    """
    found = list[Span]()
    for shard in expand(spec):
        lines = caption_lines(shard)
        found += [span._replace(lines=lines) for span in _spans(shard, beside, remote)]
    if not found:
        raise ValueError(f"evaluation set {spec!r} contains no sample: expected {IMAGE_TYPES} beside {tuple(beside)}")
    return found


def _spans(shard: str, beside: Sequence[str], remote: Remote) -> list[Span]:
    if shard.startswith("pipe:"):
        raise FileError(f"evaluation reads by position, and {shard!r} is a command: write its output to a file", shard)
    if is_remote(shard):
        try:
            return spans_of(shard, read_index(shard, remote))
        except LastingError:  # without an index beside it, its headers are read
            pass
    # all at once: a tar that is truncated is reported as such, not by its last sample
    samples = list(walk(shard, remote))
    for sample in samples:
        with errors_name(f"evaluation sample {sample.key!r} of {shard}"):
            if sample.problems:
                raise ValueError(sample.problems[0])
            image_type(sample.members)
            if not sample.members.keys() & set(beside):
                raise ValueError(f"no caption: members are {list(sample.members)}, expected one of {list(beside)}")
    return [Span(shard, sample.start, sample.stop) for sample in samples]

"""Evaluation sets: every image once, with all its captions.

Metrics compare models, so nothing may go missing in silence: tars are indexed up front, and a bad sample stops the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from stair.data.remote import LOCAL, LastingError, Remote, is_remote, read_ranges
from stair.data.samples import (
    CAPTION_TYPES,
    IMAGE_TYPES,
    caption_lines,
    captions,
    image_bytes,
    image_type,
    printable,
    types_of,
)
from stair.data.shard_index import open_index
from stair.data.tars import expand, walk
from stair.errors import FileError
from stair.images import decode_image, eval_pixels


@dataclass(frozen=True)
class Entry:
    """Where a sample lies: its tar, its key, and offset and length in bytes of its members by type.

    `lines` says whether its .txt holds a caption on each line (`stair.data.samples.caption_lines`).
    """

    path: str
    key: str
    members: dict[str, tuple[int, int]]
    lines: bool = False


@dataclass(frozen=True)
class Pair:
    """One image and its captions, read.

    Attributes:
        pixels: (3, S, S) uint8.
        captions: at least one.
        image_id: place in the set, or -1 for a row that only evens out ranks.
        key: `tar/__key__`.
        source: name of the source in a mixture, else "".
    """

    pixels: Tensor
    captions: list[str]
    image_id: int
    key: str
    source: str = ""


class EvaluationPairs(Dataset[Pair]):
    """A set of N images by index; indices from N on repeat images as padding.

    Args:
        spec: path, glob, brace pattern, URL, or list of these; uncompressed tars.
        image_size: side S of the square images, in pixels.
        max_pixels: largest width × height that is decoded.
        remote: how to read what is not local.

    Raises:
        FileNotFoundError: if the spec matches nothing.
        ValueError: if it names a command, a broken tar, a set without samples, or a sample without image or caption.
    """

    def __init__(
        self,
        spec: str | list[str],
        image_size: int,
        max_pixels: int,
        remote: Remote = LOCAL,
    ) -> None:
        self.image_size, self.max_pixels, self.remote = image_size, max_pixels, remote
        self.entries = entries(spec, CAPTION_TYPES, remote)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Pair:
        """Reads one sample.

        Raises:
            ValueError: naming file, key and cause if it is bad.
        """
        entry = self.entries[index % len(self)]
        with opened(entry, self.remote) as sample:
            texts = whole_captions(sample, entry.lines)
            pixels = eval_pixels(decode_image(image_bytes(sample), self.max_pixels), self.image_size)
        return Pair(
            pixels, texts, index if index < len(self) else -1, f"{printable(Path(entry.path).stem)}/{entry.key}"
        )


@contextmanager
def opened(entry: Entry, remote: Remote = LOCAL) -> Iterator[dict[str, bytes]]:
    """The members of a sample, while it is read.

    Raises:
        ValueError: of whatever is found wrong with it meanwhile; names file, key and cause.
    """
    try:
        yield read_entry(entry, remote)
    except ValueError as error:
        raise ValueError(f"evaluation sample {entry.key!r} of {entry.path}: {error}") from error


def whole_captions(sample: Mapping[str, bytes], lines: bool = False) -> list[str]:
    """The captions of a sample, none of which may be blank: training leaves such out, a measure must not.

    Raises:
        ValueError: as `captions`, or if one is blank.
    """
    texts = captions(sample, lines)
    if not all(texts):
        raise ValueError(f"no caption: one of the {len(texts)} is blank")
    return texts


def entries(
    spec: str | list[str],
    beside: Sequence[str],
    remote: Remote = LOCAL,
) -> list[Entry]:
    """Where the samples of a set lie.

    Args:
        spec: path, glob, brace pattern, URL, or list of these; uncompressed tars.
        beside: types of members, one of which must stand beside the image.
        remote: how to read what is not local.

    Raises:
        FileNotFoundError: if the spec matches nothing.
        ValueError: if it names a command, a broken tar, a set without samples, or one without image or what must be beside.
    """
    found = [entry for shard in expand(spec) for entry in _index(shard, beside, remote)]
    if not found:
        raise ValueError(f"evaluation set {spec!r} holds no sample: wanted {IMAGE_TYPES} beside {tuple(beside)}")
    return found


def _index(shard: str, beside: Sequence[str], remote: Remote) -> Iterator[Entry]:
    if shard.startswith("pipe:"):
        raise FileError(f"evaluation reads by position, and {shard!r} is a command: write its output to a file", shard)
    lines = caption_lines(shard)
    # all at once: a tar that is cut short is reported as such, not by its last sample
    for key, members, problem in list(_samples(shard, remote)):
        try:
            if problem:
                raise ValueError(problem)
            image_type(members)
            if not members.keys() & set(beside):
                raise ValueError(f"no caption: members are {types_of(members)}, wanted one of {list(beside)}")
        except ValueError as error:
            raise ValueError(f"evaluation sample {key!r} of {shard}: {error}") from error
        yield Entry(shard, key, members, lines)


def _samples(shard: str, remote: Remote) -> Iterator[tuple[str, dict[str, tuple[int, int]], str]]:
    if is_remote(shard):
        with suppress(LastingError):  # without an index beside it, its headers are read
            index = open_index(shard, remote)
            yield from ((index[row].key, index[row].members, index[row].problem) for row in range(len(index)))
            return
    for sample in walk(shard, remote):
        yield sample.key, sample.members, "".join(sample.problems[:1])


def read_entry(entry: Entry, remote: Remote = LOCAL) -> dict[str, bytes]:
    """The members of a sample by type.

    Raises:
        OSError: if they cannot be read.
    """
    ranges = [(entry.path, start, start + length) for start, length in entry.members.values()]
    sample = {}
    for kind, part in zip(entry.members, read_ranges(ranges, remote), strict=True):
        if isinstance(part, OSError):
            raise part
        sample[kind] = part
    return sample

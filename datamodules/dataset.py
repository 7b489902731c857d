"""What a reading process does: rows of a batch to images and captions, and bad samples to the next good ones.

A training pair is a function of (bytes of its members, random state). `PairsByPlace` reads the samples that `order.py`
names. `PairsByDraw` reads shards that can only be read forwards, by webdataset's pipeline.
"""

import functools
import itertools
import os
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from datamodules.augment import Augment
from datamodules.order import Place, Shares, seeded
from datamodules.pairs import CollatePairs
from datamodules.skipped import CONVERTED, Skip
from stair.batch import Batch
from stair.data import tars
from stair.data.pairs import Pair
from stair.data.remote import Remote, read_ranges
from stair.data.samples import caption_choices, caption_lines, image_bytes
from stair.data.shard_index import Entry, ShardIndex, open_indexes, prefetch
from stair.errors import FileError, StairError

_OPEN = 128  # indexes that a process keeps, at least: their pages take up to 42 MB
_TRIES, _BROKEN = 200, 3  # samples, and shards that cannot be read, that are tried in the place of a bad one
_GAP = 1 << 16  # bytes between members that are read along rather than by a second request
_BLOCK = 512  # bytes of a tar's header

# an entry of an index and the members by type, or why the shard cannot be read
Sample = tuple[Entry, dict[str, bytes]] | OSError
# a batch, how many samples were read for it, and what was skipped
Made = tuple[Batch, int, list[Skip]]


@dataclass(frozen=True)
class Source:
    """A named set of shards.

    Attributes:
        name: "" for an only source.
        shards: paths, URLs or commands.
        counts: samples in each shard; empty if they are not known.
        weight: share of the pairs, relative to other sources; None to see each sample once an epoch.
    """

    name: str
    shards: tuple[str, ...]
    counts: tuple[int, ...] = ()
    weight: float | None = None


class ShardTable:
    """The shards of a stream, in arrays: a hundred thousand of them reach a reading process in milliseconds.

    Args:
        sources: whose shards the stream holds, one source after the other.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._names = [source.name for source in sources]
        self._source = np.repeat(np.arange(len(sources)), [len(source.shards) for source in sources])
        self._paths = np.array([os.fsencode(shard) for source in sources for shard in source.shards])
        self.counts = np.array([count for source in sources for count in source.counts] or [0] * len(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> tuple[str, str, int]:
        """Name of the source, path or URL, and number of samples."""
        return self._names[self._source[number]], os.fsdecode(self._paths[number]), int(self.counts[number])


@dataclass(frozen=True)
class PairMaker:
    """Makes training pairs and batches.

    Attributes:
        augment: makes pixels of an image's bytes.
        collate: makes a batch of pairs.
        caption_fields: probability of each field of the JSON (or `txt`) to give the caption; empty for the usual captions.
    """

    augment: Augment
    collate: CollatePairs
    caption_fields: Mapping[str, float] = field(default_factory=dict)

    def pair(self, sample: Mapping[str, bytes], lines: bool, rng: random.Random, notes: list[str]) -> tuple[Any, str]:
        """Pixels and caption of a sample.

        Args:
            sample: bytes of its members by type.
            lines: whether a .txt member holds a caption on each line.
            rng: of crop, flip, colours and caption.
            notes: a list to which kinds of conversion are added.

        Raises:
            ValueError: if it is bad; the message begins with the cause and a colon.
        """
        shares, choices = zip(*caption_choices(sample, self.caption_fields, lines), strict=True)
        converted: list[str] = []
        pixels = self.augment(image_bytes(sample), rng, converted)
        notes += [f"{CONVERTED}{kind}: to 8-bit RGB, upright" for kind in converted]
        texts = rng.choices(choices, shares)[0] if len(choices) > 1 else choices[0]
        return pixels, rng.choice(texts)


@dataclass(eq=False)
class PairsByPlace(Dataset[Made | StairError]):
    """Training batches by the places of their rows.

    Args:
        streams: the shards of each stream.
        make: makes pairs.
        seed: of crops, flips and captions.
        remote: how shards that are not local files are read.
    """

    streams: Sequence[ShardTable]
    make: PairMaker
    seed: int | str
    remote: Remote
    _indexes: OrderedDict[str, ShardIndex | OSError] = field(default_factory=OrderedDict, init=False)
    _failed: set[str] = field(default_factory=set, init=False)

    def __getitems__(self, places: list[Place]) -> Made | StairError:
        """The batch of these rows. A bad sample is replaced by the next good one of its shard, or of the next shards.

        Returns:
            The batch. Or an error that stops the run, as torch would change its class: a shard that was replaced, too many
            bad samples in a row.
        """
        side, skips, pairs = self.make.augment.size, list[Skip](), list[Pair]()
        pixels_B3SS = torch.empty(len(places), 3, side, side, dtype=torch.uint8)
        try:
            for row, (place, sample) in enumerate(zip(places, self._read(places), strict=True)):
                pair = self._made(place, sample, skips) or self._replacement(place, skips)
                pixels_B3SS[row] = pair.pixels  # at once, so that the next image takes the memory of this one
                pairs.append(replace(pair, pixels=pixels_B3SS[row], image_id=row))
        except StairError as error:
            return error
        return self.make.collate(pairs, pixels_B3SS), len(places), skips

    def _replacement(self, place: Place, skips: list[Skip]) -> Pair:
        ignored: list[Skip] = []  # each is counted in its own place
        broken = 0
        for tried, (there, sample) in enumerate(self._others(place), 1):
            if pair := self._made(there, sample, ignored):
                return pair
            broken += isinstance(sample, OSError)
            if broken > _BROKEN or tried > _TRIES:
                break
        shard = self.streams[place.stream][place.shard][1]
        raise FileError(
            f"no good sample could be read in the place of a bad one of {shard}: {tried} were tried, {broken} of shards "
            f"that cannot be read. The bad one: {skips[-1].reason}. The last tried: {ignored[-1].reason}, "
            f"{ignored[-1].place}. Check the shards, or leave these out of data.train", shard,
        )  # fmt: skip

    def _others(self, place: Place) -> Iterator[tuple[Place, Sample]]:
        """The samples after a place: of its shard, then of the next ones; a single one of a shard that cannot be read."""
        table = self.streams[place.stream]
        for further in range(len(table)):
            shard, first = (place.shard + further) % len(table), 0 if further else place.row + 1
            count = table[shard][2]
            for row in range(first, first + count):
                there = place._replace(shard=shard, row=row % count)
                (sample,) = self._read([there])
                yield there, sample
                if isinstance(sample, OSError):
                    break

    def _made(self, place: Place, sample: Sample, skips: list[Skip]) -> Pair | None:
        name, shard, _ = self.streams[place.stream][place.shard]
        if isinstance(sample, OSError):
            skips.append(Skip(f"shard broken: {sample}", name, shard, shard, 1))
            return None
        return made(self.make, name, shard, *sample, seeded(self.seed, place.stream, place.position), skips)

    def _read(self, places: Sequence[Place]) -> Iterator[Sample]:
        """The members of each sample, or why its shard cannot be read. What is not local is read at once."""
        shards, counts = zip(*(self.streams[place.stream][place.shard][1:] for place in places), strict=True)
        self._open(dict(zip(shards, counts, strict=True)))
        indexes = [(self._indexes[shard], place.row) for shard, place in zip(shards, places, strict=True)]
        prefetch(((index, row) for index, row in indexes if isinstance(index, ShardIndex)), self._patience(shards))
        entries = [self._entry(shard, *at) for shard, at in zip(shards, indexes, strict=True)]
        spans = [[] if isinstance(entry, OSError) else _spans(entry) for entry in entries]
        ranges = [(shard, *span) for shard, parts in zip(shards, spans, strict=True) for span in parts]
        read = read_ranges(ranges, self._patience(shard for shard, _, _ in ranges))
        for shard, entry, parts in zip(shards, entries, spans, strict=True):
            if isinstance(entry, OSError):
                yield entry
                continue
            data = [next(read) for _ in parts]
            if failed := [part for part in data if isinstance(part, OSError)]:
                self._failed.add(shard)
                yield failed[0]
                continue
            self._failed.discard(shard)
            yield entry, _members(shard, entry, dict(zip(parts, data, strict=True)))

    def _entry(self, shard: str, index: ShardIndex | OSError, row: int) -> Entry | OSError:
        try:
            if isinstance(index, OSError):
                raise index
            return index[row]
        except OSError as error:
            self._failed.add(shard)
            self._indexes.pop(shard, None)  # opened again when it is due again
            return error

    def _patience(self, shards: Iterable[str]) -> Remote:
        """Shards that failed are tried once a batch, not for minutes again."""
        return replace(self.remote, retries=0) if self._failed.issuperset(shards) else self.remote

    def _open(self, counts: Mapping[str, int]) -> None:
        """Opens the indexes of shards with so many samples."""
        for shard in counts.keys() & self._indexes.keys():
            self._indexes.move_to_end(shard)
        lacking = [shard for shard in counts if shard not in self._indexes]
        for shard, index in open_indexes(lacking, self._patience(lacking)).items():
            if isinstance(index, ShardIndex) and len(index) != counts[shard]:
                raise FileError(
                    f"{shard}: its index holds {len(index)} samples, {counts[shard]} were counted before the first step. "
                    "The shard was replaced, or index.json or the index is of another file: write both again with "
                    "`stair doctor SHARDS --write_index`", shard,
                )  # fmt: skip
            self._indexes[shard] = index
        while len(self._indexes) > max(_OPEN, len(counts)):
            self._indexes.popitem(last=False)


def made(
    make: PairMaker,
    source: str,
    shard: str,
    entry: Entry,
    sample: Mapping[str, bytes],
    rng: random.Random,
    skips: list[Skip],
) -> Pair | None:
    """The pair of a sample, or None for a bad one; what is wrong or converted is added to `skips`."""
    notes = [entry.warning] if entry.warning else []
    pair, problem = None, entry.problem
    if not problem:
        try:
            pixels, text = make.pair(sample, _lines(shard), rng, notes)
            pair = Pair(pixels, [text], 0, f"{_stem(shard)}/{entry.key}", source)
        except ValueError as error:
            problem = str(error)
    where = f"{entry.key!r} in {shard}"
    skips += [Skip(note, source, shard, where, 0) for note in notes]
    if problem:
        skips.append(Skip(problem, source, shard, where, 1))
    return pair


_lines = functools.lru_cache(maxsize=4096)(caption_lines)


@functools.lru_cache(maxsize=4096)
def _stem(shard: str) -> str:
    return PurePosixPath(shard.partition("?")[0]).name.removesuffix(".tar")


def _spans(entry: Entry) -> list[tuple[int, int]]:
    """What to read of a shard: all members with their headers at once, unless much else lies between them."""
    if entry.problem:
        return []
    spans: list[tuple[int, int]] = []
    for offset, length in sorted(entry.members.values()):
        if spans and offset - spans[-1][1] <= _GAP:
            spans[-1] = spans[-1][0], offset + length
        else:
            spans.append((offset - _BLOCK, offset + length))
    return spans


def _members(shard: str, entry: Entry, parts: Mapping[tuple[int, int], bytes]) -> dict[str, bytes]:
    """The bytes of a sample's members.

    Raises:
        FileError: if the index was made for another file: each member must follow a header with its name and length.
    """
    sample = {}
    for (start, stop), data in parts.items():
        if len(data) < stop - start:
            raise _changed(shard, entry.key, f"it ends at byte {start + len(data)}")
        inside = {kind: at for kind, at in entry.members.items() if start < at[0] <= stop}
        kind, (offset, length) = min(inside.items(), key=lambda member: member[1])
        if not _is_header(data[:_BLOCK], f"{entry.key}.{kind}", length):
            raise _changed(shard, entry.key, f"there is no header of it at byte {offset - _BLOCK}")
        sample |= {kind: data[at - start : at - start + length] for kind, (at, length) in inside.items()}
    return sample


def _is_header(block: bytes, name: str, length: int) -> bool:
    """Whether a header is that of a member: by its size, and by its name where no other header holds the name."""
    try:
        size = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    plain = name.isascii() and len(name) < 100
    last = block[:100].partition(b"\0")[0].rpartition(b"/")[2].decode("latin-1")
    return size == length and (not plain or last.lower() == name.rpartition("/")[2].lower())


def _changed(shard: str, key: str, what: str) -> FileError:
    return FileError(
        f"{shard} is not the file that its index describes: sample {key!r} is not there ({what}). The shard was replaced, "
        f"or {shard}.idx is of another one: delete it, or write it again with `stair doctor SHARDS --write_index`", shard,
    )  # fmt: skip


@dataclass(eq=False)
class PairsByDraw(IterableDataset[Made]):
    """Training batches from shards that are only read forwards, drawn with replacement, without end.

    Each process draws for itself, by seed and `start`: a resumed run makes new draws.

    Args:
        streams: the shards of each stream.
        shares: how many pairs of each stream a batch holds.
        make: makes pairs.
        seed: of everything random.
        rank: this process, from 0.
        ranks: processes that train.
        shuffle: samples that are shuffled among each other.
        remote: time-out of commands and connections.
        start: the first step, counted from the start of the run.
    """

    streams: Sequence[ShardTable]
    shares: Shares
    make: PairMaker
    seed: int | str
    rank: int
    ranks: int
    shuffle: int
    remote: Remote
    start: int = 0

    def __iter__(self) -> Iterator[Made]:
        info = get_worker_info()
        number, workers = (info.id, info.num_workers) if info else (0, 1)
        seen, skips = [0], list[Skip]()
        streams = [self._pairs(i, number, seen, skips) for i in range(len(self.streams))]
        for step in itertools.count(self.start + number, workers):
            taken, pairs = 0, list[Pair]()
            for samples, (_, count) in zip(streams, self.shares.spans(step), strict=True):
                # a batch is dealt to the ranks in turn
                due = range((self.rank - taken) % self.ranks, count, self.ranks)
                pairs += itertools.islice(samples, len(due))
                taken += count
            yield self.make.collate([replace(pair, image_id=row) for row, pair in enumerate(pairs)]), seen[0], skips[:]
            seen[0], skips[:] = 0, []

    def _pairs(self, stream: int, number: int, seen: list[int], skips: list[Skip]) -> Iterator[Pair]:
        table = self.streams[stream]
        names = {shard: name for name, shard, _ in (table[i] for i in range(len(table)))}
        seed = f"{self.seed}/{self.start}/{self.rank}/{number}/{stream}"
        rng = seeded(seed)
        drawn = webdataset.ResampledShards(
            list(names), seed=rng.getrandbits(32), worker_seed=lambda: 0, deterministic=True
        )

        def read(shards: Iterator[dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
            empty = 0
            for shard in (each["url"] for each in shards):
                empty += 1
                for sample in tars.stream(shard, functools.partial(broken, shard), remote=self.remote):
                    empty = 0
                    yield shard, sample
                if empty > _TRIES:
                    raise RuntimeError(f"no sample in the last {empty} shards that were read: {skips[-1:]}")

        def broken(shard: str, error: Exception) -> None:
            seen[0] += 1
            skips.append(Skip(f"shard broken: {error}", names[shard], shard, shard, 1))

        bad = 0
        for shard, sample in webdataset.DataPipeline(
            drawn, read, webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=rng)
        ):
            seen[0] += 1
            entry = Entry(sample["__key__"], {}, sample["__wrong__"], "; ".join(sample["__odd__"][:1]))
            pair = made(self.make, names[shard], shard, entry, sample, rng, skips)
            bad = 0 if pair else bad + 1
            if bad > _TRIES:
                raise RuntimeError(f"{bad} samples in a row are bad, the last: {skips[-1:]}")
            if pair:
                yield pair

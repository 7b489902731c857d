"""What a data-loading process does: rows of a batch to images and captions, and bad samples to the next good ones.

A training pair is a function of (bytes of its members, random state). `IndexedPairs` reads the samples that `order.py`
names, `StreamedPairs` shards that can only be read sequentially. B pairs a batch, S × S pixels.
"""

import functools
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from datamodules.augment import Augment
from datamodules.order import SampleId, Shares, seeded
from stair.batch import Batch
from stair.data.pairs import Pair
from stair.data.remote import Remote
from stair.data.samples import Grouped, caption_choices, caption_lines, image_bytes
from stair.data.shard_index import SampleReader
from stair.data.tars import read_samples
from stair.errors import FileError, StairError
from stair.vocabulary import Vocabulary

CONVERTED = "converted "  # how causes begin that skip nothing
_READ_AHEAD = 16  # samples
_TRIES, _BROKEN = 200, 3  # samples, and shards that cannot be read, that are tried in the place of a bad one

Sample = Grouped[bytes] | OSError  # or why its shard cannot be read


class Skip(NamedTuple):
    """A sample that was skipped, or a note about one that was not."""

    reason: str  # begins with its cause and a colon
    source: str
    shard: str  # path or URL
    place: str  # key and shard, for messages
    samples: int = 1  # how many were skipped; 0 for a note

    @property
    def cause(self) -> str:
        """What it is counted under."""
        return self.reason.partition(":")[0]


Made = tuple[Batch, int, list[Skip]]  # a batch, how many samples were read for it, and what was skipped


class Source(NamedTuple):
    """A named set of shards."""

    name: str  # "" for an only source
    shards: tuple[str, ...]  # paths, URLs or commands
    counts: tuple[int, ...] = ()  # samples in each shard; empty if they are not known
    weight: float | None = None  # share of the pairs, relative to other sources; None to see each sample once an epoch


class ShardTable:
    """The shards of a stream, in arrays: a hundred thousand of them reach a data-loading process in milliseconds."""

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
class CollatePairs:
    """Makes a batch of pairs. Captions are cut after `max_tokens` tokens."""

    vocabulary: Vocabulary
    max_tokens: int

    def __call__(self, pairs: list[Pair], pixels: Tensor | None = None) -> Batch:
        """The batch of B pairs; `pixels` are theirs, (B, 3, S, S) uint8, if they lie together already."""
        encoded = self.vocabulary.encode([text for pair in pairs for text in pair.captions])
        ids_CT, mask_CT = self.vocabulary.pad(encoded, self.max_tokens)
        return Batch(
            pixels=default_collate([pair.pixels for pair in pairs]) if pixels is None else pixels,
            ids=ids_CT,
            mask=mask_CT,
            cut=torch.tensor([len(ids) > self.max_tokens for ids in encoded], dtype=torch.bool),
            image_id=torch.tensor([pair.image_id for pair in pairs]),
            caption_image=torch.tensor([pair.image_id for pair in pairs for _ in pair.captions]),
            key=[pair.key for pair in pairs],
            source=[pair.source for pair in pairs],
        )


@dataclass(frozen=True)
class PairMaker:
    """Makes training pairs.

    `caption_fields` are shares of fields; empty for the usual captions. A text is `join_captions` of an image's captions.
    """

    augment: Augment
    collate: CollatePairs
    caption_fields: Mapping[str, float] = field(default_factory=dict)
    join_captions: int = 1

    def empty(self, rows: int) -> Tensor:
        """Room for the pixels of so many pairs, (rows, 3, S, S) uint8."""
        return torch.empty(rows, 3, self.augment.size, self.augment.size, dtype=torch.uint8)

    def __call__(
        self, source: str, shard: str, sample: Sample, rng: random.Random, skips: list[Skip], pixels: Tensor, row: int
    ) -> Pair | None:
        """The pair of a sample, with its image in a row of `pixels`; None for a bad one. Adds to `skips` what is wrong."""
        if isinstance(sample, OSError):
            skips.append(Skip(f"shard broken: {sample}", source, shard, shard))
            return None
        where, converted = f"{sample.key!r} in {shard}", list[str]()
        skips += [Skip(note, source, shard, where, 0) for note in sample.warnings[:1]]
        try:
            if sample.problems:
                raise ValueError(sample.problems[0])
            shares, choices = zip(*caption_choices(sample.members, self.caption_fields, _lines(shard)), strict=True)
            self.augment(image_bytes(sample.members), rng, converted, pixels[row])
        except ValueError as error:
            skips.append(Skip(str(error), source, shard, where))
            return None
        skips += [Skip(f"{CONVERTED}{kind}: to 8-bit RGB, upright", source, shard, where, 0) for kind in converted]
        texts = rng.choices(choices, shares)[0] if len(choices) > 1 else choices[0]
        joined = self.join_captions > 1
        text = " ".join(rng.sample(texts, min(self.join_captions, len(texts)))) if joined else rng.choice(texts)
        return Pair(pixels[row], [text], row, f"{_stem(shard)}/{sample.key}", source)


_lines = functools.lru_cache(maxsize=4096)(caption_lines)


@functools.lru_cache(maxsize=4096)
def _stem(shard: str) -> str:
    return PurePosixPath(shard.partition("?")[0]).name.removesuffix(".tar")


@dataclass(eq=False)
class IndexedPairs(Dataset[Made | StairError]):
    """Training batches by their samples. `seed` is that of crops, flips and captions."""

    streams: Sequence[ShardTable]
    make: PairMaker
    seed: int | str
    reader: SampleReader

    def __getitems__(self, samples: list[SampleId]) -> Made | StairError:
        """The batch of these samples. A bad one is replaced by the next good one of its shard, or of the next shards.

        Returns an error that stops the run, as torch would change the class of one that is raised.
        """
        pixels_B3SS, skips, pairs = self.make.empty(len(samples)), list[Skip](), list[Pair]()
        if get_worker_info():
            pixels_B3SS.share_memory_()  # while empty: a full tensor would be copied between the processes
        try:
            due = zip(samples, self._read(samples), strict=True)
            # read some, then decode some: by turns each would find the processor's caches full of the other's data
            while part := list(itertools.islice(due, _READ_AHEAD)):
                for which, sample in part:
                    to = pixels_B3SS, len(pairs)
                    pairs.append(self._made(which, sample, skips, *to) or self._replacement(which, skips, *to))
        except StairError as error:
            return error
        return self.make.collate(pairs, pixels_B3SS), len(samples), skips

    def _read(self, samples: Sequence[SampleId]) -> Iterator[Sample]:
        shards = [self.streams[each.stream][each.shard] for each in samples]
        return self.reader.read([(s, each.row, count) for each, (_, s, count) in zip(samples, shards, strict=True)])

    def _made(self, which: SampleId, sample: Sample, skips: list[Skip], pixels: Tensor, row: int) -> Pair | None:
        source, shard, _ = self.streams[which.stream][which.shard]
        return self.make(source, shard, sample, seeded(self.seed, which.stream, which.position), skips, pixels, row)

    def _replacement(self, bad: SampleId, skips: list[Skip], pixels: Tensor, row: int) -> Pair:
        ignored: list[Skip] = []  # each is counted where it is due
        tried = broken = 0
        for tried, (which, sample) in enumerate(self._next(bad), 1):
            if pair := self._made(which, sample, ignored, pixels, row):
                return pair
            broken += isinstance(sample, OSError)
            if broken > _BROKEN or tried > _TRIES:
                break
        shard = self.streams[bad.stream][bad.shard][1]
        raise FileError(
            f"no good sample was found to replace a bad one of {shard} ({skips[-1].reason}): {tried} were tried, the last: "
            f"{ignored[-1].reason}, {ignored[-1].place}. Check the shards, or leave these out of data.train", shard,
        )  # fmt: skip

    def _next(self, bad: SampleId) -> Iterator[tuple[SampleId, Sample]]:
        """The samples after one: of its shard, then of the next ones; a single one of a shard that cannot be read."""
        table = self.streams[bad.stream]
        for further in range(len(table)):
            shard, first = (bad.shard + further) % len(table), 0 if further else bad.row + 1
            for row in range(first, first + (count := table[shard][2])):
                which = bad._replace(shard=shard, row=row % count)
                (sample,) = self._read([which])
                yield which, sample
                if isinstance(sample, OSError):
                    break


@dataclass(eq=False)
class StreamedPairs(IterableDataset[Made]):
    """Training batches from shards that are read sequentially, drawn with replacement, without end.

    Each process draws for itself, by seed and `start` (the first step, from the start of the run): a resumed run makes new
    draws. `shuffle` samples are permuted among each other.
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
        self._seen, self._skips = 0, list[Skip]()
        streams = [self._pairs(i, number) for i in range(len(self.streams))]
        for step in itertools.count(self.start + number, workers):
            dealt, pairs = 0, list[Pair]()
            for samples, (_, count) in zip(streams, self.shares.spans(step), strict=True):
                # a batch is dealt to the ranks in turn
                pairs += itertools.islice(samples, len(range((self.rank - dealt) % self.ranks, count, self.ranks)))
                dealt += count
            batch = self.make.collate([replace(pair, image_id=row) for row, pair in enumerate(pairs)])
            yield batch, self._seen, self._skips
            self._seen, self._skips = 0, []

    def _pairs(self, stream: int, number: int) -> Iterator[Pair]:
        table = self.streams[stream]
        sources = {shard: source for source, shard, _ in map(table.__getitem__, range(len(table)))}
        rng = seeded(f"{self.seed}/{self.start}/{self.rank}/{number}/{stream}")
        drawn = webdataset.ResampledShards(
            list(sources), seed=rng.getrandbits(32), worker_seed=lambda: 0, deterministic=True
        )
        shuffled = webdataset.shuffle(self.shuffle, initial=self.shuffle, rng=rng)
        bad = 0
        for shard, sample in webdataset.DataPipeline(drawn, self._samples, shuffled):
            self._seen += 1
            pair = self.make(sources[shard], shard, sample, rng, self._skips, self.make.empty(1), 0)
            bad = 0 if pair else bad + 1
            if bad > _TRIES:
                raise RuntimeError(f"no good sample among the last {bad}: {self._skips[-1:]}")
            if pair:
                yield pair

    def _samples(self, shards: Iterator[dict[str, str]]) -> Iterator[tuple[str, Sample]]:
        for shard in (each["url"] for each in shards):
            problem = "it contains no sample"
            try:
                for sample in read_samples(shard, self.remote):
                    yield shard, sample
                    problem = ""
            except FileError as error:
                problem = str(error)
            if problem:
                yield shard, OSError(problem)

"""What a reading process does: rows of a batch to images and captions, and bad samples to the next good ones.

A training pair is a function of (bytes of its members, random state). `IndexedPairs` reads the samples that `order.py`
names, `StreamedPairs` shards that can only be read from front to end.
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
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from datamodules.augment import Augment
from datamodules.order import SampleId, Shares, seeded
from datamodules.pairs import CollatePairs
from datamodules.skipped import CONVERTED, Skip
from stair.batch import Batch
from stair.data.pairs import Pair
from stair.data.remote import Remote
from stair.data.samples import Grouped, caption_choices, caption_lines, image_bytes
from stair.data.shard_index import SampleReader
from stair.data.tars import walk
from stair.errors import FileError, StairError

_READ_AHEAD = 16  # samples
_TRIES, _BROKEN = 200, 3  # samples, and shards that cannot be read, that are tried in the place of a bad one

Sample = Grouped[bytes] | OSError  # or why its shard cannot be read
Made = tuple[Batch, int, list[Skip]]  # a batch, how many samples were read for it, and what was skipped


class Source(NamedTuple):
    """A named set of shards."""

    name: str  # "" for an only source
    shards: tuple[str, ...]  # paths, URLs or commands
    counts: tuple[int, ...] = ()  # samples in each shard; empty if they are not known
    weight: float | None = None  # share of the pairs, relative to other sources; None to see each sample once an epoch


class ShardTable:
    """The shards of a stream, in arrays: a hundred thousand of them reach a reading process in milliseconds."""

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
    """Makes training pairs and batches."""

    augment: Augment
    collate: CollatePairs
    caption_fields: Mapping[str, float] = field(default_factory=dict)  # shares; empty for the usual captions

    def __call__(self, source: str, shard: str, sample: Sample, rng: random.Random, skips: list[Skip]) -> Pair | None:
        """The pair of a sample, None for a bad one; what is wrong or was converted is added to `skips`."""
        if isinstance(sample, OSError):
            skips.append(Skip(f"shard broken: {sample}", source, shard, shard, 1))
            return None
        pair, problem, notes = None, "".join(sample.problems[:1]), sample.warnings[:1]
        try:
            if not problem:
                pixels, text = self._pair(sample.members, _lines(shard), rng, notes)
                pair = Pair(pixels, [text], 0, f"{_stem(shard)}/{sample.key}", source)
        except ValueError as error:
            problem = str(error)
        where = f"{sample.key!r} in {shard}"
        skips += [Skip(note, source, shard, where, 0) for note in notes]
        skips += [Skip(problem, source, shard, where, 1)] if problem else []
        return pair

    def _pair(
        self, members: Mapping[str, bytes], lines: bool, rng: random.Random, notes: list[str]
    ) -> tuple[Tensor, str]:
        """Pixels and caption; ValueError if the sample is bad, with its cause and a colon."""
        shares, choices = zip(*caption_choices(members, self.caption_fields, lines), strict=True)
        converted: list[str] = []
        pixels = self.augment(image_bytes(members), rng, converted)
        notes += [f"{CONVERTED}{kind}: to 8-bit RGB, upright" for kind in converted]
        texts = rng.choices(choices, shares)[0] if len(choices) > 1 else choices[0]
        return pixels, rng.choice(texts)


_lines = functools.lru_cache(maxsize=4096)(caption_lines)


@functools.lru_cache(maxsize=4096)
def _stem(shard: str) -> str:
    return PurePosixPath(shard.partition("?")[0]).name.removesuffix(".tar")


@dataclass(eq=False)
class IndexedPairs(Dataset[Made | StairError]):
    """Training batches by their samples."""

    streams: Sequence[ShardTable]
    make: PairMaker
    seed: int | str  # of crops, flips and captions
    reader: SampleReader

    def __getitems__(self, samples: list[SampleId]) -> Made | StairError:
        """The batch of these samples. A bad one is replaced by the next good one of its shard, or of the next shards.

        Returns:
            The batch. Or an error that stops the run, as torch would change its class: a shard that was replaced, too many
            bad samples in a row.
        """
        side, skips, pairs = self.make.augment.size, list[Skip](), list[Pair]()
        pixels_B3SS = torch.empty(len(samples), 3, side, side, dtype=torch.uint8)
        try:
            due = zip(samples, self._read(samples), strict=True)
            # read some, then decode some: by turns each would find the processor's caches full of the other's data
            while part := list(itertools.islice(due, _READ_AHEAD)):
                for which, sample in part:
                    pair = self._made(which, sample, skips) or self._replacement(which, skips)
                    pixels_B3SS[len(pairs)] = (
                        pair.pixels
                    )  # at once, so that the next image takes the memory of this one
                    pairs.append(replace(pair, pixels=pixels_B3SS[len(pairs)], image_id=len(pairs)))
        except StairError as error:
            return error
        return self.make.collate(pairs, pixels_B3SS), len(samples), skips

    def _read(self, samples: Sequence[SampleId]) -> Iterator[Sample]:
        shards = [self.streams[each.stream][each.shard] for each in samples]
        rows = [(shard, each.row, count) for each, (_, shard, count) in zip(samples, shards, strict=True)]
        return self.reader.read(rows)

    def _made(self, which: SampleId, sample: Sample, skips: list[Skip]) -> Pair | None:
        source, shard, _ = self.streams[which.stream][which.shard]
        return self.make(source, shard, sample, seeded(self.seed, which.stream, which.position), skips)

    def _replacement(self, bad: SampleId, skips: list[Skip]) -> Pair:
        ignored: list[Skip] = []  # each is counted where it is due
        broken = 0
        for tried, (which, sample) in enumerate(self._next(bad), 1):
            if pair := self._made(which, sample, ignored):
                return pair
            broken += isinstance(sample, OSError)
            if broken > _BROKEN or tried > _TRIES:
                break
        shard = self.streams[bad.stream][bad.shard][1]
        raise FileError(
            f"no good sample could be read in the place of a bad one of {shard}: {tried} were tried, {broken} of shards "
            f"that cannot be read. The bad one: {skips[-1].reason}. The last tried: {ignored[-1].reason}, "
            f"{ignored[-1].place}. Check the shards, or leave these out of data.train", shard,
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
    """Training batches from shards that are read from front to end, drawn with replacement, without end.

    Each process draws for itself, by seed and `start`: a resumed run makes new draws.
    """

    streams: Sequence[ShardTable]
    shares: Shares
    make: PairMaker
    seed: int | str
    rank: int
    ranks: int
    shuffle: int  # samples that are shuffled among each other
    remote: Remote
    start: int = 0  # the first step, counted from the start of the run

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
            pair = self.make(sources[shard], shard, sample, rng, self._skips)
            bad = 0 if pair else bad + 1
            if bad > _TRIES:
                raise RuntimeError(f"no good sample among the last {bad}: {self._skips[-1:]}")
            if pair:
                yield pair

    def _samples(self, shards: Iterator[dict[str, str]]) -> Iterator[tuple[str, Sample]]:
        for shard in (each["url"] for each in shards):
            problem = "it holds no sample"
            try:
                for sample in walk(shard, self.remote, True, lambda member: member.read()):
                    yield shard, sample
                    problem = ""
            except FileError as error:
                problem = str(error)
            if problem:
                yield shard, OSError(problem)

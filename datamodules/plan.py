"""Who sees which sample when: the arithmetic of the training stream, without reading anything.

A *line* is an endless run of samples: the shards of one source (or of all, where none has a weight) in a permuted order,
then in another, and so on. An epoch takes the next piece of each line and cuts it into one part for each reader (rank ×
worker), in proportion to the batches that reader makes. So nothing comes twice before everything has come once, whatever
the number of shards, and every rank makes the same number of batches. A resampled line draws shards with replacement.

A plan is laid out for some number of ranks and workers and can be carried out by another: batches are its unit.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from stair.data.remote import is_remote

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: its multiples modulo 2^64 are spread as evenly as can be


def seeded(*parts: object) -> random.Random:
    """A generator that depends on these values alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Source:
    """A named set of shards.

    Attributes:
        name: of the source, "" where there is but one.
        shards: paths, URLs or commands.
        counts: samples in each shard; empty if unknown.
        sized: whether the counts are true, and not only spread from a total.
        weight: share of the pairs relative to other sources; None to see each sample once an epoch.
    """

    name: str
    shards: tuple[str, ...]
    counts: tuple[int, ...]
    sized: bool = True
    weight: float | None = None


@dataclass(frozen=True)
class Piece:
    """A run of samples in one shard.

    Attributes:
        shard: where.
        source: name of its source.
        start: first sample.
        stop: end, None for the end of the shard.
        length: samples it must have; 0 if unknown.
        visit: what tells this time the shard is read from all others; captions and crops are drawn by it.
    """

    shard: str
    source: str
    start: int
    stop: int | None
    length: int
    visit: str


@dataclass(frozen=True)
class Plan:
    """Who sees what.

    Attributes:
        sources: what there is to see, either all with a weight or none.
        seed: of everything that is random.
        ranks: processes that train.
        workers: reading processes a rank, at least 1.
        batch_size: pairs a rank.
        samples: pairs in an epoch, rounded down to whole batches.
        resample: draw shards with replacement.
    """

    sources: tuple[Source, ...]
    seed: int | str
    ranks: int
    workers: int
    batch_size: int
    samples: int
    resample: bool = False

    @property
    def global_batch_size(self) -> int:
        """Pairs of all ranks in a step."""
        return self.ranks * self.batch_size

    @property
    def steps(self) -> int:
        """Batches of each rank in an epoch."""
        return self.samples // self.global_batch_size

    def turns(self, worker: int) -> range:
        """Which of its rank's batches a worker makes."""
        return range(worker, self.steps, self.workers)

    @cached_property
    def lines(self) -> list[list[Source]]:
        """Sources that are read as one run."""
        weighted = self.sources[0].weight is not None
        return [[source] for source in self.sources] if weighted else [list(self.sources)]

    @cached_property
    def shares(self) -> list[float]:
        """The share of the pairs that each line gives."""
        weights = [line[0].weight for line in self.lines]
        return [1.0] if weights == [None] else [weight / math.fsum(weights) for weight in weights]

    def quotas(self, rank: int, steps: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
        """How many pairs each line gives to a rank's batches: a whole number next to `batch_size` × share.

        Over the batches of an epoch the rounding evens out, to within a few pairs.

        Args:
            rank: whose batches.
            steps: (N,) their numbers in the epoch.

        Returns:
            (lines, N) whole numbers, each column summing to `batch_size`.
        """
        numbers = steps.astype(np.uint64) * np.uint64(self.ranks) + np.uint64(rank)
        offsets = (numbers * np.uint64(_GOLDEN)).astype(np.float64) / 2.0**64
        bounds = np.cumsum([0.0, *self.shares])
        bounds[-1] = 1.0
        # pair i of the batch lies at (i + offset) / batch_size on a line of length 1 that is cut by the shares
        ends = np.ceil(self.batch_size * bounds[:, None] - np.minimum(offsets, 1 - 1e-12)[None]).astype(np.int64)
        return np.diff(ends, axis=0)

    @cached_property
    def _needs(self) -> "np.ndarray[Any, Any]":
        """(lines, ranks × workers) pairs that each reader takes of each line in an epoch."""
        steps = np.arange(self.steps)
        return np.stack(
            [
                self.quotas(rank, steps[worker :: self.workers]).sum(1)
                for rank in range(self.ranks)
                for worker in range(self.workers)
            ],
            axis=1,
        )

    def pieces(self, epoch: int, rank: int, worker: int, line: int) -> list[Piece]:
        """The part of a line that a reader reads in an epoch: at least as many samples as its batches take."""
        needs = self._needs[line]
        reader = rank * self.workers + worker
        before, after, total = int(needs[:reader].sum()), int(needs[: reader + 1].sum()), int(needs.sum())
        # lines without weight are read to their end, the rest of a division is shared among the readers
        span = total if len(self.lines) > 1 else max(self._size(line), total)
        low, high = (epoch * span + done * span // total if total else 0 for done in (before, after))
        return list(self._cut(line, low, high))

    def _size(self, line: int) -> int:
        return sum(sum(source.counts) for source in self.lines[line])

    def _cut(self, line: int, low: int, high: int) -> Iterator[Piece]:
        """What lies between two places of a line."""
        shards = self._shards(line)
        size = self._size(line)
        for lap in range(low // size, -(-high // size)) if size else ():
            order = seeded(self.seed, lap, self.lines[line][0].name, "shards").sample(range(len(shards)), len(shards))
            end = lap * size
            for shard, source, count in (shards[i] for i in order):
                end += count
                start, stop = max(low - end + count, 0), min(high - end + count, count)
                if start < stop:
                    # a shard may hold more than was said: whoever reads its last sample reads on
                    past = None if stop == count else stop
                    yield Piece(shard, source.name, start, past, (stop - start) * source.sized, str(lap))

    def _shards(self, line: int) -> list[tuple[str, Source, int]]:
        return [
            (shard, source, source.counts[i] if source.counts else 0)
            for source in self.lines[line]
            for i, shard in enumerate(source.shards)
        ]

    def drawn(self, epoch: int, rank: int, worker: int, line: int) -> Iterator[Piece]:
        """Whole shards of a line, drawn with replacement, without end.

        The first one is read from a random sample on where its size is known: else the ends of shards would be seen
        less often than their beginnings.
        """
        reader = f"{epoch}/{rank}/{worker}"
        rng = seeded(self.seed, reader, self.lines[line][0].name, "draws")
        shards = [shard for shard in self._shards(line) if shard[2] or not shard[1].sized or not shard[1].counts]
        for number in itertools.count():
            shard, source, count = rng.choice(shards)
            start = rng.randrange(count) if number == 0 and count and source.sized else 0
            yield Piece(shard, source.name, start, None, (count - start) * source.sized, f"{reader}/{number}")

    def beginnings(self, epoch: int, rank: int, worker: int, line: int, lap: int) -> list[Piece]:
        """Those shards of a line whose sizes are not known, from their beginnings, in an order of the reader's own.

        For a reader whose places are all past the ends of their shards; it may repeat what others read.
        """
        visit = f"{epoch}/{rank}/{worker}/beginnings/{lap}"
        pieces = [
            Piece(shard, source.name, 0, None, 0, visit) for shard, source, _ in self._shards(line) if not source.sized
        ]
        seeded(self.seed, visit, self.lines[line][0].name).shuffle(pieces)
        return pieces

    def fingerprint(self) -> dict[str, Any]:
        """What a position in the stream means something under; ranks and workers are the layout's."""
        # folders, hosts and signatures in URLs may differ between machines and days
        names = [
            (source.name, source.weight, [file_name(s) for s in source.shards], source.counts)
            for source in self.sources
        ]
        digest = hashlib.sha256(repr(names).encode()).hexdigest()[:12]
        shards = sum(len(source.shards) for source in self.sources)
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "resample": self.resample,
            "shards": f"{shards} shards, {self.samples} samples, {digest}",
        }


def file_name(shard: str) -> str:
    """A shard's name without folder, host and signature; a command is its own name."""
    if shard.startswith("pipe:"):
        return shard
    return PurePosixPath(urlsplit(shard).path if is_remote(shard) else shard).name

"""Who sees which sample in which epoch: the arithmetic of the training stream, without reading anything.

An epoch lays its N samples on a line, shard after shard in a permuted order, and cuts the line into one part for each
worker of each rank, in proportion to the batches that worker has to make. So no sample comes twice in an epoch,
whatever the number of shards, and every rank makes the same number of batches.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.tars import is_remote


def seeded(*parts: object) -> random.Random:
    """A generator that depends on these values alone."""
    return random.Random(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest())


@dataclass(frozen=True)
class Piece:
    """A run of samples in one shard, `stop` None for up to its end."""

    shard: int
    start: int
    stop: int | None
    length: int


@dataclass(frozen=True)
class Plan:
    """Who sees what in each epoch.

    Attributes:
        shards: paths or URLs.
        counts: samples in each shard.
        seed: of everything that is random.
        ranks: processes that train.
        workers: reading processes a rank, at least 1.
        batch_size: pairs a rank.
    """

    shards: tuple[str, ...]
    counts: tuple[int, ...]
    seed: int
    ranks: int
    workers: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Batches of each rank in an epoch."""
        return sum(self.counts) // (self.ranks * self.batch_size)

    def turns(self, worker: int) -> range:
        """Which of its rank's batches a worker makes."""
        return range(worker, self.steps, self.workers)

    def part(self, epoch: int, rank: int, worker: int) -> list[Piece]:
        """The part of the epoch's line that a worker reads: at least as many samples as its batches take."""
        before = rank * self.steps + sum(len(self.turns(other)) for other in range(worker))
        total, batches = sum(self.counts), self.ranks * self.steps
        low, high = (done * total // batches for done in (before, before + len(self.turns(worker))))
        order = seeded(self.seed, epoch, "shards").sample(range(len(self.shards)), len(self.shards))
        ends = itertools.accumulate(self.counts[shard] for shard in order)
        pieces = []
        for shard, end in zip(order, ends, strict=True):
            count = self.counts[shard]
            start, stop = max(low - end + count, 0), min(high - end + count, count)
            if start < stop:
                # a shard may hold more than was said: whoever reads its last sample reads on
                pieces.append(Piece(shard, start, None if stop == count else stop, stop - start))
        return pieces

    def fingerprint(self) -> dict[str, Any]:
        """What a position in the stream means something under."""
        # folders may differ between machines
        names = [shard if is_remote(shard) else Path(shard).name for shard in self.shards]
        digest = hashlib.sha256(repr((names, self.counts)).encode()).hexdigest()[:12]
        return {
            "seed": self.seed,
            "ranks": self.ranks,
            "workers": self.workers,
            "global_batch_size": self.ranks * self.batch_size,
            "shards": f"{len(self.shards)} shards, {sum(self.counts)} samples, {digest}",
        }

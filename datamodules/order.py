"""Which sample is seen when: a function of (seed, epoch, step) alone, whatever the number of ranks and workers.

A *stream* is the endless run of samples of one source, or of all sources if none has a weight. A cycle of it holds each
sample once, shard after shard in a permuted order. It is cut into L lanes of equal length; position p is number p // L of
lane p mod L. So every batch holds as many samples of each lane, and a machine, which takes some lanes, reads only their
shards. Samples are permuted within windows of W neighbours in a lane. A resampled stream draws a shard, in proportion to
its size, for each window of a lane.

G pairs a global batch, S steps an epoch, K streams.
"""

import hashlib
import math
import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_MOST_LANES = 64
_ROWS_A_LANE = 8  # of a global batch: with fewer, neighbours in a lane would hardly ever meet in a batch
_PERIOD = 1024  # steps after which the numbers of pairs of the streams repeat
_SPREAD = 633  # whose multiples are spread evenly over the period


def seeded(*parts: object) -> random.Random:
    """A generator that depends on these values alone."""
    return random.Random(_number(*parts))


def _number(*parts: object) -> int:
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


class SampleId(NamedTuple):
    """A sample that is due, by numbers."""

    stream: int
    shard: int  # of the stream
    row: int  # of the shard
    position: int  # in the stream. It occurs once in a run: captions and crops are drawn by it


class Stream:
    """The samples of a source in their order. Arguments as of `Order`; `counts` are the samples in each shard."""

    def __init__(self, counts: Ints, seed: str, global_batch: int, shuffle: int, resample: bool) -> None:
        self.counts, self.seed, self.resample = counts, seed, resample
        self.size, self._ends = int(counts.sum()), np.cumsum(counts)
        mean = max(self.size // max(int((counts > 0).sum()), 1), 1)
        self._window_size = max(min(shuffle, mean) if resample else shuffle, 1)
        most = min(_MOST_LANES, global_batch // _ROWS_A_LANE, self.size // self._window_size)
        self._lanes = max((2**n for n in range(7) if 2**n <= most and global_batch % 2**n == 0), default=1)
        self._shard_order = lru_cache(2)(self._permuted_shards)
        self._window = lru_cache(4 * self._lanes)(self._drawn if resample else self._permuted)

    def locate(self, positions: Ints) -> tuple[Ints, Ints, NDArray[np.float64]]:
        """Shard, row, and lane (as a number from 0 up to 1) of each position."""
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        cycles, within = np.divmod(positions, positions.max(initial=0) + 1 if self.resample else self.size)
        numbers, lanes = np.divmod(within, self._lanes)
        windows, offsets = np.divmod(numbers, self._window_size)
        keys, which = np.unique(np.stack([cycles, lanes, windows], 1), axis=0, return_inverse=True)
        for i, key in enumerate(keys.tolist()):
            mine = which.reshape(-1) == i
            shards[mine], rows[mine] = (each[offsets[mine]] for each in self._window(*key))
        return shards, rows, lanes / self._lanes

    def _permuted(self, cycle: int, lane: int, window: int) -> tuple[Ints, Ints]:
        """Shard and row of each sample of a window."""
        share, rest = divmod(self.size, self._lanes)
        start, length = lane * share + min(lane, rest), share + (lane < rest)
        first = window * self._window_size
        samples = start + first + np.arange(min(self._window_size, length - first))
        if self._window_size > 1:
            samples = np.random.default_rng(_number(self.seed, cycle, lane, window)).permutation(samples)
        order, ends = self._shard_order(cycle)
        at = np.searchsorted(ends, samples, side="right")
        shards = order[at]
        return shards, samples - ends[at] + self.counts[shards]

    def _permuted_shards(self, cycle: int) -> tuple[Ints, Ints]:
        order = np.random.default_rng(_number(self.seed, cycle, "shards")).permutation(len(self.counts))
        return order, np.cumsum(self.counts[order])

    def _drawn(self, cycle: int, lane: int, window: int) -> tuple[Ints, Ints]:
        rng = np.random.default_rng(_number(self.seed, "draw", lane, window))
        shard = int(np.searchsorted(self._ends, rng.integers(self.size), side="right"))
        return np.full(self._window_size, shard), np.resize(rng.permutation(self.counts[shard]), self._window_size)


class Shares:
    """How many pairs of each stream a global batch of G pairs holds: the share of its weight, to one pair."""

    def __init__(self, weights: Sequence[float], global_batch: int) -> None:
        self.of_all = [weight / math.fsum(weights) for weight in weights]
        # pair i of a batch lies at (i + offset) / G on a line of length 1 that is cut by the shares
        bounds = np.append(np.cumsum([0.0, *self.of_all[:-1]]), 1.0)
        offsets = (np.arange(_PERIOD) * _SPREAD % _PERIOD + 0.5) / _PERIOD
        pairs = np.diff(np.ceil(global_batch * bounds - offsets[:, None]).astype(np.int64), axis=1)
        self._starts = np.concatenate([np.zeros((1, len(weights)), np.int64), np.cumsum(pairs, 0)])

    def spans(self, step: int) -> list[tuple[int, int]]:
        """First position and number of pairs of each stream in a step, counted from the start of the run."""
        periods, at = divmod(step, _PERIOD)
        firsts = periods * self._starts[-1] + self._starts[at]
        return list(zip(firsts.tolist(), (self._starts[at + 1] - self._starts[at]).tolist(), strict=True))


class Order:
    """The global batches of a run, of `global_batch` pairs; `samples` pairs an epoch, rounded down to whole batches.

    `counts` (samples in each shard), `names` and relative `weights` are of the streams. `shuffle` samples are permuted
    among each other. With `resample`, shards are drawn with replacement.
    """

    def __init__(
        self, counts: Sequence[Ints], names: Sequence[str], weights: Sequence[float], seed: int | str, global_batch: int,
        samples: int, shuffle: int, resample: bool = False,
    ) -> None:  # fmt: skip
        self.seed, self.global_batch, self.steps = seed, global_batch, samples // global_batch
        self.streams = [
            Stream(np.asarray(part, np.int64), f"{seed}/{name}", global_batch, shuffle, resample)
            for part, name in zip(counts, names, strict=True)
        ]
        self.shares = Shares(weights, global_batch)

    def spans(self, epoch: int, step: int) -> list[tuple[int, int]]:
        """First position and number of pairs of each stream in a global batch."""
        if len(self.streams) == 1:
            stream = self.streams[0]
            cycle = self.steps * self.global_batch if stream.resample else stream.size
            return [(epoch * cycle + step * self.global_batch, self.global_batch)]
        return self.shares.spans(epoch * self.steps + step)

    def batch(self, epoch: int, step: int, rank: int = 0, ranks: int = 1) -> list[SampleId]:
        """A rank's rows of a global batch; all ranks' rows, one after the other, are the same for any number of ranks."""
        parts, lanes = [], []
        for number, (first, count) in enumerate(self.spans(epoch, step)):
            positions = np.arange(first, first + count)
            shards, rows, lane = self.streams[number].locate(positions)
            parts.append(np.stack([np.full(count, number), shards, rows, positions], 1))
            lanes.append(lane)
        mixed = np.random.default_rng(_number(self.seed, epoch, step)).random(self.global_batch)
        order = np.lexsort((mixed, np.concatenate(lanes)))
        size = self.global_batch // ranks
        mine = order[rank * size : (rank + 1) * size]
        return [SampleId(*row) for row in np.concatenate(parts)[mine].tolist()]

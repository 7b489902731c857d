"""The training stream: which pair is seen when, as a function of the plan, the epoch and of nothing else.

`plan.py` gives each reader its part of an epoch. A batch takes the next places of that part, shuffled; a place whose sample
is bad or missing is filled with one that is due in a later batch, which will then be seen twice. Batch j therefore always
begins at the same place, and a run is resumed by counting: no decoding, nothing to save but epoch and number of batches.
"""

import functools
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.filters import shuffle

from datamodules.augment import Augment
from datamodules.pairs import CollatePairs
from datamodules.plan import Piece, Plan, seeded
from datamodules.tally import CAUSE, CONVERTED, Report, Skip, Tally
from stair.batch import Batch
from stair.data.pairs import Pair
from stair.data.remote import Remote
from stair.data.samples import caption_lines, captions, image_bytes
from stair.data.tars import stream

_MISSING: dict[str, Any] = {}  # a place whose sample its shard did not have


@functools.lru_cache(maxsize=4096)
def _stem(shard: str) -> str:
    return PurePosixPath(shard.partition("?")[0]).name.removesuffix(".tar")


@functools.lru_cache(maxsize=4096)
def _caption_lines(shard: str) -> bool:
    return caption_lines(shard)


@dataclass(frozen=True)
class Reader:
    """Reads what one worker of one rank of the plan sees in an epoch, as lists of pairs: one list a batch.

    Attributes:
        plan: who sees what.
        augment: makes pixels of an image's bytes.
        buffer: samples, as they lie in the tar, that are shuffled among each other.
        remote: how shards that are not local files are read.
        epoch: which epoch.
        rank: in the plan.
        worker: in the plan.
        tally: told of what is seen and left out.
    """

    plan: Plan
    augment: Augment
    buffer: int
    remote: Remote
    epoch: int
    rank: int
    worker: int
    tally: Tally

    def batches(self, handed: int) -> Iterator[list[Pair]]:
        """The reader's batches, without those among the first `handed` ones of its rank."""
        turns = np.asarray(self.plan.turns(self.worker))
        quotas = self.plan.quotas(self.rank, turns)
        done = int((turns < handed).sum())
        lines = [self._filled(line, quota, done) for line, quota in enumerate(quotas)]
        for _ in range(done, len(turns)):
            yield [pair for line in lines for pair in next(line)]

    def _filled(self, line: int, quota: "np.ndarray[Any, Any]", done: int) -> Iterator[list[Pair]]:
        """What a line gives to each batch."""
        if not quota.any():
            yield from itertools.repeat([], len(quota) - done)
            return
        samples = itertools.islice(self._shuffled(line), int(quota[:done].sum()), None)
        ahead: deque[Pair | None] = deque()  # read before their turn; None is a bad one
        for wanted in quota[done:].tolist():
            due = [ahead.popleft() if ahead else self._read(next(samples)) for _ in range(wanted)]
            pairs = [pair for pair in due if pair]
            for i in itertools.count():
                if len(pairs) == wanted:
                    break
                if i == len(ahead):
                    ahead.append(self._read(next(samples)))
                if found := ahead[i]:
                    pairs.append(found)
            yield pairs

    def _shuffled(self, line: int) -> Iterator[dict[str, Any]]:
        """The samples of a part, shuffled, over and over: broken shards can leave fewer than the plan asks for."""
        name = self.plan.lines[line][0].name
        buffer = round(self.buffer * self.plan.shares[line])
        for lap in itertools.count():
            rng = seeded(self.plan.seed, self.epoch, self.rank, self.worker, name, lap)
            bad = self.tally.bad.total()
            empty = True
            for sample in self._lap(self._pieces(line, rng, lap), buffer, rng):
                empty = False
                yield sample
            # sizes spread from a total give places past the end of a short shard; nothing is wrong with it
            if empty and not self.plan.resample and self.tally.bad.total() == bad:
                for sample in self._lap(
                    self.plan.beginnings(self.epoch, self.rank, self.worker, line, lap), buffer, rng
                ):
                    empty = False
                    yield sample
            if empty:
                raise RuntimeError(
                    f"no sample could be read from {[shard for s in self.plan.lines[line] for shard in s.shards][:3]} or "
                    f"others of them: {dict(self.tally.by_cause(CAUSE)) or 'they hold none'}; check the files, and "
                    "train_samples if it was given"
                )

    def _lap(self, pieces: Iterable[Piece], buffer: int, rng: Any) -> Iterator[dict[str, Any]]:
        found: Iterator[dict[str, Any]] = shuffle(buffer, initial=buffer, rng=rng)(
            sample for piece in pieces for sample in self._stream(piece)
        )
        return found

    def _pieces(self, line: int, rng: Any, lap: int) -> Iterator[Piece]:
        if self.plan.resample:
            return self.plan.drawn(self.epoch, self.rank, self.worker, line)
        part = self.plan.pieces(self.epoch, self.rank, self.worker, line)
        rng.shuffle(part)
        return (replace(piece, visit=f"{piece.visit}+{lap}") if lap else piece for piece in part)

    def _stream(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece's samples: as many as it should have, so that a shard that breaks moves no other sample's place."""
        errors: list[Exception] = []
        read = 0
        with closing(stream(piece.shard, errors.append, remote=self.remote)) as samples:
            for sample in itertools.islice(samples, piece.start, piece.stop):
                read += 1
                sample["__piece__"] = piece
                yield sample
        if errors or read < piece.length:
            lost = max(piece.length - read, 1)
            reason = (
                errors[0] if errors else f"it has {piece.start + read} samples, {piece.start + piece.length} were said"
            )
            self.tally.seen += lost
            self.tally.note(Skip(f"shard broken: {reason}", piece.source, piece.shard, piece.shard, lost))
            self.tally.judge()
        yield from itertools.repeat(_MISSING, piece.length - read)

    def _read(self, sample: dict[str, Any]) -> Pair | None:
        if sample is _MISSING:
            return None
        self.tally.seen += 1
        reasons: list[tuple[str, int]] = [(oddity, 0) for oddity in sample["__odd__"]]
        converted: list[str] = []
        pair = None
        try:
            pair = self._pair(sample, converted)
        except ValueError as error:
            reasons.append((str(error), 1))
        for reason, lost in reasons + [(f"{CONVERTED}{kind}: to 8-bit RGB, upright", 0) for kind in converted]:
            piece: Piece = sample["__piece__"]
            place = f"{sample['__key__']!r} in {piece.shard}"
            self.tally.note(Skip(reason, piece.source, piece.shard, place, lost))
        self.tally.judge()
        return pair

    def _pair(self, sample: dict[str, Any], converted: list[str]) -> Pair:
        piece: Piece = sample["__piece__"]
        if sample["__wrong__"]:
            raise ValueError(sample["__wrong__"])
        texts = [text for text in captions(sample, _caption_lines(piece.shard)) if text]
        key = f"{_stem(piece.shard)}/{sample['__key__']}"
        rng = seeded(self.plan.seed, piece.visit, key)
        pixels = self.augment(image_bytes(sample), rng, converted)
        return Pair(pixels, [rng.choice(texts)], 0, key, piece.source)


@dataclass(eq=False)
class ShardStream(IterableDataset[tuple[Batch, Report]]):
    """What a reading process runs: its batches of one epoch, each with a report of what was skipped.

    A rank of this run makes the rows of the global batch that are its own. Where the plan was laid out for other ranks (a
    run that goes on elsewhere), these are rows of several of the plan's ranks, or some rows of one.

    Attributes:
        plan: who sees what.
        rank: this process, from 0.
        ranks: processes that train.
        processes: reading processes of this rank; must divide the plan's workers.
        augment: makes pixels of an image's bytes.
        collate: makes a batch of pairs.
        buffer: samples, as they lie in the tar, that a worker shuffles among each other.
        max_bad_share: greatest share of bad samples.
        remote: how shards that are not local files are read.
        place: (2,) int64, the epoch to make and how many of its batches to leave out, read as an iteration begins. In
            shared memory, as reading processes live for more than an epoch.
    """

    plan: Plan
    rank: int
    ranks: int
    processes: int
    augment: Augment
    collate: CollatePairs
    buffer: int
    max_bad_share: float
    remote: Remote
    place: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.int64).share_memory_())

    def __iter__(self) -> Iterator[tuple[Batch, Report]]:
        info = get_worker_info()
        epoch, handed = self.place.tolist()
        # alone, a worker judges only by a good number: its part may be small, and one bad sample a great share of it
        tally = Tally(self.max_bad_share)
        readers: dict[tuple[int, int], Iterator[list[Pair]]] = {}
        # the loader asks its processes in turn, whichever step it begins at
        for step in range(handed + (info.id if info else 0), self.plan.steps, self.processes):
            worker = step % self.plan.workers
            rows: list[Pair] = []
            for rank, part in self._shares():
                if (rank, worker) not in readers:
                    # what two ranks read is counted by the one that has its first row
                    told = tally if part.start == 0 else Tally(self.max_bad_share)
                    reader = Reader(self.plan, self.augment, self.buffer, self.remote, epoch, rank, worker, told)
                    readers[rank, worker] = reader.batches(handed)
                rows += next(readers[rank, worker])[part]
            yield self.collate([replace(pair, image_id=row) for row, pair in enumerate(rows)]), tally.report()

    def _shares(self) -> Iterator[tuple[int, slice]]:
        """The plan's ranks that hold this rank's rows, and which rows of theirs."""
        size = self.plan.global_batch_size // self.ranks
        first, end = self.rank * size, (self.rank + 1) * size
        theirs = self.plan.batch_size
        for rank in range(first // theirs, -(-end // theirs)):
            yield rank, slice(max(first - rank * theirs, 0), min(end - rank * theirs, theirs))

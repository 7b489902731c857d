"""Loaders: one rank's training batches, which know their place in the run, and its share of an evaluation set."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DistributedSampler

from datamodules.dataset import CONVERTED, CollatePairs, IndexedPairs, Made, Skip, StreamedPairs
from datamodules.order import Order, SampleId
from datamodules.workers import ReadingLoader
from stair.batch import Batch
from stair.data.pairs import EvaluationPairs
from stair.errors import SettingError, StairError

logger = logging.getLogger(__name__)

_ENOUGH = 200  # among fewer samples the share of bad ones is too rough to stop a run for


class SkipCounter:
    """Samples that a rank has read, skipped and converted. After `enough`, the share of skipped ones has a limit."""

    def __init__(self, limit: float, enough: int) -> None:
        self.limit, self.enough, self.seen = limit, enough, 0
        self.skipped: Counter[tuple[str, str, str]] = Counter()  # by cause, source and shard
        self.notes: Counter[tuple[str, str, str]] = Counter()

    def add(self, seen: int, skips: list[Skip]) -> None:
        """Counts what a batch reports; RuntimeError, naming causes and the worst shards, if too many were skipped."""
        self.seen += seen
        for skip in skips:
            (self.skipped if skip.samples else self.notes)[skip.cause, skip.source, skip.shard] += 1
        total = self.skipped.total()
        if self.seen < self.enough or total <= self.limit * self.seen:
            return
        causes, shards = Counter[str](), Counter[str]()
        for (cause, _, shard), count in self.skipped.items():
            causes[cause] += count
            shards[shard] += count
        worst = ", ".join(f"{shard} with {count}" for shard, count in shards.most_common(3))
        raise RuntimeError(
            f"{total} of {self.seen} samples are bad, more than max_bad_share={self.limit}: {dict(causes)}; "
            f"worst shards: {worst}. Repair the shards or raise max_bad_share"
        )

    def by_cause(self, converted: bool = False) -> dict[str, int]:
        """Skipped samples and notes, or converted images, by cause, and by `source/cause` if sources have names."""
        counts = Counter[str]()
        for (cause, source, _), count in (self.skipped + self.notes).items():
            if cause.startswith(CONVERTED) == converted:
                for name in (f"{source}/", "") if source else ("",):
                    counts[name + cause.removeprefix(CONVERTED)] += count
        return dict(counts)

    def by_source(self, converted: bool = False) -> dict[str, int]:
        """Skipped samples, or converted images, by source."""
        counts = Counter[str]()
        for (cause, source, _), count in (self.notes if converted else self.skipped).items():
            counts[source] += count * (cause.startswith(CONVERTED) == converted)
        return dict(+counts)


class _Batches:
    """The samples of a rank's rows, batch by batch and epoch after epoch: a batch sampler without end."""

    def __init__(self, order: Order, rank: int, ranks: int, epoch_batches: int) -> None:
        self._order, self._rank, self._ranks, self._epoch_batches = order, rank, ranks, epoch_batches
        self.start = 0, 0

    def __iter__(self) -> Iterator[list[SampleId]]:
        epoch, step = self.start
        while True:
            for each in range(step, self._epoch_batches):
                yield self._order.batch(epoch, each, self._rank, self._ranks)
            epoch, step = epoch + 1, 0


def _as_is(made: Made | StairError) -> Made | StairError:
    return made


class TrainingLoader:
    """The batches of one rank.

    The state is the epoch and the batches handed out in it, the same on every rank. Any number of ranks and workers
    continues there with the same global batches; shards that can only be read sequentially continue with new draws.

    An epoch is complete after `epoch_batches`, where a trainer stops earlier than `len`. The state means something under
    the `fingerprint` of shards and settings. `counter` has what this rank has skipped and converted so far.
    """

    def __init__(
        self, dataset: IndexedPairs | StreamedPairs, order: Order, rank: int, ranks: int, workers: int,
        epoch_batches: int, max_bad_share: float, fingerprint: dict[str, Any],
    ) -> None:  # fmt: skip
        self.dataset, self.order, self.epoch_batches, self.fingerprint = dataset, order, epoch_batches, fingerprint
        self.epoch = self.handed = 0
        self.counter = SkipCounter(max_bad_share, min(_ENOUGH, order.steps * order.global_batch // ranks))
        self._shown: set[tuple[str, str]] = set()  # causes, by source, of which an example was logged
        self._moved = False
        self._next: tuple[int, int] | None = None  # epoch and step that the running processes give next
        self._iterator: Iterator[Made | StairError] | None = None  # the name by which Lightning shuts workers down
        self._batches = _Batches(order, rank, ranks, epoch_batches)
        streamed = isinstance(dataset, StreamedPairs)
        sampling: dict[str, Any] = {"batch_size": None} if streamed else {"batch_sampler": self._batches}
        self._loader = ReadingLoader(dataset, collate_fn=_as_is, workers=workers, lasting=True, **sampling)

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        if self._moved:
            self.set_epoch(self.epoch + 1)
        return self._epoch()

    def _epoch(self) -> Iterator[Batch]:
        before = Counter(self.counter.by_cause())
        while self.handed < self.epoch_batches:
            batch, seen, skips = self._fetch()
            self.handed, self._moved = self.handed + 1, True
            for skip in skips:
                if (skip.cause, skip.source) not in self._shown:
                    self._shown.add((skip.cause, skip.source))
                    where = f"{skip.place} of source {skip.source!r}" if skip.source else skip.place
                    what = "skipped" if skip.samples else "met"
                    logger.warning("%s %s: %s; more of this cause are only counted", what, where, skip.reason)
            self.counter.add(seen, skips)
            if self.handed == self.epoch_batches and (new := Counter(self.counter.by_cause()) - before):
                total = sum(count for cause, count in new.items() if "/" not in cause)
                logger.warning("epoch %d: skipped %d samples: %s", self.epoch, total, dict(new))
            yield batch

    def _fetch(self) -> Made:
        """The next batch, from running processes if they are at this place."""
        if self._iterator is None or self._next != (self.epoch, self.handed):
            if self._iterator is None or isinstance(self.dataset, StreamedPairs):
                self._loader._iterator = None  # shut down by Lightning, or begun for another place
            self._batches.start = self.epoch, self.handed
            if isinstance(self.dataset, StreamedPairs):
                self.dataset.start = self.epoch * len(self) + self.handed
            self._iterator = iter(self._loader)
        try:
            made = next(self._iterator)
            if isinstance(made, StairError):
                raise made
        except BaseException:
            self._loader._iterator = self._iterator = None  # whoever tries again gets other processes
            raise
        last = self.handed + 1 == self.epoch_batches
        self._next = (self.epoch + 1, 0) if last else (self.epoch, self.handed + 1)
        return made

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin this epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.handed, self._moved = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it (plain numbers), and the fingerprint of what they count in."""
        epochs, batches = divmod(self.handed, max(self.epoch_batches, 1))
        return {"epoch": self.epoch + epochs, "batches": batches, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue there; SettingError if the state is of other shards or settings."""
        there, here = state["fingerprint"], self.fingerprint
        pairs = {name: (there.get(name), here.get(name)) for name in sorted(there.keys() | here.keys())}
        if differ := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            raise SettingError(
                f"the checkpoint's data position does not fit this run: (checkpoint, this run) differ in {differ}; "
                "resume with the checkpoint's values, or start a new run from its weights", f"data.{next(iter(differ))}",
            )  # fmt: skip
        self.epoch, self.handed, self._moved = state["epoch"], state["batches"], False


class RankShare(DistributedSampler[int]):
    """Indices r, r + ranks, r + 2·ranks, ...: as many on every rank, so the last ones may lie past the set's end.

    A `DistributedSampler`, because Lightning puts its own, which repeats samples unmarked, in the place of any other.
    """

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.total_size, self.num_replicas))


def evaluation_loader(
    pairs: EvaluationPairs, collate: CollatePairs, batch_size: int, workers: int, rank: int, ranks: int
) -> ReadingLoader:
    """A loader of this rank's share of a set: the same number of batches, of the same sizes, on every rank."""
    sampler = RankShare(pairs, ranks, rank, shuffle=False)
    return ReadingLoader(pairs, batch_size=batch_size, sampler=sampler, workers=workers, collate_fn=collate)

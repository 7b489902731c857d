"""The loader of one rank's batches, epoch after epoch, which knows its place in the run."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datamodules.dataset import IndexedPairs, Made, StreamedPairs
from datamodules.order import Order, SampleId
from datamodules.skipped import Skip, SkipCounter
from datamodules.workers import ReadingLoader
from stair.batch import Batch
from stair.errors import SettingError, StairError

logger = logging.getLogger(__name__)

_ENOUGH = 200  # among fewer samples the share of bad ones is too rough to stop a run for


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

    The state is the epoch and the batches handed out in it, the same on every rank. Lightning stores it in its checkpoints.
    Any number of ranks and workers continues there with the same global batches; shards that can only be read from front to
    end continue with new draws.

    Args:
        dataset: makes batches.
        order: which sample is seen when.
        rank: this process, from 0.
        ranks: processes that train.
        workers: reading processes; 0 reads in this one.
        epoch_batches: batches after which an epoch counts as complete, where a trainer stops earlier than `len`.
        max_bad_share: greatest share of bad samples.
        fingerprint: of the shards and settings under which the state means something.

    Attributes:
        counter: what this rank has skipped and converted so far.
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
            self._count(seen, skips)
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
        after = self.handed + 1
        self._next = (self.epoch, after) if after < self.epoch_batches else (self.epoch + 1, 0)
        return made

    def _count(self, seen: int, skips: list[Skip]) -> None:
        for skip in skips:
            if (skip.cause, skip.source) not in self._shown:
                self._shown.add((skip.cause, skip.source))
                where = f"{skip.place} of source {skip.source!r}" if skip.source else skip.place
                what = "skipped" if skip.samples else "met"
                logger.warning("%s %s: %s; more of this cause are only counted", what, where, skip.reason)
        self.counter.add(seen, skips)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin this epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.handed, self._moved = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it (plain numbers), and the fingerprint of what they count in."""
        epochs, batches = divmod(self.handed, max(self.epoch_batches, 1))
        return {"epoch": self.epoch + epochs, "batches": batches, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue where the state was taken.

        Raises:
            SettingError: if it was taken with other shards or settings.
        """
        there, here = state["fingerprint"], self.fingerprint
        differ = {
            k: (there.get(k), here.get(k)) for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)
        }
        if differ:
            raise SettingError(
                f"the checkpoint's data position does not fit this run: (checkpoint, this run) differ in {differ}; "
                "resume with the checkpoint's values, or start a new run from its weights", f"data.{next(iter(differ))}",
            )  # fmt: skip
        self.epoch, self.handed, self._moved = state["epoch"], state["batches"], False

"""Hands out one rank's batches, epoch after epoch, and knows its place in the run."""

import logging
from collections.abc import Iterator
from typing import Any

from datamodules.dataset import Made, PairsByDraw, PairsByPlace
from datamodules.order import Order, Place
from datamodules.skipped import CAUSE, ENOUGH, SkipCounter
from datamodules.workers import ReadingLoader
from stair.batch import Batch
from stair.errors import SettingError, StairError

logger = logging.getLogger(__name__)


class _Places:
    """The places of a rank's rows, batch by batch and epoch after epoch: a batch sampler without end."""

    def __init__(self, order: Order, rank: int, ranks: int, epoch_batches: int) -> None:
        self.order, self.rank, self.ranks, self.epoch_batches = order, rank, ranks, epoch_batches
        self.start = (0, 0)

    def __iter__(self) -> Iterator[list[Place]]:
        epoch, step = self.start
        while True:
            for each in range(step, self.epoch_batches):
                yield self.order.batch(epoch, each, self.rank, self.ranks)
            epoch, step = epoch + 1, 0


def _as_is(made: Made | StairError) -> Made | StairError:
    return made


class TrainingLoader:
    """Hands out the batches of one rank.

    The state is the epoch and the batches handed out in it, the same on every rank. Lightning finds `state_dict` and
    `load_state_dict` and stores the state in its checkpoints. Any number of ranks and workers continues at that place, with
    the same global batches; from shards that can only be read forwards it continues with new draws.

    Args:
        dataset: makes batches.
        order: which sample is seen when.
        rank: this process, from 0.
        ranks: processes that train.
        workers: reading processes; 0 reads in this one.
        epoch_batches: batches after which an epoch counts as complete, where a trainer stops earlier than `len`.
        max_bad_share: greatest share of bad samples.
        fingerprint: of the shards and settings under which a place means something.

    Attributes:
        counter: what this rank has skipped and converted so far.
    """

    def __init__(
        self, dataset: PairsByPlace | PairsByDraw, order: Order, rank: int, ranks: int, workers: int, epoch_batches: int,
        max_bad_share: float, fingerprint: dict[str, Any],
    ) -> None:  # fmt: skip
        self.order, self.epoch_batches, self.fingerprint = order, epoch_batches, fingerprint
        self.epoch = self.handed = 0
        self.counter = SkipCounter(max_bad_share, min(ENOUGH, order.steps * order.global_batch // ranks))
        self._next = (-1, 0)  # epoch and step that the running processes give next
        self._shown: set[tuple[str, str]] = set()  # causes, by source, of which an example was logged
        self._iterator: Iterator[Made | StairError] | None = (
            None  # the name by which Lightning finds workers to shut down
        )
        self._moved = False
        if isinstance(dataset, PairsByDraw):
            self._placed: Any = dataset
            self._loader = ReadingLoader(dataset, batch_size=None, collate_fn=_as_is, workers=workers, lasting=True)
        else:
            self._placed = _Places(order, rank, ranks, epoch_batches)
            self._loader = ReadingLoader(
                dataset, batch_sampler=self._placed, collate_fn=_as_is, workers=workers, lasting=True
            )

    def __len__(self) -> int:
        return self.order.steps

    def __iter__(self) -> Iterator[Batch]:
        if self._moved:
            self.set_epoch(self.epoch + 1)
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        before = self.counter.by_cause(CAUSE)
        while self.handed < self.epoch_batches:
            batch, seen, skips = self._fetched()
            self.handed += 1
            self._moved = True
            self._note(seen, skips)
            if self.handed == self.epoch_batches and (fresh := self.counter.by_cause(CAUSE) - before):
                logger.warning("epoch %d: skipped %d samples: %s", self.epoch, fresh.total(), dict(fresh))
            yield batch

    def _fetched(self) -> Made:
        """The next batch, from running processes if they are at this place."""
        if self._iterator is None or self._next != (self.epoch, self.handed):
            if self._iterator is None or isinstance(self._placed, PairsByDraw):
                self._loader._iterator = None  # shut down by Lightning, or begun for another place
            place = self.epoch, self.handed
            self._placed.start = place if isinstance(self._placed, _Places) else self.epoch * len(self) + self.handed
            self._iterator = iter(self._loader)
        try:
            made = next(self._iterator)
            if isinstance(made, StairError):
                raise made
        except BaseException:
            self._next = (-1, 0)
            self._loader._iterator = None  # whoever tries again gets other processes
            raise
        after = self.handed + 1
        self._next = (self.epoch, after) if after < self.epoch_batches else (self.epoch + 1, 0)
        return made

    def _note(self, seen: int, skips: list[Any]) -> None:
        for skip in skips:
            if (skip.cause, skip.source) not in self._shown:
                which = f" of source {skip.source!r}" if skip.source else ""
                done = "skipped" if skip.samples else "met"
                logger.warning("%s %s%s: %s; more of this cause are only counted", done, skip.place, which, skip.reason)
                self._shown.add((skip.cause, skip.source))
        self.counter.add(seen, skips)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin this epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.handed, self._moved = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Epoch, batches handed out in it (plain numbers), and the fingerprint of what they count in."""
        complete = self.handed >= self.epoch_batches
        return {
            "epoch": self.epoch + complete,
            "batches": 0 if complete else self.handed,
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration continue where the state was taken.

        Raises:
            SettingError: if it was taken with other shards or settings.
        """
        there = state["fingerprint"]
        if there != self.fingerprint:
            names = sorted(there.keys() | self.fingerprint.keys())
            differ = {name: (there.get(name), self.fingerprint.get(name)) for name in names}
            differ = {name: values for name, values in differ.items() if values[0] != values[1]}
            raise SettingError(
                f"the checkpoint's place in the data is none in this run: (checkpoint, this run) differ in {differ}; "
                "resume with the checkpoint's values, or start a new run from its weights", f"data.{next(iter(differ))}",
            )  # fmt: skip
        self.epoch, self.handed, self._moved = state["epoch"], state["batches"], False

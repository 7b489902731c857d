"""Hands out one rank's batches, epoch after epoch, and knows where it stands."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from datamodules.stream import ShardStream
from datamodules.tally import CAUSE, ENOUGH, Report, Tally
from datamodules.workers import LivelyLoader
from stair.batch import Batch

logger = logging.getLogger(__name__)


def _as_is(made: tuple[Batch, Report]) -> tuple[Batch, Report]:
    return made


class ShardLoader:
    """Hands out the batches of one rank and knows where it stands.

    The state is what has been handed out, not what workers have read ahead, and the same on every rank. Lightning finds
    `state_dict` and `load_state_dict` and stores the state in its checkpoints; the next iteration goes on where the state
    was taken. An epoch that was begun by other ranks or workers is read to its end as they would have read it, so that
    nothing is lost or repeated; the next one is read in this run's own way.

    Args:
        stream: what the workers run; its plan is this run's own.
        processes: reading processes; 0 reads in this one.
        epoch_batches: batches after which an epoch counts as complete, where a trainer stops earlier than `len`.

    Attributes:
        tally: what this rank has met so far that was left out or converted.
    """

    def __init__(self, stream: ShardStream, processes: int, epoch_batches: int) -> None:
        self.stream, self.epoch_batches = stream, epoch_batches
        self.epoch = self.handed = 0
        self._plan, self._begun, self._processes = stream.plan, stream.plan, processes
        self.tally = Tally(stream.max_bad_share, min(ENOUGH, epoch_batches * stream.plan.batch_size))
        self._moved = False
        self._told: set[tuple[str, str]] = set()  # causes, by source, of which an example was logged
        self._readers: tuple[ShardStream, LivelyLoader] | None = None
        self._iterator: Iterator[Any] | None = None  # the name by which Lightning finds workers to shut down

    def __len__(self) -> int:
        return self._plan.steps

    def __iter__(self) -> Iterator[Batch]:
        if self._moved:
            self.set_epoch(self.epoch + 1)
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        self._iterator = self._begin()
        before = self.tally.by_cause(CAUSE)
        try:
            for batch, report in self._iterator:
                self.handed += 1
                self._moved = True
                self._note(report)
                if self.handed == self.epoch_batches and (fresh := self.tally.by_cause(CAUSE) - before):
                    logger.warning("epoch %d: skipped %d samples: %s", self.epoch, fresh.total(), dict(fresh))
                yield batch
        except Exception:
            # whoever tries again gets other processes; the iterator stays, for Lightning to shut down
            self._readers = None
            raise

    def _begin(self) -> Iterator[Any]:
        """Iterates from where this loader stands, by the processes that read the epoch before if they read by this plan.

        To fork anew for each epoch would cost a copy of all memory that training then writes to, page by page.
        """
        if self._readers is None or self._iterator is None or self._readers[0].plan != self._begun:
            self._iterator = None
            self._readers = self._started()
        self.stream.place.copy_(torch.tensor([self.epoch, self.handed]))
        return iter(self._readers[1])

    def _started(self) -> tuple[ShardStream, LivelyLoader]:
        # each of the plan's workers must be read by one process: fewer processes take several, more would have none
        planned = self._begun.workers
        processes = max((n for n in range(1, self._processes + 1) if planned % n == 0), default=0)
        made = replace(self.stream, plan=self._begun, processes=max(processes, 1))
        return made, LivelyLoader(
            made,
            batch_size=None,
            num_workers=processes,
            persistent_workers=processes > 0,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the default one would draw from the global state
        )

    def _note(self, report: Report) -> None:
        for skip in report[1]:
            if (skip.cause, skip.source) not in self._told:
                which = f" of source {skip.source!r}" if skip.source else ""
                done = "skipped" if skip.samples else "met"
                logger.warning("%s %s%s: %s; more of this cause are only counted", done, skip.place, which, skip.reason)
                self._told.add((skip.cause, skip.source))
        self.tally.add(report)
        self.tally.judge()

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin this epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.handed, self._moved, self._begun = epoch, 0, False, self._plan

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches handed out in it, by how many readers (plain numbers), and what they mean something under."""
        complete = self.handed >= self.epoch_batches
        layout = self._plan if complete else self._begun
        return {
            "epoch": self.epoch + complete,
            "batches": 0 if complete else self.handed,
            "layout": {"ranks": layout.ranks, "workers": layout.workers},
            "fingerprint": self._fingerprint(),
        }

    def _fingerprint(self) -> dict[str, Any]:
        return {**self._plan.fingerprint(), "shuffle": self.stream.buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on where the state was taken.

        Raises:
            ValueError: if it was taken on other shards, batches or seeds.
        """
        here, there = self._fingerprint(), state["fingerprint"]
        if here != there:
            differ = {name: (there.get(name), value) for name, value in here.items() if there.get(name) != value}
            raise ValueError(
                f"the checkpoint's place in the data cannot be found again: (checkpoint, this run) differ in {differ}; "
                "resume with the checkpoint's values, or start a new run from its weights"
            )
        self.epoch, self.handed, self._moved, self._begun = state["epoch"], state["batches"], False, self._plan
        if self.handed:
            self._go_on_as(**state["layout"])

    def _go_on_as(self, ranks: int, workers: int) -> None:
        plan = self._plan
        self._begun = replace(plan, ranks=ranks, workers=workers, batch_size=plan.global_batch_size // ranks)
        if self._begun != plan:
            logger.warning(
                "epoch %d was begun by %d ranks with %d workers each, this run has %d with %d: it is read to its end as "
                "those would have read it, the next one in this run's own way",
                *(self.epoch, ranks, workers, plan.ranks, plan.workers),
            )

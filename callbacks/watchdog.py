"""A run that stands still ends, and says where: a collective that some rank never joins would wait for the job's end.

A thread of its own looks at the clock, since the main one may be inside a collective. (It needs Python's lock; collectives
and reading release that while they wait.)
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from typing import Any

import lightning as L

_EXIT = 70  # EX_SOFTWARE
_READING_ON = 10  # times the limit that a resumed run has until its first step is done


class Watchdog(L.Callback):
    """Ends the process with a message and the stacks of its threads when nothing has moved for a time.

    What counts as movement: a training or evaluation batch that begins or ends, a validation or checkpoint that begins or
    ends. Every rank watches itself, so the messages together say which rank waits for input and which for the others.
    Time in which the process was suspended does not count.

    A run that was resumed from a checkpoint has ten times as long until its first step is done: before its first batch it
    reads all shards up to its place in the epoch, and nothing moves meanwhile. (The step's end, not the batch: a rank that
    has read faster waits in it for the others.)

    Args:
        limit: seconds without movement, longer than the slowest start, checkpoint or final count of an evaluation, and
            than a tenth of what it takes to read the shards of an epoch; 0 for no watchdog. Below the 30 minutes after
            which collectives give up by themselves.
    """

    def __init__(self, limit: float = 1200.0) -> None:
        if limit < 0:
            raise ValueError(f"limit={limit}: wanted seconds, or 0 for no watchdog")
        self.limit = self._patience = limit
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ movement

    def _move(self, what: str) -> None:
        self._at = what, self._patience  # one new object: the thread sees both change at once

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begins to watch."""
        self._stop()
        if self.limit == 0:
            return
        self._who = f"rank {trainer.global_rank} of {trainer.world_size} on {socket.gethostname()}"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._patience = self.limit
        self._move("getting ready")
        self._thread.start()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gives a resumed training time to read up to its place."""
        if trainer.training and self._thread is not None:
            self._patience = _READING_ON * self.limit
            self._move("getting ready to go on")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes that a batch has come."""
        self._move(f"in the training step after step {trainer.global_step}: computing, or waiting for other ranks")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes that a step is done."""
        self._patience = self.limit
        self._move(f"waiting for the batch after step {trainer.global_step}: input, or what is logged")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that the first batch is next."""
        self._move(f"waiting for the batch after step {trainer.global_step}: input is starting")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that an evaluation begins."""
        self._move("starting an evaluation")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Notes a batch of an evaluation."""
        self._move(f"in an evaluation, after batch {args[2]}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that an evaluation is done."""
        self._move("after an evaluation")

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes that a checkpoint is being written."""
        self._move("writing a checkpoint")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes that training is done."""
        self._move("handing over")

    # ------------------------------------------------------------------ the end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stops watching."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops watching."""
        self._stop()

    def _stop(self) -> None:
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        tick = min(self.limit / 10, 5.0)
        last, seen, still = time.monotonic(), self._at, 0.0
        while not self._end.wait(tick):
            now = time.monotonic()
            still += min(now - last, 2 * tick)  # a suspended process has not stood still
            last, at = now, self._at
            if at is not seen:
                seen, still = at, 0.0
            elif still > at[1]:
                self._bark(still, *at)

    def _bark(self, still: float, doing: str, patience: float) -> None:
        if patience > self.limit:
            advice = (
                f"A resumed run first reads its shards up to its place, and has {_READING_ON} times watchdog.limit "
                f"({self.limit:g} s) until its first step is done. If it was reading still, the same command would end "
                "here again: raise --watchdog.limit"
            )
        else:
            advice = "The same command with --ckpt_path last goes on from the last checkpoint"
        print(
            f"watchdog: {self._who} has not moved for {still:.0f} s. It is {doing}. Compare with the messages of other "
            "ranks: one that waits for input, or is missing, holds up the rest. Ending this process. "
            f"{advice}. Stacks of all threads:",
            file=sys.__stderr__,
            flush=True,
        )
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(_EXIT)

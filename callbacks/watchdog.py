"""A run that stands still ends, and prints where: a collective that some rank never joins would wait for the job's end.

A thread watches the clock, since the main one may be inside a collective, which releases Python's lock. It counts ticks:
the timer of `faulthandler.dump_traceback_later` would end a run that SLURM suspended, and prints no rank.
"""

import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Callable

import lightning as L

from stair.errors import SettingError

_EXIT = 70  # EX_SOFTWARE
_TICKS = 10  # in a limit

# what a process does after each hook; a figure is the trainer's step
_PLACES = {
    "setup": "getting ready",
    "on_train_start": "waiting for the batch after step {}: input is starting",
    "on_train_batch_start": "in the training step after step {}: computing, or waiting for other ranks",
    "on_train_batch_end": "waiting for the batch after step {}: input, or what is logged",
    "on_validation_start": "in an evaluation",
    "on_validation_batch_end": "in an evaluation",
    "on_validation_end": "after an evaluation",
    "on_test_start": "in an evaluation",
    "on_test_batch_end": "in an evaluation",
    "on_predict_start": "in an evaluation",
    "on_predict_batch_end": "in an evaluation",
    "on_save_checkpoint": "writing a checkpoint",
    "on_load_checkpoint": "loading a checkpoint",
    "on_train_end": "exporting the model",
}


class Watchdog(L.Callback):
    """Ends the process with status 70, its rank and the stacks of its threads when no hook has run for a time.

    Every rank watches itself, so the messages together tell the ranks that wait for input from those that wait for others.
    Time in which the process was suspended does not count.

    Args:
        limit: seconds without a hook, longer than the slowest start, checkpoint or final count of an evaluation; 0 for no
            watchdog. Below the 30 minutes after which collectives give up by themselves.

    Raises:
        SettingError: if `limit` is negative.
    """

    def __init__(self, limit: float = 1200.0) -> None:
        if limit < 0:
            raise SettingError(f"limit={limit}: wanted seconds, or 0 for no watchdog", "watchdog.limit")
        self.limit = limit
        self._end: threading.Event | None = None

    def _move(self, hook: str, trainer: L.Trainer) -> None:
        if hook == "setup":
            self._start(trainer)
        self._place, self._ticks = _PLACES[hook].format(trainer.global_step), 0

    def _start(self, trainer: L.Trainer) -> None:
        self._stop()
        if self.limit:
            self._rank = f"rank {trainer.global_rank} of {trainer.world_size} on {socket.gethostname()}"
            self._end = threading.Event()
            threading.Thread(target=self._watch, args=(self._end,), daemon=True).start()

    def _watch(self, end: threading.Event) -> None:
        self._ticks = 0
        while not end.wait(self.limit / _TICKS):
            self._ticks += 1
            if self._ticks > _TICKS:
                self._abort()

    def _abort(self) -> None:
        print(
            f"watchdog: {self._rank} has not moved for {self.limit:g} s. It is {self._place}. Compare with the messages of "
            "other ranks: one that waits for input, or is missing, holds up the rest. Ending this process. The same "
            "command with --ckpt_path last goes on from the last checkpoint; if the run was only slow, raise "
            "--watchdog.limit. Stacks of all threads:",
            file=sys.__stderr__,
            flush=True,
        )
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(_EXIT)

    def _stop(self) -> None:
        if self._end is not None:
            self._end.set()
            self._end = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stops watching."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops watching."""
        self._stop()


def _hook(name: str) -> Callable[..., None]:
    return lambda self, trainer, *args, **kwargs: self._move(name, trainer)


for _name in _PLACES:
    setattr(Watchdog, _name, _hook(_name))

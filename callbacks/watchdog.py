"""A run that makes no progress ends and prints where: a collective that a rank never joins would wait until the job's end.

Not `faulthandler.dump_traceback_later`: it would also end a run that SLURM suspended, and prints no rank.
"""

import faulthandler
import os
import socket
import sys
import threading
from typing import Any

from lightning import Callback, Trainer

from stair.errors import require

_EXIT = 70  # EX_SOFTWARE
_TICKS = 10  # in a limit
# what a process does after each hook
_ACTIVITIES = {
    "setup": "starting",
    "on_train_start": "waiting for the first batch",
    "on_train_batch_start": "in the training step: computing, or waiting for other ranks",
    "on_train_batch_end": "waiting for the batch, or logging",
    **dict.fromkeys(("on_validation_start", "on_test_start", "on_predict_start"), "in an evaluation"),
    **dict.fromkeys(("on_validation_batch_end", "on_test_batch_end", "on_predict_batch_end"), "in an evaluation"),
    "on_validation_end": "after an evaluation",
    "on_save_checkpoint": "writing a checkpoint",
    "on_load_checkpoint": "loading a checkpoint",
    "on_train_end": "exporting the model",
}


class Watchdog(Callback):
    """Ends the process with exit code 70 and prints all stack traces if no hook has run for some time.

    Each rank watches itself: the messages together tell ranks that wait for input from those that wait for others. Time in
    which the process was suspended does not count.

    Args:
        limit: seconds without a hook; 0 disables the watchdog. Set it above the slowest start, checkpoint or evaluation,
            and below the 30 minutes after which NCCL and gloo time out.
    """

    def __init__(self, limit: float = 1200.0) -> None:
        self.limit = limit
        require(limit >= 0, "watchdog.limit", limit, "seconds, or 0 for no watchdog")
        self._end = threading.Event()

    def _record(self, hook: str, trainer: Trainer) -> None:
        self._activity, self._ticks = f"{_ACTIVITIES[hook]}, after step {trainer.global_step}", 0
        if hook == "setup" and self.limit:
            self._end.set()
            self._end = threading.Event()
            rank = f"rank {trainer.global_rank} of {trainer.world_size} on {socket.gethostname()}"
            threading.Thread(target=self._watch, args=(rank, self._end), daemon=True).start()

    def _watch(self, rank: str, end: threading.Event) -> None:
        while self._ticks <= _TICKS:
            if end.wait(self.limit / _TICKS):
                return
            self._ticks += 1
        print(
            f"watchdog: {rank} has not moved for {self.limit:g} s. Last activity: {self._activity}. Compare the "
            "messages of all ranks: a rank that waits for input, or has no message, blocks the others. This process ends. "
            "To resume, run the same command with --ckpt_path last. If the run was only slow, raise --watchdog.limit. "
            "Stacks of all threads:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(_EXIT)

    def teardown(self, *args: Any, **options: Any) -> None:
        self._end.set()

    on_exception = teardown


for _name in _ACTIVITIES:
    setattr(Watchdog, _name, lambda self, trainer, *_, hook=_name, **__: self._record(hook, trainer))

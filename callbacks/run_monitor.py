"""How fast the run goes, what it waits for, and what it skips. Loss, λ, scale and rates belong to the stage.

Figures are those of all ranks: ranks move in lock step, so the slowest one is the pace of all.
"""

import resource
import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.contrastive import planned_steps
from stair.batch import Batch

_COUNTED = ("skipped", "converted")  # of the data module, each a count by cause


def logs_now(trainer: L.Trainer, batch_idx: int) -> bool:
    """True in `on_train_batch_end` of the batches after which the loggers write: elsewhere a figure would be lost."""
    stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
    return stepped and trainer.log_every_n_steps > 0 and trainer.global_step % trainer.log_every_n_steps == 0


class StepProgress(TQDMProgressBar):
    """Lightning's bar, shown only on a terminal: in a log file each refresh would be a line."""

    def __init__(self) -> None:
        super().__init__()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Disables the bar outside of a terminal."""
        super().setup(trainer, pl_module, stage)
        if not sys.stderr.isatty():
            self.disable()


class RunMonitor(L.Callback):
    """Logs the pace of training at every `trainer.log_every_n_steps`, over the steps since the last time.

    - `run/pairs_per_second`: pairs of all ranks a second, without validation.
    - `run/seconds_per_step`, `run/seconds_waiting`: a step, and the part of it between the end of one step and the
      start of the next, on the slowest rank: input that is not ready (and checkpoints, when one was written).
    - `run/max_memory_gib`: greatest memory PyTorch has held on a CUDA device since the start, largest over ranks.
    - `run/skipped/<cause>`, `run/converted/<kind>`: samples skipped, and images that were CMYK, of 16 bits, turned by EXIF,
      ..., since the start, all ranks together. Of a mixture also `run/skipped/<source>/<cause>`.

    Where no progress bar is shown, each time is also a line in the log: step, loss, recall of the last validation, pace,
    greatest memory of the process (of the device, if it is CUDA), time left.
    """

    def __init__(self) -> None:
        self._pairs, self._steps, self._seconds, self._waiting = 0, 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock: the start of loaders counts as waiting."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock again."""
        self._last = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Takes the time since the last step's end."""
        self._waiting += time.perf_counter() - self._last

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Counts the step, and logs where it is time to."""
        now = time.perf_counter()
        self._seconds += now - self._last
        self._last = now
        self._steps += 1
        self._pairs += len(batch["pixels"])
        if logs_now(trainer, batch_idx):
            figures = self._figures(trainer, pl_module.device)
            pl_module.log_dict(figures, batch_size=1)
            self._pairs, self._steps, self._seconds, self._waiting = 0, 0, 0.0, 0.0
            if not getattr(trainer.progress_bar_callback, "is_enabled", False):
                rank_zero_info(_line(trainer, float(outputs["loss"]), figures))

    def _figures(self, trainer: L.Trainer, device: torch.device) -> dict[str, float]:
        mine = {
            "pairs": self._pairs,
            "seconds": self._seconds,
            "waiting": self._waiting / self._steps,
            "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
            **{what: dict(getattr(trainer.datamodule, what, {})) for what in _COUNTED},
        }
        ranks = [mine]
        if trainer.world_size > 1:
            # as objects: ranks meet different causes of skipping, and it is one exchange for everything
            ranks = [{} for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(ranks, mine)
        slowest = max(rank["seconds"] for rank in ranks)
        figures = {
            "run/pairs_per_second": sum(rank["pairs"] for rank in ranks) / slowest,
            "run/seconds_per_step": slowest / self._steps,
            "run/seconds_waiting": max(rank["waiting"] for rank in ranks),
        }
        if device.type == "cuda":
            figures["run/max_memory_gib"] = max(rank["memory"] for rank in ranks) / 2**30
        for what in _COUNTED:
            for cause in {cause for rank in ranks for cause in rank[what]}:
                figures[f"run/{what}/{cause}"] = float(sum(rank[what].get(cause, 0) for rank in ranks))
        return figures


def _line(trainer: L.Trainer, loss: float, figures: dict[str, float]) -> str:
    step, planned = trainer.global_step, planned_steps(trainer)
    left = timedelta(seconds=round((planned - step) * figures["run/seconds_per_step"]))
    memory = figures.get("run/max_memory_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    recall = trainer.callback_metrics.get("val/recall")
    return (
        f"step {step}/{planned} · loss {loss:.4f}"
        + (f" · val/recall {float(recall):.4f}" if recall is not None else "")
        + f" · {figures['run/pairs_per_second']:.0f} pairs/s · waiting {figures['run/seconds_waiting']:.2f} of "
        f"{figures['run/seconds_per_step']:.2f} s a step · {memory:.1f} GiB · {left} left"
    )

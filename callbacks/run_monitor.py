"""How fast a run goes, what it waits for, what it skips, and what each source of a mixture gives, over all ranks."""

import resource
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.contrastive import planned_steps
from stair.batch import Batch

_COUNTED = ("skipped", "converted")  # of the data module: counts by cause, and with `_by_source` by source


def logs_now(trainer: Trainer) -> bool:
    """Whether loggers write after this step, in `on_train_batch_end`. Elsewhere a figure would be lost."""
    return bool(trainer.log_every_n_steps and trainer.global_step % trainer.log_every_n_steps == 0)


def of_all_ranks(trainer: Trainer, value: Any) -> list[Any]:
    """A value of each rank, by rank. All ranks call it."""
    values = [value] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


class RunMonitor(Callback):
    """Logs pace, waiting, memory, skipped samples and the sources of a mixture at every `trainer.log_every_n_steps`.

    Figures are of the steps since the last time (docs/guides/training.md lists the tags). Without a progress bar, each time
    is also a line in the log.
    """

    def __init__(self) -> None:
        self._earlier: dict[str, int] = {}  # pairs by source before this start, of all ranks
        self._by_source: Counter[str] = Counter()  # since, of this rank
        self._pairs, self._steps, self._seconds, self._waiting = 0, 0, 0.0, 0.0

        self._is_first = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        trained = sum(each.numel() for each in parameters if each.requires_grad)
        rank_zero_info(
            f"{sum(each.numel() for each in parameters) / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
        )

    def on_train_start(self, *args: Any) -> None:
        self._last = time.perf_counter()

    on_validation_end = on_train_start

    def on_train_batch_start(self, *args: Any) -> None:
        self._waiting += time.perf_counter() - self._last

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._seconds, self._last = self._seconds + now - self._last, now
        self._steps, self._pairs = self._steps + 1, self._pairs + len(batch["pixels"])
        if _sources(trainer):
            self._by_source.update(batch["source"])
        if self._is_first and trainer.log_every_n_steps > 1 and not logs_now(trainer):
            first = f"first batch: loss {float(outputs['loss']):.4f}, {self._seconds:.1f} s"
            rank_zero_info(f"{first}; logging every {trainer.log_every_n_steps} steps")
        self._is_first = False
        if logs_now(trainer):
            figures = self._figures(trainer, pl_module.device, outputs, batch)
            pl_module.log_dict(figures, batch_size=1)
            self._pairs, self._steps, self._seconds, self._waiting = 0, 0, 0.0, 0.0
            if not getattr(trainer.progress_bar_callback, "is_enabled", False):
                rank_zero_info(_line(trainer, float(outputs["loss"]), figures))

    def _figures(self, trainer: Trainer, device: torch.device, outputs: Any, batch: Batch) -> dict[str, float]:
        data, sources = trainer.datamodule, _sources(trainer)
        counts = {f"run/{what}/{cause}": n for what in _COUNTED for cause, n in getattr(data, what, {}).items()}
        for name in sources:
            pairs = zip(batch["source"], outputs["pair_loss_B"].tolist(), strict=True)
            losses = [loss for source, loss in pairs if source == name]
            counts[f"source/{name}/loss"], counts[f"source/{name}/logged"] = sum(losses), len(losses)
            counts[f"source/{name}/pairs"] = self._by_source[name]
            counts |= {f"source/{name}/{what}": getattr(data, f"{what}_by_source").get(name, 0) for what in _COUNTED}
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        # as objects: ranks skip for different causes, and it is one exchange for everything
        mine = self._pairs, self._seconds, self._waiting, memory, counts
        by: Any = zip(*of_all_ranks(trainer, mine), strict=True)
        pairs, seconds, waiting, memories, by_rank = by
        figures = {
            "run/pairs_per_second": sum(pairs) / max(seconds),
            "run/seconds_per_step": max(seconds) / self._steps,
            "run/seconds_waiting": max(waiting) / self._steps,
            **{name: float(sum(rank.get(name, 0) for rank in by_rank)) for rank in by_rank for name in rank},
        }
        if device.type == "cuda":
            figures["run/max_memory_gib"] = max(memories) / 2**30
        for name in sources:
            figures[f"source/{name}/pairs"] += self._earlier.get(name, 0)
            loss, logged = figures.pop(f"source/{name}/loss"), figures.pop(f"source/{name}/logged")
            if logged:
                figures[f"source/{name}/loss"] = loss / logged
        return figures

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if _sources(trainer):
            checkpoint["source_pairs"] = dict(sum(of_all_ranks(trainer, self._by_source), Counter(self._earlier)))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._earlier = checkpoint.get("source_pairs", {})


def _sources(trainer: Trainer) -> list[str]:
    """Names of the sources of a mixture; empty for one source."""
    return list(getattr(trainer.datamodule, "source_names", []))


def _line(trainer: Trainer, loss: float, figures: dict[str, float]) -> str:
    step, planned = trainer.global_step, planned_steps(trainer)
    left = timedelta(seconds=round((planned - step) * figures["run/seconds_per_step"]))
    memory = figures.get("run/max_memory_gib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    recall = trainer.callback_metrics.get("val/recall")
    return (
        f"step {step}/{planned} · loss {loss:.4f}"
        + (f" · val/recall {float(recall):.4f}" if recall is not None else "")
        + f" · {figures['run/pairs_per_second']:.0f} pairs/s · {figures['run/seconds_per_step']:.2f} s/step "
        f"({figures['run/seconds_waiting']:.2f} waiting for data) · {memory:.1f} GiB · {left} left"
    )

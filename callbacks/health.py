"""Alarms: a run that cannot recover stops with the reason, one that is going wrong logs a warning.

Where the limits come from: in the project's first runs a dead model (one side's embeddings empty, loss at log N, no
gradient) never came back; first batches whose logits had standard deviation 3.3 and 121 ended there, those of 2.2 and less
trained.

B pairs on this rank, V terms.
"""

import math
import time
from collections import deque
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.run_monitor import logs_now
from callbacks.sparsity_monitor import words_of
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.run_folder import save_last
from lightning_modules.stage import StairStage
from stair.batch import Batch
from stair.errors import TrainingError, check_settings
from stair.plain import one_line

_NEAR_CHANCE = 0.01
_WIDE_LOGITS = 3.0
_DENSE = 0.5
_KEYS_SHOWN = 20
_SLOW_BF16 = 2.0


class _Step(NamedTuple):
    """A training step on this rank: what of it is finite, whether the embeddings of each pair are, number and keys."""

    finite: Tensor  # loss and gradient
    loss_finite: Tensor
    sound_B: Tensor
    number: int
    keys: list[str]

    def culprits(self) -> list[str]:
        """Keys of the pairs whose embeddings are not finite; of all where none is to blame."""
        return [key for key, sound in zip(self.keys, self.sound_B.tolist(), strict=True) if not sound] or self.keys


def _shown(keys: list[str], most: int) -> str:
    return one_line(", ".join(keys[:most])) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _weights_finite(trainer: L.Trainer) -> bool:
    """On all ranks."""
    weights = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.lightning_module.parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights]).all()
    return bool(trainer.strategy.reduce(finite.float(), reduce_op="min"))


def bf16_cost() -> float:
    """Time of a matrix product in bf16 on this CPU, in units of that in fp32: above 30 where it has no instructions."""

    def seconds(dtype: torch.dtype) -> float:
        square, times = torch.ones(256, 256, dtype=dtype), []
        for _ in range(3):  # the first also sets up
            started = time.perf_counter()
            square @ square
            times.append(time.perf_counter() - started)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)


class Health(L.Callback):
    """Watches the training steps.

    - Loss or gradient not finite: warns with the batch's keys. Such a step is skipped (counted by `health/skipped_steps`);
      after more than `skip` in a row the run stops, and saves the state from before them if the weights are finite.
    - Weights not finite: no checkpoint is written, the last one stays, and the run stops.
    - Dead, `patience` steps in a row (contrastive loss within 0.01 of log N, and on either side less than one active term
      an embedding): stops.
    - At chance, `patience` steps in a row (the same loss, though terms are active): warns once; `health/alarm`, logged at
      every `trainer.log_every_n_steps`, is 1 for as long.
    - Logits of a sparse model's first batch with a standard deviation above 3: warns, but not of cosines at a kept scale.
    - Dense (more than half of V active on either side, after `dense_after` steps): warns once, `health/alarm` is 1 for as
      long.
    - bf16-mixed on a CPU that takes more than twice as long for it as for fp32: warns, also where nothing is trained.

    The figures stay on the device and are read, over all ranks, every few steps: reading each step would make the host
    wait, and all ranks must come to the same decision or the others hang.

    Args:
        patience: steps in a row that a dead run is given; at least 1.
        dense_after: optimiser steps after which embeddings should have become sparse; at least 0.
        every: steps between two readings; a stop comes at most that much late. At least 1.
        skip: steps in a row whose loss or gradient may be not finite; 0 stops at the first.

    Raises:
        SettingError: if an argument is out of range.
    """

    def __init__(self, patience: int = 50, dense_after: int = 500, every: int = 10, skip: int = 5) -> None:
        self.patience, self.dense_after, self.every, self.skip = patience, dense_after, every, skip
        valid = {"patience": patience >= 1, "every": every >= 1, "dense_after": dense_after >= 0, "skip": skip >= 0}
        check_settings("health", self, valid, "patience and every of at least 1, dense_after and skip of at least 0")
        self._warned_dense = self._warned_chance = False
        self._skipped: Tensor | int = 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run continues to count."""
        return {"skipped_steps": int(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues to count."""
        self._skipped = state_dict["skipped_steps"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares bf16 with fp32, where a CPU computes in it."""
        in_bf16 = trainer.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu"
        if in_bf16 and (cost := bf16_cost()) > _SLOW_BF16:
            rank_zero_warn(
                f"trainer.precision is bf16-mixed, and this CPU takes {cost:.0f} times as long for a product in bf16 "
                "as in fp32: give --trainer.precision 32-true"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew; a resumed run's first batch is not the first batch of the run."""
        self._first_batch = trainer.global_step == 0
        zero = torch.zeros((), device=pl_module.device)
        self._dead_steps = self._chance_steps = self._broken_steps = zero  # in a row
        self._most_broken = zero  # in a row, since the last reading
        self._share = zero  # of V, active in the last step; 0 for dense models
        self._skipped = zero + self._skipped
        self._alarm = 0.0
        self._recent: deque[_Step] = deque()  # since the last reading

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Any], batch: Batch, batch_idx: int
    ) -> None:
        """Notes the step, and reads what was noted where it is time to.

        Raises:
            TrainingError: if too many steps in a row were not finite, or the run is dead.
        """
        loss_finite = outputs["loss"].detach().isfinite()
        finite = loss_finite & (not (isinstance(pl_module, ContrastiveModule) and pl_module.skipped))
        sound_B = (outputs["image_BV"].sum(1) + outputs["text_CV"].sum(1)).isfinite()
        self._recent.append(_Step(finite, loss_finite, sound_B, trainer.global_step, batch["key"]))
        self._skipped = self._skipped + ~finite
        self._broken_steps = (self._broken_steps + 1) * ~finite
        self._most_broken = torch.maximum(self._most_broken, self._broken_steps)
        sparse = words_of(pl_module, outputs["image_BV"]) is not None
        active = torch.stack([outputs[side].count_nonzero() / len(outputs[side]) for side in ("image_BV", "text_CV")])
        at_chance = (outputs["contrastive"] - math.log(outputs["pairs"])).abs() < _NEAR_CHANCE
        self._dead_steps = (self._dead_steps + 1) * (at_chance & (active < 1).any())
        self._chance_steps = (self._chance_steps + 1) * at_chance
        if self._first_batch:
            self._first_batch = False
            if sparse:  # dense models train from wider ones
                self._warn_of_wide_logits(pl_module, float(outputs["logit_std"]))
        if sparse:
            full = outputs.get("text_full", outputs["text_CV"])  # under a soft mask it can be dense unseen
            self._share = torch.maximum(active.max(), full.count_nonzero() / len(full)) / full.shape[1]
        if len(self._recent) == self.every:
            self._read(trainer)
        if logs_now(trainer, batch_idx):
            pl_module.log_dict({"health/alarm": self._alarm, "health/skipped_steps": self._skipped}, batch_size=1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the last steps too: a broken run must not be exported."""
        if self._recent:
            self._read(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prevents that a checkpoint of broken weights replaces a sound one.

        Raises:
            TrainingError: if a weight is not finite.
        """
        if not _weights_finite(trainer):
            raise TrainingError(
                f"weights are not finite at step {trainer.global_step}, so no checkpoint is written, the last one stays: "
                "start from it (--ckpt_path last) with a lower optimizer.lr, or a lower trainer.gradient_clip_val"
            )

    def _read(self, trainer: L.Trainer) -> None:
        # the greatest over ranks: one broken rank breaks the run, but all must be dead
        figures = torch.stack([self._most_broken, -self._dead_steps, self._share, -self._chance_steps])
        broken, dead, share, chance = trainer.strategy.reduce(figures, reduce_op="max").tolist()
        step = trainer.global_step
        if broken:
            self._most_broken = torch.zeros_like(self._most_broken)
            self._handle_broken(trainer, round(broken))
        if -dead >= self.patience:
            raise TrainingError(
                "the run is dead: every embedding is empty on at least one side and the loss has been log N for "
                f"{-dead:.0f} steps, up to step {step}. Start again with a lower objective.flops_image "
                "and objective.flops_text, or a longer objective.flops_ramp_steps; if it died within the first steps, set "
                "objective.scale_start to 'measure'"
            )
        dense, at_chance = share > _DENSE and step > self.dense_after, -chance >= self.patience
        self._alarm = float(dense or at_chance)
        if at_chance and not self._warned_chance:
            self._warned_chance = True
            sparse = isinstance(trainer.lightning_module, StairStage)
            rank_zero_warn(
                f"the loss has been log N for {-chance:.0f} steps, up to step {step}: all images, or all texts, have the "
                "same embedding, and the run has learned nothing it could use. Start again with "
                + (
                    "a lower objective.flops_image and objective.flops_text or a longer objective.flops_ramp_steps; in "
                    "stages 2 and 3 check first whether the stage before learned enough"
                    if sparse
                    else "a lower optimizer.lr or a longer optimizer.warmup_steps"
                )
            )
        if dense and not self._warned_dense:
            self._warned_dense = True
            rank_zero_warn(
                f"at step {step}, {share:.0%} of the vocabulary is active in a mean embedding: the model is dense, slow to "
                "search and not readable. Raise objective.flops_image or objective.flops_text"
            )
        self._recent.clear()

    def _handle_broken(self, trainer: L.Trainer, steps: int) -> None:
        what = self._what_broke(trainer)
        if steps <= self.skip:
            rank_zero_warn(f"{what}. Such steps are left out; more than health.skip={self.skip} on end stop the run")
            return
        saved = "the weights are not finite either: go on from the last checkpoint"
        if _weights_finite(trainer):
            saved = f"the state without these steps is saved in {save_last(trainer)}"
        raise TrainingError(
            f"{what}, and {steps} steps on end were so; {saved}. Look at these samples, lower optimizer.lr, or set "
            "trainer.precision to bf16-mixed if it is 16-mixed; then give the same command with --ckpt_path last"
        )

    def _what_broke(self, trainer: L.Trainer) -> str:
        first = next((step for step in self._recent if not step.finite), None)
        mine = first and (first.number, bool(first.sound_B.all()), first.culprits(), bool(first.loss_finite))
        ranks = [mine]
        if trainer.world_size > 1:
            # every rank names the batch: launchers end the others, and their messages, when the first one stops
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        # of the ranks with the first such step, one whose own embeddings are broken: loss and gradient are of all ranks
        (step, _, keys, loss_finite), rank = min((found, rank) for rank, found in enumerate(ranks) if found is not None)
        if not loss_finite:
            return f"the loss is not finite at step {step}; the batch of rank {rank} was {_shown(keys, _KEYS_SHOWN)}"
        each = max(1, _KEYS_SHOWN // len(ranks))
        batches = (f"of rank {rank} {_shown(found[2], each)}" for rank, found in enumerate(ranks) if found is not None)
        return f"the gradient is not finite at step {step}, though the loss is; the batch was {'; '.join(batches)}"

    def _warn_of_wide_logits(self, pl_module: L.LightningModule, spread: float) -> None:
        if spread <= _WIDE_LOGITS:
            return
        if not isinstance(pl_module, StairStage) or pl_module.objective.scale_start != "keep":
            advice = (
                f"wanted 0.3 to 1.5: above {_WIDE_LOGITS:.0f} training from scratch collapses. Set "
                "objective.scale_start to 'measure', which takes the scale from the first batch"
            )
        elif pl_module.stair.similarity == "dot":
            advice = (
                "and texts may come over dense from the stage before. Where recall does not come back within 100 steps, "
                "give all stages a higher stair.in_caption_margin"
            )
        else:  # a learned scale of directions is wide as it should be
            return
        rank_zero_warn(f"the first batch's logits spread by {spread:.1f}, {advice}")

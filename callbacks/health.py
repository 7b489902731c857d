"""Alarms: a run that cannot recover stops with the reason, one that is going wrong says so.

Where the limits come from: in the project's first runs a dead model (one side's embeddings empty, loss at log N, no
gradient) never came back; first batches whose logits spread by 3.3 and 121 ended there, those of 2.2 and less trained.

B pairs on this rank, V words.
"""

import math
from collections import deque
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from callbacks.run_monitor import logs_now
from callbacks.sparsity_monitor import words_of
from stair.batch import Batch

_NEAR_CHANCE = 0.01
_WIDE_LOGITS = 3.0
_DENSE = 0.5
_KEYS_SHOWN = 20


class Health(L.Callback):
    """Watches the training steps.

    - The loss is not finite: stops, naming the step and the batch's keys.
    - Dead, `patience` steps on end (contrastive loss within 0.01 of log N, and on either side less than one active
      word an embedding): stops.
    - At chance, `patience` steps on end (contrastive loss within 0.01 of log N, though words are active): warns once, and
      `health/alarm`, logged at every `trainer.log_every_n_steps`, is 1 for as long.
    - The first batch's scaled logits of a model of words spread by more than 3 (standard deviation): warns.
    - Dense (more than half of V active on either side, after `dense_after` steps): warns once, and
      `health/alarm` is 1 for as long; otherwise it is 0.

    The figures wait on the device and are read, over all ranks, every few steps: reading each step would make the host
    wait for the device, and all ranks must come to the same decision or the others hang.

    Args:
        patience: steps on end that a dead run is given; at least 1.
        dense_after: optimiser steps after which embeddings should have become sparse; at least 0.
        every: steps between two readings; a stop comes at most that much late. At least 1.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, patience: int = 50, dense_after: int = 500, every: int = 10) -> None:
        if min(patience, every) < 1 or dense_after < 0:
            raise ValueError(
                f"patience={patience}, dense_after={dense_after}, every={every}: wanted patience and every of at "
                "least 1, dense_after of at least 0"
            )
        self.patience, self.dense_after, self.every = patience, dense_after, every
        self._warned_dense = self._warned_chance = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew; a resumed run's first batch is not the first batch of the run."""
        self._first_batch = trainer.global_step == 0
        self._dead_steps = torch.zeros((), device=pl_module.device)
        self._chance_steps = torch.zeros((), device=pl_module.device)
        self._share = torch.zeros((), device=pl_module.device)  # of V, active in the last step; 0 for dense models
        self._alarm = 0.0
        #: since the last reading: finite or not, the step, the batch's keys
        self._recent: deque[tuple[Tensor, int, list[str]]] = deque()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Any],
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Notes the step, and reads what was noted where it is time to.

        Raises:
            RuntimeError: if the loss is not finite, or the run is dead.
        """
        self._recent.append((outputs["loss"].detach().isfinite(), trainer.global_step, batch["key"]))
        words = words_of(pl_module, outputs["image_BV"]) is not None
        active = torch.stack([outputs[side].count_nonzero() / len(outputs[side]) for side in ("image_BV", "text_CV")])
        at_chance = (outputs["contrastive"] - math.log(outputs["pairs"])).abs() < _NEAR_CHANCE
        self._dead_steps = (self._dead_steps + 1) * (at_chance & (active < 1).any())
        self._chance_steps = (self._chance_steps + 1) * at_chance
        if self._first_batch:
            self._first_batch = False
            if words:  # dense models train from wider ones
                self._warn_of_wide_logits(float(outputs["logit_std"]))
        if words:
            self._share = active.max() / outputs["image_BV"].shape[1]
        if len(self._recent) == self.every:
            self._read(trainer)
        if logs_now(trainer, batch_idx):
            pl_module.log("health/alarm", self._alarm, batch_size=1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the last steps too: a broken run must not be handed over."""
        if self._recent:
            self._read(trainer)

    def _read(self, trainer: L.Trainer) -> None:
        broken = ~torch.stack([finite for finite, _, _ in self._recent]).all()
        # the greatest over ranks: one broken rank breaks the run, but all must be dead
        figures = torch.stack([broken.float(), -self._dead_steps, self._share, -self._chance_steps])
        figures = trainer.strategy.reduce(figures, reduce_op="max")
        anywhere_broken, dead_steps, greatest_share, chance_steps = figures.tolist()
        if anywhere_broken:
            raise RuntimeError(self._what_broke(trainer))
        if -dead_steps >= self.patience:
            raise RuntimeError(
                "the run is dead: every embedding is empty on at least one side and the loss has been log N for "
                f"{-dead_steps:.0f} steps, up to step {trainer.global_step}. There is no gradient to come back by: start "
                "again with a lower objective.flops_image and objective.flops_text, or a longer "
                "objective.flops_ramp_steps; if it died "
                "within the first steps, set objective.scale_start to 'measure'"
            )
        dense = greatest_share > _DENSE and trainer.global_step > self.dense_after
        at_chance = -chance_steps >= self.patience
        self._alarm = float(dense or at_chance)
        if at_chance and not self._warned_chance:
            self._warned_chance = True
            rank_zero_warn(
                f"the loss has been log N for {-chance_steps:.0f} steps, up to step {trainer.global_step}: all images, or "
                "all texts, say the same, and the run has learned nothing it could use. Start again with a lower "
                "objective.flops_image and objective.flops_text or a longer objective.flops_ramp_steps; in stages 2 "
                "and 3 look first at whether the stage before learned enough"
            )
        if dense and not self._warned_dense:
            self._warned_dense = True
            rank_zero_warn(
                f"at step {trainer.global_step}, {greatest_share:.0%} of the vocabulary is active in a mean embedding: the "
                "model is dense, slow to search and not readable. Raise objective.flops_image or objective.flops_text"
            )
        self._recent.clear()

    def _what_broke(self, trainer: L.Trainer) -> str:
        mine = next(((step, keys) for finite, step, keys in self._recent if not finite), None)
        ranks = [mine]
        if trainer.world_size > 1:
            # every rank names the batch: launchers end the others, and their messages, when the first one stops
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        step, rank, keys = min((found[0], rank, found[1]) for rank, found in enumerate(ranks) if found is not None)
        more = f" and {len(keys) - _KEYS_SHOWN} more" if len(keys) > _KEYS_SHOWN else ""
        return (
            f"the loss is not finite at step {step}; the batch of rank {rank} was {', '.join(keys[:_KEYS_SHOWN])}{more}. "
            "Look at these samples, lower the learning rate, or set trainer.precision to bf16-mixed if it is 16-mixed"
        )

    def _warn_of_wide_logits(self, spread: float) -> None:
        if spread > _WIDE_LOGITS:
            rank_zero_warn(
                f"the first batch's logits spread by {spread:.1f}, wanted 0.3 to 1.5: above {_WIDE_LOGITS:.0f} runs "
                "collapse. Set objective.scale_start to 'measure', which takes the scale from the first batch; at the "
                "start of stage 2 it means that texts are almost dense: give stage 1 a higher objective.flops_text"
            )

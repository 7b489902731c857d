"""Alarms: a run that cannot recover stops with the reason, one that is going wrong says so.

Where the limits come from: in the project's first runs a dead model (one side's embeddings empty, loss at log N, no
gradient) never came back; first batches whose logits spread by 3.3 and 121 ended there, those of 2.2 and less trained.

B pairs on this rank, V words.
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
from stair.errors import TrainingError
from stair.plain import one_line

_NEAR_CHANCE = 0.01
_WIDE_LOGITS = 3.0
_DENSE = 0.5
_KEYS_SHOWN = 20
_SLOW_BF16 = 2.0


class _Step(NamedTuple):
    """A training step on this rank: what of it is finite, and the embeddings of each pair; its number and keys."""

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


def _sound(trainer: L.Trainer) -> bool:
    """Whether the weights are finite, on all ranks."""
    weights = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.lightning_module.parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights]).all()
    return bool(trainer.strategy.reduce(finite.float(), reduce_op="min"))


def bf16_cost() -> float:
    """How many times as long as in fp32 this CPU takes for a product of two matrices in bf16: 30 times and more have been
    seen where it has no instructions for it."""
    seconds = []
    for kind in (torch.bfloat16, torch.float32):
        square = torch.ones(256, 256, dtype=kind)
        best = math.inf
        for _ in range(3):  # the first also sets up
            started = time.perf_counter()
            square @ square
            best = min(best, time.perf_counter() - started)
        seconds.append(best)
    return seconds[0] / seconds[1]


class Health(L.Callback):
    """Watches the training steps.

    - The loss or the gradient is not finite: warns, naming the step and the batch's keys. The stages leave such a step
      out (`health/left_out` counts them since the run began); after more than `skip` of them on end the run stops, and
      saves the state from before them if the weights are sound.
    - The weights are not finite: no checkpoint is written, the last one stays, and the run stops.
    - Dead, `patience` steps on end (contrastive loss within 0.01 of log N, and on either side less than one active
      word an embedding): stops.
    - At chance, `patience` steps on end (contrastive loss within 0.01 of log N, though words are active): warns once, and
      `health/alarm`, logged at every `trainer.log_every_n_steps`, is 1 for as long.
    - The first batch's scaled logits of a model of words spread by more than 3 (standard deviation): warns, but where
      they are cosines at a scale that was learned before.
    - Dense (more than half of V active on either side, after `dense_after` steps): warns once, and
      `health/alarm` is 1 for as long; otherwise it is 0.
    - In bf16-mixed on a CPU that takes more than twice as long for it as for fp32: warns, also where nothing is trained.

    The figures wait on the device and are read, over all ranks, every few steps: reading each step would make the host
    wait for the device, and all ranks must come to the same decision or the others hang.

    Args:
        patience: steps on end that a dead run is given; at least 1.
        dense_after: optimiser steps after which embeddings should have become sparse; at least 0.
        every: steps between two readings; a stop comes at most that much late. At least 1.
        skip: steps on end whose loss or gradient may be not finite; 0 stops at the first.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, patience: int = 50, dense_after: int = 500, every: int = 10, skip: int = 5) -> None:
        if min(patience, every) < 1 or min(dense_after, skip) < 0:
            raise ValueError(
                f"patience={patience}, dense_after={dense_after}, every={every}, skip={skip}: wanted patience and every of "
                "at least 1, dense_after and skip of at least 0"
            )
        self.patience, self.dense_after, self.every, self.skip = patience, dense_after, every, skip
        self._warned_dense = self._warned_chance = False
        self._left_out: Tensor | int = 0

    def state_dict(self) -> dict[str, int]:
        """What a resumed run goes on counting."""
        return {"left_out": int(self._left_out)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on from there."""
        self._left_out = state_dict["left_out"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Compares bf16 with fp32, if it is asked of a CPU."""
        if trainer.precision != "bf16-mixed" or trainer.strategy.root_device.type != "cpu":
            return
        if (cost := bf16_cost()) > _SLOW_BF16:
            rank_zero_warn(
                f"trainer.precision is bf16-mixed, and this CPU takes {cost:.0f} times as long for a product in bf16 "
                "as in fp32: give --trainer.precision 32-true"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew; a resumed run's first batch is not the first batch of the run."""
        self._first_batch = trainer.global_step == 0
        self._remedy = (
            "a lower objective.flops_image and objective.flops_text or a longer objective.flops_ramp_steps; in stages 2 "
            "and 3 look first at whether the stage before learned enough"
            if isinstance(pl_module, StairStage)
            else "a lower optimizer.lr or a longer optimizer.warmup_steps"
        )
        self._dead_steps = torch.zeros((), device=pl_module.device)
        self._chance_steps = torch.zeros((), device=pl_module.device)
        self._share = torch.zeros((), device=pl_module.device)  # of V, active in the last step; 0 for dense models
        self._alarm = 0.0
        self._broken_steps = torch.zeros((), device=pl_module.device)  # on end
        self._most_broken = torch.zeros((), device=pl_module.device)  # of these, since the last reading
        self._left_out = torch.tensor(float(self._left_out), device=pl_module.device)  # in all
        #: since the last reading
        self._recent: deque[_Step] = deque()

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
            TrainingError: if too many steps on end were not finite, or the run is dead.
        """
        loss_finite = outputs["loss"].detach().isfinite()
        finite = loss_finite & (not (isinstance(pl_module, ContrastiveModule) and pl_module.left_out))
        sound_B = (outputs["image_BV"].sum(1) + outputs["text_CV"].sum(1)).isfinite()
        self._recent.append(_Step(finite, loss_finite, sound_B, trainer.global_step, batch["key"]))
        self._left_out = self._left_out + ~finite
        self._broken_steps = (self._broken_steps + 1) * ~finite
        self._most_broken = torch.maximum(self._most_broken, self._broken_steps)
        words = words_of(pl_module, outputs["image_BV"]) is not None
        active = torch.stack([outputs[side].count_nonzero() / len(outputs[side]) for side in ("image_BV", "text_CV")])
        at_chance = (outputs["contrastive"] - math.log(outputs["pairs"])).abs() < _NEAR_CHANCE
        self._dead_steps = (self._dead_steps + 1) * (at_chance & (active < 1).any())
        self._chance_steps = (self._chance_steps + 1) * at_chance
        if self._first_batch:
            self._first_batch = False
            if words:  # dense models train from wider ones
                self._warn_of_wide_logits(pl_module, float(outputs["logit_std"]))
        if words:
            whole = outputs.get("text_full", outputs["text_CV"])  # under a soft mask it can be dense unseen
            self._share = torch.maximum(active.max(), whole.count_nonzero() / len(whole)) / whole.shape[1]
        if len(self._recent) == self.every:
            self._read(trainer)
        if logs_now(trainer, batch_idx):
            pl_module.log_dict({"health/alarm": self._alarm, "health/left_out": self._left_out}, batch_size=1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reads the last steps too: a broken run must not be handed over."""
        if self._recent:
            self._read(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sees that no checkpoint of broken weights takes the place of a sound one.

        Raises:
            TrainingError: if a weight is not finite.
        """
        if not _sound(trainer):
            raise TrainingError(
                f"weights are not finite at step {trainer.global_step}, so no checkpoint is written, the last one stays: "
                "start from it (--ckpt_path last) with a lower optimizer.lr, or a lower trainer.gradient_clip_val"
            )

    def _read(self, trainer: L.Trainer) -> None:
        # the greatest over ranks: one broken rank breaks the run, but all must be dead
        figures = torch.stack([self._most_broken, -self._dead_steps, self._share, -self._chance_steps])
        figures = trainer.strategy.reduce(figures, reduce_op="max")
        broken_steps, dead_steps, greatest_share, chance_steps = figures.tolist()
        if broken_steps:
            self._most_broken = torch.zeros_like(self._most_broken)
            self._judge_broken(trainer, round(broken_steps))
        if -dead_steps >= self.patience:
            raise TrainingError(
                "the run is dead: every embedding is empty on at least one side and the loss has been log N for "
                f"{-dead_steps:.0f} steps, up to step {trainer.global_step}. It does not come back by itself: start "
                "again with a lower objective.flops_image and objective.flops_text, or a longer "
                "objective.flops_ramp_steps; if it died within the first steps, set objective.scale_start to 'measure'"
            )
        dense = greatest_share > _DENSE and trainer.global_step > self.dense_after
        at_chance = -chance_steps >= self.patience
        self._alarm = float(dense or at_chance)
        if at_chance and not self._warned_chance:
            self._warned_chance = True
            rank_zero_warn(
                f"the loss has been log N for {-chance_steps:.0f} steps, up to step {trainer.global_step}: all images, or "
                f"all texts, say the same, and the run has learned nothing it could use. Start again with {self._remedy}"
            )
        if dense and not self._warned_dense:
            self._warned_dense = True
            rank_zero_warn(
                f"at step {trainer.global_step}, {greatest_share:.0%} of the vocabulary is active in a mean embedding: the "
                "model is dense, slow to search and not readable. Raise objective.flops_image or objective.flops_text"
            )
        self._recent.clear()

    def _judge_broken(self, trainer: L.Trainer, steps: int) -> None:
        what = self._what_broke(trainer)
        if steps <= self.skip:
            rank_zero_warn(f"{what}. Such steps are left out; more than health.skip={self.skip} on end stop the run")
            return
        saved = "the weights are not finite either: go on from the last checkpoint"
        if _sound(trainer):
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
        # of ranks that saw it first, one whose own embeddings are broken: loss and gradient are those of all ranks
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
            rank_zero_warn(
                f"the first batch's logits spread by {spread:.1f}, wanted 0.3 to 1.5: above {_WIDE_LOGITS:.0f} training "
                "from scratch collapses. Set objective.scale_start to 'measure', which takes the scale from the first batch"
            )
        elif pl_module.stair.similarity == "dot":  # a learned scale of directions is wide as it should be
            rank_zero_warn(
                f"the first batch's logits spread by {spread:.1f}: texts may come over dense from the stage before. Where "
                "recall does not come back within 100 steps, give all stages a higher stair.own_word_lead"
            )

"""Alarms: a run that cannot recover stops with the reason, one that is going wrong logs a warning.

The limits are measured: models whose embeddings were empty on one side at loss log N never recovered. First batches whose
logits had standard deviation 3.3 and more ended there; those of 2.2 and less trained.

B pairs on this rank, V terms.
"""

import math
import timeit
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from callbacks.run_monitor import logs_now, of_all_ranks
from callbacks.sparsity_monitor import vocabulary_of
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.run_folder import save_last
from lightning_modules.stage import StairStage
from stair.batch import Batch
from stair.errors import TrainingError, require
from stair.plain import counted, one_line

_NEAR_CHANCE, _WIDE_LOGITS, _DENSE, _KEYS_SHOWN, _SLOW_BF16 = 0.01, 3.0, 0.5, 20, 2.0
_SPARSER = "a lower objective.flops_image and objective.flops_text, or a longer objective.flops_ramp_steps"
# `{}`: steps in a row, this step, share of the vocabulary, advice
_DEAD = (
    "the run is dead: every embedding is empty on at least one side and the loss has been log N for {0} steps, up to step "
    "{1}. Start again with {3}. If it died in the first steps, set objective.scale_start to 'measure'"
)
_WARNINGS = {
    "chance": "the loss has been log N for {0} steps, up to step {1}: all images, or all texts, have the same embedding. "
    "Check whether the stage before learned enough, or start again with {3}",
    "dense": "at step {1}, {2:.0%} of the vocabulary is active in a mean embedding: the model is dense, slow to search and "
    "not readable. Raise objective.flops_image or objective.flops_text",
}


class _Step(NamedTuple):
    """A step of this rank that is not read yet."""

    number: int
    figures: Tensor  # (4,) fp32: skipped, not dead, not at chance, share of V that is active; largest over ranks counts
    loss_finite: Tensor
    finite_B: Tensor  # the embeddings of each pair
    keys: list[str]


def bf16_cost() -> float:
    """Time of a matrix product in bf16 on this CPU, in units of that in fp32: above 30 without instructions for it."""
    # not torch.utils.benchmark: importing it looks for CUDA, and ddp_fork refuses a process that has done so
    squares = [{"x": torch.ones(256, 256, dtype=dtype)} for dtype in (torch.bfloat16, torch.float32)]
    bf16, fp32 = (min(timeit.repeat("x @ x", globals=x, number=1, repeat=3)) for x in squares)  # the first sets up
    return bf16 / fp32


class Health(Callback):
    """Stops or warns if training diverges, collapses or stays dense.

    - Loss or gradient not finite: warns with the batch's keys. The stages skip such a step; after more than `skip` in a row
      the run stops, and saves the state from before them. Weights not finite: no checkpoint is written, the run stops.
    - Dead (contrastive loss within 0.01 of log N, and on either side less than one active term an embedding) for
      `patience` steps in a row: stops. At chance (the same loss, though terms are active): warns once.
    - Dense (more than half of V active on either side, after `dense_after` steps): warns once.
    - First logits of a sparse model too wide, or bf16-mixed on a CPU that is slow at it: warns.

    `health/alarm` is 1 while the model is at chance or dense. Figures stay on the device and are read every few steps, over
    all ranks: all must come to the same decision, and the host must not wait for each step.

    Args:
        patience: consecutive steps with empty embeddings on one side and a loss of log N, after which the run stops; at
            least 1.
        dense_after: optimizer steps after which embeddings should be sparse; at least 0.
        every: steps between two checks, at least 1. A stop is delayed by at most this many steps.
        skip: allowed consecutive steps with a non-finite loss or gradient; 0 stops at the first.
    """

    def __init__(self, patience: int = 50, dense_after: int = 500, every: int = 10, skip: int = 5) -> None:
        self.patience, self.dense_after, self.every, self.skip = patience, dense_after, every, skip
        for name, least in (("patience", 1), ("dense_after", 0), ("every", 1), ("skip", 0)):
            require(getattr(self, name) >= least, f"health.{name}", getattr(self, name), f"at least {least}")
        self._warned: set[str] = set()
        self._skipped: Tensor | int = 0  # since the start of the run

    def state_dict(self) -> dict[str, int]:
        return {"skipped_steps": int(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._skipped = state_dict["skipped_steps"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        in_bf16 = trainer.precision == "bf16-mixed" and trainer.strategy.root_device.type == "cpu"
        if in_bf16 and (cost := bf16_cost()) > _SLOW_BF16:
            rank_zero_warn(
                f"trainer.precision is bf16-mixed, and this CPU takes {cost:.0f} times as long for a product in bf16 "
                "as in fp32: give --trainer.precision 32-true"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_batch = trainer.global_step == 0
        self._in_a_row = dict.fromkeys(("skipped", "dead", "chance"), 0)
        self._skipped = torch.zeros((), device=pl_module.device) + self._skipped
        self._alarm = 0.0
        self._steps: list[_Step] = []  # since the last reading

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Any], batch: Batch, batch_idx: int
    ) -> None:
        """Notes the step, and reads those since the last reading when it is time; TrainingError if the run must stop."""
        images, texts = outputs["image_BV"], outputs["text_CV"]
        loss_finite = outputs["loss"].detach().isfinite()
        skipped = ~loss_finite | (isinstance(pl_module, ContrastiveModule) and pl_module.skipped)
        active = torch.stack([side.count_nonzero() / len(side) for side in (images, texts)])
        at_chance = (outputs["contrastive"] - math.log(outputs["pairs"])).abs() < _NEAR_CHANCE
        share = torch.zeros_like(active[0])
        if vocabulary_of(pl_module, images) is not None:
            full = outputs.get("text_full", texts)  # under a soft mask it can be dense unseen
            share = torch.maximum(active.max(), full.count_nonzero() / len(full)) / full.shape[1]
            if self._first_batch:
                self.check_first_logits(pl_module, float(outputs["logit_std"]))
        self._first_batch = False
        figures = torch.stack([skipped.float(), ~(at_chance & (active < 1).any()), ~at_chance, share])
        finite_B = (images.sum(1) + texts.sum(1)).isfinite()
        self._steps.append(_Step(trainer.global_step, figures, loss_finite, finite_B, batch["key"]))
        self._skipped = self._skipped + skipped
        if len(self._steps) == self.every:
            self.on_train_epoch_end(trainer, pl_module)
        if logs_now(trainer):
            pl_module.log_dict({"health/alarm": self._alarm, "health/skipped_steps": self._skipped}, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the steps since the last reading."""
        if not self._steps:
            return
        steps, self._steps = self._steps, []
        rows = trainer.strategy.reduce(torch.stack([step.figures for step in steps]), reduce_op="max").tolist()
        most_skipped = 0
        for skipped, alive, learning, _ in rows:
            for kind, is_so in (("skipped", skipped), ("dead", not alive), ("chance", not learning)):
                self._in_a_row[kind] = (self._in_a_row[kind] + 1) * bool(is_so)
            most_skipped = max(most_skipped, self._in_a_row["skipped"])
        if most_skipped:
            self._handle_skipped(trainer, steps, most_skipped)
        step, share = trainer.global_step, rows[-1][3]
        advice = _SPARSER if isinstance(pl_module, StairStage) else "a lower optimizer.lr or a longer warm-up"
        if self._in_a_row["dead"] >= self.patience:
            raise TrainingError(_DEAD.format(self._in_a_row["dead"], step, share, _SPARSER))
        at_chance, dense = self._in_a_row["chance"] >= self.patience, share > _DENSE and step > self.dense_after
        alarms = {"chance": at_chance, "dense": dense}
        self._alarm = float(any(alarms.values()))
        for kind in (kind for kind, is_so in alarms.items() if is_so and kind not in self._warned):
            self._warned.add(kind)
            rank_zero_warn(_WARNINGS[kind].format(self._in_a_row["chance"], step, share, advice))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the last checkpoint where the weights are broken: TrainingError if one is not finite."""
        if not _weights_finite(trainer):
            raise TrainingError(
                f"weights are not finite at step {trainer.global_step}, so no checkpoint is written. "
                "Resume from the last one (--ckpt_path last) with a lower optimizer.lr or trainer.gradient_clip_val"
            )

    def _handle_skipped(self, trainer: Trainer, steps: list[_Step], in_a_row: int) -> None:
        reason = _reason(trainer, steps)
        if in_a_row <= self.skip:
            rank_zero_warn(
                f"{reason}. Such steps are skipped; more than health.skip={self.skip} consecutive ones stop the run"
            )
            return
        saved = "the weights are not finite either: resume from the last checkpoint"
        if _weights_finite(trainer):
            saved = f"the state without these steps is saved in {save_last(trainer)}"
        raise TrainingError(
            f"{reason}, in {counted(in_a_row, 'consecutive step')}; {saved}. Check these samples, lower optimizer.lr, or "
            "change trainer.precision from 16-mixed to bf16-mixed. Then run the same command with --ckpt_path last"
        )

    def check_first_logits(self, module: LightningModule, deviation: float) -> None:
        """Warns of a standard deviation of the first batch's logits from which training from scratch collapses."""
        kept = isinstance(module, StairStage) and module.objective.scale_start == "keep"
        if deviation <= _WIDE_LOGITS or (kept and module.towers.similarity == "cosine"):  # a learned scale of cosines
            return
        advice = (
            "If recall does not recover within 100 steps, raise stair.in_caption_margin in all stages"
            if kept
            else f"Above {_WIDE_LOGITS:.0f} training from scratch collapses: set objective.scale_start to 'measure'"
        )
        rank_zero_warn(f"the first batch's logits have standard deviation {deviation:.1f} (usual: 0.3-1.5). {advice}")


def _weights_finite(trainer: Trainer) -> bool:
    """On all ranks."""
    weights = (p.to_local() if isinstance(p, DTensor) else p for p in trainer.lightning_module.parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights]).all()
    return bool(trainer.strategy.reduce(finite.float(), reduce_op="min"))


def _reason(trainer: Trainer, steps: list[_Step]) -> str:
    """Names the first skipped step, and its pairs whose embeddings are not finite, or all where none is to blame."""
    mine = None
    if first := next((step for step in steps if step.figures[0]), None):
        broken = [key for key, finite in zip(first.keys, first.finite_B.tolist(), strict=True) if not finite]
        mine = first.number, bool(first.loss_finite), bool(broken), broken or first.keys
    # every rank builds the message: launchers end the others, and their messages, when the first one stops
    ranks = {rank: each for rank, each in enumerate(of_all_ranks(trainer, mine)) if each is not None}
    number, loss_finite = min(each[:2] for each in ranks.values())
    ranks = {rank: each for rank, each in ranks.items() if each[2]} or ranks
    most = max(1, _KEYS_SHOWN // len(ranks))
    batches = (
        f"of rank {rank} was {one_line(', '.join(keys[:most]))}" + f" and {len(keys) - most} more" * (len(keys) > most)
        for rank, (_, _, _, keys) in ranks.items()
    )
    problem = "gradient" if loss_finite else "loss"
    return f"the {problem} is not finite at step {number}; the batch {'; '.join(batches)}"

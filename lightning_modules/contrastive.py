"""What every contrastive run shares, sparse or dense: one batch, one evaluation, one optimiser.

B images, C captions (C = B in training), V terms (or the width of a dense embedding).
"""

import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_modules import parallel
from lightning_modules.optimizer import Optimizer
from lightning_modules.run_folder import flat
from stair.batch import Batch
from stair.errors import FileError, StairError, require
from stair.exchange import ranks
from stair.metrics import RetrievalRecall
from stair.set_counts import SetCounts, image_hashes, sentences, token_captions
from stair.towers import TwoTowers

RECALL_AT = (1, 5, 10)
# settings of a model by which weights may differ
_FREE = re.compile(r".*\.pretrained|text\.options\.(dtype|_name_or_path)|text_bias_start|text_form")


class ContrastiveModule(LightningModule):
    """Trains and evaluates an image and a text encoder on pairs.

    A subclass has a model, under its `export_name`, and a `training_step` that ends in `report`.

    Args:
        optimizer: the optimizer and its schedule.
        scale_start: start of the learnable scale (inverse temperature), in (0, 100]; None keeps it.
        micro_batch_size: pairs encoded at a time on a device; None: all. A smaller value needs less memory and a second
            forward pass. The loss and its gradient remain those of the whole batch (GradCache, Gao et al. 2021).
        recompute: store only the input of each block and head and recompute the rest in the backward pass: less memory,
            one more forward pass.
        compile: backend of torch.compile for the blocks of the encoders, usually `inductor`; None: no compilation.
    """

    stage: ClassVar[int | None] = None  # position in the order of stages; None starts from initial weights
    export_name: ClassVar[str]  # folder in RUN/home that the finished model is exported to
    frozen: ClassVar[tuple[Literal["image", "text"], ...]] = ()  # sides without a gradient, always in eval mode
    skipped = False  # whether the last step was skipped, as its loss or its gradient is not finite

    def __init__(
        self,
        optimizer: Optimizer,
        scale_start: float | None = None,
        micro_batch_size: int | None = None,
        recompute: bool = False,
        compile: str | None = None,
    ) -> None:
        super().__init__()
        self.optimizer, self.scale_start, self.micro_batch_size = optimizer, scale_start, micro_batch_size
        self.recompute, self.compile_backend, self._laid_out = recompute, compile, False
        backends = [None, *(torch.compiler.list_backends(exclude_tags=()) if compile is not None else [])]
        positive = micro_batch_size is None or micro_batch_size >= 1
        in_range = scale_start is None or 0 < scale_start <= 100
        require(in_range, "model.init_args.scale_start", scale_start, "a number in (0, 100], or null")
        require(positive, "model.init_args.micro_batch_size", micro_batch_size, "at least 1, or null for all")
        require(compile in backends, "model.init_args.compile", compile, f"one of {backends}")
        self._stated: dict[str, str] = {}
        self._saved_groups: list[list[int]] = []

    @classmethod
    def home(cls) -> str:
        """The folder in a run where this module works: `stage1` to `stage3`, or `clip`."""
        return cls.export_name if cls.stage is None else f"stage{cls.stage}"

    @property
    def towers(self) -> TwoTowers:
        """The model that trains."""
        model: TwoTowers = getattr(self, self.export_name)
        return model

    def configure_model(self) -> None:
        """Applies recompute, compile and sharding, once: weights are loaded and frozen by now."""
        if self._laid_out:
            return
        self._laid_out = True
        if self.recompute:
            parallel.recompute(self.towers)
        if self.compile_backend is not None:
            parallel.compile_blocks(self.towers, self.compile_backend)
        if self.device_mesh is not None:
            parallel.shard(self.towers, self.device_mesh["data_parallel"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["towers"] = {  # all that `stair consolidate` needs
            "family": self.towers.family,
            "model": self.towers.portable_config(),
            "tokens": self.towers.vocabulary.tokens,
            "stage": self.stage,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises a StairError if the checkpoint is of another model; names the differences."""
        if "towers" in checkpoint:
            check_same_model(self.towers, "the checkpoint", checkpoint["towers"])
        self._saved_groups = [_sizes(state["param_groups"]) for state in checkpoint.get("optimizer_states", [])]

    def setup(self, stage: str) -> None:
        """Makes the metrics; SettingError if loss, clipping and export would be wrong under the trainer's settings."""
        trainer, wide = self.trainer, str(self.trainer.precision) not in ("16-true", "bf16-true")
        require(wide, "trainer.precision", trainer.precision, "bf16-mixed or 32-true: 16 bits lose small updates")
        if stage == "fit":
            known = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | parallel.FullySharded)
            allowed = "ddp (configs/hardware/ddp.yaml) or FSDP2 (configs/hardware/fsdp2.yaml)"
            require(known, "trainer.strategy", type(trainer.strategy).__name__, allowed)
            parts, one = trainer.accumulate_grad_batches, "1. To save memory, set model.init_args.micro_batch_size"
            require(parts == 1, "trainer.accumulate_grad_batches", parts, one)
        name = {"predict": None, "test": "test_names"}.get(stage, "val_names")
        self._sets: list[str] = list(getattr(trainer.datamodule, name)) if name else []
        self.retrieval: Any = torch.nn.ModuleList([RetrievalRecall(RECALL_AT) for _ in self._sets])
        self.counts: Any = torch.nn.ModuleList([SetCounts() for _ in self._sets])

    def frozen_modules(self) -> list[torch.nn.Module]:
        """Encoders and heads of the frozen sides, and parts with `lr_scale` 0.

        `StageTransition` freezes them before DDP or FSDP2 wraps the model.
        """
        sides = [module for name, module in self.towers.named_children() if name.startswith(self.frozen)]
        return sides + self.optimizer.untrained(self.towers)

    def train(self, mode: bool = True) -> "ContrastiveModule":
        """As in torch, but frozen modules stay in eval mode, without dropout."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def on_train_start(self) -> None:
        """Puts the optimiser's settings over a checkpoint's, and sets the scale at step 0; only here is the step known."""
        self.optimizer.apply_settings(self.optimizers(use_pl_optimizer=False), self.lr_schedulers(), self.towers)
        if self.scale_start is not None and self.trainer.global_step == 0:
            self.set_scale(self.scale_start)

    def set_scale(self, value: float) -> None:
        """Sets the similarity's scale, at most 100."""
        towers: Any = self.towers
        gathered = isinstance(self.towers, FSDPModule) and not isinstance(towers.log_scale, DTensor)
        if gathered:  # what is gathered for a step is a copy
            towers.reshard()
        with torch.no_grad():
            towers.log_scale.fill_(math.log(min(value, 100.0)))
        if gathered:
            towers.unshard()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes dropout a function of seed, stage, step and rank, so that a resumed run repeats it."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) + ((self.stage or 0) << 40)
        torch.manual_seed(seed + 1 + self.trainer.global_step * self.trainer.world_size + self.trainer.global_rank)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and holds the scale at 100: held in the forward pass, it would have no gradient there."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.towers.log_scale.clamp_(max=math.log(100))

    def embed(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds one micro-batch: `image_BV`, `text_CV`, and whatever else the loss needs."""
        encoded: dict[str, Tensor] = self.towers(pixels, ids, mask)
        return encoded

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes the batch, by micro-batches if so set.

        Each is a checkpointed segment, encoded again backwards with the same random state. Models encode images last, and
        encoding again stops where nothing is missing any more: frozen images are not encoded again.
        """
        parts = batch["pixels"], batch["ids"], batch["mask"]
        if not self.training or self.micro_batch_size is None or self.micro_batch_size >= len(parts[0]):
            return self.embed(*parts)
        pieces = [
            checkpoint(self.embed, *piece, use_reentrant=False)
            for piece in zip(*(part.split(self.micro_batch_size) for part in parts), strict=True)
        ]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def report(self, logged: dict[str, Tensor], encoded: dict[str, Tensor], pair_loss_B: Tensor) -> dict[str, Any]:
        """Logs the parts of a step, and returns them detached, but for `loss`, with `scale` and `pairs` of all ranks.

        Args:
            logged: `loss`, `contrastive`, `logit_std` and other parts, already of the global batch on every rank.
            encoded: `image_BV` and `text_CV`, as in evaluation, and whatever else was encoded.
            pair_loss_B: (B,) the contrastive loss of each pair; its mean over all ranks is `contrastive`.
        """
        self._loss = logged["loss"].detach()
        logged = {**logged, "scale": self.towers.scale[0]}
        for bar, names in ((False, logged.keys() - {"loss", "scale"}), (True, ("loss", "scale"))):
            self.log_dict({f"train/{name}": logged[name] for name in names}, prog_bar=bar, batch_size=1)
        outputs = {**logged, **encoded, "pair_loss_B": pair_loss_B}
        detached = {name: torch.as_tensor(value).detach() for name, value in outputs.items()}
        return {**detached, "loss": logged["loss"], "pairs": len(encoded["image_BV"]) * ranks()}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and skips a step whose loss or gradient is not finite, on all ranks: without gradients nothing moves.

        In 16-mixed the gradient scaler finds its scale by overflow: a step counts as skipped only if that is below 1.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        finite = bool(norm.isfinite() & self._loss.isfinite().all())
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        self.skipped = not finite and (scaler is None or scaler.get_scale() < 1)
        if not finite:
            optimizer.zero_grad(set_to_none=True)
        elif gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def configure_optimizers(self) -> Any:
        """The optimiser, and its schedule over the planned steps of the run."""
        optimizer = self.optimizer.build(self.towers)
        same = self._saved_groups in ([], [_sizes(optimizer.param_groups)])
        allowed = "that of the checkpoint, whose parameter groups differ. Compare layer_decay and freeze_until too"
        require(same, "optimizer.lr_scale", self.optimizer.lr_scale, allowed)
        steps = planned_steps(self.trainer)
        if self.trainer.fast_dev_run:  # a dry run is shorter than any warm-up
            steps = max(steps, self.optimizer.warmup_steps + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optimizer.schedule(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Encodes a batch of an evaluation set and updates the set's metrics."""
        encoded, ids = self.encode(batch), (batch["image_id"], batch["caption_image"])
        image_BV, text_CV = (self.towers.comparable(encoded[key]) for key in ("image_BV", "text_CV"))
        self.retrieval[dataloader_idx].update(image_BV, text_CV, *ids)
        captions = token_captions(self.towers.vocabulary, batch["ids"], batch["mask"], batch["cut"])
        self.counts[dataloader_idx].update(image_hashes(batch["pixels"]), captions, *ids)
        return encoded

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embeddings of a batch with the ids that tell their images."""
        ids = {"image_id": batch["image_id"], "caption_image": batch["caption_image"], "key": batch["key"]}
        return {**self.encode(batch), **ids}

    def on_validation_epoch_end(self) -> None:
        """Logs recall of every set, `val/recall` (mean over both directions of the first), and what makes it unfair."""
        prefix = "test" if self.trainer.testing else "val"
        for name, metric, counter in zip(self._sets, self.retrieval, self.counts, strict=True):
            values, counts, tied = metric.compute(), counter.compute(), metric.tied
            metric.reset()
            counter.reset()
            self.log_dict({f"{prefix}/{name}/{key}": value.float() for key, value in values.items()})
            if name == self._sets[0]:
                recalls = [value.float() for key, value in values.items() if "recall@" in key]
                self.log(f"{prefix}/recall", torch.stack(recalls).mean(), prog_bar=True)
            size = f"{prefix}/{name}: {counts['images']} images, {counts['captions']} captions"
            stated = "; ".join([size, *sentences(counts, RECALL_AT)])
            if not self.trainer.sanity_checking and self._stated.get(name) != stated:
                self._stated[name] = stated
                ties = sentences({f"tied_{way}": number for way, number in tied.items()})
                rank_zero_info("; ".join([stated, *ties]))

    on_test_epoch_end = on_validation_epoch_end


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def check_same_model(towers: TwoTowers, source: Path | str, saved: dict[str, Any], *free: str) -> None:
    """Compares a model with the description of the weights in `source`, but for the settings `free`.

    Raises:
        StairError: if they differ; names the settings. A FileError if the source is a path.
    """
    fingerprint = towers.vocabulary.fingerprint
    ours = {"family": towers.family, "vocabulary": fingerprint}
    theirs = {"family": saved["family"], "vocabulary": saved.get("vocabulary_fingerprint", fingerprint)}
    if theirs["family"] == ours["family"]:
        ours, theirs = {**flat(towers.portable_config()), **ours}, {**flat(saved["model"]), **theirs}
    if differences := [
        f"{key}: {theirs.get(key)} there, {ours.get(key)} here"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key) and key not in free and not _FREE.fullmatch(key)
    ]:
        message = (
            f"{source} is another model than this run's. {'; '.join(differences)}. Use the same stair in all stages"
        )
        raise FileError(message, source) if isinstance(source, Path) else StairError(message)


def planned_steps(trainer: Trainer) -> int:
    """Optimiser steps the run is planned for; SettingError if nothing bounds it."""
    steps = trainer.estimated_stepping_batches
    bounded = not math.isinf(steps)
    require(
        bounded,
        "trainer.max_steps",
        trainer.max_steps,
        "a number of steps: the schedules of learning rate and λ depend on it",
    )
    return int(steps)

"""What every contrastive run shares, of words or dense: one batch, one evaluation, one optimiser.

The stages of STAIR (stage.py) and the dense baseline (clip.py) say only what differs: the model and the loss.

B images, C captions (C = B in training), V words (or the width of a dense embedding).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_modules import parallel
from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.errors import SettingError, StairError
from stair.exchange import ranks
from stair.metrics import RetrievalRecall
from stair.set_counts import SetCounts, image_hashes, sentences, token_captions
from stair.towers import TowersConfig, TwoTowers

RECALL_AT = (1, 5, 10)


class ContrastiveModule(L.LightningModule):
    """Trains two towers on pairs, and measures them.

    A subclass names its model (`towers`) and has a `training_step` that ends in `report`.

    Args:
        optimizer: how parameters move.
        scale_start: start of the learnable scale (inverse temperature), in (0, 100]; None leaves it as it is.
        micro_batch_size: pairs encoded at a time on a device, None for all. Smaller needs less memory and costs a second
            forward pass; the loss and its gradient stay those of the whole batch (as in GradCache, Gao et al. 2021).
        recompute: keep of each block and head only its input, and compute it again backwards: less memory, one more
            forward pass.
        compile: backend of torch.compile for the towers' blocks, `inductor` for the usual one; None does not compile.
    """

    stage: ClassVar[int | None] = None  # place in the order of stages; None is no stage, and starts from nothing
    export_name: ClassVar[str]  # folder of the exported model in RUN/home
    #: sides that stay as they are: their parameters get no gradient and their modules stay in eval mode
    frozen: ClassVar[tuple[Literal["image", "text"], ...]] = ()
    skipped = False  # whether the last step was skipped: its loss or its gradient is not finite

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
        if micro_batch_size is not None and micro_batch_size < 1:
            what = f"micro_batch_size is {micro_batch_size}; give a number of pairs from 1 up, or null for all"
            raise SettingError(what, "model.init_args.micro_batch_size")
        if compile is not None and compile not in (known := torch.compiler.list_backends(exclude_tags=())):
            what = f"compile is {compile!r}; give one of {', '.join(known)}, or null for none"
            raise SettingError(what, "model.init_args.compile")
        self.retrieval, self.counts = torch.nn.ModuleList(), torch.nn.ModuleList()
        self._sets: list[str] = []
        self._stated: dict[str, str] = {}

    @classmethod
    def home(cls) -> str:
        """Where a run of this module works: RUN/home of `--run RUN`."""
        raise NotImplementedError

    @property
    def towers(self) -> TwoTowers:
        """The model that trains."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Lays the model out as the settings and the strategy say, once: weights are loaded and frozen by now."""
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
        """Describes the model, so that `stair consolidate` needs nothing else."""
        checkpoint["towers"] = {
            "family": self.towers.family,
            "model": self.towers.portable_config(),
            "words": self.towers.vocabulary.tokens,
            "stage": self.stage,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compares this run's model with the checkpoint's: differences beside the weights would have no effect.

        Raises:
            ValueError: if it is another model, or compares otherwise; names both sides.
        """
        described = checkpoint.get("towers")
        if described is not None and described["family"] == self.towers.family:
            refuse_other_model(self.towers, "the checkpoint", described["model"])

    # ------------------------------------------------------------------ training

    def train(self, mode: bool = True) -> "ContrastiveModule":
        """As in torch, but frozen sides stay in eval mode, without dropout."""
        super().train(mode)
        for side in self.frozen:
            for module in sides(self.towers)[side]:
                module.eval()
        return self

    def on_fit_start(self) -> None:
        """Checks the trainer.

        Raises:
            SettingError: if the trainer accumulates gradients, which would cut the contrastive batch into pieces, or its
                strategy is one under which loss, clipping and export would be wrong.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | parallel.FullySharded):
            raise SettingError(
                f"trainer.strategy is {type(strategy).__name__}, with which this code has never trained. Give ddp "
                "(configs/hardware/ddp.yaml) or FSDP2 (configs/hardware/fsdp2.yaml)",
                "trainer.strategy",
            )
        if self.trainer.accumulate_grad_batches != 1:
            raise SettingError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: each piece would be compared "
                "with itself only. Set model.micro_batch_size instead, which keeps the whole batch in one loss",
                "trainer.accumulate_grad_batches",
            )

    def on_train_start(self) -> None:
        """Sets what a checkpoint must not: how parameters move, and at step 0 the scale.

        Not earlier, as only here a resumed run has its state and knows its step.
        """
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if isinstance(optimizer, torch.optim.Optimizer) and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.optimizer.govern(optimizer, scheduler, self)
        if self.scale_start is not None and self.trainer.global_step == 0:
            self.set_scale(self.scale_start)

    def set_scale(self, value: float) -> None:
        """Sets the similarity's scale, at most 100."""
        gathered = isinstance(self.towers, FSDPModule) and not isinstance(self.towers.log_scale, DTensor)
        if gathered:  # what is gathered for a step is a copy
            self.towers.reshard()
        with torch.no_grad():
            self.towers.log_scale.fill_(math.log(min(value, 100.0)))
        if gathered:
            self.towers.unshard()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes dropout a function of seed, stage, step and rank, so that a resumed run draws what it would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) + ((self.stage or 0) << 40)
        torch.manual_seed(seed + 1 + self.trainer.global_step * self.trainer.world_size + self.trainer.global_rank)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and holds the scale at 100: held in the forward pass, it would have no gradient there to come back by.

        Here and not at the batch's end: callbacks come before the module there, and save.
        """
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.towers.log_scale.clamp_(max=math.log(100))

    def embed(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds one micro-batch: `image_BV`, `text_CV`, and whatever else the loss wants."""
        return self.towers(pixels, ids, mask)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes the batch, by micro-batches if so set.

        Each micro-batch is a checkpointed segment: forwards only its embeddings are kept, backwards it is encoded again
        with the same random state. So one loss sees the whole batch while memory holds one micro-batch. Models encode
        images last, and encoding again stops where nothing is missing any more: frozen images are not encoded again.
        """
        parts = batch["pixels"], batch["ids"], batch["mask"]
        if not self.training or self.micro_batch_size is None or self.micro_batch_size >= len(parts[0]):
            return self.embed(*parts)
        pieces = [
            checkpoint(self.embed, *piece, use_reentrant=False)
            for piece in zip(*(part.split(self.micro_batch_size) for part in parts), strict=True)
        ]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def report(
        self,
        logged: dict[str, Any],
        encoded: dict[str, Tensor],
        compared: list[tuple[float, Tensor, Tensor]],
    ) -> dict[str, Any]:
        """Logs the parts of a step by name, and returns them with what callbacks read.

        Args:
            logged: `loss`, `contrastive`, `logit_std` and other parts, already of the global batch on every rank.
            encoded: `image_BV` and `text_CV`, as in evaluation, and whatever else was encoded.
            compared: of each contrastive term its weight, images and texts.

        Returns:
            All of them detached, but for `loss`, with `scale` and `pairs`, the number of pairs on all ranks.
        """
        self._loss = logged["loss"].detach()
        logged = {**logged, "scale": self.towers.scale[0]}
        self.log_dict({f"train/{k}": v for k, v in logged.items() if k not in ("loss", "scale")}, batch_size=1)
        self.log_dict({f"train/{k}": logged[k] for k in ("loss", "scale")}, prog_bar=True, batch_size=1)
        return {
            **{k: v.detach() if isinstance(v, Tensor) and k != "loss" else v for k, v in logged.items()},
            "pairs": len(encoded["image_BV"]) * ranks(),
            **{name: value.detach() for name, value in encoded.items()},
            "compared": [(weight, image.detach(), text.detach()) for weight, image, text in compared],
        }

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and leaves a step out whose loss or gradient is not finite: without gradients nothing moves.

        Loss and norm are those of the global batch, the same on every rank, so all leave the step out or none.
        (`callbacks/health.py` counts such steps and stops the run.) The host waits for the device here, once a step,
        for the norm that clipping needs anyway. In 16-mixed the gradient scaler finds its scale by overflow: only
        once that is below 1, and gradients overflow still, is a step counted.
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

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and its schedule over the planned steps of the run."""
        optimizer = self.optimizer.build(self)
        steps = planned_steps(self.trainer)
        if self.trainer.fast_dev_run:  # a dry run is shorter than any warm-up
            steps = max(steps, self.optimizer.warmup_steps + 1)
        factor = self.optimizer.schedule(steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------- evaluation

    def setup(self, stage: str) -> None:
        """Makes a retrieval metric for every evaluation set.

        Raises:
            SettingError: if the weights themselves are to be of 16 bits.
        """
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            raise SettingError(
                f"trainer.precision is {self.trainer.precision}: in weights of 16 bits small updates vanish. Give "
                "bf16-mixed, or 32-true",
                "trainer.precision",
            )
        kind = "test" if stage == "test" else "val"
        self._sets = list(getattr(self.trainer.datamodule, f"{kind}_names")) if stage != "predict" else []
        self.retrieval = torch.nn.ModuleList([RetrievalRecall(RECALL_AT) for _ in self._sets])
        self.counts = torch.nn.ModuleList([SetCounts() for _ in self._sets])

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Encodes a batch of an evaluation set and hands it to the set's metric."""
        encoded = self.encode(batch)
        metric = self.retrieval[dataloader_idx]
        image_BV, text_CV = (self.towers.comparable(encoded[key]) for key in ("image_BV", "text_CV"))
        metric.update(image_BV, text_CV, batch["image_id"], batch["caption_image"])
        captions = token_captions(self.towers.vocabulary, batch["ids"], batch["mask"], batch["cut"])
        counts = self.counts[dataloader_idx]
        counts.update(image_hashes(batch["pixels"]), captions, batch["image_id"], batch["caption_image"])
        return encoded

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """As validation."""
        return self.validation_step(batch, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Embeddings of a batch with the ids that say whose they are."""
        encoded = self.encode(batch)
        return {**encoded, **{k: batch[k] for k in ("image_id", "caption_image", "key")}}  # type: ignore[literal-required]

    def on_validation_epoch_end(self) -> None:
        """Logs recall of every set, and `val/recall`, the mean over both directions of the first set."""
        self._log_retrieval("val")

    def on_test_epoch_end(self) -> None:
        """As validation, under `test/`."""
        self._log_retrieval("test")

    def _log_retrieval(self, prefix: str) -> None:
        for place, (name, metric, counts) in enumerate(zip(self._sets, self.retrieval, self.counts, strict=True)):
            values = metric.compute()
            self._state_counts(f"{prefix}/{name}", counts.compute(), metric.tied)
            metric.reset()
            counts.reset()
            self.log_dict({f"{prefix}/{name}/{key}": value.float() for key, value in values.items()})
            if place == 0:
                recalls = [value.float() for key, value in values.items() if "recall@" in key]
                self.log(f"{prefix}/recall", torch.stack(recalls).mean(), prog_bar=True)

    def _state_counts(self, name: str, counts: dict[str, int], tied: dict[str, int]) -> None:
        """Logs what makes the figures of a set unfair, once and whenever it changes by more than ties."""
        size = f"{name}: {counts['images']} images, {counts['captions']} captions"
        lasting = "; ".join([size, *sentences(counts, RECALL_AT)])
        if not self.trainer.sanity_checking and self._stated.get(name) != lasting:
            self._stated[name] = lasting
            ties = sentences({f"tied_{way}": number for way, number in tied.items()})
            rank_zero_info("; ".join([lasting, *ties]))


def sides(towers: TwoTowers) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules of each side of a model, as stages freeze them."""
    parts = list(towers.named_children())
    return {side: tuple(part for name, part in parts if name.startswith(side)) for side in ("image", "text")}


#: settings of a model that no weight shows
_UNSEEN = ("in_caption_margin", "similarity", "pooling", "width")


def refuse_other_model(towers: TwoTowers, where: str, model: dict[str, Any], free: Sequence[str] = ()) -> None:
    """Compares a model with the settings of saved weights.

    Args:
        towers: the model.
        where: what the weights are in.
        model: the settings, as `portable_config` gives them.
        free: settings that may differ.

    Raises:
        StairError: if others differ; names both sides.
    """
    theirs, ours = (_design(towers.config_class, values) for values in (model, towers.portable_config()))
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key) and key not in free)
    if keys:
        raise StairError(
            f"{where} is another model than this run's. "
            + "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
            + ". Use the settings it was trained with; those of stair are the same in all stages"
        )


def _design(family: type[TowersConfig], values: dict[str, Any]) -> dict[str, Any]:
    """What must be equal: not the words a text may light up, which the stage says, nor how weights were started."""
    flat: dict[str, Any] = {}
    for key, value in asdict(family.from_dict(values)).items():
        if key in _UNSEEN:
            flat[key] = value
        if key in ("image", "text"):
            flat.update({f"{key}.{inner}": v for inner, v in value.items() if inner != "pretrained"})
    options = flat.pop("text.options")
    return {**flat, **{f"text.options.{k}": v for k, v in options.items() if k not in ("dtype", "_name_or_path")}}


def planned_steps(trainer: L.Trainer) -> int:
    """Optimiser steps the run is planned for.

    Raises:
        SettingError: if nothing bounds the run.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise SettingError("the run has no end: set trainer.max_steps (schedules and λ follow it)", "trainer.max_steps")
    return int(steps)

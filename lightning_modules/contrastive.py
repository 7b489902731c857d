"""What every contrastive run shares, sparse or dense: one batch, one evaluation, one optimiser.

The stages of STAIR (stage.py) and the dense baseline (clip.py) state only what differs: the model and the loss.

B images, C captions (C = B in training), V terms (or the width of a dense embedding).
"""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict
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
from stair.batch import Batch
from stair.errors import FileError, SettingError, StairError
from stair.exchange import ranks
from stair.metrics import RetrievalRecall
from stair.set_counts import SetCounts, image_hashes, sentences, token_captions
from stair.towers import TwoTowers

RECALL_AT = (1, 5, 10)
_UNSEEN = ("in_caption_margin", "similarity", "pooling", "width")  # settings of a model that no weight shows


class ContrastiveModule(LightningModule):
    """Trains two towers on pairs, and evaluates them.

    A subclass has a model (`towers`) and a `training_step` that ends in `report`.

    Args:
        optimizer: how parameters move.
        scale_start: start of the learnable scale (inverse temperature), in (0, 100]; None leaves it as it is.
        micro_batch_size: pairs encoded at a time on a device, None for all. Smaller needs less memory and costs a second
            forward pass; the loss and its gradient stay those of the whole batch (as in GradCache, Gao et al. 2021).
        recompute: keep of each block and head only its input, and compute it again backwards: less memory, one more
            forward pass.
        compile: backend of torch.compile for the towers' blocks, `inductor` for the usual one; None does not compile.
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
        backends = torch.compiler.list_backends(exclude_tags=()) if compile is not None else []
        micro = micro_batch_size is None or micro_batch_size >= 1
        for name, value, valid, allowed in (
            ("scale_start", scale_start, scale_start is None or 0 < scale_start <= 100, "a number in (0, 100]"),
            ("micro_batch_size", micro_batch_size, micro, "at least 1, or null for all"),
            ("compile", compile, compile is None or compile in backends, f"{', '.join(backends)}, or null for none"),
        ):
            if not valid:
                raise SettingError(f"{name} is {value!r}. Allowed: {allowed}", f"model.init_args.{name}")
        self._begin([])
        self._stated: dict[str, str] = {}

    @classmethod
    def home(cls) -> str:
        """Where a run of this module works: RUN/home of `--run RUN`; `stage1` to `stage3`, or `clip`."""
        return cls.export_name if cls.stage is None else f"stage{cls.stage}"

    @property
    def towers(self) -> TwoTowers:
        """The model that trains."""
        raise NotImplementedError

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
        """Raises a StairError if the checkpoint is of another model; names both sides."""
        if "towers" in checkpoint:
            check_same_model(self.towers, "the checkpoint", checkpoint["towers"])

    def train(self, mode: bool = True) -> "ContrastiveModule":
        """As in torch, but frozen sides stay in eval mode, without dropout."""
        super().train(mode)
        for side in self.frozen:
            for module in sides(self.towers)[side]:
                module.eval()
        return self

    def on_fit_start(self) -> None:
        """Raises a SettingError if loss, clipping and export would be wrong under the trainer's settings."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | parallel.FullySharded):
            raise SettingError(
                f"trainer.strategy is {type(strategy).__name__}, which is not supported. Give ddp "
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
        """Puts the optimiser's settings over a checkpoint's, and sets the scale at step 0; only here is the step known."""
        optimizer, scheduler = self.optimizers(use_pl_optimizer=False), self.lr_schedulers()
        if isinstance(optimizer, torch.optim.Optimizer) and isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.optimizer.apply_settings(optimizer, scheduler, self)
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
        """Steps, and holds the scale at 100: held in the forward pass, it would have no gradient there.

        Not at the batch's end: callbacks come before the module there, and save.
        """
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.towers.log_scale.clamp_(max=math.log(100))

    def embed(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds one micro-batch: `image_BV`, `text_CV`, and whatever else the loss needs."""
        encoded: dict[str, Tensor] = self.towers(pixels, ids, mask)
        return encoded

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes the batch, by micro-batches if so set.

        Each micro-batch is a checkpointed segment: forwards only its embeddings are kept, backwards it is encoded again
        with the same random state. Models encode images last, and encoding again stops where nothing is missing any more:
        frozen images are not encoded again.
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
        """Logs the parts of a step by name, and returns them with what callbacks read.

        Args:
            logged: `loss`, `contrastive`, `logit_std` and other parts, already of the global batch on every rank.
            encoded: `image_BV` and `text_CV`, as in evaluation, and whatever else was encoded.
            pair_loss_B: (B,) the contrastive loss of each pair; its mean over all ranks is `contrastive`.

        Returns:
            All of them detached, but for `loss`, with `scale` and `pairs`, the number of pairs on all ranks.
        """
        self._loss = logged["loss"].detach()
        logged = {**logged, "scale": self.towers.scale[0]}
        for bar, names in ((False, logged.keys() - {"loss", "scale"}), (True, {"loss", "scale"})):
            self.log_dict(
                {f"train/{name}": logged[name] for name in logged if name in names}, prog_bar=bar, batch_size=1
            )
        outputs = {**logged, **encoded, "pair_loss_B": pair_loss_B}
        detached = {name: torch.as_tensor(value).detach() for name, value in outputs.items()}
        return {**detached, "loss": logged["loss"], "pairs": len(encoded["image_BV"]) * ranks()}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and skips a step whose loss or gradient is not finite: without gradients nothing moves.

        Loss and norm are those of the global batch, so all ranks skip the step or none. In 16-mixed the gradient scaler
        finds its scale by overflow: a step counts as skipped only where that is below 1 already.
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
        optimizer = self.optimizer.build(self)
        steps = planned_steps(self.trainer)
        if self.trainer.fast_dev_run:  # a dry run is shorter than any warm-up
            steps = max(steps, self.optimizer.warmup_steps + 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.optimizer.schedule(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def setup(self, stage: str) -> None:
        """Makes the metrics of every evaluation set. Raises a SettingError for weights of 16 bits."""
        if str(self.trainer.precision) in ("16-true", "bf16-true"):
            raise SettingError(
                f"trainer.precision is {self.trainer.precision}: in weights of 16 bits small updates vanish. Give "
                "bf16-mixed, or 32-true",
                "trainer.precision",
            )
        name = {"predict": None, "test": "test_names"}.get(stage, "val_names")
        self._begin(getattr(self.trainer.datamodule, name) if name else [])

    def _begin(self, sets: Sequence[str]) -> None:
        self._sets = list(sets)
        self.retrieval: Any = torch.nn.ModuleList([RetrievalRecall(RECALL_AT) for _ in sets])
        self.counts: Any = torch.nn.ModuleList([SetCounts() for _ in sets])

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
        """Logs recall of every set, and `val/recall`, the mean over both directions of the first set.

        States once, and whenever it changes by more than ties, what makes the figures of a set unfair.
        """
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


def sides(towers: TwoTowers) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules of each side of a model, as stages freeze them."""
    parts = list(towers.named_children())
    return {side: tuple(part for name, part in parts if name.startswith(side)) for side in ("image", "text")}


def check_same_model(towers: TwoTowers, source: Path | str, saved: dict[str, Any], free: Sequence[str] = ()) -> None:
    """Compares a model with the description of saved weights.

    Args:
        towers: the model.
        source: what holds the weights: a folder, or words for it.
        saved: `family`, `model` as `portable_config` gives it, and where known `vocabulary_fingerprint`.
        free: settings that may differ.

    Raises:
        StairError: if others differ; names both sides. A FileError if the source is a folder.
    """
    ours: dict[str, Any] = {"family": towers.family, "vocabulary": towers.vocabulary.fingerprint[:12]}
    theirs: dict[str, Any] = {
        "family": saved["family"],
        "vocabulary": saved.get("vocabulary_fingerprint", ours["vocabulary"])[:12],
    }
    if theirs["family"] == ours["family"]:
        for design, values in ((theirs, saved["model"]), (ours, towers.portable_config())):
            config = asdict(towers.config_class.from_dict(values))
            design.update({key: config[key] for key in _UNSEEN if key in config})
            for side in ("image", "text"):  # not how weights were initialised
                design.update({f"{side}.{key}": v for key, v in config[side].items() if key != "pretrained"})
            options = design.pop("text.options")
            design.update({f"text.options.{k}": v for k, v in options.items() if k not in ("dtype", "_name_or_path")})
    keys = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key) and key not in free)
    if keys:
        differences = "; ".join(f"{key}: {theirs.get(key)} there, {ours.get(key)} here" for key in keys)
        message = (
            f"{source} is another model than this run's. {differences}. Use the same settings of stair in all stages"
        )
        raise FileError(message, source) if isinstance(source, Path) else StairError(message)


def planned_steps(trainer: Trainer) -> int:
    """Optimiser steps the run is planned for.

    Raises:
        SettingError: if nothing bounds the run.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise SettingError("the run has no end: set trainer.max_steps (schedules and λ follow it)", "trainer.max_steps")
    return int(steps)

"""What all stages share: one step, one evaluation, one optimiser. A stage's own page says only what differs.

`L = InfoNCE(image, text) + r(t) · (λ_image · FLOPs(image) + λ_text · FLOPs(text))`   (STAIR, section 2)

B images, C captions (C = B in training), V words.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.losses import flops, info_nce, ramp
from stair.metrics import RetrievalRecall
from stair.model import Stair, StairConfig


@dataclass
class Objective:
    """The loss of a stage.

    Args:
        similarity: `dot` of the weights, or `cosine`.
        scale_start: start of the learnable scale (inverse temperature): a number; `measure` sets it so that the first
            batch's scaled logits have the spread `first_logit_std`; `keep` carries over the previous stage's.
        first_logit_std: wanted standard deviation of the first batch's logits; 0.3 to 1.5 trains, above 2.2 collapses.
        flops_image: λ of the image embeddings.
        flops_text: λ of the text embeddings.
        flops_ramp_steps: optimiser steps over which λ grows quadratically from 0; 0 for none.
        flops_text_words: which of a text's words λ_text weighs on in the masked stage. `own`: what the mask lets through,
            the paper's form. `all`: as if there were no mask, so that words outside it have a gradient and stage 2 does
            not start almost dense; costs a full text head. `others`: only those outside the mask; own words, which the
            mask bounds already, stay on. For long captions, whose own words `all` switches off.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    scale_start: float | Literal["measure", "keep"] = "measure"
    first_logit_std: float = 1.0
    flops_image: float = 1e-3
    flops_text: float = 1e-3
    flops_ramp_steps: int = 0
    flops_text_words: Literal["own", "all", "others"] = "all"

    def __post_init__(self) -> None:
        """Refuses values that cannot train."""
        if isinstance(self.scale_start, str) and self.scale_start not in ("measure", "keep"):
            raise ValueError(f"objective.scale_start is {self.scale_start!r}; give a number, 'measure' or 'keep'")
        if not isinstance(self.scale_start, str) and not 0 < self.scale_start <= 100:
            raise ValueError(f"objective.scale_start is {self.scale_start}; the scale lies in (0, 100]")
        if min(self.flops_image, self.flops_text, self.flops_ramp_steps) < 0:
            raise ValueError("objective.flops_image, flops_text and flops_ramp_steps must not be negative")


class StairStage(L.LightningModule):
    """One training stage.

    Args:
        stair: the model; its weights come from the previous stage where there is one.
        objective: the loss.
        optimizer: how parameters move.
        micro_batch_size: pairs encoded at a time on a device, None for all. Smaller needs less memory and costs a second
            forward pass; the loss and its gradient stay those of the whole batch (as in GradCache, Gao et al. 2021).
    """

    stage: ClassVar[int]
    text_words: ClassVar[Literal["own", "all"]] = "all"
    #: which sides stay as they are: their parameters get no gradient and their modules stay in eval mode
    frozen: ClassVar[tuple[Literal["image", "text"], ...]] = ()

    def __init__(
        self,
        stair: StairConfig,
        objective: Objective,
        optimizer: Optimizer,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(
                f"micro_batch_size is {micro_batch_size}; give a number of pairs from 1 up, or null for all"
            )
        stair.similarity, stair.text_words = objective.similarity, self.text_words
        self.stair = Stair(stair)
        self.objective, self.optimizer, self.micro_batch_size = objective, optimizer, micro_batch_size
        self.retrieval = torch.nn.ModuleDict()

    # ------------------------------------------------------------------ training

    def train(self, mode: bool = True) -> "StairStage":
        """As in torch, but frozen sides stay in eval mode: no dropout moves what they say."""
        super().train(mode)
        for side in self.frozen:
            for module in sides(self.stair)[side]:
                module.eval()
        return self

    def on_fit_start(self) -> None:
        """Sets the scale's start, unless it is measured on the first batch or carried over.

        Raises:
            ValueError: if the trainer accumulates gradients, which would cut the contrastive batch into pieces.
        """
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: each piece would be compared "
                "with itself only. Set model.micro_batch_size instead, which keeps the whole batch in one loss"
            )
        if not isinstance(self.objective.scale_start, str) and self.trainer.global_step == 0:
            self._set_scale(self.objective.scale_start)

    def _set_scale(self, value: float) -> None:
        with torch.no_grad():
            self.stair.log_scale.fill_(math.log(min(value, 100.0)))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Makes dropout a function of seed, step and rank, so that a resumed run draws what it would have drawn."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(seed + 1 + self.trainer.global_step * self.trainer.world_size + self.trainer.global_rank)

    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Encodes the batch, by micro-batches if so set.

        Each micro-batch is a checkpointed segment: forwards only its embeddings are kept, backwards it is encoded again
        with the same random state. So one loss sees the whole batch while memory holds one micro-batch.
        """
        unmasked = self.training and self.text_words == "own" and self.objective.flops_text_words != "own"
        parts = batch["pixels"], batch["ids"], batch["mask"]
        if not self.training or self.micro_batch_size is None or self.micro_batch_size >= len(parts[0]):
            return self.stair(*parts, unmasked)
        pieces = [
            checkpoint(self.stair, *piece, unmasked, use_reentrant=False)
            for piece in zip(*(part.split(self.micro_batch_size) for part in parts), strict=True)
        ]
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: encode, compare with all ranks, regularise. Returns and logs the parts by name."""
        encoded = self.encode(batch)
        image_BV, text_BV = self.stair.comparable(encoded["image_BV"]), self.stair.comparable(encoded["text_CV"])
        if self.trainer.global_step == 0 and batch_idx == 0 and self.objective.scale_start == "measure":
            spread = info_nce(image_BV.detach(), text_BV.detach(), torch.ones(1, device=self.device)).logit_std
            self._set_scale(self.objective.first_logit_std / max(float(spread), 1e-6))
        contrastive = info_nce(image_BV, text_BV, self.stair.scale)
        rising = ramp(self.trainer.global_step, self.objective.flops_ramp_steps)
        flops_image = flops(encoded["image_BV"])
        flops_text = flops(self._regularised_text(encoded))
        lambda_image, lambda_text = rising * self.objective.flops_image, rising * self.objective.flops_text
        loss = contrastive.loss + lambda_image * flops_image + lambda_text * flops_text
        logged = {
            "loss": loss,
            "contrastive": contrastive.loss,
            "flops_image": flops_image,
            "flops_text": flops_text,
            "lambda_image": lambda_image,
            "lambda_text": lambda_text,
            "scale": self.stair.scale[0],
            "logit_std": contrastive.logit_std,
        }
        # already the values of the global batch, on every rank
        self.log_dict({f"train/{k}": v for k, v in logged.items() if k not in ("loss", "scale")}, batch_size=1)
        self.log_dict({"train/loss": loss, "train/scale": logged["scale"]}, prog_bar=True, batch_size=1)
        return {
            **{k: v.detach() if isinstance(v, Tensor) and k != "loss" else v for k, v in logged.items()},
            "pairs": contrastive.pairs,
            "image_BV": encoded["image_BV"].detach(),
            "text_CV": encoded["text_CV"].detach(),
        }

    def _regularised_text(self, encoded: dict[str, Tensor]) -> Tensor:
        """The (C, V) weights that λ_text acts on."""
        if "text_unmasked_CV" not in encoded:
            return encoded["text_CV"]
        if self.objective.flops_text_words == "others":
            # the mask multiplies by 0 or 1, so the difference is exactly what it hides
            return encoded["text_unmasked_CV"] - encoded["text_CV"]
        return encoded["text_unmasked_CV"]

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimiser, and its schedule over the planned steps of the run."""
        optimizer = self.optimizer.build(self)
        factor = self.optimizer.schedule(planned_steps(self.trainer))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---------------------------------------------------------------- evaluation

    def setup(self, stage: str) -> None:
        """Makes a retrieval metric for every evaluation set."""
        names = self._set_names("test" if stage == "test" else "val") if stage != "predict" else []
        self.retrieval = torch.nn.ModuleDict({name: RetrievalRecall() for name in names})

    def _set_names(self, kind: str) -> list[str]:
        return list(getattr(self.trainer.datamodule, f"{kind}_names"))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Encodes a batch of an evaluation set and hands it to the set's metric."""
        encoded = self.encode(batch)
        metric = list(self.retrieval.values())[dataloader_idx]
        image_BV, text_CV = (self.stair.comparable(encoded[key]) for key in ("image_BV", "text_CV"))
        metric.update(image_BV, text_CV, batch["image_id"], batch["caption_image"])
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
        for place, (name, metric) in enumerate(self.retrieval.items()):
            values = metric.compute()
            metric.reset()
            self.log_dict({f"{prefix}/{name}/{key}": value.float() for key, value in values.items()})
            if place == 0:
                recalls = [value.float() for key, value in values.items() if "recall@" in key]
                self.log(f"{prefix}/recall", torch.stack(recalls).mean(), prog_bar=True)


def sides(stair: Stair) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules of each side of the model, as stages freeze them."""
    return {
        "image": (stair.image_encoder, stair.image_head),
        "text": (stair.text_encoder, stair.text_head),
    }


def planned_steps(trainer: L.Trainer) -> int:
    """Optimiser steps the run is planned for.

    Raises:
        ValueError: if nothing bounds the run.
    """
    steps = trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise ValueError("the run has no end: set trainer.max_steps (schedules and λ follow it)")
    return int(steps)

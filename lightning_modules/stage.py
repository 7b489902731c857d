"""What all stages share: the model and the loss. A stage's own file states only what differs.

`L = (1 - w) · InfoNCE(image, text_full) + w · InfoNCE(image, text_masked)
     + c · caption(image) + r(t) · (λ_image · FLOPs(image) + λ_text · FLOPs(text))`

`text_full` has all terms, `text_masked` only those of the caption. In the paper (STAIR, section 2) w is 1 in stage 1 and 0
in stages 2 and 3. The paper has no caption loss, c = 0. A loss of weight 0 is not computed.

B images, C captions (C = B in training), V terms.
"""

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.errors import TrainingError, require
from stair.losses import caption_loss, info_nce, info_nces, ramp
from stair.model import Stair, StairConfig, StairDesign
from stair.regularisers import Flops, TargetTerms, within_budget


@dataclass
class TextObjective:
    """The loss of a stage that trains only the text encoder.

    Args:
        similarity: dot product (`dot`) or `cosine` of the embeddings.
        scale_start: initial value of the learnable scale (inverse temperature), in (0, 100]. `measure`: the logits of the
            first batch, with the text form of greater weight, get a standard deviation of 1. `keep`: the scale of the
            previous stage.
        regulariser: `flops` (the paper), or `target`: FLOPs with λ adapted to a given number of active terms; λ below is
            its initial value.
        target_text: active terms of a text with the regulariser `target`; at least 1.
        flops_text: λ of the text embeddings.
        flops_ramp_steps: optimizer steps over which λ grows quadratically from 0; 0: no ramp.
        flops_text_form: text form that λ_text penalises: `masked` (in-caption terms) or `full`. None: `masked` in stage 1
            (the paper), `full` in stages 2 and 3. In stage 1, `full` also gives terms outside the caption a gradient. It
            needs a full text head; with a hard mask, training was much slower.
        masked_loss_weight: w, the weight of the masked contrastive loss. None (the paper): 1 in stage 1, 0 in stages 2
            and 3. Stage 1 allows (0, 1]; below 1 the mask is soft, and images keep terms outside their captions. Stages 2
            and 3 allow [0, 1); above 0, the grounding of stage 1 continues (docs/results/experiments.md).

    Raises:
        SettingError: if a value is out of range.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    scale_start: float | Literal["measure", "keep"] = "measure"
    regulariser: Literal["flops", "target"] = "flops"
    target_text: float = 32.0
    flops_text: float = 1e-3
    flops_ramp_steps: int = 0
    flops_text_form: Literal["masked", "full"] | None = None
    masked_loss_weight: float | None = None

    target_image: ClassVar[float] = 1.0
    flops_image: ClassVar[float] = 0.0
    negative_slope: ClassVar[float] = 0.0
    caption_loss_weight: ClassVar[float] = 0.0
    image_budgets: ClassVar[list[int] | None] = None

    def __post_init__(self) -> None:
        """Checks the ranges."""
        start = self.scale_start
        known = start in ("measure", "keep") if isinstance(start, str) else 0 < start <= 100
        require(known, "objective.scale_start", start, "a number in (0, 100], 'measure' or 'keep'")
        sides = [f"{kind}_{side}" for kind in ("flops", "target") for side in ("image", "text")]
        most = dict.fromkeys((*sides, "flops_ramp_steps", "caption_loss_weight"), math.inf)
        for name, limit in (most | {"masked_loss_weight": 1.0, "negative_slope": 1.0}).items():
            value, least = getattr(self, name), int(name.startswith("target"))
            valid = value is None or (least <= value <= limit and math.isfinite(value))
            require(valid, f"objective.{name}", value, f"a finite number from {least} to {limit:g}")
        budgets = self.image_budgets
        valid = budgets is None or (len(budgets) == 2 and 1 <= budgets[0] <= budgets[1])
        require(valid, "objective.image_budgets", budgets, "null, or [least, most] from 1 up")
        allowed = "above 0 with caption_loss_weight, so that inactive terms have a gradient"
        require(not self.caption_loss_weight or self.negative_slope > 0, "objective.negative_slope", 0.0, allowed)


@dataclass
class Objective(TextObjective):
    """The loss of a stage that trains both encoders.

    Args:
        similarity, scale_start, regulariser, target_text, flops_text, flops_ramp_steps, flops_text_form,
            masked_loss_weight: as in `TextObjective`.
        target_image: active terms of an image with the regulariser `target`; at least 1.
        flops_image: λ of the image embeddings.
        negative_slope: LeakyReLU slope of an image's in-caption terms, in training only; 0 (the paper) to 1. ReLU gives
            inactive terms no gradient: a term that is inactive for every image cannot recover.
        caption_loss_weight: c, the weight of the caption loss (`stair.losses.caption_loss`); at least 0. Needs a
            `negative_slope` above 0. With `data.join_captions`, the loss covers several captions of an image.
        image_budgets: [least, most]. In half of the steps, the contrastive loss uses only the k heaviest terms of each
            image, so that pruned images keep more of the recall (nested budgets, as in Matryoshka and CSR). k is drawn
            from least to most, uniformly in log k. None (the paper): all terms.
    """

    target_image: float = 64.0  # type: ignore[misc]
    flops_image: float = 1e-3  # type: ignore[misc]
    negative_slope: float = 0.0  # type: ignore[misc]
    caption_loss_weight: float = 0.0  # type: ignore[misc]
    image_budgets: list[int] | None = None  # type: ignore[misc]


class StairStage(ContrastiveModule):
    """One training stage.

    Args:
        stair: the model. Its weights come from the previous stage, if there is one.
        objective: the loss.
        optimizer: the optimizer and its schedule.
        layout: `micro_batch_size`, `recompute` and `compile`, see `ContrastiveModule`.

    Attributes:
        weights: weight of each contrastive term by the text form it compares, greatest first; terms of weight 0 are absent.

    Raises:
        SettingError: if `objective.masked_loss_weight` turns the stage into another one.
    """

    stage: ClassVar[int]
    export_name = "stair"
    text_form: ClassVar[Literal["masked", "full"]] = "full"

    def __init__(self, stair: StairDesign, objective: Objective, optimizer: Optimizer, **layout: Any) -> None:
        start = None if isinstance(objective.scale_start, str) else objective.scale_start
        super().__init__(optimizer, start, **layout)
        # set by the stage, so the settings of `stair` do not have them
        by_stage = {"similarity": objective.similarity, "text_form": self.text_form}
        self.stair = Stair(StairConfig(**{**vars(stair), **by_stage}))
        self.objective = objective
        masked = self.text_form == "masked"
        weight = float(masked) if objective.masked_loss_weight is None else objective.masked_loss_weight
        allowed = "above 0; to train without a mask, start with stage 3" if masked else "below 1, or run stage 1"
        require(weight != float(not masked), "objective.masked_loss_weight", weight, f"null, or {allowed}")
        weights = {"text_masked": weight, "text_full": 1 - weight}
        self.weights = {name: w for name, w in sorted(weights.items(), key=lambda item: -item[1]) if w > 0}
        self._evaluated = f"text_{self.text_form}"
        self._regularised = f"text_{objective.flops_text_form or self.text_form}"
        target = objective.regulariser == "target"
        self.regulariser_image = TargetTerms(objective.target_image) if target else Flops()
        self.regulariser_text = TargetTerms(objective.target_text) if target else Flops()

    def embed(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds one micro-batch: in training `image_BV` and the text forms that the loss needs, see `Stair.forward`."""
        if not self.training:
            return super().embed(pixels, ids, mask)
        forms = {*self.weights, self._evaluated, self._regularised}
        slope = 0.0 if "image" in self.frozen else self.objective.negative_slope
        encoded: dict[str, Tensor] = self.stair(pixels, ids, mask, forms, slope)
        return encoded

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: encode, compare with all ranks, regularise. Returns and logs the parts by name."""
        encoded, cosine = self.encode(batch), self.stair.similarity == "cosine"
        signed_BV, image_BV = encoded["image_BV"], encoded["image_BV"].relu()
        texts = [encoded[name] for name in self.weights]
        if self.trainer.global_step == 0 and batch_idx == 0 and self.objective.scale_start == "measure":
            self._measure_scale(signed_BV, texts[0], cosine)
        compared_BV = self._compared(signed_BV)
        parts = dict(zip(self.weights, info_nces(compared_BV, texts, self.stair.scale, cosine), strict=True))
        contrastive = torch.stack([w * parts[name].loss for name, w in self.weights.items()]).sum()
        pair_loss_B = torch.stack([w * parts[name].pair_loss_B for name, w in self.weights.items()]).sum(0)
        rising = ramp(self.trainer.global_step, self.objective.flops_ramp_steps)
        logged = {
            "contrastive": contrastive,
            "lambda_image": rising * self.objective.flops_image * self.regulariser_image.factor,
            "lambda_text": rising * self.objective.flops_text * self.regulariser_text.factor,
            "flops_image": self.regulariser_image(image_BV, rising),
            "flops_text": self.regulariser_text(encoded[self._regularised], rising),
            **{f"contrastive_{name.removeprefix('text_')}": part.loss for name, part in parts.items()},
            "logit_std": next(iter(parts.values())).logit_std,  # of the term with the greatest weight
        }
        sparsity = (logged[f"lambda_{side}"] * logged[f"flops_{side}"] for side in ("image", "text"))
        logged["loss"] = sum(sparsity, contrastive)
        if self.objective.caption_loss_weight > 0:
            in_caption_BV = self.stair.vocabulary.in_caption_terms(batch["ids"], batch["mask"])
            logged["caption"] = caption_loss(signed_BV, in_caption_BV)
            logged["loss"] = logged["loss"] + self.objective.caption_loss_weight * logged["caption"]
        return self.report(logged, {**encoded, "image_BV": image_BV, "text_CV": encoded[self._evaluated]}, pair_loss_B)

    def _compared(self, signed_BV: Tensor) -> Tensor:
        """The images that the contrastive loss compares: all ranks draw the same budget."""
        if self.objective.image_budgets is None or (draw := random.Random(self.trainer.global_step)).random() < 0.5:
            return signed_BV
        least, most = map(math.log, self.objective.image_budgets)
        return within_budget(signed_BV, round(math.exp(draw.uniform(least, most))))

    def _measure_scale(self, image_BV: Tensor, text_BV: Tensor, cosine: bool) -> None:
        one = torch.ones(1, device=self.device)
        deviation = info_nce(image_BV.detach(), text_BV.detach(), one, cosine).logit_std
        if not deviation.isfinite():  # a scale made of it would never be a number again
            raise TrainingError("the first batch's logits are not finite: give trainer.precision bf16-mixed or 32-true")
        self.set_scale(1.0 / max(float(deviation), 1e-6))

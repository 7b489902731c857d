"""What all stages share: the model and the loss. A stage's own page says only what differs.

`L = InfoNCE(image, text) + r(t) · (λ_image · FLOPs(image) + λ_text · FLOPs(text))`   (STAIR, section 2)

With `own_words_share` s, InfoNCE is `(1 - s) · InfoNCE(image, text) + s · InfoNCE(image, text cut to own words)`. [ours]

B images, C captions (C = B in training), V words.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.losses import info_nce, info_nces, ramp
from stair.model import Stair, StairConfig, StairDesign
from stair.regularisers import regulariser


@dataclass
class Objective:
    """The loss of a stage.

    Args:
        similarity: `dot` of the weights, or `cosine`.
        scale_start: start of the learnable scale (inverse temperature): a number; `measure` sets it so that the first
            batch's scaled logits, with that form of the texts that weighs most, have the spread `first_logit_std`; `keep`
            carries over the previous stage's.
        first_logit_std: wanted standard deviation of the first batch's logits; 0.3 to 1.5 trains, above 2.2 collapses.
        regulariser: what λ weighs (`stair.regularisers`): `flops`, the paper's; `l1`; `df_flops`, which spares rare words;
            `overuse`, which weighs words by their share of all use; `target`, FLOPs with λ adapted so that
            `target_image` and `target_text` words are active, λ below being where it starts.
        target_image: wanted active words of an image, of the regulariser `target`.
        target_text: the same of a text.
        flops_image: λ of the image embeddings, whatever the regulariser.
        flops_text: λ of the text embeddings.
        flops_ramp_steps: optimiser steps over which λ grows quadratically from 0; 0 for none.
        flops_text_words: which of a text's words λ_text weighs on in the masked stage. `own`: what the mask lets through,
            the paper's form. `all`: as if there were no mask, so that words outside it have a gradient; costs a full text
            head, and with a hard mask learned sentences far more slowly (docs/experiments.md).
        own_words_share: how much of the contrastive loss is that of texts cut to their own words; the rest is that of all
            words. None is the paper's form: 1 in stage 1, 0 in stages 2 and 3. Below 1 in stage 1, in (0, 1], the mask is
            soft: images keep words that no caption holds yet. Above 0 in stages 2 and 3, in [0, 1), what stage 1 taught
            words goes on being taught (docs/paper.md).
        own_words_leak: slope below zero, while training, of what an image weighs the words of its caption; the rest of its
            words keep ReLU, and so does whatever is saved, regularised or measured. ReLU has no gradient where a word is
            off: one that is off for every image never comes back, and under the mask most words end so where towers start
            from scratch (docs/results.md). 0, the paper's form, to 1.
    """

    similarity: Literal["dot", "cosine"] = "dot"
    scale_start: float | Literal["measure", "keep"] = "measure"
    first_logit_std: float = 1.0
    regulariser: Literal["flops", "l1", "df_flops", "overuse", "target"] = "flops"
    target_image: float = 64.0
    target_text: float = 32.0
    flops_image: float = 1e-3
    flops_text: float = 1e-3
    flops_ramp_steps: int = 0
    flops_text_words: Literal["own", "all"] = "own"
    own_words_share: float | None = None
    own_words_leak: float = 0.0

    def __post_init__(self) -> None:
        """Refuses values that cannot train."""
        if isinstance(self.scale_start, str) and self.scale_start not in ("measure", "keep"):
            raise ValueError(f"objective.scale_start is {self.scale_start!r}; give a number, 'measure' or 'keep'")
        if not isinstance(self.scale_start, str) and not 0 < self.scale_start <= 100:
            raise ValueError(f"objective.scale_start is {self.scale_start}; the scale lies in (0, 100]")
        if not all(0 <= each < math.inf for each in (self.flops_image, self.flops_text, self.flops_ramp_steps)):
            raise ValueError("objective.flops_image, flops_text and flops_ramp_steps must be finite and not negative")
        if not 0 < self.first_logit_std < math.inf:
            raise ValueError(f"objective.first_logit_std is {self.first_logit_std}; give a number above 0, such as 1")
        if self.own_words_share is not None and not 0 <= self.own_words_share <= 1:
            raise ValueError(f"objective.own_words_share is {self.own_words_share}; give a share from 0 to 1, or null")
        if not 0 <= self.own_words_leak <= 1:
            raise ValueError(f"objective.own_words_leak is {self.own_words_leak}; give a slope from 0 (none) to 1")


class StairStage(ContrastiveModule):
    """One training stage.

    Args:
        stair: the model; its weights come from the previous stage where there is one.
        objective: the loss.
        optimizer: how parameters move.
        micro_batch_size: pairs encoded at a time on a device, None for all; see `ContrastiveModule`.
        recompute: compute blocks and heads again backwards instead of keeping their activations.
        compile: backend of torch.compile for the towers' blocks, such as `inductor`; None does not compile.
    """

    stage: ClassVar[int]
    hand_over = "stair"
    text_words: ClassVar[Literal["own", "all"]] = "all"

    def __init__(
        self,
        stair: StairDesign,
        objective: Objective,
        optimizer: Optimizer,
        micro_batch_size: int | None = None,
        recompute: bool = False,
        compile: str | None = None,
    ) -> None:
        start = objective.scale_start
        start = None if isinstance(start, str) else start
        super().__init__(optimizer, start, micro_batch_size, recompute, compile)
        # set by the stage, so the settings of `stair` do not have them
        trained = {"similarity": objective.similarity, "text_words": self.text_words}
        self.stair = Stair(StairConfig(**{**vars(stair), **trained}))
        self.objective = objective
        self._compared = self._forms(objective.own_words_share)
        words, kind = len(self.stair.vocabulary), objective.regulariser
        self.regulariser_image = regulariser(kind, words, objective.target_image)
        self.regulariser_text = regulariser(kind, words, objective.target_text)

    @classmethod
    def _forms(cls, own: float | None) -> dict[str, tuple[str, float]]:
        """The forms of a text that are compared, heaviest first: where `embed` puts them, and their share of the loss."""
        masked = cls.text_words == "own"
        share = float(masked) if own is None else own
        if share == float(not masked):
            way = "above 0, or leave the mask out and begin with stage 3" if masked else "below 1, or run stage 1"
            raise ValueError(
                f"objective.own_words_share is {own} in stage {cls.stage}: give a share {way}; null is the paper's form"
            )
        places = ("text_CV", "text_unmasked_CV") if masked else ("text_own_CV", "text_CV")
        forms = {"own": (places[0], share), "all": (places[1], 1 - share)}
        heaviest_first = sorted(forms.items(), key=lambda item: -item[1][1])
        return {name: form for name, form in heaviest_first if form[1] > 0}

    @property
    def compared(self) -> list[str]:
        """The forms of a text that the loss compares, heaviest first: `own`, cut to its own words, and `all`."""
        return list(self._compared)

    @classmethod
    def home(cls) -> str:
        """`stage1`, `stage2` or `stage3`."""
        return f"stage{cls.stage}"

    @property
    def towers(self) -> Stair:
        """The STAIR model."""
        return self.stair

    def embed(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds one micro-batch.

        With `text_unmasked_CV` where the mask is soft or λ_text weighs on more than it lets through, `text_own_CV` where
        unmasked texts are also compared by their own words alone, and `image_leaky_BV` where own words leak.
        """
        wanted = {place for place, _ in self._compared.values()} if self.training else set()
        if self.training and self.text_words == "own" and self.objective.flops_text_words != "own":
            wanted.add("text_unmasked_CV")
        leak = self.objective.own_words_leak if self.training and "image" not in self.frozen else 0.0
        encoded: dict[str, Tensor] = self.stair(pixels, ids, mask, wanted, leak)
        return encoded

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: encode, compare with all ranks, regularise. Returns and logs the parts by name."""
        encoded = self.encode(batch)
        images = "image_leaky_BV" if "image_leaky_BV" in encoded else "image_BV"
        image_BV, cosine = encoded[images], self.stair.similarity == "cosine"
        main, *others = self._compared
        if self.trainer.global_step == 0 and batch_idx == 0 and self.objective.scale_start == "measure":
            sides = (side.detach() for side in (image_BV, encoded[self._compared[main][0]]))
            spread = info_nce(*sides, torch.ones(1, device=self.device), cosine).logit_std
            if not spread.isfinite():  # a scale made of it would never be a number again
                raise RuntimeError(
                    "the first batch's logits are not finite, so objective.scale_start cannot be measured: give "
                    "trainer.precision bf16-mixed or 32-true, or start from other weights"
                )
            self.set_scale(self.objective.first_logit_std / max(float(spread), 1e-6))
        texts = [encoded[place] for place, _ in self._compared.values()]
        losses = dict(zip(self._compared, info_nces(image_BV, texts, self.stair.scale, cosine), strict=True))
        compared = torch.stack([share * losses[form].loss for form, (_, share) in self._compared.items()]).sum()
        rising = ramp(self.trainer.global_step, self.objective.flops_ramp_steps)
        lambda_image = rising * self.objective.flops_image * self.regulariser_image.factor
        lambda_text = rising * self.objective.flops_text * self.regulariser_text.factor
        cost_image = self.regulariser_image(encoded["image_BV"], rising)
        # a soft mask has the unmasked text too, which λ_text weighs on only where asked
        weighed = "text_unmasked_CV" if self.objective.flops_text_words == "all" else "text_CV"
        cost_text = self.regulariser_text(encoded.get(weighed, encoded["text_CV"]), rising)
        loss = compared + lambda_image * cost_image + lambda_text * cost_text
        quantity = self.regulariser_image.quantity
        logged = {
            "loss": loss,
            f"{quantity}_image": cost_image,
            f"{quantity}_text": cost_text,
            "lambda_image": lambda_image,
            "lambda_text": lambda_text,
            **{f"contrastive_{form}": losses[form].loss for form in others},
        }
        told = self.report(logged, losses[main], encoded, (images, self._compared[main][0]))
        if "text_unmasked_CV" in encoded:
            told["text_unmasked_CV"] = encoded["text_unmasked_CV"].detach()
        return told

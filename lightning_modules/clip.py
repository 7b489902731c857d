"""The dense baseline: same towers, pairs, loss, batch, schedule and evaluation as the stages, in one run without terms."""

from typing import Any, Literal

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.clip import ClipConfig, DenseClip
from stair.losses import info_nce
from stair.model import StairDesign


class Clip(ContrastiveModule):
    """Dense CLIP (Radford et al. 2021): symmetric InfoNCE of pooled and projected towers, by cosine.

    Args:
        stair: the encoders and the vocabulary, as in the stages; settings of terms have no effect.
        optimizer: the optimizer and its schedule.
        width: values per embedding.
        pooling: `mean` of the positions, or the `class` token.
        scale_start: initial value of the learnable scale (inverse temperature), in (0, 100]; CLIP's 1/0.07.
        layout: `micro_batch_size`, `recompute` and `compile`, see `ContrastiveModule`.

    Raises:
        SettingError, ValueError: if an argument is out of range, or a tower cannot be built.
    """

    export_name = "clip"

    def __init__(
        self,
        stair: StairDesign,
        optimizer: Optimizer,
        width: int = 512,
        pooling: Literal["mean", "class"] = "mean",
        scale_start: float = 1 / 0.07,
        **layout: Any,
    ) -> None:
        super().__init__(optimizer, scale_start, **layout)
        self.clip = DenseClip(ClipConfig(stair.vocabulary, stair.image, stair.text, width, pooling))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: encode, compare with all ranks. Returns and logs the parts by name."""
        encoded = self.encode(batch)
        part = info_nce(encoded["image_BV"], encoded["text_CV"], self.clip.scale, cosine=True)
        logged = {"loss": part.loss, "contrastive": part.loss, "logit_std": part.logit_std}
        return self.report(logged, encoded, part.pair_loss_B)

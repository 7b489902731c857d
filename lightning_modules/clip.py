"""The dense baseline: same towers, pairs, loss, batch, schedule and evaluation as the stages, in one run without words."""

from typing import Any, Literal

from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optimizer import Optimizer
from stair.batch import Batch
from stair.clip import ClipConfig, DenseClip
from stair.errors import SettingError
from stair.losses import info_nce
from stair.model import StairDesign


class Clip(ContrastiveModule):
    """Dense CLIP (Radford et al. 2021): symmetric InfoNCE of pooled and projected towers, by cosine.

    Args:
        stair: the towers and the vocabulary, read from the same files as those of the stages; what it says of words
            (start of biases, `in_caption_margin`) does not concern a dense model.
        optimizer: how parameters move.
        width: numbers in an embedding.
        pooling: `mean` of the positions, or the `class` token.
        scale_start: start of the learnable scale (inverse temperature), in (0, 100]; CLIP's 1/0.07.
        micro_batch_size: pairs encoded at a time on a device, None for all; see `ContrastiveModule`.
        recompute: compute blocks and heads again backwards instead of keeping their activations.
        compile: backend of torch.compile for the towers' blocks, such as `inductor`; None does not compile.

    Raises:
        ValueError: if an argument is out of range, or a tower cannot be built so.
    """

    export_name = "clip"

    def __init__(
        self,
        stair: StairDesign,
        optimizer: Optimizer,
        width: int = 512,
        pooling: Literal["mean", "class"] = "mean",
        scale_start: float = 1 / 0.07,
        micro_batch_size: int | None = None,
        recompute: bool = False,
        compile: str | None = None,
    ) -> None:
        if not 0 < scale_start <= 100:
            raise SettingError(
                f"scale_start is {scale_start}; the scale lies in (0, 100]", "model.init_args.scale_start"
            )
        super().__init__(optimizer, scale_start, micro_batch_size, recompute, compile)
        self.clip = DenseClip(ClipConfig(stair.vocabulary, stair.image, stair.text, width, pooling))

    @classmethod
    def home(cls) -> str:
        """`clip`."""
        return "clip"

    @property
    def towers(self) -> DenseClip:
        """The dense model."""
        return self.clip

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step: encode, compare with all ranks. Returns and logs the parts by name."""
        encoded = self.encode(batch)
        contrastive = info_nce(encoded["image_BV"], encoded["text_CV"], self.clip.scale, cosine=True)
        logged = {"loss": contrastive.loss, "contrastive": contrastive.loss, "logit_std": contrastive.logit_std}
        return self.report(logged, encoded, [(1.0, encoded["image_BV"], encoded["text_CV"])])

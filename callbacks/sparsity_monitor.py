"""Are the embeddings sparse, do both sides activate the same terms, and do the terms fit the image? V terms."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.run_monitor import logs_now
from stair.batch import Batch
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.vocabulary import Vocabulary

_TRAIN = ("image/active_terms", "text/active_terms", "flops_per_pair")


def vocabulary_of(pl_module: LightningModule, image_BV: Tensor | None = None) -> Vocabulary | None:
    """The vocabulary of a STAIR module; None for a dense one, or if the columns of `image_BV` are no terms."""
    vocabulary: Vocabulary | None = getattr(getattr(pl_module, "stair", None), "vocabulary", None)
    fits = vocabulary is None or image_BV is None or image_BV.shape[1] == len(vocabulary)
    return vocabulary if fits else None


class SparsityMonitor(Callback):
    """Logs sparsity in training, and sparsity and grounding at each validation and test (docs/guides/training.md).

    Of training: that of the global batch at every `trainer.log_every_n_steps`. Does nothing for dense models.

    Args:
        terms: K of grounding@K: the number of an image's terms that are compared with its captions; 1 to V.
    """

    def __init__(self, terms: int = 10) -> None:
        self.terms = terms
        self._sets: dict[str, tuple[SparsityStats, Grounding, Expansion]] = {}
        self._informed = False

    def _vocabulary(self, pl_module: LightningModule, image_BV: Tensor) -> Vocabulary | None:
        vocabulary = vocabulary_of(pl_module, image_BV)
        if vocabulary is None and not self._informed:
            self._informed = True
            rank_zero_info("SparsityMonitor: the embeddings have no vocabulary; nothing is measured of terms")
        return vocabulary

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not logs_now(trainer) or (vocabulary := self._vocabulary(pl_module, outputs["image_BV"])) is None:
            return
        stats = SparsityStats(len(vocabulary)).to(pl_module.device)
        stats.update(outputs["image_BV"], outputs["text_CV"])
        figures = stats.compute()
        logged = {f"train/{name}": figures[name] for name in _TRAIN}
        if "text_full" in outputs and "text_masked" in outputs:
            stats.reset()
            stats.update(outputs["image_BV"], outputs["text_full"])
            logged["train/text_full/active_terms"] = stats.compute()["text/active_terms"]
            sums = torch.stack([outputs[form].square().sum() for form in ("text_masked", "text_full")])
            masked, full = trainer.strategy.reduce(sums, reduce_op="sum")
            logged["train/text_full/in_caption_share"] = masked / full
        pl_module.log_dict(logged, batch_size=1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # every set on every rank before a batch is seen: a rank without a batch still takes part in the sums
        if (vocabulary := vocabulary_of(pl_module)) is not None:
            size, device, data = len(vocabulary), pl_module.device, trainer.datamodule
            for name in data.test_names if trainer.testing else data.val_names:
                grounding = Grounding(size, self.terms).to(device)
                self._sets[name] = SparsityStats(size).to(device), grounding, Expansion(size).to(device)

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, number: int = 0
    ) -> None:
        if (vocabulary := self._vocabulary(pl_module, outputs["image_BV"])) is not None:
            stats, grounding, expansion = list(self._sets.values())[number]
            ids = batch["image_id"], batch["caption_image"]
            in_caption_CV = vocabulary.in_caption_terms(batch["ids"], batch["mask"])
            stats.update(outputs["image_BV"], outputs["text_CV"], *ids)
            grounding.update(outputs["image_BV"], in_caption_CV, *ids)
            expansion.update(outputs["text_CV"], in_caption_CV, *ids)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        prefix = "test" if trainer.testing else "val"
        for name, (stats, grounding, expansion) in self._sets.items():
            figures = {f"sparsity/{key}": value for key, value in stats.compute().items()} | grounding.compute()
            figures |= {f"expansion/{key}": value for key, value in expansion.compute().items()}
            if not figures["sparsity/image/active_terms"].isnan():  # NaN: no rank had an embedding made of terms
                # NaN too: what needs several captions an image
                known = {f"{prefix}/{name}/{key}": value for key, value in figures.items() if not value.isnan()}
                pl_module.log_dict(known, batch_size=1)
        self._sets = {}

    on_test_epoch_end = on_validation_epoch_end

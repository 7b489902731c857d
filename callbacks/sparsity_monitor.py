"""Are the embeddings sparse, do both sides activate the same terms, and do the terms mean what they say?

The three ways in which a sparse model goes wrong without a sign in the loss: too many terms active, the same terms always
active on both sides, terms that have nothing to do with the image. Everything is exact over ranks (stair/metrics.py).

V terms.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.run_monitor import logs_now
from stair.batch import Batch
from stair.grounding import Expansion, Grounding
from stair.metrics import SparsityStats
from stair.vocabulary import Vocabulary

_TRAIN = ("image/active_terms", "text/active_terms", "flops_per_pair")


def vocabulary_of(pl_module: L.LightningModule) -> Vocabulary | None:
    """The vocabulary of a STAIR module; None for a dense one."""
    return getattr(getattr(pl_module, "stair", None), "vocabulary", None)


def words_of(pl_module: L.LightningModule, image_BV: Tensor) -> Vocabulary | None:
    """The vocabulary whose terms the columns of an embedding are; None if they are no terms."""
    vocabulary = vocabulary_of(pl_module)
    return vocabulary if vocabulary is not None and image_BV.shape[1] == len(vocabulary) else None


class SparsityMonitor(L.Callback):
    """Logs sparsity in training, sparsity and grounding at each validation and test. Does nothing for dense models.

    - At every `trainer.log_every_n_steps`, of the global batch: `train/image/active_terms`,
      `train/text/active_terms` of the text as in evaluation, `train/flops_per_pair`; where the loss compares both
      forms of the text, `train/text_full/active_terms` and `train/text_full/in_caption_share`, the share of in-caption
      terms in the squared length of the full text.
    - Of each evaluation set, under `val/` or `test/`: `<set>/sparsity/<figure>` (the figures of `SparsityStats`),
      `<set>/grounding@10`, `grounding@1` and `grounding@10_baseline`, the same for the commonest caption words, which is
      the figure to beat; `<set>/expansion/<figure>` (the figures of `Expansion`).

    Args:
        words: K of grounding@K, the terms of an image that are compared with its captions; 1 to V.
    """

    def __init__(self, words: int = 10) -> None:
        self.words = words
        self._sets: dict[str, tuple[SparsityStats, Grounding, Expansion]] = {}
        self._informed = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: dict[str, Any], batch: Batch, batch_idx: int
    ) -> None:
        """Logs the sparsity of this step's batch, all ranks together."""
        if not logs_now(trainer, batch_idx) or (vocabulary := self._words(pl_module, outputs["image_BV"])) is None:
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

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the metrics of every validation set."""
        self._begin([] if trainer.sanity_checking else trainer.datamodule.val_names, pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Makes the metrics of every test set."""
        self._begin(trainer.datamodule.test_names, pl_module)

    def _begin(self, names: list[str], pl_module: L.LightningModule) -> None:
        # on every rank for every set, before a batch is seen: a rank without a batch still has to take part in the sums
        if (vocabulary := vocabulary_of(pl_module)) is None:
            return
        size, device = len(vocabulary), pl_module.device
        for name in names:
            metrics = SparsityStats(size).to(device), Grounding(size, self.words).to(device), Expansion(size).to(device)
            self._sets[name] = metrics

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch to the figures of its set."""
        vocabulary = self._words(pl_module, outputs["image_BV"])
        if vocabulary is None or trainer.sanity_checking:
            return
        stats, grounding, expansion = list(self._sets.values())[dataloader_idx]
        ids = batch["image_id"], batch["caption_image"]
        stats.update(outputs["image_BV"], outputs["text_CV"], *ids)
        in_caption_CV = vocabulary.in_caption_terms(batch["ids"], batch["mask"])
        grounding.update(outputs["image_BV"], in_caption_CV, *ids)
        expansion.update(outputs["text_CV"], in_caption_CV, *ids)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures of every validation set."""
        self._log("val", pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures of every test set."""
        self._log("test", pl_module)

    def _log(self, prefix: str, pl_module: L.LightningModule) -> None:
        for name, (stats, grounding, expansion) in self._sets.items():
            figures = {f"sparsity/{key}": value for key, value in stats.compute().items()} | grounding.compute()
            figures |= {f"expansion/{key}": value for key, value in expansion.compute().items()}
            if not figures["sparsity/image/active_terms"].isnan():  # NaN: no rank had an embedding made of terms
                pl_module.log_dict({f"{prefix}/{name}/{key}": value for key, value in figures.items()}, batch_size=1)
        self._sets = {}

    def _words(self, pl_module: L.LightningModule, image_BV: Tensor) -> Vocabulary | None:
        vocabulary = words_of(pl_module, image_BV)
        if vocabulary is None and not self._informed:
            self._informed = True
            rank_zero_info("SparsityMonitor: the embeddings have no vocabulary; nothing is measured of terms")
        return vocabulary

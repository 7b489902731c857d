"""The same few validation images at every validation, with the words the model says of them: what figures hide.

A word that is in the image's captions is drawn in colour, so that grounding can be seen and not only counted.

B images and C captions of a batch, K words shown, V words.
"""

import math
import re
import textwrap
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.sparsity_monitor import words_of
from stair.batch import Batch
from stair.errors import check_settings
from stair.plain import escape
from stair.vocabulary import Vocabulary

_COLUMNS = 4
_WIDTH, _HEIGHT = 336, 192  # of a panel, in pixels
_FOUND, _OTHER = "#2ca02c", "#7f7f7f"


class _Panel(NamedTuple):
    """One image: (H, W, 3) uint8 pixels, captions, and words as (word, weight, whether a caption has it)."""

    pixels: np.ndarray
    captions: list[str]
    words: list[tuple[str, float, bool]]


class RetrievalPanels(L.Callback):
    """Shows validation images with their strongest words in TensorBoard: `val/<set>/panels` (picture, text).

    The images are the first of the first validation set on rank 0, so they stay the same from step to step. Does
    nothing without a TensorBoard logger, or for a model without a vocabulary.

    Args:
        images: how many; 0 for none.
        words: K, how many words of each, strongest first; fewer where fewer are active. At least 1.

    Raises:
        SettingError: if an argument is out of range.
    """

    def __init__(self, images: int = 16, words: int = 10) -> None:
        self.images, self.words = images, words
        check_settings(
            "panels", self, {"images": images >= 0, "words": words >= 1}, "images from 0 up, words from 1 up"
        )
        self._panels: list[_Panel] = []
        self._informed = False

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins anew."""
        self._panels = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: dict[str, Tensor],
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first images of the first set."""
        wanted = self.images - len(self._panels)
        if trainer.sanity_checking or not trainer.is_global_zero or dataloader_idx != 0 or wanted <= 0:
            return
        vocabulary = words_of(pl_module, outputs["image_BV"])
        if vocabulary is None or not _tensorboards(trainer):
            if not self._informed:
                self._informed = True
                rank_zero_info("RetrievalPanels: no panels without a TensorBoard logger and a model with a vocabulary")
            return
        rows = (batch["image_id"] >= 0).nonzero().flatten().tolist()[:wanted]
        self._panels += [_panel(row, outputs["image_BV"], batch, vocabulary, self.words) for row in rows]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws what was kept."""
        if not self._panels:
            return
        tag, picture, table = f"val/{trainer.datamodule.val_names[0]}/panels", _draw(self._panels), _table(self._panels)
        for board in _tensorboards(trainer):
            board.add_image(tag, picture, trainer.global_step, dataformats="HWC")
            board.add_text(tag, table, trainer.global_step)
        self._panels = []


def _tensorboards(trainer: L.Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _panel(row: int, image_BV: Tensor, batch: Batch, vocabulary: Vocabulary, k: int) -> _Panel:
    own_C = batch["caption_image"] == batch["image_id"][row]
    ids, mask = batch["ids"][own_C], batch["mask"][own_C]
    held_V = vocabulary.in_caption_terms(ids, mask).any(0)
    top_K = image_BV[row].float().topk(min(k, image_BV.shape[1]))
    words = [
        (vocabulary.tokens[v], weight, bool(held_V[v]))
        for weight, v in zip(top_K.values.tolist(), top_K.indices.tolist(), strict=True)
        if weight > 0
    ]
    never = set(vocabulary.never_active)
    captions = [
        " ".join(vocabulary.tokens_of(i for i in caption[real].tolist() if i not in never)).replace(" ##", "")
        for caption, real in zip(ids, mask, strict=True)
    ]
    return _Panel(batch["pixels"][row].permute(1, 2, 0).cpu().numpy(), captions, words)


def _draw(panels: list[_Panel]) -> np.ndarray:
    """(H, W, 3) uint8: for each image its picture under its first caption, and bars for its words with their weights."""
    columns, font = min(_COLUMNS, len(panels)), ImageFont.load_default(10)
    sheet = Image.new("RGB", (columns * _WIDTH, math.ceil(len(panels) / columns) * _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for place, panel in enumerate(panels):
        x, y = place % columns * _WIDTH, place // columns * _HEIGHT
        title = textwrap.fill(next(iter(panel.captions), ""), 50, max_lines=2, placeholder=" …")
        draw.text((x + 10, y + 8), title, "black", font)
        sheet.paste(Image.fromarray(panel.pixels).resize((140, 140)), (x + 10, y + 38))
        heaviest = max((weight for _, weight, _ in panel.words), default=1)
        for number, (word, weight, found) in enumerate(panel.words):
            middle, half = y + 38 + 140 * (number + 0.5) / len(panel.words), 55 / len(panel.words)
            end = x + 225 + 75 * weight / heaviest
            draw.rectangle((x + 225, middle - half, end, middle + half), _FOUND if found else _OTHER)
            draw.text((x + 221, middle), word, "black", font, anchor="rm")
            draw.text((end + 3, middle), f"{weight:.2f}", "gray", font, anchor="lm")
    return np.asarray(sheet)


def _table(panels: list[_Panel]) -> str:
    """Markdown: captions and words of each image with their weights, bold where a caption has the word."""
    lines = ["| captions | words |", "|---|---|"]
    for panel in panels:
        words = [
            f"**{_escape(word)}** {w:.2f}" if found else f"{_escape(word)} {w:.2f}" for word, w, found in panel.words
        ]
        lines.append(f"| {'<br>'.join(map(_escape, panel.captions))} | {', '.join(words)} |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Text that is neither markup nor markdown: both are drawn by the browser of whoever looks."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$])", r"\\\1", escape(text))

"""The same few validation images at every validation, with their strongest terms. B images, C captions, K of V terms."""

import math
import re
import textwrap
from typing import Any, NamedTuple

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from callbacks.sparsity_monitor import vocabulary_of
from stair.batch import Batch
from stair.errors import require
from stair.plain import escape
from stair.vocabulary import Vocabulary

_COLUMNS = 4
_WIDTH, _HEIGHT = 336, 192  # of a panel, in pixels
_IN_CAPTION, _OTHER = "#1f7a6d", "#d9a441"  # as in stair/pages/style.css


class _Panel(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8
    captions: list[str]
    terms: list[tuple[str, float, bool]]  # term, weight, whether a caption has it


class RetrievalPanels(Callback):
    """Shows validation images with their heaviest terms in TensorBoard: `val/<set>/panels` (image and text).

    The images are the first of the first validation set on rank 0, the same at every step. Does nothing without a
    TensorBoard logger, or for a model without a vocabulary.

    Args:
        images: number of images; 0 for none.
        terms: number of terms per image, heaviest first; at least 1.

    Raises:
        SettingError: if an argument is out of range.
    """

    def __init__(self, images: int = 16, terms: int = 10) -> None:
        self.images, self.terms = images, terms
        require(images >= 0, "panels.images", images, "0 or more")
        require(terms >= 1, "panels.terms", terms, "1 or more")
        self._panels: list[_Panel] = []
        self._informed = False

    def on_validation_epoch_start(self, *args: Any) -> None:
        self._panels = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        set_number: int = 0,
    ) -> None:
        missing = self.images - len(self._panels)
        if trainer.sanity_checking or not trainer.is_global_zero or set_number != 0 or missing <= 0:
            return
        vocabulary = vocabulary_of(pl_module, outputs["image_BV"])
        if vocabulary is not None and _boards(trainer):
            rows = (batch["image_id"] >= 0).nonzero().flatten().tolist()[:missing]
            self._panels += [_panel(row, outputs["image_BV"], batch, vocabulary, self.terms) for row in rows]
        elif not self._informed:
            self._informed = True
            rank_zero_info("RetrievalPanels: no panels without a TensorBoard logger and a model with a vocabulary")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for board in _boards(trainer) if self._panels else ():
            tag = f"val/{trainer.datamodule.val_names[0]}/panels"
            board.add_image(tag, _draw(self._panels), trainer.global_step, dataformats="HWC")
            board.add_text(tag, _table(self._panels), trainer.global_step)


def _boards(trainer: Trainer) -> list[Any]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _panel(row: int, image_BV: Tensor, batch: Batch, vocabulary: Vocabulary, k: int) -> _Panel:
    own_C = batch["caption_image"] == batch["image_id"][row]
    ids, mask = batch["ids"][own_C], batch["mask"][own_C]
    in_caption_V = vocabulary.in_caption_terms(ids, mask).any(0)
    top_K = image_BV[row].float().topk(min(k, image_BV.shape[1]))
    top = zip(top_K.indices.tolist(), top_K.values.tolist(), strict=True)
    terms = [(vocabulary.tokens[v], weight, bool(in_caption_V[v])) for v, weight in top if weight > 0]
    never = set(vocabulary.never_active)
    captions = [
        " ".join(vocabulary.tokens_of(i for i in caption[real].tolist() if i not in never)).replace(" ##", "")
        for caption, real in zip(ids, mask, strict=True)
    ]
    return _Panel(batch["pixels"][row].permute(1, 2, 0).cpu().numpy(), captions, terms)


def _draw(panels: list[_Panel]) -> np.ndarray:
    """(H, W, 3) uint8: each image under its first caption, beside its terms as bars."""
    columns, font = min(_COLUMNS, len(panels)), ImageFont.load_default(10)
    sheet = Image.new("RGB", (columns * _WIDTH, math.ceil(len(panels) / columns) * _HEIGHT), "white")
    draw = ImageDraw.Draw(sheet)
    for n, panel in enumerate(panels):
        x, y = n % columns * _WIDTH, n // columns * _HEIGHT
        title = textwrap.fill(next(iter(panel.captions), ""), 50, max_lines=2, placeholder=" …")
        draw.text((x + 10, y + 8), title, "black", font)
        sheet.paste(Image.fromarray(panel.pixels).resize((140, 140)), (x + 10, y + 38))
        for m, (term, weight, in_caption) in enumerate(panel.terms):
            middle, half = y + 38 + 140 * (m + 0.5) / len(panel.terms), 55 / len(panel.terms)
            end = x + 225 + 75 * weight / panel.terms[0][1]
            draw.rectangle((x + 225, middle - half, end, middle + half), _IN_CAPTION if in_caption else _OTHER)
            draw.text((x + 221, middle), term, "black", font, anchor="rm")
            draw.text((end + 3, middle), f"{weight:.2f}", "gray", font, anchor="lm")
    return np.asarray(sheet)


def _table(panels: list[_Panel]) -> str:
    """Markdown: captions and terms of each image with their weights, bold where a caption has the term."""
    lines = ["| captions | terms |", "|---|---|"]
    for panel in panels:
        terms = [f"{'**' * held}{_escape(term)}{'**' * held} {weight:.2f}" for term, weight, held in panel.terms]
        lines.append(f"| {'<br>'.join(map(_escape, panel.captions))} | {', '.join(terms)} |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Text that is neither markup nor markdown: the viewer's browser renders both."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~$])", r"\\\1", escape(text))

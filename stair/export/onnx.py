"""ONNX: both encoders, from pixels or ids to the non-zero words, all of it inside the graph.

`image.onnx` takes `pixels` (B, 3, S, S) uint8, cropped and resized as `stair.images.eval_pixels` does; `text.onnx` takes
`ids` (B, T) int64 and `mask` (B, T) bool. Both return `row`, `word` (N,) int64 and `weight` (N,) float32: the coordinates
of the N non-zeros, rows ascending, words ascending within a row.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stair.errors import import_extra
from stair.export.target import engine_errors, new_target
from stair.head import VocabularyHead
from stair.model import Stair


class _Words(nn.Module):
    """The head in operators that ONNX has: the fused one is a function of its own, with a backward pass.

    Args:
        head: whose weights.
        never: (V,) bool, words that stay zero.
        others_behind: how far words that are not the row's own are lowered; None leaves them zero.
    """

    allowed: Tensor

    def __init__(self, head: VocabularyHead, never: Tensor, others_behind: float | None = 0.0) -> None:
        super().__init__()
        self.head, self.others_behind = head, others_behind
        self.register_buffer("allowed", (~never).float())

    def forward(
        self, hidden_BTD: Tensor, mask_BT: Tensor, own_BV: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_BTE = self.head.norm(nn.functional.gelu(self.head.dense(hidden_BTD)))
        logits_BTV = hidden_BTE @ self.head.words.T
        highest_BV = logits_BTV.masked_fill(~mask_BT[..., None], -1e30).amax(dim=1) + self.head.bias
        if own_BV is not None and self.others_behind:
            highest_BV = highest_BV - self.others_behind * (1 - own_BV)
        weight_BV = torch.log1p(torch.relu(highest_BV)) * self.allowed
        if own_BV is not None and self.others_behind is None:
            weight_BV = weight_BV * own_BV
        place = weight_BV.nonzero()
        return place[:, 0], place[:, 1], weight_BV[place[:, 0], place[:, 1]]


class ImageGraph(nn.Module):
    """Pixels to non-zero words.

    Args:
        model: whose image side.
    """

    def __init__(self, model: Stair) -> None:
        super().__init__()
        self.encoder, self.words = model.image_encoder, _Words(model.image_head, _never(model))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the module."""
        hidden_BTD = self.encoder(pixels.float() / 255)
        everywhere_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool)
        found: tuple[Tensor, Tensor, Tensor] = self.words(hidden_BTD, everywhere_BT)
        return found


class TextGraph(nn.Module):
    """Ids to non-zero words.

    Args:
        model: whose text side.
    """

    def __init__(self, model: Stair) -> None:
        super().__init__()
        behind = None if model.config.text_form == "masked" else model.config.in_caption_margin
        self.encoder, self.words = model.text_encoder, _Words(model.text_head, _never(model), behind)
        self.size = len(model.vocabulary)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the module."""
        own_BV = torch.zeros(ids.shape[0], self.size).scatter(1, ids, 1.0) if self.words.others_behind != 0 else None
        found: tuple[Tensor, Tensor, Tensor] = self.words(self.encoder(ids, mask), mask, own_BV)
        return found


def _never(model: Stair) -> Tensor:
    never_V = torch.zeros(len(model.vocabulary), dtype=torch.bool)
    never_V[model.vocabulary.never_active] = True
    return never_V


def onnx(model: str, out: Path) -> None:
    """Writes image.onnx, text.onnx, and the tokenizer's files; outputs are the non-zero words, pooling inside.

    Args:
        model: folder of a saved model, or its name on the hub.
        out: a new folder.
    """
    import_extra("onnxscript", "onnxscript", "export")
    with engine_errors("ONNX"), new_target(out, folder=True) as part:
        stair = Stair.from_pretrained(model)
        _write_graphs(stair, part)
        stair.vocabulary.save(part)
        facts = {
            "model": stair.fingerprint,
            "similarity": stair.similarity,
            "image_size": stair.config.image.image_size,
            "max_tokens": stair.config.text.max_tokens,
        }
        (part / "stair.json").write_text(json.dumps(facts, indent=2) + "\n")


def _write_graphs(stair: Stair, out: Path) -> None:
    size, tokens = stair.config.image.image_size, stair.config.text.max_tokens
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1, max=tokens)
    pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    _write(ImageGraph(stair), (pixels,), {"pixels": {0: batch}}, out / "image.onnx")
    ids, mask = torch.full((2, min(8, tokens)), 5), torch.ones(2, min(8, tokens), dtype=torch.bool)
    shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
    _write(TextGraph(stair), (ids, mask), shapes, out / "text.onnx")


def _write(graph: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, Any], path: Path) -> None:
    torch.onnx.export(
        graph.eval(),
        inputs,
        str(path),
        input_names=list(shapes),
        output_names=["row", "word", "weight"],
        dynamic_shapes=shapes,
        dynamo=True,
        external_data=False,
        verbose=False,
    )

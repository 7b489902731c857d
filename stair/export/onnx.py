"""ONNX: both encoders, from pixels or ids to the non-zero terms, all of it inside the graph.

`image.onnx` takes `pixels` (B, 3, S, S) uint8 of `stair.images.eval_pixels`; `text.onnx` takes `ids` (B, T) int64 and
`mask` (B, T) bool. Both return `row`, `term` (N,) int64 and `weight` (N,) float32 of the N non-zeros, in this order.
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


class _Graph(nn.Module):
    """One side of a model, its head in operators that ONNX has; the fused head is one of our own."""

    active_V: Tensor

    def __init__(self, model: Stair, encoder: nn.Module, head: VocabularyHead) -> None:
        super().__init__()
        self.encoder, self.head, self.config = encoder, head, model.config
        active_V = torch.ones(len(model.vocabulary))
        active_V[model.vocabulary.never_active] = 0
        self.register_buffer("active_V", active_V)

    def _non_zeros(self, hidden_BTD: Tensor, mask_BT: Tensor, lowered_BV: Tensor | float = 0.0) -> tuple[Tensor, ...]:
        hidden_BTE = self.head.norm(nn.functional.gelu(self.head.dense(hidden_BTD)))
        logits_BTV = hidden_BTE @ self.head.word_embeddings.T
        highest_BV = logits_BTV.masked_fill(~mask_BT[..., None], -1e30).amax(dim=1) + self.head.bias
        weight_BV = torch.log1p(torch.relu(highest_BV - lowered_BV)) * self.active_V
        at = weight_BV.nonzero()
        return at[:, 0], at[:, 1], weight_BV[at[:, 0], at[:, 1]]


class _ImageGraph(_Graph):
    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        hidden_BTD = self.encoder(pixels.float() / 255)
        return self._non_zeros(hidden_BTD, torch.ones(hidden_BTD.shape[:2], dtype=torch.bool))


class _TextGraph(_Graph):
    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        # terms outside the caption are lowered by the margin, or to zero
        margin = 1e30 if self.config.text_form == "masked" else self.config.in_caption_margin
        if not margin:
            return self._non_zeros(self.encoder(ids, mask), mask)
        in_caption_BV = torch.zeros(ids.shape[0], len(self.active_V)).scatter(1, ids, 1.0)
        return self._non_zeros(self.encoder(ids, mask), mask, margin * (1 - in_caption_BV))


def onnx(model: str, out: Path) -> None:
    """Writes image.onnx, text.onnx and the tokenizer's files. The graphs include pooling and return the non-zero terms.

    Args:
        model: folder of an exported model, or its name on the hub.
        out: a new folder.
    """
    import_extra("onnxscript", "onnxscript", "export")
    with engine_errors("ONNX"), new_target(out, folder=True) as part:
        stair = Stair.from_pretrained(model)
        size, tokens = stair.config.image.image_size, stair.config.text.max_tokens
        batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=1, max=tokens)
        pixels = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        image = _ImageGraph(stair, stair.image_encoder, stair.image_head)
        _write(image, (pixels,), {"pixels": {0: batch}}, part / "image.onnx")
        ids, mask = torch.full((2, min(8, tokens)), 5), torch.ones(2, min(8, tokens), dtype=torch.bool)
        shapes = {"ids": {0: batch, 1: length}, "mask": {0: batch, 1: length}}
        _write(_TextGraph(stair, stair.text_encoder, stair.text_head), (ids, mask), shapes, part / "text.onnx")
        stair.vocabulary.save(part)
        facts = {"model": stair.fingerprint, "similarity": stair.similarity, "image_size": size, "max_tokens": tokens}
        (part / "stair.json").write_text(json.dumps(facts, indent=2) + "\n")


def _write(graph: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, Any], path: Path) -> None:
    names: dict[str, Any] = {"input_names": list(shapes), "output_names": ["row", "term", "weight"]}
    options: dict[str, Any] = {"dynamic_shapes": shapes, "dynamo": True, "external_data": False, "verbose": False}
    torch.onnx.export(graph.eval(), inputs, str(path), **names, **options)

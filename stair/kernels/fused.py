"""The vocabulary head without its B × T × V tensor, for CPU and GPU alike.

Done plainly, 256 images of 197 patches against 30,522 terms are 1.5 billion numbers. Three observations remove them:

* log(1 + ReLU(·)) is monotone, so the max over positions is taken first and the activation applied to B × V numbers;
* the vocabulary is walked in chunks (reduction.py), so at most N × chunk numbers exist at a time, and padding is left
  out beforehand (packing.py);
* the backward pass uses only the argmax positions of active terms count (backward.py).

B rows, T positions, N = real positions of all rows, packed without padding, D width, V terms, C terms of a chunk.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import stair.kernels.backward as backward
import stair.kernels.packing as packing
import stair.kernels.reduction as reduction

_CHUNK_NUMBERS = 1 << 21  # logits alive at a time on the CPU (8 MB in fp32): a chunk should stay near the cache
_CHUNK_NUMBERS_GPU = 1 << 27  # on a GPU the matrix product wants a wide chunk


def _chunks(ranges: Sequence[tuple[int, int]], positions: int, numbers: int) -> Iterator[slice]:
    width = max(64, numbers // max(1, positions))
    for first, end in ranges:
        for start in range(first, end, width):
            yield slice(start, min(start + width, end))


class _Packed:
    """The form in PyTorch operations for the CPU: positions packed without padding, a running maximum over slots."""

    @staticmethod
    def project(
        hidden_BTD: Tensor, mask_BT: Tensor, weight_VD: Tensor, bias_V: Tensor, ranges: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings, and the slot of each row that reached the maximum."""
        (B, T, _), V = hidden_BTD.shape, len(weight_VD)
        packed = packing.by_slot(mask_BT)
        packed_ND = hidden_BTD.flatten(0, 1)[packed.source_N]
        embedding_BV = bias_V.new_zeros(B, V)
        slot_BV = torch.zeros(B, V, dtype=packing.slot_type(T))
        for chunk in _chunks(ranges, len(packed_ND), _CHUNK_NUMBERS) if len(packed_ND) else ():
            logits_NC = packed_ND @ weight_VD[chunk].T
            reduction.slot_by_slot(logits_NC, packed, bias_V[chunk], embedding_BV[:, chunk], slot_BV[:, chunk])
        return embedding_BV, slot_BV

    @staticmethod
    def gradients(
        grad_BV: Tensor,
        embedding_BV: Tensor,
        slot_BV: Tensor,
        hidden_BTD: Tensor,
        mask_BT: Tensor,
        weight_VD: Tensor,
        ranges: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias."""
        packed = packing.by_slot(mask_BT)
        packed_ND = hidden_BTD.flatten(0, 1)[packed.source_N]
        maxima = backward.Maxima(grad_BV, embedding_BV, slot_BV, packed)
        if backward.few_are_active(embedding_BV, len(packed_ND), packed_ND.dtype):
            grads = backward.sparse_gradients(maxima, packed_ND, weight_VD)
        else:
            chunks = list(_chunks(ranges, len(packed_ND), _CHUNK_NUMBERS))
            grads = backward.dense_gradients(maxima, packed_ND, weight_VD, chunks)
        grad_hidden_BTD = torch.zeros_like(hidden_BTD)
        grad_hidden_BTD.flatten(0, 1)[packed.source_N] = grads[0].to(hidden_BTD.dtype)
        return grad_hidden_BTD, *grads[1:]


class _Padded:
    """The form in PyTorch operations for other devices: nothing waits for the host, whatever the mask."""

    @staticmethod
    def project(
        hidden_BTD: Tensor, mask_BT: Tensor, weight_VD: Tensor, bias_V: Tensor, ranges: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings, and positions that reached the maximum."""
        (B, T, _), V = hidden_BTD.shape, len(weight_VD)
        embedding_BV = bias_V.new_zeros(B, V)
        position_BV = torch.zeros(B, V, dtype=packing.slot_type(T), device=hidden_BTD.device)
        for chunk in _chunks(ranges, B * T, _CHUNK_NUMBERS_GPU):
            logits_BTC = (hidden_BTD @ weight_VD[chunk].T).masked_fill_(~mask_BT[..., None], float("-inf"))
            best_BC, position_BC = logits_BTC.max(dim=1)
            embedding_BV[:, chunk] = torch.log1p(torch.relu(best_BC.to(bias_V.dtype) + bias_V[chunk]))
            position_BV[:, chunk] = position_BC.to(position_BV.dtype)
        return embedding_BV, position_BV

    @staticmethod
    def gradients(
        grad_BV: Tensor,
        embedding_BV: Tensor,
        position_BV: Tensor,
        hidden_BTD: Tensor,
        mask_BT: Tensor,
        weight_VD: Tensor,
        ranges: Sequence[tuple[int, int]],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of hidden states, weight and bias."""
        B, T, D = hidden_BTD.shape
        value_BV = torch.where(embedding_BV == 0, 0, torch.exp(-embedding_BV) * grad_BV)
        grad_hidden_ND = grad_BV.new_zeros(B * T, D)
        grad_weight_VD = grad_BV.new_zeros(weight_VD.shape)
        for chunk in _chunks(ranges, B * T, _CHUNK_NUMBERS_GPU):
            value_BC = value_BV[:, chunk].to(weight_VD.dtype)
            scattered_BTC = value_BC.new_zeros(B, T, value_BC.shape[1])
            scattered_BTC.scatter_(1, position_BV[:, None, chunk].long(), value_BC[:, None])
            grad_hidden_ND += scattered_BTC.flatten(0, 1) @ weight_VD[chunk]
            grad_weight_VD[chunk] = (scattered_BTC.flatten(0, 1).T @ hidden_BTD.flatten(0, 1)).to(grad_BV.dtype)
        return grad_hidden_ND.view(B, T, D), grad_weight_VD, value_BV.sum(0)


def _form(device: torch.device, compute: torch.dtype) -> Any:
    """The form, by a rule rather than a race between forms, so that a resumed run takes the same one."""
    if device.type == "cuda" and compute in (torch.bfloat16, torch.float16) and _has_triton(device):
        import stair.kernels.triton_head as triton_head

        return triton_head
    return _Packed if device.type == "cpu" else _Padded


@functools.cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)  # the copy engine


def refuse_second_derivative() -> None:
    """Raises inside a backward pass that is itself recorded (`create_graph=True`).

    torch's `once_differentiable` stays silent unless the incoming gradient requires a gradient, and then drops terms.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("the vocabulary head and the loss have no second derivative")


# Operators of torch, so that a compiled model is one graph: what is active is known from the numbers only
@torch.library.custom_op("stair::vocabulary_max", mutates_args=())
def _project(
    hidden: Tensor, mask: Tensor, weight: Tensor, rounded: Tensor, bias: Tensor, edges: list[int]
) -> tuple[Tensor, Tensor]:
    """Weights are multiplied as they are `rounded`; the gradient is that of `weight`."""
    form = _form(hidden.device, rounded.dtype)
    return form.project(hidden.to(rounded.dtype), mask, rounded, bias.to(_result(rounded)), _pairs(edges))  # type: ignore[no-any-return]


@_project.register_fake
def _(
    hidden: Tensor, mask: Tensor, weight: Tensor, rounded: Tensor, bias: Tensor, edges: list[int]
) -> tuple[Tensor, Tensor]:
    shape = len(hidden), len(weight)
    return hidden.new_empty(shape, dtype=_result(rounded)), hidden.new_empty(
        shape, dtype=packing.slot_type(hidden.shape[1])
    )


@torch.library.custom_op("stair::vocabulary_max_backward", mutates_args=())
def _gradients(
    grad: Tensor, embedding: Tensor, at: Tensor, hidden: Tensor, mask: Tensor, rounded: Tensor, edges: list[int],
    weight_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    form = _form(hidden.device, rounded.dtype)
    grads = form.gradients(grad, embedding, at, hidden.to(rounded.dtype), mask, rounded, _pairs(edges))
    return grads[0].to(hidden.dtype), grads[1].to(weight_type), grads[2]


@_gradients.register_fake
def _(
    grad: Tensor, embedding: Tensor, at: Tensor, hidden: Tensor, mask: Tensor, rounded: Tensor, edges: list[int],
    weight_type: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_weight = rounded.new_empty(rounded.shape, dtype=weight_type)
    return hidden.new_empty(hidden.shape), grad_weight, grad.new_empty(len(rounded))


def _result(rounded: Tensor) -> torch.dtype:
    return torch.float64 if rounded.dtype is torch.float64 else torch.float32


def _pairs(edges: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(edges[::2], edges[1::2], strict=True))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, mask, weight, rounded, bias, ctx.edges = inputs
    ctx.types = weight.dtype, bias.dtype
    ctx.save_for_backward(*output, hidden, mask, rounded)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative()
    weight_type, bias_type = ctx.types
    grads = _gradients(grad, *ctx.saved_tensors, ctx.edges, weight_type)
    return grads[0], None, grads[1], None, grads[2].to(bias_type), None


_project.register_autograd(_differentiate, setup_context=_save)


def vocabulary_max(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    active_ranges: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Computes `z_bv = log(1 + ReLU(max_t hidden_bt · weight_v + bias_v))` over real positions (STAIR, eq. of section 2).

    Under autocast the products are formed in autocast's type with fp32 accumulation; everything after them is fp32.
    Gradients flow to hidden, weight and bias; of equal maxima the earliest position receives it. Deterministic.

    Args:
        hidden: (B, T, D).
        mask: (B, T) bool, True at positions that count. A row without any gives zeros.
        weight: (V, D).
        bias: (V,).
        active_ranges: `[first, end)` of the terms that can be active; others are zero and cost nothing. All by default.

    Returns:
        (B, V) in fp32 (fp64 for fp64 input), not negative.

    Raises:
        ValueError: if shapes do not fit.
        RuntimeError: on a second derivative, which is not provided.
    """
    if hidden.shape[:2] != mask.shape or hidden.shape[-1] != weight.shape[-1] or len(weight) != len(bias):
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, mask {tuple(mask.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias.shape)}; expected (B, T, D), (B, T), (V, D), (V,)"
        )
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        edges = [edge for pair in active_ranges or ((0, len(weight)),) for edge in pair]
        embedding: Tensor = _project(hidden, mask.bool(), weight, weight.detach().to(compute), bias, edges)[0]
    return embedding

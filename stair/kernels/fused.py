"""The vocabulary head without its B × T × V tensor, for CPU and GPU alike.

Done plainly, 256 images of 197 patches against 30,522 words are 1.5 billion numbers. Three observations remove them:

* log(1 + ReLU(·)) is monotone, so the max over positions is taken first and the activation applied to B × V numbers;
* the vocabulary is walked in chunks (reduction.py), so at most N × chunk numbers exist at a time, and padding is left
  out beforehand (packing.py);
* backwards only the winners of active words count (backward.py).

B rows, T positions, N = real positions of all rows, packed without padding, D width, V words, C words of a chunk.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import stair.kernels.backward as backward
import stair.kernels.packing as packing
import stair.kernels.reduction as reduction

_CHUNK_NUMBERS = 1 << 21  # logits alive at a time on the CPU (8 MB in fp32): a chunk should stay near the cache
_CHUNK_NUMBERS_GPU = 1 << 27  # on a GPU the matrix product wants a wide chunk


def _chunks(words: Sequence[tuple[int, int]], positions: int, device: torch.device) -> Iterator[slice]:
    numbers = _CHUNK_NUMBERS if device.type == "cpu" else _CHUNK_NUMBERS_GPU
    width = max(64, numbers // max(1, positions))
    for first, end in words:
        for start in range(first, end, width):
            yield slice(start, min(start + width, end))


class _Torch:
    """The form in PyTorch operations, on any device."""

    pack = staticmethod(packing.by_slot)

    @staticmethod
    def project(
        packed_ND: Tensor,
        packed: packing.Packing,
        weight_VD: Tensor,
        bias_V: Tensor,
        words: Sequence[tuple[int, int]],
        embedding_BV: Tensor,
        slot_BV: Tensor,
    ) -> None:
        """As `triton_head.project`, by slot."""
        reduce = _reduction(packed_ND.device)
        for chunk in _chunks(words, len(packed_ND), packed_ND.device):
            logits_NC = packed_ND @ weight_VD[chunk].to(packed_ND.dtype).T
            reduce(logits_NC, packed, bias_V[chunk], embedding_BV[:, chunk], slot_BV[:, chunk])

    @staticmethod
    def gradients(
        won: backward.Won, packed_ND: Tensor, weight_VD: Tensor, words: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of packed positions, weight and bias."""
        if backward.few_are_active(won.embedding_BV, len(packed_ND), packed_ND.dtype):
            return backward.sparse_gradients(won, packed_ND, weight_VD)
        chunks = list(_chunks(words, len(packed_ND), packed_ND.device))
        return backward.dense_gradients(won, packed_ND, weight_VD, chunks)


def _reduction(device: torch.device) -> Callable[..., None]:
    return reduction.slot_by_slot if device.type == "cpu" else reduction.padded


def _form(device: torch.device, compute: torch.dtype) -> Any:
    """Triton where tensor cores multiply what is asked; a rule rather than a race, so that a resumed run takes the same."""
    if device.type == "cuda" and compute in (torch.bfloat16, torch.float16) and _has_triton(device):
        import stair.kernels.triton_head as triton_head

        return triton_head
    return _Torch


@functools.cache
def _has_triton(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def refuse_second_derivative() -> None:
    """Raises inside a backward pass that is itself recorded (`create_graph=True`).

    torch's `once_differentiable` stays silent unless the incoming gradient requires a gradient, and then drops terms.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("a second derivative was asked of the vocabulary head or the loss, which have only a first")


class _VocabularyMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTD: Tensor,
        mask_BT: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        words: Sequence[tuple[int, int]],
        compute: torch.dtype,
    ) -> Tensor:
        B, T, D = hidden_BTD.shape
        V = weight_VD.shape[0]
        form = _form(hidden_BTD.device, compute)
        packed = form.pack(mask_BT)
        packed_ND = hidden_BTD.reshape(B * T, D)[packed.source_N].to(compute)
        result = torch.float64 if compute is torch.float64 else torch.float32
        embedding_BV = torch.zeros(B, V, dtype=result, device=hidden_BTD.device)
        slot_BV = torch.zeros(B, V, dtype=packing.slot_type(T), device=hidden_BTD.device)
        if len(packed_ND):
            form.project(packed_ND, packed, weight_VD, bias_V.to(result), words, embedding_BV, slot_BV)
        ctx.save_for_backward(packed_ND, weight_VD, embedding_BV, slot_BV, *packed[:-1])
        ctx.shape, ctx.dtypes = (B, T, D), (hidden_BTD.dtype, weight_VD.dtype, bias_V.dtype)
        ctx.words, ctx.alive, ctx.form = words, packed.alive, form
        return embedding_BV

    @staticmethod
    def backward(ctx: Any, grad_BV: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        packed_ND, weight_VD, embedding_BV, slot_BV, *places = ctx.saved_tensors
        B, T, D = ctx.shape
        packed = packing.Packing._make([*places, ctx.alive])
        won = backward.Won(grad_BV, embedding_BV, slot_BV, packed)
        grads = ctx.form.gradients(won, packed_ND, weight_VD, ctx.words)
        hidden_type, weight_type, bias_type = ctx.dtypes
        grad_hidden = torch.zeros(B * T, D, dtype=hidden_type, device=grad_BV.device)
        grad_hidden[packed.source_N] = grads[0].to(hidden_type)
        return grad_hidden.view(B, T, D), None, grads[1].to(weight_type), grads[2].to(bias_type), None, None


# compiled towers break here, cleanly: what is active is known from the numbers only
_vocabulary_max: Callable[..., Tensor] = torch.compiler.disable(_VocabularyMax.apply)


def vocabulary_max(
    hidden: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    words: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """Computes `z_bv = log(1 + ReLU(max_t hidden_bt · weight_v + bias_v))` over real positions (STAIR, eq. of section 2).

    Under autocast the products are formed in autocast's type with fp32 accumulation; everything after them is fp32.
    Gradients flow to hidden, weight and bias; of equal maxima the earliest position receives it. Deterministic.

    Args:
        hidden: (B, T, D).
        mask: (B, T) bool, True at positions that count. A row without any gives zeros.
        weight: (V, D).
        bias: (V,).
        words: ranges `[first, end)` of the words that can be active; others are zero and cost nothing. All by default.

    Returns:
        (B, V) in fp32 (fp64 for fp64 input), not negative.

    Raises:
        ValueError: if shapes do not fit.
        RuntimeError: on a second derivative, which is not provided.
    """
    if hidden.shape[:2] != mask.shape or hidden.shape[-1] != weight.shape[-1] or len(weight) != len(bias):
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, mask {tuple(mask.shape)}, weight {tuple(weight.shape)}, "
            f"bias {tuple(bias.shape)}; wanted (B, T, D), (B, T), (V, D), (V,)"
        )
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _vocabulary_max(hidden, mask.bool(), weight, bias, tuple(words or ((0, len(weight)),)), compute)

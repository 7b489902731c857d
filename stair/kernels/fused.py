"""The vocabulary head without its B × T × V tensor, in PyTorch operations, for CPU and GPU alike.

Done plainly, 256 images of 197 patches against 30,522 words are 1.5 billion numbers. Three observations remove them:

* log(1 + ReLU(·)) is monotone, so the max over positions is taken first and the activation applied to B × V numbers;
* the vocabulary is walked in chunks with a running maximum, so at most T × B × chunk numbers exist at a time;
* backwards only the position that won a word, and only words that are active, receive a gradient. With
  `z = log(1 + s)` its factor is `dz/ds = exp(-z)`, so z and the winner's number are all that is kept.

B rows, T positions, N = real positions of all rows, packed without padding, D width, V words, C words of a chunk.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch's notice that CSR is young would greet every user in the first step
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

_CHUNK_NUMBERS = 1 << 21  # logits alive at a time on the CPU (8 MB in fp32): a chunk should stay near the cache
_CHUNK_NUMBERS_GPU = 1 << 27  # on a GPU the matrix product wants a wide chunk
# A gathered multiply-add costs about this many times one inside a matrix product: on one CPU core in fp32 (B 128, T 16,
# D 192, V 30,522) the sparse and the dense backward took equal time at ratios of about 40. One reading;
# no benchmark in the repository repeats it yet.
_GATHER_COST = 40


class _Packing(NamedTuple):
    """Real positions in position-major order: slot 0 of every row, then slot 1 of the rows that have one, …

    Rows are ordered by length, longest first, so that the rows alive at slot t are the first `alive[t]`.
    """

    order_B: Tensor  # packed row -> row
    source_N: Tensor  # packed position -> b·T + t
    start_T: Tensor  # first packed position of slot t
    alive: list[int]  # rows with more than t real positions


def _pack(mask_BT: Tensor) -> _Packing:
    T = mask_BT.shape[1]
    length_B = mask_BT.sum(1)
    order_B = length_B.argsort(descending=True, stable=True)
    # stable: real positions first and in their own order, so that ties go to the earliest
    position_BT = (~mask_BT[order_B]).to(torch.uint8).argsort(dim=1, stable=True)
    flat_TB = (order_B[:, None] * T + position_BT).T
    alive_TB = torch.arange(T, device=mask_BT.device)[:, None] < length_B[order_B][None, :]
    alive_T = alive_TB.sum(1)
    return _Packing(order_B, flat_TB[alive_TB], alive_T.cumsum(0) - alive_T, [n for n in alive_T.tolist() if n])


def _chunks(words: Sequence[tuple[int, int]], width: int) -> Iterator[slice]:
    for first, end in words:
        for start in range(first, end, width):
            yield slice(start, min(start + width, end))


def _running_max(logits_NC: Tensor, alive: list[int]) -> tuple[Tensor, Tensor]:
    """Maximum over the slots of each row, and the first slot that reached it.

    Slot by slot on the CPU: there `max(dim)` with indices is about 20 times slower, and writing the slot under a mask
    (`masked_fill_`) 10 times slower than multiply and maximum, which are vectorised.
    """
    rows, width = alive[0], logits_NC.shape[1]
    best_BC = logits_NC[:rows].clone()
    kind = _slot_type(len(alive))
    slot_BC = torch.zeros(rows, width, dtype=kind, device=logits_NC.device)
    better_BC = torch.empty(rows, width, dtype=torch.bool, device=logits_NC.device)
    # the same bytes, 0 or 1, where a slot is a byte: no conversion
    better_as_number = better_BC.view(torch.uint8)
    start = rows
    for t, n in enumerate(alive[1:], start=1):
        now_BC = logits_NC[start : start + n]
        torch.gt(now_BC, best_BC[:n], out=better_BC[:n])
        torch.maximum(slot_BC[:n], better_as_number[:n].to(kind).mul_(t), out=slot_BC[:n])
        torch.maximum(best_BC[:n], now_BC, out=best_BC[:n])
        start += n
    return best_BC, slot_BC


def _padded_max(logits_NC: Tensor, packing: _Packing) -> tuple[Tensor, Tensor]:
    """The same in one reduction, for devices where a loop of small operations is slow."""
    rows, T = packing.alive[0], len(packing.alive)
    padded_TBC = logits_NC.new_full((T, rows, logits_NC.shape[1]), float("-inf"))
    slot_N, row_N = _slot_and_row(packing)
    padded_TBC[slot_N, row_N] = logits_NC
    best_BC, slot_BC = padded_TBC.max(dim=0)
    return best_BC, slot_BC.to(_slot_type(T))


def _slot_and_row(packing: _Packing) -> tuple[Tensor, Tensor]:
    device = packing.start_T.device
    alive_T = torch.tensor(packing.alive, device=device)
    slot_N = torch.repeat_interleave(torch.arange(len(packing.alive), device=device), alive_T)
    return slot_N, torch.arange(len(slot_N), device=device) - packing.start_T[slot_N]


def _slot_type(slots: int) -> torch.dtype:
    return torch.uint8 if slots <= 256 else torch.int16 if slots <= 32768 else torch.int32


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
        packing = _pack(mask_BT)
        packed_ND = hidden_BTD.reshape(B * T, D)[packing.source_N].to(compute)
        result = torch.float64 if compute is torch.float64 else torch.float32
        embedding_BV = torch.zeros(B, V, dtype=result, device=hidden_BTD.device)
        slot_BV = torch.zeros(B, V, dtype=_slot_type(len(packing.alive)), device=hidden_BTD.device)
        on_cpu = hidden_BTD.device.type == "cpu"
        width = max(64, (_CHUNK_NUMBERS if on_cpu else _CHUNK_NUMBERS_GPU) // max(1, len(packed_ND)))
        for chunk in _chunks(words, width) if packing.alive else ():
            logits_NC = packed_ND @ weight_VD[chunk].to(compute).T
            best_BC, slot_BC = _running_max(logits_NC, packing.alive) if on_cpu else _padded_max(logits_NC, packing)
            rows_B = packing.order_B[: packing.alive[0]]
            embedding_BV[rows_B, chunk] = torch.log1p(torch.relu(best_BC.to(result) + bias_V[chunk].to(result)))
            slot_BV[rows_B, chunk] = slot_BC
        ctx.save_for_backward(
            packed_ND, weight_VD, embedding_BV, slot_BV, packing.order_B, packing.source_N, packing.start_T
        )
        ctx.shape, ctx.dtypes = (B, T, D), (hidden_BTD.dtype, weight_VD.dtype, bias_V.dtype)
        ctx.words, ctx.width, ctx.compute = words, width, compute
        return embedding_BV

    @staticmethod
    def backward(ctx: Any, grad_BV: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        packed_ND, weight_VD, embedding_BV, slot_BV, order_B, source_N, start_T = ctx.saved_tensors
        B, T, D = ctx.shape
        rank_B = torch.empty_like(order_B)
        rank_B[order_B] = torch.arange(B, device=order_B.device)
        won = _Won(grad_BV.contiguous(), embedding_BV, slot_BV, rank_B, start_T)
        active = int(torch.count_nonzero(embedding_BV))
        if active * _GATHER_COST < len(packed_ND) * weight_VD.shape[0]:
            grads = _sparse_backward(won, packed_ND, weight_VD)
        else:
            grads = _dense_backward(won, packed_ND, weight_VD, list(_chunks(ctx.words, ctx.width)), ctx.compute)
        hidden_type, weight_type, bias_type = ctx.dtypes
        grad_hidden = torch.zeros(B * T, D, dtype=hidden_type, device=grad_BV.device)
        grad_hidden[source_N] = grads[0].to(hidden_type)
        return grad_hidden.view(B, T, D), None, grads[1].to(weight_type), grads[2].to(bias_type), None, None


class _Won(NamedTuple):
    """Incoming gradients, and which packed position won each word."""

    grad_BV: Tensor
    embedding_BV: Tensor
    slot_BV: Tensor
    rank_B: Tensor  # row -> packed row
    start_T: Tensor


def _sparse_backward(won: _Won, packed_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two products with the N × V matrix of gradients, which has one entry for every active (row, word)."""
    N, V = len(packed_ND), len(weight_VD)
    word_A, row_A = won.embedding_BV.T.nonzero(as_tuple=True)  # A active entries, ordered by word
    value_A = won.grad_BV[row_A, word_A] * torch.exp(-won.embedding_BV[row_A, word_A])
    position_A = won.start_T[won.slot_BV[row_A, word_A].long()] + won.rank_B[row_A]
    by_word = _csr(word_A, position_A, value_A, (V, N))
    grad_weight_VD = by_word @ packed_ND.to(value_A.dtype)
    grad_bias_V = (by_word @ torch.ones(N, 1, dtype=value_A.dtype, device=value_A.device))[:, 0]
    by_position = position_A.argsort(stable=True)
    position_A, word_A, value_A = position_A[by_position], word_A[by_position], value_A[by_position]
    grad_packed_ND = _csr(position_A, word_A, value_A, (N, V)) @ weight_VD.to(value_A.dtype)
    return grad_packed_ND, grad_weight_VD, grad_bias_V


def _dense_backward(
    won: _Won, packed_ND: Tensor, weight_VD: Tensor, chunks: Sequence[slice], compute: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by matrix products, a chunk of words at a time: faster while most words are active."""
    N = len(packed_ND)
    grad_packed_ND = won.grad_BV.new_zeros(packed_ND.shape)
    grad_weight_VD = won.grad_BV.new_zeros(weight_VD.shape)
    grad_bias_V = won.grad_BV.new_zeros(len(weight_VD))
    # a row without any real position has no gradient, and no place to scatter a zero to
    filled = int(won.start_T[1]) if len(won.start_T) > 1 else N
    rows_B = (won.rank_B < filled).nonzero(as_tuple=True)[0]
    for chunk in chunks if filled else ():
        embedding_BC = won.embedding_BV[rows_B, chunk]
        # the factor of ReLU: nothing for words that are not active
        grad_BC = torch.exp(-embedding_BC).mul_(won.grad_BV[rows_B, chunk]).mul_(embedding_BC > 0)
        position_BC = won.start_T[won.slot_BV[rows_B, chunk].long()] + won.rank_B[rows_B, None]
        scattered_NC = torch.zeros(N, position_BC.shape[1], dtype=compute, device=grad_BC.device)
        scattered_NC.scatter_(0, position_BC, grad_BC.to(compute))
        grad_packed_ND += scattered_NC @ weight_VD[chunk].to(compute)
        grad_weight_VD[chunk] = (scattered_NC.T @ packed_ND).to(grad_BC.dtype)
        grad_bias_V[chunk] = grad_BC.sum(0)
    return grad_packed_ND, grad_weight_VD, grad_bias_V


def _csr(row_A: Tensor, column_A: Tensor, value_A: Tensor, size: tuple[int, int]) -> Tensor:
    edge_R = torch.zeros(size[0] + 1, dtype=torch.int64, device=row_A.device)
    edge_R[1:] = torch.bincount(row_A, minlength=size[0]).cumsum(0)
    return torch.sparse_csr_tensor(edge_R, column_A, value_A, size, check_invariants=False)


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
        result: Tensor = _VocabularyMax.apply(
            hidden, mask.bool(), weight, bias, tuple(words or ((0, len(weight)),)), compute
        )
    return result

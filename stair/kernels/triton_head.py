"""The vocabulary head's Triton form, for NVIDIA GPUs: logits never leave the chip, and nothing waits for the host.

Forward: a program multiplies a block of terms with all positions of a few rows, a tile of `SLOTS` positions of each row at
a time. The columns of a tile are ordered position by position, so the maximum over positions is a maximum over registers
of one thread: no atomics, no exchange between threads, and every embedding is written once.

Backward: active entries are listed by term and, within each row, by position. Both gradients are then products of
compressed rows with a dense matrix. Lists have room for all entries, so their sizes need not be known on the host, and
their order is that of rows and of terms, so the result is deterministic.

This module needs triton, which comes with torch for CUDA on Linux; stair/kernels/fused.py imports it where it can be used.

B rows, T positions, D width, V terms.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from stair.kernels.packing import real_first, slot_type

BLOCKS = {"BLOCK_V": 128, "BLOCK_D": 64, "FLATTEN": True}
TILE = 256  # positions of a tile: SLOTS · ROWS
ROWS = 32
OPTIONS = {"num_warps": 8, "num_stages": 3}
PRODUCT = {"BLOCK_A": 8, "num_warps": 1}
LIST = {"BLOCK_V": 1024, "num_warps": 8}


@triton.jit
def _maximum(a, b):  # type: ignore[no-untyped-def]  # NaN stays NaN
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit  # type: ignore[untyped-decorator]
def project_max(  # type: ignore[no-untyped-def]
    packed, weight, bias_ptr, row_ptr, tiles_ptr, place_ptr, embedding_ptr, position_ptr,
    V, T, D, row_blocks, row_block_size,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Embeddings, and positions that reach the maximum, of one block of terms and of rows."""
    block = tl.program_id(0) % row_blocks
    first_v = (tl.program_id(0) // row_blocks) * BLOCK_V
    v = first_v + tl.arange(0, BLOCK_V)
    bias = tl.load(bias_ptr + v, mask=v < V, other=float("-inf"))
    if tl.sum((bias != float("-inf")).to(tl.int32), axis=0) == 0:
        return
    tiles = tl.load(tiles_ptr + block)
    best = tl.full((BLOCK_V, ROWS), float("-inf"), dtype=tl.float32)
    at = tl.zeros((BLOCK_V, ROWS), dtype=tl.int32)
    for tile in tl.range(0, tiles, flatten=FLATTEN):
        first_n = block * row_block_size + tile * (SLOTS * ROWS)
        logits = tl.zeros((BLOCK_V, SLOTS * ROWS), dtype=tl.float32)
        for d in tl.range(0, D, BLOCK_D):
            logits = tl.dot(weight.load([first_v, d]), packed.load([first_n, d]).T, logits, input_precision="ieee")
        by_slot = tl.reshape(logits, (BLOCK_V, SLOTS, ROWS))
        highest = tl.reduce(by_slot, 1, _maximum)
        slot = tl.arange(0, SLOTS)[None, :, None]
        first = tl.min(tl.where(by_slot == highest[:, None, :], slot, SLOTS), axis=1)
        at = tl.where(highest > best, tile * SLOTS + first, at)
        best = _maximum(best, highest)
    row = tl.load(row_ptr + block * ROWS + tl.arange(0, ROWS))
    score = best + bias[:, None]
    # a maximum would drop NaN; infinity reaches the loss
    score = tl.where(score != score, float("inf"), tl.maximum(score, 0.0))
    above = 1.0 + score
    lost = tl.where(score < 1.0, (score - (above - 1.0)) / above, 0.0)  # what the sum lost of a small score
    entry = row.to(tl.int64)[None, :] * V + v[:, None]
    written = (row >= 0)[None, :] & (bias != float("-inf"))[:, None]
    tl.store(embedding_ptr + entry, tl.log(above) + lost, mask=written)
    position = tl.load(place_ptr + row[None, :] * T + at, mask=written, other=0)
    tl.store(position_ptr + entry, position.to(position_ptr.dtype.element_ty), mask=written)


@triton.jit  # type: ignore[untyped-decorator]
def list_by_term(  # type: ignore[no-untyped-def]
    grad_ptr, embedding_ptr, position_ptr, begin_ptr, end_ptr, column_ptr, value_ptr, bias_ptr,
    B, T, V, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Active entries of each term, row by row: which position, and its gradient; and the sums of the gradients."""
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    begin = v.to(tl.int64) * B
    count = tl.zeros((BLOCK_V,), dtype=tl.int32)
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, B, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        entry = b.to(tl.int64)[:, None] * V + v[None, :]
        inside = (b < B)[:, None] & (v < V)[None, :]
        z = tl.load(embedding_ptr + entry, mask=inside, other=0.0)
        active = z > 0
        value = tl.load(grad_ptr + entry, mask=active, other=0.0) * tl.exp(-z)
        position = tl.load(position_ptr + entry, mask=active, other=0).to(tl.int32)
        place = (begin + count)[None, :] + tl.cumsum(active.to(tl.int32), axis=0) - 1
        tl.store(column_ptr + place, b[:, None] * T + position, mask=active)
        tl.store(value_ptr + place, value, mask=active)
        count += tl.sum(active.to(tl.int32), axis=0)
        total += tl.sum(tl.where(active, value, 0.0), axis=0)
    tl.store(begin_ptr + v, begin, mask=v < V)
    tl.store(end_ptr + v, begin + count, mask=v < V)
    tl.store(bias_ptr + v, total, mask=v < V)


@triton.jit  # type: ignore[untyped-decorator]
def list_by_position(  # type: ignore[no-untyped-def]
    grad_ptr, embedding_ptr, position_ptr, begin_ptr, end_ptr, column_ptr, value_ptr, active_ptr,
    T, V, BLOCK_V: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Active entries of each position of a row, term by term: which term, and its gradient. BINS is above T."""
    row = tl.program_id(0).to(tl.int64) * V
    none: tl.constexpr = BINS - 1
    i, t = tl.arange(0, BLOCK_V), tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    total = 0
    for start in range(0, V, BLOCK_V):
        v = start + i
        active = tl.load(embedding_ptr + row + v, mask=v < V, other=0.0) > 0
        position = tl.load(position_ptr + row + v, mask=active, other=0).to(tl.int32)
        counts += tl.histogram(tl.where(active, position, none), BINS)
        tl.store(active_ptr + row + total + tl.cumsum(active.to(tl.int32), axis=0) - 1, v, mask=active)
        total += tl.sum(active.to(tl.int32), axis=0)
    counts = tl.where(t < none, counts, 0)
    begin = tl.cumsum(counts, axis=0) - counts
    tl.store(begin_ptr + tl.program_id(0) * T + t, row + begin, mask=t < T)
    tl.store(end_ptr + tl.program_id(0) * T + t, row + begin + counts, mask=t < T)
    tl.debug_barrier()  # other threads of the program read what was stored
    for start in range(0, total, BLOCK_V):
        inside = start + i < total
        v = tl.load(active_ptr + row + start + i, mask=inside, other=0)
        position = tl.where(inside, tl.load(position_ptr + row + v).to(tl.int32), none)
        # by position, and of a position by term; each goes where its position's begin in the row, less where they do here
        order = tl.sort(position * BLOCK_V + i)
        counts = tl.histogram(position, BINS)
        place = row + i + tl.gather(begin - (tl.cumsum(counts, axis=0) - counts), order // BLOCK_V, axis=0)
        inside = order // BLOCK_V < none
        v = tl.load(active_ptr + row + start + order % BLOCK_V, mask=inside, other=0)
        value = tl.load(grad_ptr + row + v) * tl.exp(-tl.load(embedding_ptr + row + v))
        tl.store(column_ptr + place, v, mask=inside)
        tl.store(value_ptr + place, value, mask=inside)
        begin += counts


@triton.jit  # type: ignore[untyped-decorator]
def compressed_rows_product(  # type: ignore[no-untyped-def]
    begin_ptr, end_ptr, column_ptr, value_ptr, source_ptr, out_ptr, D, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """One row of (compressed rows) @ source."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(begin_ptr + row), tl.load(end_ptr + row)
    out = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        column = tl.load(column_ptr + a, mask=a < end, other=0).to(tl.int64)
        value = tl.load(value_ptr + a, mask=a < end, other=0.0)
        inside = (a < end)[:, None] & (d < D)[None, :]
        source = tl.load(source_ptr + column[:, None] * D + d[None, :], mask=inside, other=0.0)
        out += tl.sum(value[:, None] * source.to(tl.float32), axis=0)
    tl.store(out_ptr + row * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)


class _Packed(NamedTuple):
    """Positions in the order of the tiles: of each block of rows slot 0 of all its rows, then slot 1, …

    Attributes:
        packed_ND: rows of a block have as many slots as T, rounded up to tiles; past a row's end its first position again.
        rows: (blocks · ROWS,) which row; -1 past the last one, and for rows without positions.
        tiles: (blocks,) tiles that the longest row of a block fills.
        place_BT: the position that is slot t of row b.
    """

    packed_ND: Tensor
    rows: Tensor
    tiles: Tensor
    place_BT: Tensor


def _pack(hidden_BTD: Tensor, mask_BT: Tensor, rows: int, slots: int) -> _Packed:
    B, T, D = hidden_BTD.shape
    device = hidden_BTD.device
    blocks, T_filled = triton.cdiv(B, rows), triton.cdiv(T, slots) * slots
    # longest first, so that the rows of a block have about the same length
    length_B, order_B = mask_BT.sum(1).sort(descending=True, stable=True)
    place_BT = real_first(mask_BT)
    spare = blocks * rows - B
    order_R = torch.cat([order_B, order_B[-1:].expand(spare)])
    length_R = torch.cat([length_B, length_B.new_zeros(spare)])
    slot_T = torch.arange(T_filled, device=device)
    slot_RT = torch.where(slot_T < length_R[:, None], slot_T, 0)
    source_RT = order_R[:, None] * T + place_BT[order_R[:, None], slot_RT]
    source_N = source_RT.view(blocks, rows, T_filled).transpose(1, 2).flatten()
    packed_ND = hidden_BTD.reshape(B * T, D).index_select(0, source_N)
    tiles = (length_R[::rows] + (slots - 1)) // slots
    return _Packed(packed_ND, torch.where(length_R > 0, order_R, -1).int(), tiles.int(), place_BT.int().contiguous())


def _widened(matrix: Tensor) -> Tensor:
    """A matrix whose rows begin at multiples of 16 bytes, as the copy engine wants them."""
    missing = -matrix.shape[1] % 16
    return torch.nn.functional.pad(matrix, (0, missing)).contiguous() if missing else matrix.contiguous()


def project(
    hidden_BTD: Tensor, mask_BT: Tensor, weight_VD: Tensor, bias_V: Tensor, ranges: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Computes `log(1 + ReLU(max over positions + bias))`, and the first positions that reach the maximum.

    Args:
        hidden_BTD: (B, T, D) in half precision.
        mask_BT: (B, T) bool, True at positions that count.
        weight_VD: (V, D) of the same type.
        bias_V: (V,) fp32.
        ranges: `[first, end)` of the terms that can be active.

    Returns:
        (B, V) fp32, and (B, V) positions in T, meaningful where the embedding is positive.
    """
    (B, T, _), V = hidden_BTD.shape, len(weight_VD)
    rows = min(ROWS, max(8, triton.next_power_of_2(B)))
    slots = TILE // rows
    packed = _pack(hidden_BTD, mask_BT, rows, slots)
    packed_ND, weight_VD = _widened(packed.packed_ND), _widened(weight_VD)
    embedding_BV = torch.zeros(B, V, device=hidden_BTD.device)
    position_BV = torch.empty(B, V, dtype=slot_type(T), device=hidden_BTD.device)
    possible_V = torch.full_like(bias_V, float("-inf"))
    for first, end in ranges:
        possible_V[first:end] = bias_V[first:end]
    row_blocks: Any = len(packed.tiles)
    project_max[(row_blocks * triton.cdiv(V, BLOCKS["BLOCK_V"]),)](
        TensorDescriptor.from_tensor(packed_ND, [TILE, BLOCKS["BLOCK_D"]]),
        TensorDescriptor.from_tensor(weight_VD, [BLOCKS["BLOCK_V"], BLOCKS["BLOCK_D"]]),
        *(possible_V, packed.rows, packed.tiles, packed.place_BT, embedding_BV, position_BV),
        *(V, T, weight_VD.shape[1], row_blocks, len(packed_ND) // row_blocks),
        **BLOCKS,
        ROWS=rows,
        SLOTS=slots,
        **OPTIONS,
    )
    return embedding_BV, position_BV


class _Rows(NamedTuple):
    """Compressed rows: of each the entries from `begin` to `end`, their columns and values."""

    begin: Tensor
    end: Tensor
    column: Tensor
    value: Tensor


def _rows(rows: int, entries: int, device: torch.device) -> _Rows:
    begin, end = torch.empty(2, rows, dtype=torch.int64, device=device)
    column = torch.empty(entries, dtype=torch.int32, device=device)
    return _Rows(begin, end, column, torch.empty(entries, device=device))


def _product(rows: _Rows, source: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, D) product with a (columns, D) matrix."""
    D = source.shape[1]
    out = torch.empty(len(rows.begin), D, dtype=dtype, device=source.device)
    block: Any = min(256, triton.next_power_of_2(D))
    compressed_rows_product[(len(out), triton.cdiv(D, block))](
        *rows, source.contiguous(), out, D, BLOCK_D=block, **PRODUCT
    )
    return out


def gradients(
    grad_BV: Tensor,
    embedding_BV: Tensor,
    position_BV: Tensor,
    hidden_BTD: Tensor,
    mask_BT: Tensor,
    weight_VD: Tensor,
    ranges: Sequence[tuple[int, int]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden states (B, T, D), in their type, and of weight (V, D) and bias (V,), in fp32.

    Neither the mask nor the ranges are read: a position or a term that does not count has no active entry.
    """
    (B, T, D), V = hidden_BTD.shape, len(weight_VD)
    device = hidden_BTD.device
    entries = grad_BV.contiguous(), embedding_BV, position_BV
    by_term, grad_bias_V = _rows(V, B * V, device), torch.empty(V, device=device)
    list_by_term[(triton.cdiv(V, 32),)](*entries, *by_term, grad_bias_V, B, T, V, BLOCK_B=8, BLOCK_V=32, num_warps=1)
    grad_weight_VD = _product(by_term, hidden_BTD.reshape(B * T, D), torch.float32)
    # what was listed by term is used up
    by_position = _rows(B * T, 0, device)._replace(column=by_term.column, value=by_term.value)
    bins = triton.next_power_of_2(T + 1)
    active_BV = torch.empty(B, V, dtype=torch.int32, device=device)
    list_by_position[(B,)](*entries, *by_position, active_BV, T, V, BINS=bins, **LIST)
    grad_hidden_ND = _product(by_position, weight_VD, hidden_BTD.dtype)
    return grad_hidden_ND.view(B, T, D), grad_weight_VD, grad_bias_V

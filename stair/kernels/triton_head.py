"""The vocabulary head's Triton form, for NVIDIA GPUs: logits never leave the chip.

Forward: blocks of positions times words by tensor cores; the epilogue reduces each row's part of the block and merges it by
an atomic maximum over 64 bits, the logit in the upper half (as an integer of the same order), what is left of the slots in
the lower: of equal logits the first position wins, and the result does not depend on the order in which blocks finish.
Backward: one program for every row of the compressed rows of gradients (stair/kernels/backward.py), without atomics, so it
is deterministic, which cuSPARSE need not be.

This module needs triton, which comes with torch for CUDA on Linux; stair/kernels/fused.py imports it where it can be used.

B rows, N packed positions, D width, V words, A active (row, word) pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

import stair.kernels.backward as backward
from stair.kernels.packing import Packing, by_row

# 128 x 128 sums stay in the registers of 8 warps where D is a multiple of 16 (tests/test_kernels_triton.py holds it)
BLOCKS = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64}
OPTIONS = {"num_warps": 8, "num_stages": 3}
pack = by_row

_GROUP = 8  # blocks of positions that share the words in the cache


@triton.jit
def _ordered(bits):  # type: ignore[no-untyped-def]  # the bits of a float as an integer of the same order; its own inverse
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator]
def project_max(  # type: ignore[no-untyped-def]
    packed_ptr, weight_ptr, row_ptr, start_ptr, key_ptr, N, V, D, first_word, end_word,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Merges the logits of one block of positions and words into the (B, V) keys."""
    blocks_n, blocks_v = tl.cdiv(N, BLOCK_N), tl.cdiv(end_word - first_word, BLOCK_V)
    program = tl.program_id(0)
    group = program // (GROUP * blocks_v)
    height = tl.minimum(blocks_n - group * GROUP, GROUP)
    within = program % (GROUP * blocks_v)
    first_n = (group * GROUP + within % height) * BLOCK_N
    first_v = first_word + (within // height) * BLOCK_V
    n, v = first_n + tl.arange(0, BLOCK_N), first_v + tl.arange(0, BLOCK_V)
    d = tl.arange(0, BLOCK_D)
    # long numbers for the block, short ones within it: long ones for each element would not leave registers enough
    packed = packed_ptr + first_n.to(tl.int64) * D + (tl.arange(0, BLOCK_N)[:, None] * D + d[None, :])
    weight = weight_ptr + first_v.to(tl.int64) * D + (tl.arange(0, BLOCK_V)[None, :] * D + d[:, None])
    logits = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        a = tl.load(packed + start, mask=(n[:, None] < N) & inside[None, :], other=0.0)
        b = tl.load(weight + start, mask=(v[None, :] < end_word) & inside[:, None], other=0.0)
        logits = tl.dot(a, b, logits, input_precision="ieee")
    # a maximum would swallow what is no number (here, and of the bias in `finish`); infinity gets through to the loss
    logits = tl.where(logits != logits, float("inf"), logits)
    row = tl.load(row_ptr + n, mask=n < N, other=-1)
    first_row = tl.load(row_ptr + first_n)
    last_row = tl.max(row, axis=0)
    for current in range(first_row, last_row + 1):
        own = tl.where(row[:, None] == current, logits, float("-inf"))
        best, at = tl.max(own, axis=0, return_indices=True, return_indices_tie_break_left=True)
        winner = tl.maximum(first_n + at - tl.load(start_ptr + current), 0)
        upper = _ordered(best.to(tl.int32, bitcast=True)).to(tl.int64) << 32
        key = upper | (0x7FFFFFFF - winner).to(tl.int64)
        tl.atomic_max(key_ptr + tl.cast(current, tl.int64) * V + v, key, mask=v < end_word)


@triton.jit  # type: ignore[untyped-decorator]
def finish(  # type: ignore[no-untyped-def]
    key_ptr, bias_ptr, embedding_ptr, winner_ptr, V, first_word, end_word, BLOCK_V: tl.constexpr
):  # fmt: skip
    """From keys to embeddings and slots, for one row and block of words."""
    v = first_word + tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = tl.program_id(0).to(tl.int64) * V + v
    key = tl.load(key_ptr + place, mask=v < end_word, other=0)
    best = _ordered((key >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
    score = best + tl.load(bias_ptr + v, mask=v < end_word, other=0.0)
    score = tl.where(score != score, float("inf"), tl.maximum(score, 0.0))
    above = 1.0 + score
    lost = tl.where(score < 1.0, (score - (above - 1.0)) / above, 0.0)  # what the sum lost of a small score
    tl.store(embedding_ptr + place, tl.log(above) + lost, mask=v < end_word)
    winner = 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)
    winner = tl.where(score > 0.0, winner, 0)
    tl.store(winner_ptr + place, winner.to(winner_ptr.dtype.element_ty), mask=v < end_word)


@triton.jit  # type: ignore[untyped-decorator]
def compressed_rows_product(  # type: ignore[no-untyped-def]
    edge_ptr, column_ptr, value_ptr, source_ptr, out_ptr, sum_ptr, D,
    BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of (compressed rows) @ source, and the sum of its values."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin, end = tl.load(edge_ptr + row), tl.load(edge_ptr + row + 1)
    out = tl.zeros((BLOCK_D,), dtype=tl.float32)
    values = tl.zeros((BLOCK_A,), dtype=tl.float32)
    for start in range(begin, end, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        column = tl.load(column_ptr + a, mask=a < end, other=0)
        value = tl.load(value_ptr + a, mask=a < end, other=0.0)
        inside = (a[:, None] < end) & (d[None, :] < D)
        source = tl.load(source_ptr + column[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        out += tl.sum(value[:, None] * source, axis=0)
        values += value
    tl.store(out_ptr + row * D + d, out, mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(sum_ptr + row, tl.sum(values, axis=0))


def project(
    packed_ND: Tensor,
    packing: Packing,
    weight_VD: Tensor,
    bias_V: Tensor,
    words: Sequence[tuple[int, int]],
    embedding_BV: Tensor,
    slot_BV: Tensor,
) -> None:
    """Fills in `log(1 + ReLU(max over positions + bias))` of the given words, and the first slots that won.

    Args:
        packed_ND: (N, D) in half precision or fp32, contiguous.
        packing: by row, not empty.
        weight_VD: (V, D).
        bias_V: (V,) fp32.
        words: ranges `[first, end)`.
        embedding_BV: (B, V) fp32 of zeros, filled in.
        slot_BV: (B, V) of zeros, filled in.
    """
    (N, D), (B, V) = packed_ND.shape, embedding_BV.shape
    device = packed_ND.device
    row_N = torch.repeat_interleave(torch.arange(B, device=device), packing.length_B, output_size=N)
    key_BV = torch.full((B, V), torch.iinfo(torch.int64).min, device=device)
    # minus infinity, for rows without positions
    key_BV[packing.length_B == 0] = -0x7F800001 << 32
    weight_VD, bias_V = weight_VD.to(packed_ND.dtype).contiguous(), bias_V.contiguous()
    for first, end in words:
        blocks = triton.cdiv(N, BLOCKS["BLOCK_N"]) * triton.cdiv(end - first, BLOCKS["BLOCK_V"])
        project_max[(blocks,)](
            *(packed_ND, weight_VD, row_N.int(), packing.row_offset_B, key_BV),
            *(N, V, D, first, end),
            **BLOCKS,
            GROUP=_GROUP,
            **OPTIONS,
        )
        finish[(B, triton.cdiv(end - first, 1024))](key_BV, bias_V, embedding_BV, slot_BV, V, first, end, BLOCK_V=1024)


def _product(index_A: Tensor, rows: int, column_A: Tensor, value_A: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, D) product with a (columns, D) source, and (rows,) sums of the values; index_A is sorted."""
    D = source.shape[1]
    out = torch.empty(rows, D, device=source.device)
    sums = torch.empty(rows, device=source.device)
    block: Any = min(256, triton.next_power_of_2(D))
    compressed_rows_product[(rows, triton.cdiv(D, block))](
        backward.edges(index_A, rows), column_A, value_A, source.contiguous(), out, sums, D, BLOCK_A=16, BLOCK_D=block
    )
    return out, sums


def gradients(
    won: backward.Won, packed_ND: Tensor, weight_VD: Tensor, words: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed positions (N, D), weight (V, D) and bias (V,), in fp32; `words` are of no use here."""
    position_A, word_A, value_A = backward.entries(won)
    grad_weight_VD, grad_bias_V = _product(word_A, len(weight_VD), position_A, value_A, packed_ND)
    order_A = position_A.argsort(stable=True)
    grad_packed_ND, _ = _product(
        position_A[order_A], len(packed_ND), word_A[order_A], value_A[order_A], weight_VD.to(packed_ND.dtype)
    )
    return grad_packed_ND, grad_weight_VD, grad_bias_V

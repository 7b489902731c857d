"""Gradients of the vocabulary head from the argmax positions alone, in PyTorch operations.

Only active terms have a gradient, and only at their argmax position. With `z = log(1 + s)` its factor is
`dz/ds = exp(-z)`, so z and the argmax slot are all that is kept. Seen as an N × V matrix of gradients with one entry for
every active (row, term), both gradients are products with it: of its sparse form if few terms are active, of its dense
form, a chunk of terms at a time, otherwise.

B rows, N packed positions, D width, V terms, C terms of a chunk, A active (row, term) pairs.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stair.kernels.packing import Packing

# A multiply-add of the sparse form costs about this many of the dense form's (benchmarks/head.py --limits)
_GATHER_COST = {torch.float64: 20, torch.float32: 35, torch.bfloat16: 80, torch.float16: 80}


class Maxima(NamedTuple):
    """Incoming gradients, and the argmax slot of each term.

    Attributes:
        grad_BV: gradient of the embedding.
        embedding_BV: what the forward pass returned.
        slot_BV: the first slot that reached each maximum.
        packing: where the slots of a row lie.
    """

    grad_BV: Tensor
    embedding_BV: Tensor
    slot_BV: Tensor
    packing: Packing


def few_are_active(embedding: Tensor, positions: int, compute: torch.dtype) -> bool:
    """Whether the sparse form is the faster one, for `positions` packed positions multiplied in type `compute`."""
    products = positions * embedding.shape[1]
    return int(torch.count_nonzero(embedding)) * _GATHER_COST.get(compute, 35) < products


class Entries(NamedTuple):
    """The N × V matrix of gradients, entry by entry: ordered by term, and of a term by row."""

    position_A: Tensor
    term_A: Tensor
    value_A: Tensor


def entries(maxima: Maxima) -> Entries:
    """Entries of the active terms."""
    term_A, row_A = maxima.embedding_BV.T.nonzero(as_tuple=True)
    value_A = maxima.grad_BV[row_A, term_A] * torch.exp(-maxima.embedding_BV[row_A, term_A])
    return Entries(maxima.packing.position(row_A, maxima.slot_BV[row_A, term_A]), term_A, value_A)


def edges(index: Tensor, size: int) -> Tensor:
    """(size + 1,) where the run of each value of a sorted (A,) index begins and ends."""
    edge = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
    edge[1:] = torch.bincount(index, minlength=size).cumsum(0)
    return edge


def sparse_gradients(maxima: Maxima, packed_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed positions (N, D), weight (V, D) and bias (V,): two products in compressed rows."""
    N, V = len(packed_ND), len(weight_VD)
    position_A, term_A, value_A = entries(maxima)
    by_term_VN = torch.sparse_csr_tensor(edges(term_A, V), position_A, value_A, (V, N), check_invariants=False)
    grad_weight_VD = by_term_VN @ packed_ND.to(value_A.dtype)
    grad_bias_V = (by_term_VN @ torch.ones(N, 1, dtype=value_A.dtype, device=value_A.device))[:, 0]
    order_A = position_A.argsort(stable=True)
    by_position_NV = torch.sparse_csr_tensor(
        edges(position_A, N), term_A[order_A], value_A[order_A], (N, V), check_invariants=False
    )
    return by_position_NV @ weight_VD.to(value_A.dtype), grad_weight_VD, grad_bias_V


def dense_gradients(
    maxima: Maxima, packed_ND: Tensor, weight_VD: Tensor, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by products of matrices of packed_ND's type."""
    grad_packed_ND = maxima.grad_BV.new_zeros(packed_ND.shape)
    grad_weight_VD = maxima.grad_BV.new_zeros(weight_VD.shape)
    grad_bias_V = maxima.grad_BV.new_zeros(len(weight_VD))
    # a row without any real position has no gradient, and no place to scatter a zero to
    filled = len(maxima.grad_BV) if maxima.packing.in_order else int((maxima.packing.length_B > 0).sum())
    rows = slice(None) if filled == len(maxima.grad_BV) else maxima.packing.length_B.nonzero()[:, 0]
    row_B1 = torch.arange(len(maxima.grad_BV), device=packed_ND.device)[rows, None]
    for chunk in chunks if filled else ():
        embedding_BC = maxima.embedding_BV[rows, chunk]
        # the factor of ReLU: nothing for terms that are not active
        grad_BC = torch.exp(-embedding_BC).mul_(maxima.grad_BV[rows, chunk]).mul_(embedding_BC > 0)
        position_BC = maxima.packing.position(row_B1, maxima.slot_BV[rows, chunk])
        scattered_NC = packed_ND.new_zeros(len(packed_ND), grad_BC.shape[1])
        scattered_NC.scatter_(0, position_BC, grad_BC.to(packed_ND.dtype))
        grad_packed_ND += scattered_NC @ weight_VD[chunk].to(packed_ND.dtype)
        grad_weight_VD[chunk] = (scattered_NC.T @ packed_ND).to(grad_BC.dtype)
        grad_bias_V[chunk] = grad_BC.sum(0)
    return grad_packed_ND, grad_weight_VD, grad_bias_V

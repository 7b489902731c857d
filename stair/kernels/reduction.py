"""From the logits of a chunk of terms to their maxima over positions, in PyTorch operations.

B rows, N packed positions (stair/kernels/packing.py), R rows with any position, in the packing's order, C terms of the
chunk, A active (row, term) pairs.
"""

import torch
from torch import Tensor

from stair.kernels.packing import Packing, slot_type

# Looking up the argmax of the active terms alone beats a pass over all logits below one active term in so many:
# benchmarks/head.py --limits
_LOOK_UP_BELOW = 10


def slot_by_slot(logits: Tensor, packing: Packing, bias: Tensor, embedding: Tensor, slot: Tensor) -> None:
    """Fills in `log(1 + ReLU(max over positions + bias))` and the first slot that reached the maximum: on the CPU.

    Args:
        logits: (N, C).
        packing: by slot, not empty.
        bias: (C,), of the result's type.
        embedding: (B, C) of zeros, filled in.
        slot: (B, C) of zeros, filled in where the embedding is positive.
    """
    best_RC = _running_max(logits, packing.alive)
    score_RC = (best_RC + bias).relu_()
    if int(torch.count_nonzero(score_RC)) * _LOOK_UP_BELOW < score_RC.numel():
        row_A, term_A = score_RC.nonzero(as_tuple=True)
        b_A = packing.order_B[row_A]
        embedding[b_A, term_A] = _log1p(score_RC[row_A, term_A])
        slot[b_A, term_A] = _look_up(logits, packing, row_A, term_A).to(slot.dtype)
    else:
        rows = slice(None) if packing.in_order else packing.order_B[: packing.alive[0]]
        embedding[rows] = _log1p(score_RC)
        slot[rows] = _argmax(logits, best_RC, packing.alive)


def _log1p(score: Tensor) -> Tensor:
    """As `torch.log1p` within a rounding error, for what is not negative: on the CPU that one is 10 times slower."""
    above = 1 + score
    # second term: what the sum lost of a small score
    return torch.log(above).add_((score - (above - 1)).div_(above))


def _running_max(logits_NC: Tensor, alive: list[int]) -> Tensor:
    """(R, C) maxima over slots, slot by slot: vectorised, where `max(dim)` with indices is about 20 times slower."""
    best_RC = logits_NC[: alive[0]].clone()
    start = alive[0]
    for n in alive[1:]:
        torch.maximum(best_RC[:n], logits_NC[start : start + n], out=best_RC[:n])
        start += n
    return best_RC


def _look_up(logits_NC: Tensor, packing: Packing, row_A: Tensor, term_A: Tensor) -> Tensor:
    """(A,) first slots that reached the maximum, of a few pairs of packed row and term."""
    N, C = logits_NC.shape
    alive_T = torch.tensor(packing.alive)
    position_AT = packing.slot_offset_T[: len(alive_T)] + row_A[:, None]
    entry_AT = position_AT.clamp_(max=N - 1).mul_(C).add_(term_A[:, None])
    found_AT = logits_NC.flatten()[entry_AT]
    if packing.alive[-1] < packing.alive[0]:
        found_AT.masked_fill_(row_A[:, None] >= alive_T, float("-inf"))
    return found_AT.argmax(1)  # of equals the first


def _argmax(logits_NC: Tensor, best_RC: Tensor, alive: list[int]) -> Tensor:
    """(R, C) first slots that reached the maximum, of all pairs."""
    if logits_NC.dtype in (torch.bfloat16, torch.float16):  # comparisons of these are not vectorised
        logits_NC, best_RC = logits_NC.float(), best_RC.float()
    T, kind = len(alive), slot_type(len(alive) + 1)
    # T - slot, so that the first of equals is the greatest; arithmetic, as writing under a mask is 10 times slower
    left_RC = torch.zeros(best_RC.shape, dtype=kind)
    equal_RC = torch.empty(best_RC.shape, dtype=torch.bool)
    start = 0
    for t, n in enumerate(alive):
        torch.eq(logits_NC[start : start + n], best_RC[:n], out=equal_RC[:n])
        # where a slot is a byte: the same bytes, 0 or 1, without conversion
        torch.maximum(left_RC[:n], equal_RC[:n].view(torch.uint8).to(kind).mul(T - t), out=left_RC[:n])
        start += n
    # NaN equals nothing, not even itself: slot 0, which every row has
    return (T - left_RC.to(torch.int32)).remainder_(T).to(slot_type(T))

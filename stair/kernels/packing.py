"""Which positions count, laid side by side without padding.

B rows, T positions, N = real positions of all rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Real positions of all rows. The one that is slot t of row b lies at `slot_offset_T[t] + row_offset_B[b]`.

    Attributes:
        source_N: packed position -> b·T + t.
        slot_offset_T: see above.
        row_offset_B: see above.
        length_B: real positions of each row.
        order_B: rows by length, longest first.
        alive: rows with more than t real positions, for each slot t that any row has.
    """

    source_N: Tensor
    slot_offset_T: Tensor
    row_offset_B: Tensor
    length_B: Tensor
    order_B: Tensor
    alive: list[int]

    @property
    def in_order(self) -> bool:
        """All rows have the same length, so `order_B` changes nothing."""
        return bool(self.alive) and self.alive[-1] == len(self.order_B)

    def position(self, row: Tensor, slot: Tensor) -> Tensor:
        """Packed positions of the given slots (any integer type) of the given rows; the two broadcast."""
        return self.slot_offset_T[slot.long()] + self.row_offset_B[row]


def by_slot(mask: Tensor) -> Packing:
    """Slot 0 of every row, longest row first, then slot 1 of the rows that have one, …

    The rows alive at slot t are then the first `alive[t]`, and a running maximum over slots needs no gathering.

    Args:
        mask: (B, T) bool, True at positions that count; any pattern.
    """
    B, T = mask.shape
    length_B = mask.sum(1)
    order_B = length_B.argsort(descending=True, stable=True)
    flat_TB = (order_B[:, None] * T + real_first(mask[order_B])).T
    alive_TB = torch.arange(T, device=mask.device)[:, None] < length_B[order_B][None, :]
    alive_T = alive_TB.sum(1)
    rank_B = torch.empty_like(order_B)
    rank_B[order_B] = torch.arange(B, device=mask.device)
    alive = [n for n in alive_T.tolist() if n]
    return Packing(flat_TB[alive_TB], alive_T.cumsum(0) - alive_T, rank_B, length_B, order_B, alive)


def real_first(mask_BT: Tensor) -> Tensor:
    """(B, T) positions of each row, those that count first: in their own order, so that ties go to the earliest."""
    return (~mask_BT).to(torch.uint8).argsort(dim=1, stable=True)


def slot_type(slots: int) -> torch.dtype:
    """The smallest integer type that counts so many slots."""
    return torch.uint8 if slots <= 256 else torch.int16 if slots <= 32768 else torch.int32

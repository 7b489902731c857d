"""Exchanges embeddings between ranks without their zeros; no rank holds all of them in dense form.

Of a (B, V) embedding with A non-zeros the A values travel and, for each, the gap to the one before it, in row order over
B·V: mostly one byte, since the gaps of 1 % non-zeros are around 100. A gap that exceeds its type is made up of steps of the
type's largest value, which stand for no value, so any V and A fit. Dense embeddings travel unchanged. All ranks use the
payload that is smallest for the rank with most data.

B rows of a rank, R ranks, V terms, K of them selected, A non-zeros.
"""

from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Payload = Literal["gaps8", "gaps16", "dense"]
_GAPS: dict[Payload, torch.dtype] = {"gaps8": torch.uint8, "gaps16": torch.int16}


def ranks() -> int:
    """Number of processes training together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, in the order of ranks, without gradient; the same number on each."""
    return torch.cat(_gather(rows))


def _gather(value: Tensor) -> list[Tensor]:
    if ranks() == 1:
        return [value]
    parts = [torch.empty_like(value) for _ in range(ranks())]
    dist.all_gather(parts, value.contiguous())
    return parts


def total(value: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    value = value.clone()
    if ranks() > 1:
        dist.all_reduce(value)
    return value


class Gathered(NamedTuple):
    """A (B, V) embedding of every rank, as received.

    Attributes:
        payload: its form.
        parts: of each rank the (B, V) values, or the bytes of its values and gaps.
        numbers: non-zeros of the rank with most; 0 for dense.
        shape: B, V.
        dtype: type of the values.
    """

    payload: Payload
    parts: list[Tensor]
    numbers: int
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes_received(self) -> int:
        """Bytes a rank receives, its own among them."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    def block(self, rank: int, columns: Tensor | None = None) -> Tensor:
        """A rank's embedding: (B, V), or (B, K) of the given sorted columns. Made dense at each call."""
        (B, V), part = self.shape, self.parts[rank]
        if self.payload == "dense":
            return part if columns is None else part[:, columns]
        index_A, value_A = self._entries(rank)
        if columns is None:
            return part.new_zeros(B * V, dtype=self.dtype).index_put_((index_A,), value_A).view(B, V)
        index_V = torch.full((V,), -1, device=part.device)
        index_V[columns] = torch.arange(len(columns), device=part.device)
        column_A = index_V[index_A % V]
        index_A = (index_A // V) * len(columns) + column_A
        kept_A = column_A >= 0
        block = part.new_zeros(B * len(columns), dtype=self.dtype)
        return block.index_put_((index_A[kept_A],), value_A[kept_A]).view(B, len(columns))

    def columns(self) -> Tensor:
        """(K,) sorted columns in which any rank has a number that is not zero."""
        active_V = torch.zeros(self.shape[1], dtype=torch.bool, device=self.parts[0].device)
        for at, part in enumerate(self.parts):
            if self.payload == "dense":
                active_V |= (part != 0).any(0)
            else:
                active_V[self._entries(at)[0] % self.shape[1]] = True
        return active_V.nonzero()[:, 0]

    def _entries(self, rank: int) -> tuple[Tensor, Tensor]:
        """Indices into B·V, in order, and the values there."""
        size = self.numbers * self.dtype.itemsize
        values, gaps = self.parts[rank][:size].view(self.dtype), self.parts[rank][size:].view(_GAPS[self.payload])
        step = gaps.long()
        stands = step != torch.iinfo(gaps.dtype).max
        index_A = (step + stands).cumsum(0)[stands] - 1
        return index_A, values[: len(index_A)]


def _active_indices(own_BV: Tensor) -> Tensor | None:
    """(A,) indices in B·V that are not zero; None if there are too many for any other form than dense to be smaller."""
    size = own_BV.element_size()
    if int(torch.count_nonzero(own_BV)) * (1 + size) >= own_BV.numel() * size:
        return None
    return own_BV.flatten().nonzero()[:, 0]


def _steps(index_A: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """How often each gap goes beyond the type, and what remains of it."""
    gap_A = torch.diff(index_A, prepend=index_A.new_tensor([-1])) - 1
    return gap_A // torch.iinfo(dtype).max, gap_A % torch.iinfo(dtype).max


def _message(own_BV: Tensor, index_A: Tensor, dtype: torch.dtype, numbers: int, gaps: int) -> Tensor:
    """Bytes of the numbers, then of the gaps, both filled up to the given lengths."""
    beyond_A, rest_A = _steps(index_A, dtype)
    value = own_BV.new_zeros(numbers)
    value[: len(index_A)] = own_BV.flatten()[index_A]
    # what fills up, and what is beyond, stands for no number
    gap = torch.full((gaps,), torch.iinfo(dtype).max, dtype=dtype, device=own_BV.device)
    gap[(beyond_A + 1).cumsum(0) - 1] = rest_A.to(dtype)
    return torch.cat([value.view(torch.uint8), gap.view(torch.uint8)])


def exchange(*own: Tensor) -> list[Gathered]:
    """Sends this rank's embeddings to all others and receives theirs, each in its smallest form.

    Args:
        own: (B, V) each, of one shape and type; without gradient. All ranks call this together.

    Raises:
        ValueError: if ranks hold different numbers of rows; on every rank.
    """
    B, V = own[0].shape
    dtype = own[0].dtype
    if ranks() == 1:
        return [Gathered("dense", [part], 0, (B, V), dtype) for part in own]
    indices = [_active_indices(part) for part in own]
    sizes = [B]
    for index_A in indices:
        if index_A is None:
            sizes += [0, -1, -1]
        else:
            sizes += [len(index_A), *(len(index_A) + int(_steps(index_A, gap)[0].sum()) for gap in _GAPS.values())]
    table = gather(torch.tensor([sizes], device=own[0].device)).cpu()
    if len(set(table[:, 0].tolist())) > 1:
        raise ValueError(
            f"ranks have different numbers of pairs: {table[:, 0].tolist()}; the global batch needs the same on each. "
            "ImageTextShards gives equal batches; with another loader, drop the last incomplete batch"
        )
    lengths = table[:, 1:].view(ranks(), len(own), 3).unbind(1)
    return [_send(*of) for of in zip(own, indices, lengths, strict=True)]


def _send(own_BV: Tensor, index_A: Tensor | None, lengths_R3: Tensor) -> Gathered:
    """Chooses from the lengths of all ranks (numbers, gaps of each type; -1 where dense), and gathers."""
    B, V = own_BV.shape
    size = own_BV.element_size()
    numbers, *gaps = lengths_R3.amax(0).tolist()
    choices: list[tuple[int, Payload]] = [(B * V * size, "dense")]
    if int(lengths_R3.min()) >= 0:
        choices += [
            (numbers * size + length * _GAPS[name].itemsize, name) for name, length in zip(_GAPS, gaps, strict=True)
        ]
    payload = min(choices)[1]
    if payload == "dense" or index_A is None:
        return Gathered("dense", _gather(own_BV), 0, (B, V), own_BV.dtype)
    gap = _GAPS[payload]
    # one more of each, which stands for nothing: no backend then sees an empty message
    message = _message(own_BV, index_A, gap, numbers + 1, gaps[list(_GAPS).index(payload)] + 1)
    return Gathered(payload, _gather(message), numbers + 1, (B, V), own_BV.dtype)

"""Ranking by sparse rows: who comes before whom, without ever holding all scores or all weights at once.

What is held: each row without its zeros (8 bytes an active term), and one block of `QUERIES` queries: their rows stood
upright (V × 256 fp32, 31 MB at V = 30,522) and their scores (M × 256 fp32, 100 MB for 100,000 rows). The full score
matrix of 100,000 images and 500,000 captions would take 200 GB, a dense (N, V) matrix of the images 12 GB.

Shapes: N rows, M rows ranked against each other, Q queries of a block, V words (or the width of a dense embedding), K own
rows of the query that has most.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUERIES = 256
_NOWHERE = 2**62  # a place beyond every cut


class SparseRows(NamedTuple):
    """Rows of an embedding matrix without their zeros.

    Attributes:
        entries: (N,) int64, how many a row has.
        column: (sum of entries,) int32, their columns, row after row.
        weight: (sum of entries,) fp32, their values.
    """

    entries: Tensor
    column: Tensor
    weight: Tensor

    @classmethod
    def none(cls) -> "SparseRows":
        """No row."""
        return cls(*(torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32)))

    @classmethod
    def cat(cls, parts: Iterable["SparseRows"]) -> "SparseRows":
        """The rows of all parts, one after the other."""
        return cls(*(torch.cat(columns) for columns in zip(cls.none(), *parts, strict=True)))

    @classmethod
    def of(cls, rows_NV: Tensor) -> "SparseRows":
        """The rows of a dense (N, V) matrix."""
        row, column = rows_NV.nonzero(as_tuple=True)
        return cls(torch.bincount(row, minlength=len(rows_NV)), column.int(), rows_NV[row, column].float())

    def only(self, keep_N: Tensor) -> "SparseRows":
        """The rows that are True in `keep_N`."""
        keep = keep_N.repeat_interleave(self.entries)
        return SparseRows(self.entries[keep_N], self.column[keep], self.weight[keep])

    def matrix(self, width: int) -> Tensor:
        """(N, width) sparse CSR."""
        start = torch.cat([self.entries.new_zeros(1), self.entries.cumsum(0)])
        size = (len(self.entries), width)
        return torch.sparse_csr_tensor(start, self.column.long(), self.weight, size=size, check_invariants=False)

    def scipy(self, width: int) -> Any:
        """(N, width) `scipy.sparse.csr_matrix`."""
        from scipy.sparse import csr_matrix

        start = torch.cat([self.entries.new_zeros(1), self.entries.cumsum(0)])
        parts = (self.weight.numpy(), self.column.numpy(), start.numpy())
        return csr_matrix(parts, shape=(len(self.entries), width))

    def columns(self, first: int, last: int, width: int) -> Tensor:
        """(width, last - first) dense: the rows `first` to `last` stood upright."""
        entries_Q = self.entries[first:last]
        begin = int(self.entries[:first].sum())
        here = slice(begin, begin + int(entries_Q.sum()))
        row = torch.arange(len(entries_Q), device=entries_Q.device).repeat_interleave(entries_Q)
        dense_VQ = self.weight.new_zeros(width, len(entries_Q))
        dense_VQ[self.column[here].long(), row] = self.weight[here]
        return dense_VQ

    def to(self, device: torch.device) -> "SparseRows":
        """The same rows on another device."""
        return SparseRows(*(part.to(device) for part in self))

    @property
    def row(self) -> Tensor:
        """(sum of entries,) int64: the row of each entry."""
        return torch.arange(len(self.entries), device=self.entries.device).repeat_interleave(self.entries)

    @property
    def nbytes(self) -> int:
        """Bytes the rows take."""
        return sum(part.numel() * part.element_size() for part in self)

    def where(self, keep: Tensor) -> "SparseRows":
        """The entries that are True in `keep`, a bool for each; rows stay, even if emptied."""
        entries = torch.bincount(self.row[keep], minlength=len(self.entries))
        return SparseRows(entries, self.column[keep], self.weight[keep])

    def largest(self, k: int) -> "SparseRows":
        """The `k` largest entries of each row, or all it has; of equal ones those of lower columns."""
        order = self.weight.sort(descending=True, stable=True).indices
        order = order[self.row[order].sort(stable=True).indices]  # by row, then by weight
        start = self.entries.cumsum(0) - self.entries
        place = torch.arange(len(order), device=order.device) - start.repeat_interleave(self.entries)
        keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        keep[order[place < k]] = True
        return self.where(keep)

    def above(self, share: float) -> "SparseRows":
        """The entries of at least `share` times the largest of their row."""
        largest_N = self.weight.new_zeros(len(self.entries)).scatter_reduce(0, self.row, self.weight, "amax")
        return self.where(self.weight >= share * largest_N[self.row])

    def unit(self) -> "SparseRows":
        """Rows of length 1; empty ones stay empty."""
        square_N = self.weight.new_zeros(len(self.entries)).index_add(0, self.row, self.weight.square())
        return self._replace(weight=self.weight / square_N.sqrt()[self.row])


class Ranks(NamedTuple):
    """Where the right answers of each query came; queries that have none are left out.

    Attributes:
        first: (N,) int64, rank of the best right answer among the wrong ones, from 1.
        gain: (N,) fp32, nDCG@`cut` with binary relevance.
        tied: (N,) bool, whether a wrong answer scores as the best right one does, or a score is NaN.
    """

    first: Tensor
    gain: Tensor
    tied: Tensor


def rank(query: SparseRows, owner_N: Tensor, gallery: SparseRows, owner_M: Tensor, width: int, cut: int = 10) -> Ranks:
    """Ranks each query's own rows among those of other owners. Ties, and NaN, count against.

    A right answer's place in nDCG is 1 + the wrong ones that score at least as much + the right ones before it; the
    gain of a query is `Σ_right 1/log2(1 + place)` over places up to `cut`, divided by what the best order gets.

    Both directions are ranked by this one product, gallery times block, so that equal rows get bitwise equal scores
    and tie; reusing one score matrix for both would save half the work and lose that.

    Args:
        query: N rows.
        owner_N: (N,) int64.
        gallery: M rows.
        owner_M: (M,) int64; a query's own rows are those of its owner.
        width: V, more than the largest column.
        cut: of nDCG.
    """
    first: list[Tensor] = [owner_N[:0]]
    gain: list[Tensor] = [query.weight[:0]]
    tied: list[Tensor] = [owner_N[:0].bool()]
    if len(owner_M):
        gallery_MV = gallery.matrix(width)
        discount = 1 / torch.arange(2, cut + 2, device=owner_N.device).log2()
        best = torch.cat([discount.new_zeros(1), discount.cumsum(0)])
        for begin in range(0, len(owner_N), QUERIES):
            last = min(begin + QUERIES, len(owner_N))
            score_MQ = gallery_MV @ query.columns(begin, last, width)
            own_MQ = owner_M[:, None] == owner_N[None, begin:last]
            own_Q = own_MQ.sum(0)
            place_KQ, tied_Q = _places(score_MQ, own_MQ, int(own_Q.max()))
            place_KQ = place_KQ[:, own_Q > 0]
            if len(place_KQ):
                tied.append(tied_Q[own_Q > 0])
                first.append(place_KQ[0])
                gains_KQ = torch.where(place_KQ <= cut, discount[place_KQ.clamp(max=cut) - 1], 0.0)
                gain.append(gains_KQ.sum(0) / best[own_Q[own_Q > 0].clamp(max=cut)])
    return Ranks(torch.cat(first), torch.cat(gain), torch.cat(tied))


def _places(score_MQ: Tensor, own_MQ: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(K, Q) int64: places of each query's own rows, best first, `_NOWHERE` where it has fewer than K; `Ranks.tied`."""
    own_KQ = score_MQ.masked_fill(~own_MQ | score_MQ.isnan(), -torch.inf).topk(most, dim=0).values
    here_KQ = torch.arange(most, device=own_MQ.device)[:, None] < own_MQ.sum(0)
    # "not below" instead of "at least": a NaN among the wrong ones then counts against
    ahead = [(~(score_MQ < own_Q) & ~own_MQ).sum(0) for own_Q in own_KQ]
    places = [before_Q + 1 + place for place, before_Q in enumerate(ahead)]
    if not places:
        return own_MQ.new_zeros(0).long(), own_MQ.new_zeros(0)
    above_Q = ((score_MQ > own_KQ[0]) & ~own_MQ).sum(0)
    return torch.stack(places).masked_fill(~here_KQ, _NOWHERE), ahead[0] > above_Q


def retrieval_figures(
    images: SparseRows, texts: SparseRows, text_owner: Tensor, ks: Iterable[int], ways: Iterable[str] = ("i2t", "t2i")
) -> dict[str, Tensor]:
    """The figures of `stair.metrics.RetrievalRecall` for images 0 … N-1 and texts that belong to `text_owner`."""
    return rank_figures(retrieval_ranks(images, texts, text_owner, ways), ks)


def retrieval_ranks(
    images: SparseRows, texts: SparseRows, text_owner: Tensor, ways: Iterable[str] = ("i2t", "t2i")
) -> dict[str, Ranks]:
    """Ranks of images among texts (`i2t`) and of texts among images (`t2i`); arguments as `retrieval_figures`."""
    device, image_owner = images.entries.device, torch.arange(len(images.entries), device=images.entries.device)
    text_owner = text_owner.to(device)
    width = 1 + max((int(rows.column.max()) for rows in (images, texts) if len(rows.column)), default=0)
    sides = {"i2t": (images, image_owner, texts, text_owner), "t2i": (texts, text_owner, images, image_owner)}
    return {way: rank(*sides[way], width) for way in ways}


def rank_figures(ranks: Mapping[str, Ranks], ks: Iterable[int]) -> dict[str, Tensor]:
    """Recall@k, median rank, mean reciprocal rank and nDCG@10 of each direction."""
    figures: dict[str, Tensor] = {}
    for name, (first, gain, _) in ranks.items():
        figures |= {f"{name}/recall@{k}": (first <= k).float().mean() for k in ks}
        # torch.median takes the lower of two middle ranks; none at all gives NaN
        figures[f"{name}/median_rank"] = (first.float().median() - (-first.float()).median()) / 2
        figures[f"{name}/mrr"] = (1 / first.float()).mean()
        figures[f"{name}/ndcg@10"] = gain.mean()
    return figures

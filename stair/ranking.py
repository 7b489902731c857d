"""Ranking by sparse rows: held are rows without zeros (8 bytes an active term), and one block of `QUERIES` queries.

Shapes: N rows, M rows ranked against each other, Q queries of a block, V terms (or the width of a dense embedding), K own
rows of the query that has most.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from scipy import sparse
from torch import Tensor

QUERIES = 256
_NO_RANK = 2**62  # beyond every cut


class SparseRows(NamedTuple):
    """N rows of an embedding matrix without their zeros."""

    entries: Tensor  # (N,) int64, how many a row has
    column: Tensor  # (sum of entries,) int32, their columns, row after row
    weight: Tensor  # (sum of entries,) fp32, their values

    @classmethod
    def of(cls, rows_NV: Tensor) -> "SparseRows":
        """The rows of a dense (N, V) matrix."""
        row, column = rows_NV.nonzero(as_tuple=True)
        return cls(torch.bincount(row, minlength=len(rows_NV)), column.int(), rows_NV[row, column].float())

    @classmethod
    def cat(cls, parts: Iterable["SparseRows"]) -> "SparseRows":
        """The rows of all parts, one after the other."""
        none = (torch.empty(0, dtype=dtype) for dtype in (torch.int64, torch.int32, torch.float32))
        return cls(*(torch.cat(columns) for columns in zip(none, *parts, strict=True)))

    def to(self, device: torch.device) -> "SparseRows":
        """The same rows on another device."""
        return SparseRows(*(part.to(device) for part in self))

    @property
    def nbytes(self) -> int:
        """Bytes the rows take."""
        return sum(part.numel() * part.element_size() for part in self)

    @property
    def row(self) -> Tensor:
        """(sum of entries,) int64: the row of each entry."""
        return torch.arange(len(self.entries), device=self.entries.device).repeat_interleave(self.entries)

    @property
    def start(self) -> Tensor:
        """(N + 1,) int64: where each row begins."""
        return torch.cat([self.entries.new_zeros(1), self.entries.cumsum(0)])

    def matrix(self, width: int) -> Tensor:
        """(N, width) sparse CSR."""
        size = (len(self.entries), width)
        return torch.sparse_csr_tensor(self.start, self.column.long(), self.weight, size=size, check_invariants=False)

    def scipy(self, width: int) -> Any:
        """(N, width) `scipy.sparse.csr_matrix`."""
        parts = (self.weight.numpy(), self.column.numpy(), self.start.numpy())
        return sparse.csr_matrix(parts, shape=(len(self.entries), width))

    def columns(self, first: int, last: int, width: int) -> Tensor:
        """(width, last - first) dense: the rows `first` to `last`, transposed."""
        entries_Q = self.entries[first:last]
        begin = int(self.entries[:first].sum())
        here = slice(begin, begin + int(entries_Q.sum()))
        row = torch.arange(len(entries_Q), device=entries_Q.device).repeat_interleave(entries_Q)
        dense_VQ = self.weight.new_zeros(width, len(entries_Q))
        dense_VQ[self.column[here].long(), row] = self.weight[here]
        return dense_VQ

    def only(self, keep_N: Tensor) -> "SparseRows":
        """The rows that are True in `keep_N`."""
        keep = keep_N.repeat_interleave(self.entries)
        return SparseRows(self.entries[keep_N], self.column[keep], self.weight[keep])

    def where(self, keep: Tensor) -> "SparseRows":
        """The entries that are True in `keep`, a bool for each; rows stay, even if emptied."""
        entries = torch.bincount(self.row[keep], minlength=len(self.entries))
        return SparseRows(entries, self.column[keep], self.weight[keep])

    def largest(self, k: int) -> "SparseRows":
        """The `k` largest entries of each row, or all it has; of equal ones those of lower columns."""
        order = self.weight.sort(descending=True, stable=True).indices
        order = order[self.row[order].sort(stable=True).indices]  # by row, then by weight
        rank = torch.arange(len(order), device=order.device) - self.start[:-1].repeat_interleave(self.entries)
        keep = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        keep[order[rank < k]] = True
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
    """Ranks of the right answers of each query; queries that have none are left out."""

    first: Tensor  # (N,) int64, rank of the best right answer among the wrong ones, from 1
    gain: Tensor  # (N,) fp32, nDCG@`cut` with binary relevance
    tied: Tensor  # (N,) bool, whether a wrong answer scores as the best right one does, or a score is NaN


def rank(query: SparseRows, owner_N: Tensor, gallery: SparseRows, owner_M: Tensor, width: int, cut: int = 10) -> Ranks:
    """Ranks each query's own rows (those of its owner) among those of other owners. Ties, and NaN, count against.

    A right answer's rank in nDCG is 1 + the wrong ones that score at least as much + the right ones before it; the
    gain of a query is `Σ_right 1/log2(1 + rank)` over ranks up to `cut`, divided by that of the best order.
    Both directions use the product gallery times block, so that equal rows get bitwise equal scores and tie.
    """
    parts = [Ranks(owner_N[:0], query.weight[:0], owner_N[:0].bool())]
    gallery_MV = gallery.matrix(width)
    discount = 1 / torch.arange(2, cut + 2, device=owner_N.device).log2()
    best = torch.cat([discount.new_zeros(1), discount.cumsum(0)])
    for begin in range(0, len(owner_N) if len(owner_M) else 0, QUERIES):
        last = min(begin + QUERIES, len(owner_N))
        score_MQ = gallery_MV @ query.columns(begin, last, width)
        own_MQ = owner_M[:, None] == owner_N[None, begin:last]
        own_Q = own_MQ.sum(0)
        rank_KQ, tied_Q = _ranks_of_own(score_MQ, own_MQ, int(own_Q.max()))
        rank_KQ = rank_KQ[:, own_Q > 0]
        if len(rank_KQ):
            gains_KQ = torch.where(rank_KQ <= cut, discount[rank_KQ.clamp(max=cut) - 1], 0.0)
            gain_Q = gains_KQ.sum(0) / best[own_Q[own_Q > 0].clamp(max=cut)]
            parts.append(Ranks(rank_KQ[0], gain_Q, tied_Q[own_Q > 0]))
    return Ranks(*map(torch.cat, zip(*parts, strict=True)))


def _ranks_of_own(score_MQ: Tensor, own_MQ: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """(K, Q) int64: ranks of each query's own rows, best first, `_NO_RANK` where it has fewer than K; `Ranks.tied`."""
    own_KQ = score_MQ.masked_fill(~own_MQ | score_MQ.isnan(), -torch.inf).topk(most, dim=0).values
    if not most:
        return own_MQ.new_zeros(0, own_MQ.shape[1]).long(), own_MQ.new_zeros(0)
    present_KQ = torch.arange(most, device=own_MQ.device)[:, None] < own_MQ.sum(0)
    # "not below" instead of "at least": a NaN among the wrong ones then counts against
    ahead = [(~(score_MQ < own_Q) & ~own_MQ).sum(0) for own_Q in own_KQ]
    rank_KQ = torch.stack([ahead_Q + 1 + before for before, ahead_Q in enumerate(ahead)])
    above_Q = ((score_MQ > own_KQ[0]) & ~own_MQ).sum(0)
    return rank_KQ.masked_fill(~present_KQ, _NO_RANK), ahead[0] > above_Q


def retrieval_ranks(images: SparseRows, texts: SparseRows, text_owner: Tensor) -> dict[str, Ranks]:
    """Ranks of images 0 … N-1 among texts (`i2t`) and of texts, which belong to `text_owner`, among images (`t2i`)."""
    image_owner = torch.arange(len(images.entries), device=images.entries.device)
    text_owner = text_owner.to(image_owner.device)
    width = 1 + max((int(rows.column.max()) for rows in (images, texts) if len(rows.column)), default=0)
    sides = {"i2t": (images, image_owner, texts, text_owner), "t2i": (texts, text_owner, images, image_owner)}
    return {way: rank(*sides[way], width) for way in sides}


def retrieval_figures(images: SparseRows, texts: SparseRows, owner: Tensor, ks: Iterable[int]) -> dict[str, Tensor]:
    """The figures of `stair.metrics.RetrievalRecall`; arguments as `retrieval_ranks` and `rank_figures`."""
    return rank_figures(retrieval_ranks(images, texts, owner), ks)


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

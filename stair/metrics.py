"""What is measured of a whole evaluation set: retrieval, sparsity, grounding, each exact over any number of ranks.

Averaging the recalls of ranks or batches gives another number than the recall of the set, so states are gathered or
summed and the figure is computed once. Rows whose id is -1 are padding that evens out ranks, and count nowhere.

torchmetrics has a RetrievalRecall, not used here: it wants one flat entry per (image, caption) pair in memory
(5,000 x 25,000 for COCO, in each direction) and leaves the order of ties to the sort.

Shapes: B images of an update, C captions of it, N images in all, M rows ranked against each other, Q queries of a
block, V words (or the width of a dense embedding), K words shown.
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

_QUERIES = 256  # rows made dense at a time: 31 MB at V = 30,522
_ALWAYS_ON = 0.9


def _row_of_caption(image_id_B: Tensor, caption_image_C: Tensor) -> Tensor:
    """(C,) int64: the row of a caption's image in the batch, -1 for padding.

    Raises:
        ValueError: if a caption's image is not in the batch, or is in it twice.
    """
    real_C = caption_image_C >= 0
    match_CB = (caption_image_C[:, None] == image_id_B[None, :]) & real_C[:, None]
    if not torch.equal(match_CB.sum(1), real_C.long()):
        raise ValueError(
            f"the captions belong to images {sorted(set(caption_image_C.tolist()))}, the batch holds images "
            f"{sorted(image_id_B.tolist())}: wanted each caption's image exactly once in the same batch; "
            "mark repeated images and their captions with -1"
        )
    return match_CB.int().argmax(1).masked_fill(~real_C, -1) if match_CB.numel() else caption_image_C.long()


class _Rows(NamedTuple):
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
    def of(cls, rows_NV: Tensor) -> "_Rows":
        row, column = rows_NV.nonzero(as_tuple=True)
        return cls(torch.bincount(row, minlength=len(rows_NV)), column.int(), rows_NV[row, column].float())

    def only(self, keep_N: Tensor) -> "_Rows":
        keep = keep_N.repeat_interleave(self.entries)
        return _Rows(self.entries[keep_N], self.column[keep], self.weight[keep])

    def matrix(self, width: int) -> Tensor:
        """(N, width) sparse CSR."""
        start = torch.cat([self.entries.new_zeros(1), self.entries.cumsum(0)])
        size = (len(self.entries), width)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(start, self.column.long(), self.weight, size=size, check_invariants=False)

    def columns(self, first: int, last: int, width: int) -> Tensor:
        """(width, last - first) dense: the rows `first` to `last` stood upright."""
        entries_Q = self.entries[first:last]
        begin = int(self.entries[:first].sum())
        here = slice(begin, begin + int(entries_Q.sum()))
        row = torch.arange(len(entries_Q), device=entries_Q.device).repeat_interleave(entries_Q)
        dense_VQ = self.weight.new_zeros(width, len(entries_Q))
        dense_VQ[self.column[here].long(), row] = self.weight[here]
        return dense_VQ

    def to(self, device: torch.device) -> "_Rows":
        return _Rows(*(part.to(device) for part in self))


def _ranks(query: _Rows, owner_N: Tensor, gallery: _Rows, owner_M: Tensor, width: int) -> Tensor:
    """Rank of each query's best own row among the rows of other owners; queries that own no row are left out.

    Both directions are ranked by this one product, gallery times block, so that equal rows get bitwise equal scores
    and tie; reusing one score matrix for both would save half the work and lose that.
    """
    ranks: list[Tensor] = [owner_N[:0]]
    if len(owner_M):
        gallery_MV = gallery.matrix(width)
        for first in range(0, len(owner_N), _QUERIES):
            last = min(first + _QUERIES, len(owner_N))
            score_MQ = gallery_MV @ query.columns(first, last, width)
            own_MQ = owner_M[:, None] == owner_N[None, first:last]
            best_Q = score_MQ.masked_fill(~own_MQ, -torch.inf).amax(0)
            # "not below" instead of "at least": a NaN then ranks last, and not first
            ahead_Q = (~(score_MQ < best_Q) & ~own_MQ).sum(0)
            ranks.append((ahead_Q + 1)[own_MQ.any(0)])
    return torch.cat(ranks)


class RetrievalRecall(Metric):
    """Recall@k and median rank of image-to-text (i2t) and text-to-image (t2i) retrieval over a whole set.

    rank(query) = 1 + number of competitors whose score is at least that of the query's best own row, where

    - score is the dot product of the embeddings as given (hand in normalised rows for cosine), fp32;
    - i2t: own rows are the image's captions, competitors the captions of all other images; images without a caption
      are no queries;
    - t2i: the own row is the caption's image, competitors are all other images.

    Ties count against: an embedding that is all zero, or NaN, ranks last. recall@k is the share of queries with
    rank <= k. An image seen twice (a sampler that evens out ranks by repeating) counts once, with the captions it came
    with first. With no query at all every figure is NaN.

    Embeddings are kept without their zeros, 8 bytes an active word, in CPU memory: a set of 30,000 rows takes 25 MB at
    100 active words but 7 GB when a run has gone dense, which must not take the GPU down. Gathering and ranking happen
    on the metric's device, so that both gloo and nccl can gather; call `.to(device)` before the first update.

    Args:
        ks: the k of recall@k, each at least 1.

    Raises:
        ValueError: if a k is below 1.
    """

    full_state_update = False
    higher_is_better = True
    _STATES = {  # noqa: RUF012 - torchmetrics needs plain class attributes
        "image_id": torch.int64,
        "captions": torch.int64,  # of each image; its captions follow each other in the text states
        "image_entries": torch.int64,
        "image_column": torch.int32,
        "image_weight": torch.float32,
        "text_entries": torch.int64,
        "text_column": torch.int32,
        "text_weight": torch.float32,
    }

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__(compute_on_cpu=True, dist_sync_fn=self._gather)
        if min(ks, default=0) < 1:
            raise ValueError(f"ks is {tuple(ks)}: wanted one or more numbers of at least 1, as in (1, 5, 10)")
        self.ks = tuple(ks)
        for name in self._STATES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, image_BV: Tensor, text_CV: Tensor, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds images with their captions.

        Args:
            image_BV: (B, V) embeddings, any float type.
            text_CV: (C, V) embeddings.
            image_id: (B,) int64, unique in the set; -1 for padding.
            caption_image: (C,) int64, the `image_id` of a caption's image, which must be in the same update; -1 for
                padding.

        Raises:
            ValueError: if a caption's image is missing from the update or in it twice, or the widths differ.
        """
        if image_BV.shape[1] != text_CV.shape[1]:
            raise ValueError(
                f"image embeddings are {image_BV.shape[1]} wide, text embeddings {text_CV.shape[1]}: wanted one width"
            )
        row_C = _row_of_caption(image_id, caption_image)
        # captions in the order of their images; padding has sorted to the front and is cut off
        order_C = row_C.argsort(stable=True)[int((row_C < 0).sum()) :]
        real_B = image_id >= 0
        captions_B = torch.bincount(row_C[order_C], minlength=len(image_id))
        new = (
            image_id[real_B],
            captions_B[real_B],
            *_Rows.of(image_BV.detach()[real_B]),
            *_Rows.of(text_CV.detach()[order_C]),
        )
        for name, rows in zip(self._STATES, new, strict=True):
            getattr(self, name).append(rows)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all ranks; a rank without rows takes part with empty ones of the right type.

        torchmetrics would send an empty fp32 tensor from it, which breaks the gathering of integers.
        """
        for name, dtype in self._STATES.items():
            if isinstance(rows := getattr(self, name), list):
                setattr(self, name, [torch.cat([torch.empty(0, dtype=dtype), *(r.cpu() for r in rows)])])
        super().sync(*args, **kwargs)

    def _gather(self, rows: Tensor, group: Any = None) -> list[Tensor]:
        return [part.cpu() for part in gather_all_tensors(rows.to(self.device), group)]

    def compute(self) -> dict[str, Tensor]:
        """Ranks every image and every caption.

        Returns:
            `i2t/recall@k` and `t2i/recall@k` for each k, in 0 to 1, `i2t/median_rank` and `t2i/median_rank`, from 1.
        """
        image_id_N, captions_N, *parts = (dim_zero_cat(getattr(self, name)) for name in self._STATES)
        ordered_N, order_N = image_id_N.sort(stable=True)
        is_new_N = torch.ones_like(ordered_N, dtype=torch.bool)
        is_new_N[1:] = ordered_N[1:] != ordered_N[:-1]
        first_N = torch.empty_like(is_new_N).scatter_(0, order_N, is_new_N)

        # sparse products exist on CPU and CUDA only
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        images = _Rows(*parts[:3]).only(first_N).to(device)
        texts = _Rows(*parts[3:]).only(first_N.repeat_interleave(captions_N)).to(device)
        image_owner = torch.arange(len(images.entries), device=device)
        text_owner = image_owner.repeat_interleave(captions_N[first_N].to(device))
        width = 1 + max((int(rows.column.max()) for rows in (images, texts) if len(rows.column)), default=0)
        figures: dict[str, Tensor] = {}
        for name, ranks in (
            ("i2t", _ranks(images, image_owner, texts, text_owner, width)),
            ("t2i", _ranks(texts, text_owner, images, image_owner, width)),
        ):
            figures |= {f"{name}/recall@{k}": (ranks <= k).float().mean() for k in self.ks}
            # torch.median takes the lower of two middle ranks; none at all gives NaN
            figures[f"{name}/median_rank"] = (ranks.float().median() - (-ranks.float()).median()) / 2
        return figures


class SparsityStats(Metric):
    """How many words are active, on which side, and how much the two sides overlap, over a whole set.

    With P(v) the share of rows in which word v is active (non-zero), over all rows of all ranks:

    - active_words = Σ_v P(v), the mean number of active words of a row, 0 to V;
    - dead_words = words with P(v) = 0, those that can never be active included; always_on_words = words with
      P(v) > 0.9; max_share = max_v P(v);
    - products_per_pair = Σ_v P_image(v) · P_text(v), the multiplications a pair of rows costs an inverted index, and
      the sign of co-activation: it nears V when both sides light up the same words always.

    Repeated images are not recognised: mark padding with -1. Without rows the figures are NaN (counts of words: V
    dead, 0 always on).

    Args:
        vocabulary_size: V.
    """

    full_state_update = False
    image_active_V: Tensor
    text_active_V: Tensor
    images: Tensor
    texts: Tensor

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        for side in ("image", "text"):
            self.add_state(f"{side}_active_V", torch.zeros(vocabulary_size, dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}s", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        image_BV: Tensor,
        text_CV: Tensor,
        image_id: Tensor | None = None,
        caption_image: Tensor | None = None,
    ) -> None:
        """Adds embeddings.

        Args:
            image_BV: (B, V).
            text_CV: (C, V).
            image_id: (B,) int64, -1 for padding; None: all rows are real.
            caption_image: (C,) int64, -1 for padding; None: all rows are real.
        """
        active_BV = image_BV != 0 if image_id is None else image_BV[image_id >= 0] != 0
        active_CV = text_CV != 0 if caption_image is None else text_CV[caption_image >= 0] != 0
        self.image_active_V += active_BV.sum(0)
        self.text_active_V += active_CV.sum(0)
        self.images += len(active_BV)
        self.texts += len(active_CV)

    def compute(self) -> dict[str, Tensor]:
        """The figures of the class docstring, those of a side as `image/...` and `text/...`."""
        share_V = {"image": self.image_active_V / self.images, "text": self.text_active_V / self.texts}
        figures = {"products_per_pair": share_V["image"] @ share_V["text"]}
        for side, active_V, rows in (
            ("image", self.image_active_V, self.images),
            ("text", self.text_active_V, self.texts),
        ):
            figures |= {
                f"{side}/active_words": active_V.sum() / rows,
                f"{side}/dead_words": (active_V == 0).sum().float(),
                f"{side}/always_on_words": (share_V[side] > _ALWAYS_ON).sum().float(),
                f"{side}/max_share": share_V[side].max(),
            }
        return figures


class Grounding(Metric):
    """Do an image's strongest words occur in its captions?

    grounding@k = mean over images of |top-k(image) ∩ words of its captions| / |top-k(image)|, where top-k holds the k
    words of greatest weight, only active ones (> 0): with fewer than k active the share is of those there are, with
    none it is 0. Ties in weight are broken arbitrarily. Images without a caption do not count.

    grounding@k_frequent is what an answer that never looks at the image gets: always the k words that occur in the
    captions of most images of this set. With n(v) the images whose captions hold v, it is the sum of the k largest
    n(v) over k times the number of images.

    Args:
        vocabulary_size: V.
        k: words of an image that are looked at, at least 1.

    Raises:
        ValueError: if k is not in 1 to V.
    """

    full_state_update = False
    higher_is_better = True
    share: Tensor
    share_first: Tensor
    held_V: Tensor
    images: Tensor

    def __init__(self, vocabulary_size: int, k: int = 10) -> None:
        super().__init__()
        if not 1 <= k <= vocabulary_size:
            raise ValueError(f"k is {k}: wanted 1 to {vocabulary_size}, the size of the vocabulary")
        self.k = k
        self.add_state("share", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("share_first", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("held_V", torch.zeros(vocabulary_size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, image_BV: Tensor, own_words_CV: Tensor, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds images with the words of their captions.

        Args:
            image_BV: (B, V) image embeddings, at least 0.
            own_words_CV: (C, V) bool, the words of each caption (`Vocabulary.own_words`).
            image_id: (B,) int64, -1 for padding.
            caption_image: (C,) int64, the `image_id` of a caption's image, which must be in the same update; -1 for
                padding.

        Raises:
            ValueError: if a caption's image is missing from the update or in it twice.
        """
        row_C = _row_of_caption(image_id, caption_image)
        real_C = row_C >= 0
        held_BV = torch.zeros_like(image_BV, dtype=torch.int32)
        held_BV.index_add_(0, row_C[real_C], own_words_CV[real_C].int())
        captioned_B = torch.bincount(row_C[real_C], minlength=len(image_id)) > 0
        held_BV = held_BV[captioned_B] > 0

        top_BK = image_BV[captioned_B].topk(self.k)
        active_BK = top_BK.values > 0
        hit_BK = held_BV.gather(1, top_BK.indices) & active_BK
        self.share += (hit_BK.sum(1) / active_BK.sum(1).clamp(min=1)).sum()
        self.share_first += hit_BK[:, 0].sum()
        self.held_V += held_BV.sum(0)
        self.images += len(held_BV)

    def compute(self) -> dict[str, Tensor]:
        """`grounding@k`, `grounding@1` and `grounding@k_frequent`, in 0 to 1; NaN without images."""
        return {
            f"grounding@{self.k}": self.share / self.images,
            "grounding@1": self.share_first / self.images,
            f"grounding@{self.k}_frequent": self.held_V.topk(self.k).values.sum() / (self.k * self.images),
        }

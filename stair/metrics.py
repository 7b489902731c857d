"""Retrieval and sparsity of a whole evaluation set, exact over any number of ranks. Rows with id -1 are padding.

The retrieval metrics of torchmetrics are not used: they hold one entry per (image, caption) pair in memory (5,000 x 25,000
for COCO, in each direction) and leave the order of ties to the sort. The tests compare with them.

B images of an update, C captions of it, N images in all, V terms (or the width of a dense embedding).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from stair.ranking import SparseRows, rank_figures, retrieval_ranks

Rows = Callable[[Tensor], Iterable[Tensor]]
_ALWAYS_ON = 0.9


def row_of_caption(image_id_B: Tensor, caption_image_C: Tensor) -> Tensor:
    """(C,) int64: the row of a caption's image in the batch, -1 for padding.

    Raises:
        ValueError: if a caption's image is not in the batch, or is in it twice.
    """
    real_C = caption_image_C >= 0
    match_CB = (caption_image_C[:, None] == image_id_B[None, :]) & real_C[:, None]
    if not torch.equal(match_CB.sum(1), real_C.long()):
        given = f"captions are of images {sorted(set(caption_image_C.tolist()))}, the batch holds images"
        wanted = "give each caption's image exactly once in its batch; mark repeated ones with -1"
        raise ValueError(f"{given} {sorted(image_id_B.tolist())}: {wanted}")
    return match_CB.int().argmax(1).masked_fill(~real_C, -1) if match_CB.numel() else caption_image_C.long()


class ImageRows(Metric):
    """Rows of images and of their captions, gathered from all ranks; an image that a sampler repeats counts once.

    A subclass names its states and their types. The first two are `image_id` and `captions`, the number of captions of an
    image; states of captions are in the order of the images.
    """

    full_state_update = False
    _STATES: ClassVar[dict[str, torch.dtype]]

    def __init__(self) -> None:
        super().__init__(compute_on_cpu=True, dist_sync_fn=self._gather)
        for name in self._STATES:
            self.add_state(name, [], dist_reduce_fx="cat")

    def _add(self, image_id: Tensor, caption_image: Tensor, images: Rows, captions: Rows) -> None:
        """Adds the real rows of a batch: `images` and `captions` select rows by an index, for the states in order."""
        row_C = row_of_caption(image_id, caption_image)
        # in the order of the images; padding sorts to the front
        order_C = row_C.argsort(stable=True)[int((row_C < 0).sum()) :]
        real_B = image_id >= 0
        captions_B = torch.bincount(row_C[order_C], minlength=len(image_id))
        new = (image_id[real_B], captions_B[real_B], *images(real_B), *captions(order_C))
        for name, rows in zip(self._STATES, new, strict=True):
            getattr(self, name).append(rows)

    def _first(self) -> tuple[list[Tensor], Tensor, Tensor]:
        """The states, (N,) bool whether a row is the first of its image, and (C,) bool the same of captions."""
        states = [dim_zero_cat(getattr(self, name)) for name in self._STATES]
        ordered_N, order_N = states[0].sort(stable=True)
        is_new_N = torch.ones_like(ordered_N, dtype=torch.bool)
        is_new_N[1:] = ordered_N[1:] != ordered_N[:-1]
        first_N = torch.empty_like(is_new_N).scatter_(0, order_N, is_new_N)
        return states, first_N, first_N.repeat_interleave(states[1])

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gathers the states of all ranks.

        From a rank without rows torchmetrics would send an empty fp32 tensor, which breaks the gathering of integers.
        """
        for name, dtype in self._STATES.items():
            if isinstance(rows := getattr(self, name), list):
                setattr(self, name, [torch.cat([torch.empty(0, dtype=dtype), *(r.cpu() for r in rows)])])
        super().sync(*args, **kwargs)

    def _gather(self, rows: Tensor, group: Any = None) -> list[Tensor]:
        return [part.cpu() for part in gather_all_tensors(rows.to(self.device), group)]


class RetrievalRecall(ImageRows):
    """Recall@k, ranks and gain of image-to-text (i2t) and text-to-image (t2i) retrieval over a whole set.

    rank(query) = 1 + number of competitors whose score is at least that of the query's best own row, where

    - score is the fp32 dot product of the embeddings as given (normalise rows for cosine);
    - i2t: own rows are the image's captions, competitors the captions of all other images; images without a caption are
      no queries;
    - t2i: the own row is the caption's image, competitors are all other images.

    Ties count against the model: an embedding of zeros, or with NaN, ranks last. recall@k is the share of queries with
    rank <= k, mrr the mean of 1/rank, ndcg@10 counts all captions of an image (`stair.ranking.rank`). Without a query every
    figure is NaN.

    Embeddings are kept without their zeros in CPU memory, 8 bytes an active term. Gathering and ranking happen on the
    metric's device. Call `.to(device)` before the first update.

    Args:
        ks: the k of recall@k, each at least 1.

    Raises:
        ValueError: if a k is below 1.
    """

    higher_is_better = True
    _STATES = {  # noqa: RUF012 - torchmetrics needs plain class attributes
        "image_id": torch.int64,
        "captions": torch.int64,
        "image_entries": torch.int64,
        "image_column": torch.int32,
        "image_weight": torch.float32,
        "text_entries": torch.int64,
        "text_column": torch.int32,
        "text_weight": torch.float32,
    }

    def __init__(self, ks: Sequence[int] = (1, 5, 10)) -> None:
        super().__init__()
        if min(ks, default=0) < 1:
            raise ValueError(f"ks is {tuple(ks)}; give numbers of at least 1, such as (1, 5, 10)")
        self.ks = tuple(ks)
        self.tied: dict[str, int] = {}

    def update(self, image_BV: Tensor, text_CV: Tensor, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds images with their captions: (B, V) and (C, V) embeddings of any float type.

        Args:
            image_id: (B,) int64, unique in the set; -1 for padding.
            caption_image: (C,) int64, the `image_id` of a caption's image, in the same update; -1 for padding.

        Raises:
            ValueError: if a caption's image is missing from the update or in it twice, or the widths differ.
        """
        if image_BV.shape[1] != text_CV.shape[1]:
            raise ValueError(f"image embeddings are {image_BV.shape[1]} wide, text embeddings {text_CV.shape[1]}")
        self._add(
            image_id,
            caption_image,
            lambda real_B: SparseRows.of(image_BV.detach()[real_B]),
            lambda order_C: SparseRows.of(text_CV.detach()[order_C]),
        )

    def compute(self) -> dict[str, Tensor]:
        """Ranks every image and every caption.

        Returns:
            For `i2t` and `t2i`: `recall@k` for each k, `mrr` and `ndcg@10`, in 0 to 1; `median_rank`, from 1. The attribute
            `tied` is set to the number of queries whose best own row ties with a competitor.
        """
        ranks = retrieval_ranks(*self.embeddings())
        self.tied = {way: int(each.tied.sum()) for way, each in ranks.items()}
        return rank_figures(ranks, self.ks)

    def embeddings(self) -> tuple[SparseRows, SparseRows, Tensor]:
        """Images in the order of their ids, their captions, and (C,) int64 the index of each caption's image."""
        (_, captions_N, *parts), first_N, first_C = self._first()
        # sparse products exist on CPU and CUDA only
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        images = SparseRows(*parts[:3]).only(first_N).to(device)
        texts = SparseRows(*parts[3:]).only(first_C).to(device)
        return images, texts, torch.arange(len(images.entries)).repeat_interleave(captions_N[first_N])


class SparsityStats(Metric):
    """How many terms are active on each side, and how much the two sides overlap, over a whole set.

    With P(v) the share of rows in which term v is active (non-zero), over all rows of all ranks:

    - active_terms = Σ_v P(v), the mean number of active terms of a row; active_terms_p50 and active_terms_p95, the smallest
      number that 50 % and 95 % of the rows do not exceed;
    - dead_terms: those with P(v) = 0, also if they can never be active; always_on_terms: those with P(v) > 0.9;
      max_share = max_v P(v);
    - flops_per_pair = Σ_v P_image(v) · P_text(v), the multiplications that a pair of rows costs an inverted index. It
      approaches V if both sides always activate the same terms.

    Repeated images count again: mark padding with -1. A side without rows has NaN figures.

    Args:
        vocabulary_size: V.
    """

    full_state_update = False
    active: Tensor  # (2, V), of images and texts
    histogram: Tensor  # (2, V + 1): rows with 0, 1, … V active terms; gives percentiles that are exact over ranks
    rows: Tensor  # (2, 1)

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        for name, size in (("active", vocabulary_size), ("histogram", vocabulary_size + 1), ("rows", 1)):
            self.add_state(name, torch.zeros(2, size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, image_BV: Tensor, text_CV: Tensor, image_id: Tensor | None = None, caption_image: Tensor | None = None
    ) -> None:
        """Adds embeddings: (B, V), (C, V). Ids are (B,) and (C,) int64, -1 for padding; None: all rows are real."""
        for side, (rows, ids) in enumerate(((image_BV, image_id), (text_CV, caption_image))):
            active = rows != 0 if ids is None else rows[ids >= 0] != 0
            self.active[side] += active.sum(0)
            self.histogram[side] += torch.bincount(active.sum(1), minlength=self.histogram.shape[1])
            self.rows[side] += len(active)

    def compute(self) -> dict[str, Tensor]:
        """The figures of the class docstring, those of a side as `image/...` and `text/...`."""
        share = self.active / self.rows
        figures = {"flops_per_pair": share[0] @ share[1]}
        for side, name in enumerate(("image", "text")):
            known, reached = self.rows[side, 0] > 0, self.histogram[side].cumsum(0)
            counts = {
                "active_terms_p50": (reached >= 0.5 * self.rows[side]).int().argmax(),
                "active_terms_p95": (reached >= 0.95 * self.rows[side]).int().argmax(),
                "dead_terms": (self.active[side] == 0).sum(),
                "always_on_terms": (share[side] > _ALWAYS_ON).sum(),
            }
            figures |= {
                f"{name}/active_terms": self.active[side].sum() / self.rows[side, 0],
                f"{name}/max_share": share[side].max(),
                **{f"{name}/{key}": torch.where(known, count.float(), torch.nan) for key, count in counts.items()},
            }
        return figures

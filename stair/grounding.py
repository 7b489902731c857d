"""Do terms mean what they say? An image's terms against its captions, a text's added terms against its other captions.

Terms are tokens, without lemmatisation: `dog` of an image matches `dogs` of its caption only if the vocabulary splits the
latter as `dog ##s`. Exact over any number of ranks, like `stair.metrics`.

B images of an update, C captions of it, V terms, K terms of an image.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from stair.metrics import row_of_caption


class Grounding(Metric):
    """Do an image's heaviest terms occur in its captions?

    grounding@k = mean over images of |top-k(image) ∩ tokens of its captions| / |top-k(image)|, where top-k holds the k
    terms of greatest weight, only active ones (> 0); 0 without any. Images without a caption are ignored.

    grounding@k_baseline is the same for an answer that ignores the image: the k tokens that occur in the captions of most
    images of the set. With n(v) the images whose captions hold v, it is the sum of the k largest n(v) over k times the
    number of images.

    Args:
        vocabulary_size: V.
        k: from 1 to V.

    Raises:
        ValueError: if k is out of range.
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
            raise ValueError(f"k is {k}; give 1 to {vocabulary_size}, the size of the vocabulary")
        self.k = k
        self.add_state("share", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("share_first", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("held_V", torch.zeros(vocabulary_size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, image_BV: Tensor, in_caption_CV: Tensor, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds images with the tokens of their captions.

        Args:
            image_BV: (B, V) image embeddings, at least 0.
            in_caption_CV: (C, V) bool, the tokens of each caption (`Vocabulary.in_caption_terms`).
            image_id: (B,) int64, -1 for padding.
            caption_image: (C,) int64, the `image_id` of a caption's image, in the same update; -1 for padding.

        Raises:
            ValueError: if a caption's image is missing from the update or in it twice.
        """
        row_C = row_of_caption(image_id, caption_image)
        in_caption_CV, row_C = in_caption_CV[row_C >= 0], row_C[row_C >= 0]
        captioned_B = torch.bincount(row_C, minlength=len(image_id)) > 0
        held_BV = _captions_with(in_caption_CV, row_C, len(image_id))[captioned_B] > 0
        top_BK = image_BV[captioned_B].topk(self.k)
        active_BK = top_BK.values > 0
        hit_BK = held_BV.gather(1, top_BK.indices) & active_BK
        self.share += (hit_BK.sum(1) / active_BK.sum(1).clamp(min=1)).sum()
        self.share_first += hit_BK[:, 0].sum()
        self.held_V += held_BV.sum(0)
        self.images += len(held_BV)

    def compute(self) -> dict[str, Tensor]:
        """`grounding@k`, `grounding@1` and `grounding@k_baseline`, in 0 to 1; NaN without images."""
        return {
            f"grounding@{self.k}": self.share / self.images,
            "grounding@1": self.share_first / self.images,
            f"grounding@{self.k}_baseline": self.held_V.topk(self.k).values.sum() / (self.k * self.images),
        }


class Expansion(Metric):
    """Which terms does a text activate beyond its own tokens, and are they true of the image?

    A text's added terms are its active terms that are no tokens of the text itself.

    - added_terms: mean number of added terms of a text;
    - added_share: their share of all active terms, over all texts together;
    - added_confirmed: the share of added terms that occur in *other* captions of the same image, over all texts whose
      image has another caption; NaN without any;
    - added_confirmed_baseline: the same beside a random image, the mean over all images of the set.

    Args:
        vocabulary_size: V.
    """

    full_state_update = False
    added: Tensor
    active: Tensor
    texts: Tensor
    tested: Tensor
    confirmed: Tensor
    added_V: Tensor
    held_V: Tensor
    images: Tensor

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        for name in ("added", "active", "texts", "tested", "confirmed", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("added_V", "held_V"):
            self.add_state(name, torch.zeros(vocabulary_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, text_CV: Tensor, in_caption_CV: Tensor, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds texts; all captions of an image belong to one update. Arguments and errors as in `Grounding.update`."""
        row_C = row_of_caption(image_id, caption_image)
        real_C = row_C >= 0
        row_C, own_CV, active_CV = row_C[real_C], in_caption_CV[real_C], text_CV[real_C] > 0
        added_CV = active_CV & ~own_CV
        held_BV = _captions_with(own_CV, row_C, len(image_id))
        has_other_C = torch.bincount(row_C, minlength=len(image_id))[row_C] > 1
        self.added += added_CV.sum()
        self.active += active_CV.sum()
        self.texts += len(row_C)
        self.tested += added_CV[has_other_C].sum()
        # an added term is not in the text itself, so a caption that holds it is another one
        self.confirmed += (added_CV & (held_BV[row_C] > 0))[has_other_C].sum()
        self.added_V += added_CV[has_other_C].sum(0)
        self.held_V += (held_BV[row_C.unique()] > 0).sum(0)
        self.images += len(row_C.unique())

    def compute(self) -> dict[str, Tensor]:
        """The figures of the class docstring; NaN without texts."""
        baseline = (self.added_V.double() @ self.held_V.double() / (self.tested * self.images)).float()
        return {
            "added_terms": self.added / self.texts,
            "added_share": self.added / self.active,
            "added_confirmed": self.confirmed / self.tested,
            "added_confirmed_baseline": baseline,
        }


def _captions_with(in_caption_CV: Tensor, row_C: Tensor, images: int) -> Tensor:
    """(B, V) int32: how many captions of each image hold a term."""
    count_BV = torch.zeros(images, in_caption_CV.shape[1], dtype=torch.int32, device=in_caption_CV.device)
    return count_BV.index_add_(0, row_C, in_caption_CV.int())

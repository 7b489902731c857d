"""What makes the figures of an evaluation set unfair, counted alike by `stair evaluate` and validation.

A repeated image, for example, has rank 2 at best for its captions. Such samples are measured as they are, and counted.

B images of an update, C captions of it, N images in all, T positions, L classes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from stair.metrics import ImageRows
from stair.vocabulary import Vocabulary

_CUT, _UNKNOWN, _EMPTY = 1, 2, 4
_LABELS = {
    "repeated_images": "repeated images",
    "images_with_the_captions_of_another": "images with the same captions as another",
    "shared_captions": "captions of several images",
    "images_without_captions": "images without caption",
    "cut_captions": "truncated captions",
    "captions_with_unknown_tokens": "captions with unknown tokens",
    "empty_captions": "captions without a token",
    "images_without_class": "images without class",
    "images_of_several_classes": "images in several classes",
    "classes_sharing_a_name": "classes that share a name",
    "classes_without_images": "classes without images",
    "images_also_in_train": "images that are also in the train part",
    "images_also_in_val": "images that are also in the val part",
    "tied_i2t": "images tied with a wrong caption",
    "tied_t2i": "captions tied with a wrong image",
    "tied_classes": "images tied with a wrong class",
}


class Captions(NamedTuple):
    """C captions as a model reads them: `content`, equal if the model cannot distinguish them; (C,) int64 `flags`."""

    content: list[bytes]
    flags: Tensor


def token_captions(vocabulary: Vocabulary, ids: Tensor, mask: Tensor, cut: Tensor) -> Captions:
    """Captions of a model with our tokenizer: (C, T) int64, (C, T) bool; (C,) bool, True if longer than the model takes."""
    ids, mask, cut = ids.cpu(), mask.cpu(), cut.cpu()
    unknown_C = ((ids == vocabulary.unknown_id) & mask).any(1)
    flags_C = cut.long() * _CUT + unknown_C.long() * _UNKNOWN + (mask.sum(1) <= 2).long() * _EMPTY
    return Captions([row[real].numpy().tobytes() for row, real in zip(ids, mask, strict=True)], flags_C)


def text_captions(texts: Sequence[str], cut: Tensor | None) -> Captions:
    """Captions of a model with another tokenizer; `cut` as in `token_captions`, None if unknown."""
    flags_C = torch.tensor([0 if text.strip() else _EMPTY for text in texts], dtype=torch.int64)
    return Captions([text.encode() for text in texts], flags_C if cut is None else flags_C + cut.long().cpu() * _CUT)


class SetCounts(ImageRows):
    """Counts over a whole set, exact over any number of ranks. Repeated images have equal pixels."""

    _STATES = {  # noqa: RUF012 - torchmetrics needs plain class attributes
        name: torch.int64 for name in ("image_id", "captions", "image_hash", "caption_hash", "caption_flags")
    }

    def update(self, image_hash_B: Tensor, captions: Captions, image_id: Tensor, caption_image: Tensor) -> None:
        """Adds images with their captions: (B,) int64 of `image_hashes`; ids as in `RetrievalRecall.update`."""
        caption_hash_C = _hashes(captions.content)
        self._add(
            image_id.cpu(),
            caption_image.cpu(),
            lambda real_B: [image_hash_B[real_B]],
            lambda order_C: [caption_hash_C[order_C], captions.flags[order_C]],
        )

    def compute(self) -> dict[str, int]:
        """`images`, `captions`, and how many of them make the figures unfair; see `sentences`."""
        (_, captions_N, *rows), first_N, first_C = self._first()
        caption_counts, hash_N = captions_N[first_N].tolist(), rows[0][first_N].tolist()
        hash_C, flags_C = rows[1][first_C].tolist(), rows[2][first_C]
        remaining = iter(hash_C)
        captions_of = [tuple(next(remaining) for _ in range(count)) for count in caption_counts]
        images_of = Counter(caption for captions in captions_of for caption in set(captions))
        return {
            "images": len(hash_N),
            "captions": len(hash_C),
            "repeated_images": repeats(hash_N),
            "images_with_the_captions_of_another": repeats(filter(None, captions_of)),
            "shared_captions": sum(images_of[caption] > 1 for caption in hash_C),
            "images_without_captions": caption_counts.count(0) if hash_C else 0,
            "cut_captions": int((flags_C & _CUT > 0).sum()),
            "captions_with_unknown_tokens": int((flags_C & _UNKNOWN > 0).sum()),
            "empty_captions": int((flags_C & _EMPTY > 0).sum()),
        }


def class_counts(classes: Sequence[str], labels: Sequence[int], image_hash: Sequence[int]) -> dict[str, int]:
    """What makes figures of L classes unfair; N labels, -1 for none, and N hashes of the images."""
    classes_of: dict[int, set[int]] = {}
    for label, image in zip(labels, image_hash, strict=True):
        if label >= 0:
            classes_of.setdefault(image, set()).add(label)
    return {
        "images_without_class": sum(label < 0 for label in labels),
        "images_of_several_classes": sum(len(classes_of.get(image, ())) > 1 for image in image_hash),
        "classes_sharing_a_name": repeats(" ".join(name.lower().split()) for name in classes),
        "classes_without_images": len(set(range(len(classes))) - set(labels)),
    }


def image_hashes(images: Tensor | Sequence[Image]) -> Tensor:
    """(B,) int64 of (B, 3, H, W) pixels or of B images, equal for equal pixels."""
    if isinstance(images, Tensor):
        return _hashes([pixels.numpy().tobytes() for pixels in images.cpu()])
    return _hashes([repr(image.size).encode() + image.tobytes() for image in images])


def sentences(counts: Mapping[str, int], ks: Sequence[int] = ()) -> list[str]:
    """What a reader of the figures must know: each count above 0, and each K of recall@K that is trivial."""
    trivial = [f"R@{k} is 100 % for any model" for k in ks if k >= counts["images"]]
    return [f"{label}: {counts[key]}" for key, label in _LABELS.items() if counts.get(key)] + trivial


def repeats(values: Iterable[object]) -> int:
    """How many values are equal to another one."""
    return sum(count for count in Counter(values).values() if count > 1)


def _hashes(contents: Sequence[bytes]) -> Tensor:
    digests = [hashlib.blake2b(content, digest_size=8).digest() for content in contents]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests], dtype=torch.int64)

"""The batch of images and captions, in training and in evaluation.

B images, C captions (C = B in training: one caption an image), T text positions, H × W pixels.
"""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict):
    """Images with their captions.

    Keys:
        pixels: (B, 3, H, W) uint8, 0 to 255. The model normalises: mean and deviation have one home.
        ids: (C, T) int64 word-piece ids, padded with the vocabulary's pad id.
        mask: (C, T) bool, True at real tokens.
        cut: (C,) bool, True where a caption was longer than the model's longest text.
        image_id: (B,) int64, the image's place in its evaluation set; -1 marks padding that only evens out ranks and
            must be ignored. In training: the row number.
        caption_image: (C,) int64, the `image_id` of the image a caption belongs to; -1 for padding.
        key: B strings, `tar/__key__` of each sample, for messages.
        source: B strings, the name of each sample's source in a mixture; "" where there is but one.
    """

    pixels: Tensor
    ids: Tensor
    mask: Tensor
    cut: Tensor
    image_id: Tensor
    caption_image: Tensor
    key: list[str]
    source: list[str]

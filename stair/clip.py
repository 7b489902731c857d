"""The dense baseline: CLIP (Radford et al. 2021) with the towers, vocabulary, loss and training code of STAIR.

It differs from `Stair` only at the end of a tower: one pooled vector and a projection.

B images, C captions, T positions, D width of a tower, V width of the embedding.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from stair.encoders import ImageEncoder, TextEncoder
from stair.towers import TowersConfig, TwoTowers
from stair.vocabulary import Vocabulary


@dataclass
class ClipConfig(TowersConfig):
    """Settings of a dense model.

    Args:
        vocabulary: a BERT `vocab.txt`, a folder with one, or a hub name; here only the tokenizer of texts.
        image: the image tower.
        text: the text tower.
        width: dimensions of an embedding.
        pooling: `mean` of all positions that `image.positions` selects (of texts: of all tokens), or `class`, the class
            token of images and [CLS] of texts.
    """

    width: int = 512
    pooling: Literal["mean", "class"] = "mean"


class DenseClip(TwoTowers):
    """Image and text encoders that end in one vector each, compared by cosine.

    `z = P · pool(h_1 … h_T)` with a bias-free projection P (V, D) of each side: `image_projection`, `text_projection`.

    Raises:
        ValueError: if a tower cannot be built, does not fit the vocabulary, or has no class token to pool.
        OSError: if published weights are neither in the cache nor downloadable.
    """

    family = "clip"
    config_class = ClipConfig
    config: ClipConfig

    def __init__(self, config: ClipConfig) -> None:
        super().__init__(config)
        if config.width < 1:
            raise ValueError(f"width is {config.width}; give the dimensions of an embedding, 512 as in CLIP")
        if config.pooling == "class":
            config.image = replace(config.image, positions="all")
        self.vocabulary = Vocabulary(config.vocabulary)
        self.image_encoder = ImageEncoder(config.image)
        if config.pooling == "class" and getattr(self.image_encoder.backbone, "cls_token", None) is None:
            raise ValueError(f"{config.image.name!r} has no class token; give pooling 'mean'")
        self.text_encoder, _ = TextEncoder.build(config.text, len(self.vocabulary))
        self.image_projection = nn.Linear(self.image_encoder.width, config.width, bias=False)
        self.text_projection = nn.Linear(self.text_encoder.width, config.width, bias=False)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Embeds images, with gradients; see `TwoTowers`."""
        hidden_BTD = self.image_encoder(pixels)
        pooled_BD = hidden_BTD[:, 0] if self.config.pooling == "class" else hidden_BTD.mean(1)
        image_BV: Tensor = self.image_projection(pooled_BD).float()
        return image_BV

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeds texts, with gradients; see `TwoTowers`."""
        hidden_CTD = self.text_encoder(ids, mask)
        if self.config.pooling == "class":
            pooled_CD = hidden_CTD[:, 0]
        else:
            real_CT1 = mask[..., None].to(hidden_CTD.dtype)
            pooled_CD = (hidden_CTD * real_CT1).sum(1) / real_CT1.sum(1)
        text_CV: Tensor = self.text_projection(pooled_CD).float()
        return text_CV

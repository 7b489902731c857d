"""The STAIR model: two towers, two vocabulary heads, one vocabulary.

    model = Stair.from_pretrained("runs/demo/stage3/stair")
    image_BV = model.encode_image([picture])
    text_BV = model.encode_text(["two red circles above a boat"])
    model.score(image_BV, text_BV)
    model.encode(images=folder_of_pictures.glob("*.jpg"))     # a sparse matrix, for many

B images, C captions, N of either, T positions, V terms.
"""

import hashlib
import json
import math
import tempfile
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from stair.encoders import ImageEncoder, TextEncoder
from stair.errors import require
from stair.head import VocabularyHead
from stair.images import decode_image
from stair.towers import TowersConfig, TwoTowers
from stair.vocabulary import Vocabulary

if TYPE_CHECKING:
    from stair.embeddings import EmbeddingSpace


@dataclass
class StairDesign(TowersConfig):
    """Settings of a STAIR model, the same in all stages.

    Args:
        vocabulary: a BERT `vocab.txt`, a folder with one, or a hub name; each token is a dimension.
        image: the image encoder.
        text: the text encoder.
        text_bias_start: initial bias of the text head, unless a pretrained head has one. A value above 0 keeps in-caption
            terms active at the start of training from scratch.
        in_caption_margin: constant subtracted from a text's logits for all other terms; at least 0, the same in all
            stages. With a soft mask, in-caption terms should give about 1/20 of a text's squared norm at the start
            (`train/text_full/in_caption_share`): 0.45 from scratch; 3 with a masked-LM head pretrained on captions, whose
            logits are larger; 0 with a SPLADE head (benchmarks/real_encoders). With a hard mask, a text encoder from
            scratch needs about 3: its other terms get no gradient in stage 1 and would all be active in stage 2.

    Raises:
        SettingError: if `in_caption_margin` is negative or not finite.
    """

    text_bias_start: float = 0.0
    in_caption_margin: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        margin = self.in_caption_margin
        require(0 <= margin < math.inf, "stair.in_caption_margin", margin, "finite, at least 0, in logits")


@dataclass
class StairConfig(StairDesign):
    """Settings of a trained STAIR model: its design, and what its stage sets.

    Args:
        vocabulary, image, text, text_bias_start, in_caption_margin: as in `StairDesign`.
        similarity: dot product (`dot`) or `cosine` of the embeddings.
        text_form: terms of a text that can be active: in-caption terms (`masked`, stage 1) or all (`full`).
    """

    similarity: Literal["dot", "cosine"] = "dot"
    text_form: Literal["masked", "full"] = "full"


class Stair(TwoTowers):
    """Image and text encoders that end in the terms of one vocabulary (STAIR, section 2).

    Attributes:
        vocabulary: V terms.
        image_encoder: hidden states of images.
        image_head: terms of images; its word embeddings begin as a copy of the text side's.
        text_encoder: hidden states of texts.
        text_head: terms of texts; tied to the encoder's input embeddings.

    Raises:
        ValueError: if a tower cannot be built or does not fit the vocabulary.
        OSError: if published weights are neither in the cache nor downloadable.
    """

    family = "stair"
    config_class = StairConfig
    config: StairConfig

    def __init__(self, config: StairConfig) -> None:
        super().__init__(config)
        self.vocabulary = Vocabulary(config.vocabulary)
        self.image_encoder = ImageEncoder(config.image)
        self.text_encoder, masked_lm = TextEncoder.build(config.text, len(self.vocabulary))
        if config.text.pretrained and masked_lm is None:
            warnings.warn(
                f"text encoder {config.text.name!r} was published without a masked-LM head: both vocabulary heads start "
                "from its word embeddings, and their other layers from scratch",
                stacklevel=2,
            )
        embeddings: nn.Parameter = self.text_encoder.word_embeddings.weight  # type: ignore[assignment]
        never = self.vocabulary.never_active
        self.text_head = VocabularyHead(self.text_encoder.width, embeddings, never, masked_lm, config.text_bias_start)
        # a shared matrix would let stage 2 change image embeddings although the image side is frozen
        copied = nn.Parameter(embeddings.detach().clone())
        self.image_head = VocabularyHead(self.image_encoder.width, copied, never, masked_lm)
        self.log_scale = nn.Parameter(torch.zeros(1))

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared; the stage that trains the model sets it."""
        return self.config.similarity

    def forward(
        self, pixels: Tensor, ids: Tensor, mask: Tensor, texts: Collection[str] = (), negative_slope: float = 0.0
    ) -> dict[str, Tensor]:
        """Encodes a batch, with gradients where parameters require them.

        Args:
            pixels: (B, 3, H, W), uint8 in 0 to 255.
            ids: (C, T) int64.
            mask: (C, T) bool.
            texts: forms of the texts to compute: `text_full` with all terms, `text_masked` with in-caption terms only.
                Without any: `text_CV`, as in `encode_text`.
            negative_slope: for training on pairs (C = B): slope below zero of an image's in-caption terms.

        Returns:
            `image_BV` and the texts asked for: fp32, not negative except for images with a slope.
        """
        if not texts:
            return super().forward(pixels, ids, mask)
        if "text_full" in texts:
            encoded = {"text_full": self._text(ids, mask, self.config.in_caption_margin)}
            if "text_masked" in texts:
                encoded["text_masked"] = encoded["text_full"] * self.vocabulary.in_caption_terms(ids, mask)
        else:
            encoded = {"text_masked": self._text(ids, mask, math.inf)}
        encoded["image_BV"] = self._image(pixels, ids, negative_slope)  # last: see `ContrastiveModule.encode`
        return encoded

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Computes the term weights of images, with gradients; see `TwoTowers`."""
        return self._image(pixels)

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Computes the term weights of texts, with gradients; see `TwoTowers`."""
        return self._text(ids, mask, math.inf if self.config.text_form == "masked" else self.config.in_caption_margin)

    def _image(self, pixels: Tensor, caption_ids: Tensor | None = None, negative_slope: float = 0.0) -> Tensor:
        hidden_BTD = self.image_encoder(pixels)
        mask_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        in_caption = caption_ids if negative_slope > 0 else None
        image_BV: Tensor = self.image_head(hidden_BTD, mask_BT, in_caption, negative_slope=negative_slope)
        return image_BV

    def _text(self, ids_CT: Tensor, mask_CT: Tensor, margin: float) -> Tensor:
        # padding's id is never active, so it needs no mask
        in_caption = ids_CT if margin > 0 else None
        text_CV: Tensor = self.text_head(self.text_encoder(ids_CT, mask_CT), mask_CT, in_caption, margin)
        return text_CV

    def encode(
        self,
        images: Iterable[Image | str | Path] | None = None,
        texts: Iterable[str] | None = None,
        *,
        output: Literal["scipy", "torch"] = "scipy",
        batch_size: int = 64,
    ) -> Any:
        """Computes sparse embeddings of any number of images or texts.

        Args:
            images: PIL images, or paths of files; read batch by batch.
            texts: texts. Give images or texts, not both.
            output: `scipy` for CSR, `torch` for a sparse CSR tensor.
            batch_size: how many are encoded at a time.

        Returns:
            (N, V) `scipy.sparse.csr_matrix` or sparse CSR `Tensor`, fp32, not negative: the rows of `encode_image` or
            `encode_text`.

        Raises:
            ValueError: if not exactly one of both is given, or an image cannot be decoded.
        """
        if (images is None) == (texts is None):
            raise ValueError("give images or texts, one of both")
        if isinstance(texts, str) or isinstance(images, (str, Path, Image)):
            raise ValueError("give a list, also for a single item: encode(texts=[text])")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a number from 1 up")
        if output not in ("scipy", "torch"):
            raise ValueError(f"output is {output!r}; give 'scipy' or 'torch'")
        from scipy import sparse

        from stair.embeddings import to_csr

        rows = [sparse.csr_matrix((0, len(self.vocabulary)), dtype="float32")]
        items: Iterator[Any] = map(_opened, images) if images is not None else iter(texts or ())
        while batch := list(islice(items, batch_size)):
            rows.append(to_csr(self.encode_text(batch) if images is None else self.encode_image(batch)))
        csr = sparse.vstack(rows, format="csr")
        if output == "scipy":
            return csr
        start, terms, weights = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        return torch.sparse_csr_tensor(start, terms, weights, csr.shape)

    def push_to_hub(
        self, name: str, licence: str, data: str = "", results: Path | None = None, private: bool = False
    ) -> None:
        """Uploads the model with a card to the hub; arguments as in `stair.hub.push`."""
        from stair.hub import push

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model")
            push(str(Path(folder) / "model"), name, licence, data, results, private=private)

    @property
    def fingerprint(self) -> str:
        """Sha256 of all that determines an embedding: weights, vocabulary, sizes. Equal for equal models.

        Reads every weight, so keep the value. All ranks of a sharded model must ask.
        """
        image, text = self.config.image, self.config.text
        sizes = [
            image.image_size,
            image.positions,
            text.max_tokens,
            self.config.text_form,
            self.config.in_caption_margin,
        ]
        digest = hashlib.sha256(json.dumps([self.vocabulary.fingerprint, *sizes]).encode())
        for name, value in sorted(self.state_dict().items()):
            if name != "log_scale":  # scales scores, not embeddings
                value = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded under FSDP2
                digest.update(f"{name}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().float().contiguous().numpy())
        return digest.hexdigest()

    @property
    def space(self) -> "EmbeddingSpace":
        """What this model's embeddings are comparable with; see `fingerprint`, also for its cost."""
        from stair.embeddings import EmbeddingSpace

        return EmbeddingSpace(self.fingerprint, self.similarity, tuple(self.vocabulary.tokens))


def _opened(image: Image | str | Path) -> Image:
    if isinstance(image, Image):
        return image
    if not isinstance(image, (str, Path)):
        raise ValueError(f"an image is a {type(image).__name__}; give a path, or a PIL image: decode_image(bytes)")
    try:
        return decode_image(Path(image).read_bytes())
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error

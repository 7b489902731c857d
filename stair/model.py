"""The model people load and ask: two towers, two vocabulary heads, one vocabulary.

    model = Stair.from_pretrained("runs/demo/stage3/stair")
    image_BV = model.encode_image([picture])
    text_BV = model.encode_text(["two red circles above a boat"])
    model.score(image_BV, text_BV)

B images, C captions, T positions, V words.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from stair.encoders import ImageEncoder, ImageTower, TextEncoder, TextTower
from stair.head import VocabularyHead
from stair.images import as_rgb, eval_pixels
from stair.vocabulary import Vocabulary

_WEIGHTS, _CONFIG, _FORMAT = "model.safetensors", "config.json", 1


@dataclass
class StairConfig:
    """What a STAIR model is made of.

    Args:
        vocabulary: a BERT `vocab.txt`, a folder with one, or a hub name; every word piece of it is a dimension.
        image: the image tower.
        text: the text tower.
        image_bias_start: start of the image head's bias, where no published head gives one. Below 0 costs recall.
        text_bias_start: the same for text. Above 0 keeps a caption's own words on while training starts from scratch.
        similarity: how images and texts are compared: `dot` of the weights, or `cosine`. A stage sets it.
        text_words: which words a text may light up: its `own` (stage 1) or `all`. A stage sets it.
    """

    vocabulary: str = "bert-base-uncased"
    image: ImageTower = field(default_factory=ImageTower)
    text: TextTower = field(default_factory=TextTower)
    image_bias_start: float = 0.0
    text_bias_start: float = 0.0
    similarity: Literal["dot", "cosine"] = "dot"
    text_words: Literal["own", "all"] = "all"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StairConfig":
        """Reads what `asdict` wrote.

        Raises:
            ValueError: on fields we do not know.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown} in a STAIR configuration; known are {sorted(known)}")
        return cls(**{**values, "image": ImageTower(**values["image"]), "text": TextTower(**values["text"])})


class Stair(nn.Module):
    """Image and text encoders that end in the words of one vocabulary (STAIR, section 2).

    Args:
        config: what to build.

    Attributes:
        config: the same; `config.similarity` and `config.text_words` are set by the stage that trains the model.
        vocabulary: V words.
        image_encoder, image_head: the image side; its head has a word matrix of its own, a copy of the text side's.
        text_encoder, text_head: the text side; its head is tied to the tower's input embeddings.
        log_scale: (1,), logarithm of the similarity's scale (inverse temperature). Not a scalar: FSDP2 refuses those.

    Raises:
        ValueError: if a tower cannot be built or does not fit the vocabulary.
        OSError: if published weights are neither in the cache nor to be fetched.
    """

    def __init__(self, config: StairConfig) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = Vocabulary(config.vocabulary)
        self.image_encoder = ImageEncoder(config.image)
        self.text_encoder, masked_lm = TextEncoder.build(config.text, len(self.vocabulary))
        text_words: nn.Parameter = self.text_encoder.words.weight  # type: ignore[assignment]
        never = self.vocabulary.never_active
        self.text_head = VocabularyHead(
            self.text_encoder.width,
            text_words,
            never,
            masked_lm,
            config.text_bias_start,
        )
        # A shared matrix would let stage 2 move the image embeddings although the image tower is frozen
        self.image_head = VocabularyHead(
            self.image_encoder.width,
            nn.Parameter(text_words.detach().clone()),
            never,
            masked_lm,
            config.image_bias_start,
        )
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor, unmasked: bool = False) -> dict[str, Tensor]:
        """Encodes a batch, with gradients where parameters require them.

        Args:
            pixels: (B, 3, H, W), uint8 in 0 to 255.
            ids: (C, T) int64.
            mask: (C, T) bool.
            unmasked: also return the text weighed over all words, when `config.text_words` is `own`.

        Returns:
            `image_BV` and `text_CV`, fp32 and not negative; with `unmasked` also `text_unmasked_CV`.
        """
        out = {"image_BV": self._encode_pixels(pixels)}
        hidden_CTD = self.text_encoder(ids, mask)
        own = self.config.text_words == "own"
        if own and not unmasked:
            # padding's id is never active, so it needs no mask
            out["text_CV"] = self.text_head(hidden_CTD, mask, own_ids=ids)
            return out
        out["text_CV"] = self.text_head(hidden_CTD, mask)
        if unmasked:
            out["text_unmasked_CV"] = out["text_CV"]
        if own:
            out["text_CV"] = out["text_CV"] * self.vocabulary.own_words(ids, mask)
        return out

    def _encode_pixels(self, pixels: Tensor) -> Tensor:
        hidden_BTD = self.image_encoder(pixels)
        everywhere_BT = torch.ones(hidden_BTD.shape[:2], dtype=torch.bool, device=hidden_BTD.device)
        image_BV: Tensor = self.image_head(hidden_BTD, everywhere_BT)
        return image_BV

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Weighs the words of images. Put the model in `eval()` mode first; `from_pretrained` returns it so.

        Args:
            images: pictures, cropped and resized as in evaluation; or (B, 3, H, W) uint8 pixels of the model's size.

        Returns:
            (B, V) fp32, not negative.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([eval_pixels(as_rgb(image), self.config.image.image_size) for image in images])
        return self._encode_pixels(images.to(self.log_scale.device))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Weighs the words of texts. Put the model in `eval()` mode first; `from_pretrained` returns it so.

        Returns:
            (C, V) fp32, not negative; after stage 1 only a text's own words are non-zero, as it was trained.
        """
        ids, mask = self.vocabulary.tokenize(texts, self.config.text.max_tokens)
        ids, mask = ids.to(self.log_scale.device), mask.to(self.log_scale.device)
        text_CV: Tensor = self.text_head(
            self.text_encoder(ids, mask), mask, own_ids=ids if self.config.text_words == "own" else None
        )
        return text_CV

    def comparable(self, embedding: Tensor) -> Tensor:
        """Embeddings ready for the dot product: as they are for `dot`, of length 1 for `cosine` (empty stay empty)."""
        return nn.functional.normalize(embedding, dim=-1) if self.config.similarity == "cosine" else embedding

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """Similarity of every image with every text.

        Args:
            image: (B, V).
            text: (C, V).

        Returns:
            (B, C).
        """
        return self.comparable(image) @ self.comparable(text).T

    @property
    def scale(self) -> Tensor:
        """(1,) the similarity's scale, at most 100."""
        return self.log_scale.clamp(max=math.log(100)).exp()

    def save_pretrained(self, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes the model: weights as safetensors, configuration as json, the tokenizer's files. No pickle.

        The folder appears whole or not at all: it is written beside its place and renamed.

        Args:
            folder: replaced if it exists.
            facts: plain values about the training, kept in `config.json` under `training`.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        save_model(self, str(fresh / _WEIGHTS))
        self.vocabulary.save(fresh)
        content = {
            "format": _FORMAT,
            "model": self.portable_config(),
            "vocabulary_fingerprint": self.vocabulary.fingerprint,
            "training": facts or {},
        }
        (fresh / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def portable_config(self) -> dict[str, Any]:
        """The configuration without any name that would have to be looked up elsewhere."""
        values = asdict(self.config)
        values["vocabulary"] = "."
        values["image"].update(name=self.image_encoder.architecture, pretrained=False)
        text = self.text_encoder.config.to_diff_dict()
        text_options = {
            k: v for k, v in text.items() if k not in ("model_type", "transformers_version", "architectures")
        }
        values["text"].update(name=self.text_encoder.config.model_type, pretrained=False, options=text_options)
        return values

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "Stair":
        """Loads what `save_pretrained` wrote, in `eval()` mode, on the CPU.

        Args:
            source: a folder, or the name of a repository on the hub.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            ValueError: if the files are not a STAIR model of a format we know, or contradict each other.
            OSError: if the hub name can neither be found in the cache nor fetched.
        """
        folder = _folder_of(source)
        content = read_description(folder)
        config = StairConfig.from_dict(content["model"])
        if ":" in config.image.name or config.image.pretrained or config.text.pretrained:
            raise ValueError(f"{folder / _CONFIG} wants weights from elsewhere; a saved model holds its own")
        config.vocabulary = str(folder)
        model = cls(config)
        if model.vocabulary.fingerprint != content["vocabulary_fingerprint"]:
            raise ValueError(f"{folder}: vocab.txt is not the vocabulary the model was saved with")
        load_model(model, str(folder / _WEIGHTS), strict=True)
        return model.eval()


def read_description(folder: Path) -> dict[str, Any]:
    """Reads and checks the `config.json` of a saved model: keys `model`, `vocabulary_fingerprint`, `training`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the format is not ours.
    """
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is no saved STAIR model: {missing} missing")
    try:
        content: dict[str, Any] = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / _CONFIG} is no json: {error}") from error
    if content.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG} has format {content.get('format')!r}; this version reads {_FORMAT}")
    return content


def _folder_of(source: str | Path) -> Path:
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") > 1 or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), allow_patterns=[_WEIGHTS, "*.json", "vocab.txt"]))

"""Two towers over one vocabulary: encode, compare, save, load, for `stair.model.Stair` and `stair.clip.DenseClip`.

B images, C captions, T positions, V terms (or the width of a dense embedding).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from typing_extensions import Self

from stair.encoders import ImageEncoder, ImageTower, TextEncoder, TextTower
from stair.errors import FileError
from stair.files import atomic_folder, folder_or_hub_name, read_json
from stair.images import as_rgb, eval_pixels
from stair.vocabulary import Vocabulary

_WEIGHTS, _CONFIG, _FORMAT = "model.safetensors", "config.json", 1
#: the files of a saved model
FILES = (_WEIGHTS, _CONFIG, "vocab.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass
class TowersConfig:
    """Settings of every model.

    Args:
        vocabulary: a BERT `vocab.txt`, a folder with one, or a hub name.
        image: the image tower.
        text: the text tower.
    """

    vocabulary: str = "bert-base-uncased"
    image: ImageTower = field(default_factory=ImageTower)
    text: TextTower = field(default_factory=TextTower)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Reads the output of `asdict`; ValueError on unknown fields."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown} in a {cls.__name__}; known are {sorted(known)}")
        return cls(**{**values, "image": ImageTower(**values["image"]), "text": TextTower(**values["text"])})


class TwoTowers(nn.Module):
    """A model of images and texts.

    Attributes:
        family: the kind of model in `config.json`; also the folder of a run's exported model.
        config_class: settings of the model.
        log_scale: (1,), logarithm of the similarity's scale (inverse temperature). No scalar: FSDP2 rejects those.
        folder: the folder that it was loaded from; None if it was not.
        recorded: facts about a loaded model's training; saved with it again.
    """

    family: ClassVar[str]
    config_class: ClassVar[type[TowersConfig]]
    config: Any
    vocabulary: Vocabulary
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    log_scale: nn.Parameter
    recorded: dict[str, Any]
    folder: Path | None = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.recorded = {}

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared."""
        return "cosine"

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(B, V) fp32 embeddings of (B, 3, H, W) uint8 pixels, with gradients where parameters require them."""
        raise NotImplementedError

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(C, V) fp32 embeddings of (C, T) token ids, True in `mask` at real tokens, with gradients."""
        raise NotImplementedError

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds a batch: `image_BV` (B, V) and `text_CV` (C, V), with gradients where parameters require them."""
        text_CV = self.embed_tokens(ids, mask)  # images last: see `ContrastiveModule.encode`
        return {"image_BV": self.embed_pixels(pixels), "text_CV": text_CV}

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Embeds images. Call `eval()` first; `from_pretrained` has done so.

        Args:
            images: PIL images, cropped and resized as in evaluation; or (B, 3, H, W) uint8 pixels of the model's size.

        Returns:
            (B, V) fp32; of a `Stair` not negative.

        Raises:
            ValueError: if there are none, or they are of another type.
        """
        if not len(images):
            raise ValueError("no images: the list is empty")
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            raise ValueError(f"pixels are {images.dtype}; give uint8 in 0 to 255, or PIL images")
        if not isinstance(images, Tensor):
            if wrong := [image for image in images if not isinstance(image, Image)]:
                raise ValueError(
                    f"an image is a {type(wrong[0]).__name__}; give PIL images, such as PIL.Image.open(path)"
                )
            images = torch.stack([eval_pixels(as_rgb(image), self.config.image.image_size) for image in images])
        return self.embed_pixels(images.to(self.log_scale.device))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts. Call `eval()` first; `from_pretrained` has done so.

        Returns:
            (C, V) fp32; of a `Stair` not negative, and after stage 1 only in-caption terms are active.

        Raises:
            ValueError: if there are none, or they are no list of strings.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError("give a list of texts: encode_text([text])" if texts else "no texts: the list is empty")
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a text is {wrong[0]!r}, of {type(wrong[0]).__name__}; give strings")
        ids, mask = self.vocabulary.tokenize(texts, self.config.text.max_tokens)
        return self.embed_tokens(ids.to(self.log_scale.device), mask.to(self.log_scale.device))

    def comparable(self, embedding: Tensor) -> Tensor:
        """Embeddings ready for the dot product: normalised for `cosine` (empty ones stay empty), unchanged for `dot`."""
        return nn.functional.normalize(embedding, dim=-1) if self.similarity == "cosine" else embedding

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, C) similarity of every image (B, V) with every text (C, V)."""
        return self.comparable(image) @ self.comparable(text).T

    @property
    def scale(self) -> Tensor:
        """(1,) the similarity's scale, at most 100 in training."""
        return self.log_scale.exp()

    def save_pretrained(self, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes the model: weights as safetensors, configuration as JSON, the tokenizer's files. No pickle.

        A new folder appears complete or not at all. In an existing folder, a saved model is replaced and other files stay.

        Args:
            folder: where to write.
            facts: plain values about the training, for `training` in `config.json`; `recorded` by default.

        Raises:
            FileError: before anything is written, if the folder holds files of the same names that are no saved model.
        """
        content = {
            "format": _FORMAT,
            "family": self.family,
            "model": self.portable_config(),
            "vocabulary_fingerprint": self.vocabulary.fingerprint,
            "training": self.recorded if facts is None else facts,
        }
        with atomic_folder(Path(folder), _CONFIG, FILES, _is_ours) as stage:
            save_model(self, str(stage / _WEIGHTS))
            self.vocabulary.save(stage)
            (stage / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def portable_config(self) -> dict[str, Any]:
        """The configuration without names that would have to be looked up elsewhere."""
        values, bert = asdict(self.config), self.text_encoder.config
        architecture = str(self.image_encoder.backbone.pretrained_cfg["architecture"])
        options = {k: v for k, v in values["image"]["options"].items() if k != "checkpoint_path"}
        values["image"].update(name=architecture, pretrained=False, options=options, freeze_until=None)
        skipped = ("model_type", "transformers_version", "architectures")
        options = {k: v for k, v in bert.to_diff_dict().items() if k not in skipped}
        values["text"].update(name=bert.model_type, pretrained=False, options=options)
        return {**values, "vocabulary": "."}

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Loads a model that `save_pretrained` wrote, in `eval()` mode, on the CPU.

        Args:
            source: a folder, or the name of a repository on the hub.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            ValueError: if the files are no model of this class and format, or contradict each other.
            FileError: if there is no such folder, and no model of that name on the hub.
        """
        folder = folder_of(source)
        content = read_description(folder)
        if content["family"] != cls.family:
            raise ValueError(
                f"{folder} holds a model of family {content['family']!r}; {cls.__name__} reads {cls.family!r}"
            )
        try:
            config = cls.config_class.from_dict(content["model"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{folder / _CONFIG} describes no model: {type(error).__name__}: {error}") from error
        elsewhere = ":" in config.image.name or "checkpoint_path" in config.image.options
        if elsewhere or config.image.pretrained or config.text.pretrained:
            raise ValueError(f"{folder / _CONFIG} refers to weights elsewhere; a saved model contains its own")
        config.vocabulary = str(folder)
        model = cls(config)
        if model.vocabulary.fingerprint != content["vocabulary_fingerprint"]:
            raise ValueError(f"{folder}: vocab.txt is not the vocabulary the model was saved with")
        load_weights(model, folder)
        model.recorded, model.folder = content["training"], folder
        return model.eval()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Loads the weights of a saved model of the same design. Nothing in the file is executed.

    Raises:
        ValueError: if the file is damaged, has other weights than the model, or values that are no finite floats.
    """
    path = folder / _WEIGHTS
    try:
        with safe_open(str(path), "pt") as file:
            types = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no dict
        load_model(model, str(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold this model's weights: {error}") from error
    floats = {name: value for name, value in sorted(model.state_dict().items()) if value.is_floating_point()}
    # loading would convert integers silently
    if wrong := [name for name in floats if not types.get(name, "F32").startswith(("F", "BF"))]:
        raise ValueError(f"{path}: {wrong[0]!r} is of type {types[wrong[0]]}; weights are floating-point numbers")
    if broken := [name for name, value in floats.items() if not value.isfinite().all()]:
        raise ValueError(f"{path}: {broken[0]!r} has values that are not finite; such a model cannot be used")


def _is_ours(config: Path) -> bool:
    try:
        return "vocabulary_fingerprint" in read_json(config)
    except (OSError, FileError):
        return False


def read_description(folder: Path) -> dict[str, Any]:
    """Reads and checks the `config.json` of a saved model: `family`, `model`, `vocabulary_fingerprint`, `training`.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the format is another one.
    """
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is not a saved model: {missing} is missing")
    content = read_json(folder / _CONFIG)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG} has format {content.get('format')!r}; this version reads {_FORMAT}")
    if missing := sorted({"family", "model", "vocabulary_fingerprint", "training"} - content.keys()):
        raise ValueError(f"{folder / _CONFIG} lacks {missing}: it was not written by this project")
    return content


def folder_of(source: str | Path) -> Path:
    """The folder of a saved model: the source itself, or a download from the hub.

    Raises:
        FileError: if the source is a file, or neither a folder nor the name of a model on the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileError(
            f"{source} is a file; give the folder of a model. `stair consolidate` converts a checkpoint to one", source
        )
    with folder_or_hub_name(source):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[_WEIGHTS, "*.json", "vocab.txt"]))

"""Two towers over one vocabulary: what every model here can do, whatever its embeddings mean.

Encode, compare, save, load. `stair.model.Stair` says what an embedding is made of words, `stair.clip.DenseClip` of 512
nameless numbers; the two differ in nothing else.

B images, C captions, T positions, V words (or the width of a dense embedding).
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
#: what a saved model consists of
FILES = (_WEIGHTS, _CONFIG, "vocab.txt", "tokenizer.json", "tokenizer_config.json")


@dataclass
class TowersConfig:
    """What every model is made of.

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
        """Reads what `asdict` wrote.

        Raises:
            ValueError: on fields we do not know.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown fields {unknown} in a {cls.__name__}; known are {sorted(known)}")
        return cls(**{**values, "image": ImageTower(**values["image"]), "text": TextTower(**values["text"])})


class TwoTowers(nn.Module):
    """What models of images and texts share.

    Attributes:
        family: what `config.json` calls the kind of model; also the name of the folder of a run's exported model.
        config_class: what the model is built from.
        log_scale: (1,), logarithm of the similarity's scale (inverse temperature). Not a scalar: FSDP2 refuses those.
        recorded: what a loaded model's files say of its training; it is saved with it again.
    """

    family: ClassVar[str]
    config_class: ClassVar[type[TowersConfig]]
    config: Any
    vocabulary: Vocabulary
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    log_scale: nn.Parameter
    recorded: dict[str, Any]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.recorded = {}

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared: `dot` of the weights, or `cosine`."""
        raise NotImplementedError

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """(B, V) fp32 embeddings of (B, 3, H, W) uint8 pixels, with gradients where parameters require them."""
        raise NotImplementedError

    def embed_tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(C, V) fp32 embeddings of (C, T) word-piece ids, True in `mask` at real tokens, with gradients."""
        raise NotImplementedError

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeds a batch: `image_BV` (B, V) and `text_CV` (C, V), with gradients where parameters require them."""
        text_CV = self.embed_tokens(ids, mask)  # images last: see `ContrastiveModule.encode`
        return {"image_BV": self.embed_pixels(pixels), "text_CV": text_CV}

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image] | Tensor) -> Tensor:
        """Embeds images. Put the model in `eval()` mode first; `from_pretrained` returns it so.

        Args:
            images: pictures, cropped and resized as in evaluation; or (B, 3, H, W) uint8 pixels of the model's size.

        Returns:
            (B, V) fp32; of a `Stair` not negative, the weight of every word.

        Raises:
            ValueError: if there are none, pixels are of another type, or an image is no picture.
        """
        if not len(images):
            raise ValueError("no images: the list is empty")
        if not isinstance(images, Tensor) and (odd := [image for image in images if not isinstance(image, Image)]):
            raise ValueError(f"an image is a {type(odd[0]).__name__}; give PIL images, such as PIL.Image.open(path)")
        if isinstance(images, Tensor) and images.dtype != torch.uint8:
            raise ValueError(f"pixels are of {images.dtype}; give uint8 of 0 to 255, or pictures")
        if not isinstance(images, Tensor):
            images = torch.stack([eval_pixels(as_rgb(image), self.config.image.image_size) for image in images])
        return self.embed_pixels(images.to(self.log_scale.device))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Embeds texts. Put the model in `eval()` mode first; `from_pretrained` returns it so.

        Returns:
            (C, V) fp32; of a `Stair` not negative, and after stage 1 only the in-caption terms are non-zero, as it was
            trained.

        Raises:
            ValueError: if there are none, or what is given is no list of strings.
        """
        if isinstance(texts, str) or not len(texts):
            raise ValueError(
                "give a list of texts, also for one: encode_text([text])" if texts else "no texts were given"
            )
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"a text is {odd[0]!r}, of {type(odd[0]).__name__}; give strings")
        ids, mask = self.vocabulary.tokenize(texts, self.config.text.max_tokens)
        return self.embed_tokens(ids.to(self.log_scale.device), mask.to(self.log_scale.device))

    def comparable(self, embedding: Tensor) -> Tensor:
        """Embeddings ready for the dot product: as they are for `dot`, of length 1 for `cosine` (empty stay empty)."""
        return nn.functional.normalize(embedding, dim=-1) if self.similarity == "cosine" else embedding

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
        """(1,) the similarity's scale; training holds it at 100 at most."""
        return self.log_scale.exp()

    def save_pretrained(self, folder: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes the model: weights as safetensors, configuration as json, the tokenizer's files. No pickle.

        A new folder appears complete or not at all. In a folder that exists, a saved model is replaced and other files
        stay.

        Args:
            folder: where to write.
            facts: plain values about the training, kept in `config.json` under `training`; `recorded` by default.

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
        """The configuration without any name that would have to be looked up elsewhere."""
        values = asdict(self.config)
        values["vocabulary"] = "."
        values["image"].update(name=self.image_encoder.architecture, pretrained=False)
        values["image"]["options"].pop("checkpoint_path", None)
        text = self.text_encoder.config.to_diff_dict()
        text_options = {
            k: v for k, v in text.items() if k not in ("model_type", "transformers_version", "architectures")
        }
        values["text"].update(name=self.text_encoder.config.model_type, pretrained=False, options=text_options)
        return values

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Loads what `save_pretrained` wrote, in `eval()` mode, on the CPU.

        Args:
            source: a folder, or the name of a repository on the hub.

        Raises:
            FileNotFoundError: if the folder lacks a file.
            ValueError: if the files are not a model of this class in a format we know, or contradict each other.
            FileError: if there is no such folder, and the hub gives no model of that name.
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
            raise ValueError(f"{folder / _CONFIG} wants weights from elsewhere; a saved model holds its own")
        config.vocabulary = str(folder)
        model = cls(config)
        if model.vocabulary.fingerprint != content["vocabulary_fingerprint"]:
            raise ValueError(f"{folder}: vocab.txt is not the vocabulary the model was saved with")
        load_weights(model, folder)
        model.recorded = content["training"]
        return model.eval()


def load_weights(model: nn.Module, folder: Path) -> None:
    """Puts the weights of a saved model into one of the same design. Nothing in the file is executed.

    Raises:
        ValueError: if the file is damaged, lacks a weight or has one too many, or holds what is no finite float.
    """
    path = folder / _WEIGHTS
    try:
        with safe_open(str(path), "pt") as file:
            kinds = {name: str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118 - no dict
        load_model(model, str(path), strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold this model's weights: {error}") from error
    whole = sorted(name for name, value in model.state_dict().items() if value.is_floating_point())
    # loading would turn whole numbers into floats without a word
    if odd := [name for name in whole if not kinds.get(name, "F32").startswith(("F", "BF"))]:
        raise ValueError(f"{path}: {odd[0]!r} is of type {kinds[odd[0]]}; weights are floating-point numbers")
    if broken := [name for name, value in model.named_parameters() if not value.isfinite().all()]:
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
        ValueError: if the format is not ours.
    """
    if missing := [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} is no saved model: {missing} missing")
    content = read_json(folder / _CONFIG)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{folder / _CONFIG} has format {content.get('format')!r}; this version reads {_FORMAT}")
    if missing := sorted({"model", "vocabulary_fingerprint", "training"} - content.keys()):
        raise ValueError(f"{folder / _CONFIG} lacks {missing}: it was written by no version of this project")
    return {"family": "stair", **content}


def folder_of(source: str | Path) -> Path:
    """The folder of a saved model: the source itself, or what the hub has under that name.

    Raises:
        FileError: if the source is a file, or neither a folder nor the name of a model that can be had from the hub.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise FileError(
            f"{source} is a file; give a model's folder. `stair consolidate` makes one of a checkpoint", source
        )
    with folder_or_hub_name(source):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[_WEIGHTS, "*.json", "vocab.txt"]))

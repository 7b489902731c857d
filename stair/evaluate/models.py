"""Models that can be evaluated: exported ones, open_clip checkpoints, sentence-transformers models on disk.

Nothing is unpickled: open_clip checkpoints must be safetensors or weights only, sentence-transformers loads without remote
code.

B images or texts, V words (or the width of a dense embedding).
"""

import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from PIL.Image import Image
from torch import Tensor

from stair.clip import DenseClip
from stair.errors import FileError, SettingError, import_extra
from stair.model import Stair
from stair.towers import TwoTowers, folder_of, read_description
from stair.vocabulary import Vocabulary


class Encoder(Protocol):
    """What embeds."""

    @property
    def similarity(self) -> Literal["dot", "cosine"]:
        """How embeddings are compared."""
        ...

    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings of RGB images of any size."""
        ...

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings of texts."""
        ...


@runtime_checkable
class Cutting(Protocol):
    """A model with its own tokenizer that states which texts it cuts."""

    def cut(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, True where a text is longer than the model takes."""
        ...


@dataclass(frozen=True)
class EvaluatedModel:
    """A model with what tables say of it.

    Attributes:
        encoder: the model.
        name: what tables call it.
        kind: `sparse` or `dense`.
        words: names the dimensions; None where they have no names.
        vocabulary: words to choose among in the vocabulary test; that of `words`, or any other for a dense model.
        truncation: what becomes of long texts, as printed beside the figures.
        facts: about its training, for the model card.
    """

    encoder: Encoder
    name: str
    kind: Literal["sparse", "dense"]
    words: Vocabulary | None
    vocabulary: Vocabulary | None
    truncation: str
    facts: dict[str, object]


def open_model(source: str, vocabulary: str | None = None) -> EvaluatedModel:
    """Opens a model to evaluate.

    Args:
        source: a folder of an exported model (STAIR or dense CLIP), a STAIR model of the hub, or
            `open_clip:ARCHITECTURE:CHECKPOINT` or `sentence_transformers:FOLDER`.
        vocabulary: words for the vocabulary test of a model that has none of its own.

    Raises:
        FileNotFoundError: if there is no such model.
        FileError: if it is none that can be read.
        MissingPackageError: if it needs a package that is not installed.
    """
    scheme, _, rest = source.partition(":")
    extra = Vocabulary(vocabulary) if vocabulary else None
    if scheme == "open_clip":
        return _open_clip(rest, extra)
    if scheme == "sentence_transformers":
        return _sentence_transformers(rest, extra)
    folder = folder_of(source)
    description = read_description(folder)
    families: dict[str, type[TwoTowers]] = {family.family: family for family in (Stair, DenseClip)}
    if description["family"] not in families:
        raise FileError(
            f"{folder} holds a model of family {description['family']!r}; known are {sorted(families)}", folder
        )
    config = description["model"]
    model = families[description["family"]].from_pretrained(folder)
    name = "/".join(Path(source).resolve().parts[-3:]) if Path(source).is_dir() else source
    cut = f"texts cut at {config['text']['max_tokens']} word pieces"
    truncation = f"{cut}, images centre-cropped to {config['image']['image_size']} px"
    facts = dict(description["training"])
    if not isinstance(model, Stair):
        return EvaluatedModel(model, name, "dense", None, extra or model.vocabulary, truncation, facts)
    if extra and extra.tokens != model.vocabulary.tokens:
        raise SettingError(f"{source} has words of its own: leave --vocabulary out", "vocabulary")
    return EvaluatedModel(model, name, "sparse", model.vocabulary, model.vocabulary, truncation, facts)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OpenClip:
    """A model of open_clip, with its own preprocessing and tokenizer.

    Args:
        architecture: such as `ViT-B-32`.
        checkpoint: a file, or the tag of published weights.

    Raises:
        SettingError: if open_clip has no such model.
    """

    similarity: Literal["dot", "cosine"] = "cosine"

    def __init__(self, architecture: str, checkpoint: str) -> None:
        open_clip = import_extra("open_clip", "open_clip_torch", "openclip")
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=checkpoint, weights_only=True
            )
            self.tokenize = open_clip.get_tokenizer(architecture)
        except (RuntimeError, OSError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error)[:200]  # the message lists every model there is
            raise SettingError(
                f"open_clip cannot open {architecture!r} with {checkpoint!r}: {reason}", "model"
            ) from error
        self.model = model.to(_device()).eval()
        self._lock = threading.Lock()  # tokenizers of transformers keep how they cut texts
        self.context: int = self.tokenize.context_length

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings."""
        found: Tensor = self.model.encode_image(torch.stack([self.preprocess(i) for i in images]).to(_device()))
        return found

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings."""
        found: Tensor = self.model.encode_text(self._ids(texts, self.context).to(_device()))
        return found

    def cut(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, True where a text is longer than the model takes."""
        longer = self._ids(["", *texts], self.context + 2)[:, self.context]
        return longer[1:] != longer[0]

    def _ids(self, texts: Sequence[str], length: int) -> Tensor:
        with self._lock:
            ids: Tensor = self.tokenize(list(texts), context_length=length)
        return ids


def _open_clip(place: str, vocabulary: Vocabulary | None) -> EvaluatedModel:
    architecture, _, checkpoint = place.partition(":")
    if not checkpoint:
        wanted = "open_clip:ARCHITECTURE:CHECKPOINT, a file or the tag of published weights"
        raise SettingError(f"open_clip:{place}: give {wanted}", "model")
    model = OpenClip(architecture, checkpoint)
    cut = f"texts cut at {model.context} tokens, images by open_clip's own preprocessing"
    name = f"{architecture} {Path(checkpoint).name}"
    return EvaluatedModel(model, name, "dense", None, vocabulary, cut, {"source": "open_clip"})


class SentenceModel:
    """A sentence-transformers model of images and texts, dense or sparse (`SparseEncoder`).

    Args:
        folder: of the model.

    Raises:
        FileError: if there is no such model.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        if not (path / "modules.json").is_file():
            raise FileError(f"{folder} is no sentence-transformers model: modules.json is missing", path)
        library = import_extra("sentence_transformers", "sentence-transformers", "openclip")
        settings = path / "config_sentence_transformers.json"
        self.sparse = settings.is_file() and '"SparseEncoder"' in settings.read_text(encoding="utf-8")
        family = library.SparseEncoder if self.sparse else library.SentenceTransformer
        self.model: Any = family(folder, device=str(_device()), trust_remote_code=False)
        self._lock = threading.Lock()
        named = self.model.similarity_fn_name
        if named not in ("cosine", "dot"):
            raise FileError(f"{folder} compares by {named!r}; only cosine and dot can be ranked here", path)
        self.similarity: Literal["dot", "cosine"] = named

    @property
    def tokens(self) -> list[str]:
        """The pieces of its tokenizer, by id; none where it has no such tokenizer."""
        known: dict[str, int] = getattr(getattr(self.model, "tokenizer", None), "get_vocab", dict)()
        return sorted(known, key=known.__getitem__)

    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings."""
        return self._encode(list(images))

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings."""
        return self._encode(list(texts))

    def _encode(self, inputs: list[Any]) -> Tensor:
        with self._lock:  # `encode` sets the model's mode, and its tokenizer keeps how it cuts texts
            found: Tensor = self.model.encode(inputs, convert_to_tensor=True, show_progress_bar=False)
        return found.to_dense() if found.is_sparse or found.is_sparse_csr else found


def _sentence_transformers(place: str, vocabulary: Vocabulary | None) -> EvaluatedModel:
    model = SentenceModel(place)
    cut = f"texts cut at {model.model.max_seq_length} tokens, images by the model's own preprocessing"
    # a sparse model of another tokenizer has other words: its dimensions stay nameless here
    words = vocabulary if model.sparse and vocabulary is not None and model.tokens == vocabulary.tokens else None
    kind: Literal["sparse", "dense"] = "sparse" if model.sparse else "dense"
    return EvaluatedModel(model, Path(place).name, kind, words, vocabulary, cut, {"source": "sentence-transformers"})

"""Models that can be evaluated: exported ones, open_clip checkpoints, sentence-transformers models on disk.

Nothing is unpickled: open_clip reads safetensors or weights only, sentence-transformers loads without remote code.

B images or texts, V terms (or the width of a dense embedding).
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from stair.clip import DenseClip
from stair.errors import FileError, SettingError, import_extra
from stair.model import Stair
from stair.towers import TwoTowers, folder_of, read_description
from stair.vocabulary import Vocabulary


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OpenClip:
    """A model of open_clip, with its own preprocessing and tokenizer.

    Args:
        source: `ARCHITECTURE:CHECKPOINT`, such as `ViT-B-32:weights.safetensors`; the checkpoint is a file, or the tag of
            published weights.

    Raises:
        SettingError: if open_clip has no such model.
    """

    similarity: Literal["cosine"] = "cosine"
    kind: Literal["dense"] = "dense"
    tokens = None

    def __init__(self, source: str) -> None:
        architecture, _, checkpoint = source.partition(":")
        if not checkpoint:
            raise SettingError(f"open_clip:{source}: give open_clip:ARCHITECTURE:CHECKPOINT", "model")
        open_clip = import_extra("open_clip", "open_clip_torch", "openclip")
        options = {"pretrained": checkpoint, "weights_only": True}
        try:
            model, _, self.preprocess = open_clip.create_model_and_transforms(architecture, **options)
            self.tokenize = open_clip.get_tokenizer(architecture)
        except (RuntimeError, OSError, TypeError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error)[:200]  # the whole message lists all models
            raise SettingError(f"open_clip cannot open {source!r}: {reason}", "model") from error
        self.model = model.to(_device()).eval()
        self.name, self.max_tokens = f"{architecture} {Path(checkpoint).name}", self.tokenize.context_length

    @torch.no_grad()
    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings."""
        embedding: Tensor = self.model.encode_image(torch.stack([self.preprocess(i) for i in images]).to(_device()))
        return embedding

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(B, V) embeddings."""
        ids = self.tokenize(list(texts), context_length=self.max_tokens)
        embedding: Tensor = self.model.encode_text(ids.to(_device()))
        return embedding

    def cut(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, True where a text is longer than the model's limit."""
        beyond = self.tokenize(["", *texts], context_length=self.max_tokens + 2)[:, self.max_tokens]
        longer: Tensor = beyond[1:] != beyond[0]
        return longer


class SentenceModel:
    """A sentence-transformers model of images and texts, dense or sparse (`SparseEncoder`), in a folder.

    Raises:
        FileError: if it is no such model, or one that compares by neither cosine nor dot product.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        if not (path / "modules.json").is_file():
            raise FileError(f"{folder} is not a sentence-transformers model: modules.json is missing", path)
        library = import_extra("sentence_transformers", "sentence-transformers", "openclip")
        settings = path / "config_sentence_transformers.json"
        sparse = settings.is_file() and '"SparseEncoder"' in settings.read_text(encoding="utf-8")
        family = library.SparseEncoder if sparse else library.SentenceTransformer
        self.model: Any = family(folder, device=str(_device()), trust_remote_code=False)
        self.kind: Literal["sparse", "dense"] = "sparse" if sparse else "dense"
        self.name, self.max_tokens = path.name, self.model.max_seq_length
        self.similarity: Literal["dot", "cosine"] = self.model.similarity_fn_name
        if self.similarity not in ("cosine", "dot"):
            raise FileError(f"{folder} compares by {self.similarity!r}; only cosine and dot can be ranked", path)

    @property
    def tokens(self) -> list[str] | None:
        """Names of the dimensions: the tokens of its tokenizer by id. None for a dense model."""
        ids: dict[str, int] = getattr(getattr(self.model, "tokenizer", None), "get_vocab", dict)()
        return sorted(ids, key=ids.__getitem__) if self.kind == "sparse" else None

    def encode_image(self, images: Sequence[Image]) -> Tensor:
        """(B, V) embeddings."""
        return self.encode_text(images)

    def encode_text(self, texts: Sequence[Any]) -> Tensor:
        """(B, V) embeddings."""
        embedding: Tensor = self.model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return embedding.to_dense() if embedding.is_sparse or embedding.is_sparse_csr else embedding


@dataclass(frozen=True)
class EvaluatedModel:
    """A model and its description in tables."""

    encoder: TwoTowers | OpenClip | SentenceModel  # (B, V) embeddings of RGB images of any size, and of texts
    name: str
    kind: Literal["sparse", "dense"]
    terms: Vocabulary | None  # names of the dimensions; None without names
    vocabulary: Vocabulary | None  # of the vocabulary probe: `terms`, or any other for a dense model
    truncation: str  # how texts and images are cut, for the protocol
    facts: dict[str, object]  # about its training, for the model card


def open_model(source: str, vocabulary: str | None = None) -> EvaluatedModel:
    """Opens a model to evaluate.

    Args:
        source: folder of an exported model (STAIR or dense CLIP), a STAIR model of the hub,
            `open_clip:ARCHITECTURE:CHECKPOINT` or `sentence_transformers:FOLDER`.
        vocabulary: terms of the vocabulary probe, for a model without its own.

    Raises:
        FileError, FileNotFoundError: if there is no such model, or one of an unknown kind.
        MissingPackageError: if it needs a package that is not installed.
    """
    scheme, _, rest = source.partition(":")
    extra = Vocabulary(vocabulary) if vocabulary else None
    if scheme in ("open_clip", "sentence_transformers"):
        encoder = OpenClip(rest) if scheme == "open_clip" else SentenceModel(rest)
        terms = extra if extra is not None and encoder.tokens == extra.tokens else None
        texts = f"texts truncated to {encoder.max_tokens} tokens, images by the model's own preprocessing"
        return EvaluatedModel(encoder, encoder.name, encoder.kind, terms, extra, texts, {"source": scheme})
    folder = folder_of(source)
    description = read_description(folder)
    families = {family.family: family for family in (Stair, DenseClip)}
    if (family := families.get(description["family"])) is None:
        raise FileError(f"{folder}: unknown model family {description['family']!r}. Known: {sorted(families)}", folder)
    model = family.from_pretrained(folder)
    name = "/".join(Path(source).resolve().parts[-3:]) if Path(source).is_dir() else source
    sizes = model.config.text.max_tokens, model.config.image.image_size
    truncation = "texts truncated to {} tokens, images centre-cropped to {} px".format(*sizes)
    if not isinstance(model, Stair):
        return EvaluatedModel(model, name, "dense", None, extra or model.vocabulary, truncation, model.recorded)
    if extra and extra.tokens != model.vocabulary.tokens:
        raise SettingError(f"{source} has its own vocabulary. Leave --vocabulary out", "vocabulary")
    return EvaluatedModel(model, name, "sparse", model.vocabulary, model.vocabulary, truncation, model.recorded)

"""Public models in the same evaluation: open_clip checkpoints, sentence-transformers image-text models on disk.

Both packages are an extra (`pip install 'stair-embeddings[openclip]'`). Nothing of them is unpickled: open_clip checkpoints
must be safetensors or weights only, sentence-transformers loads without remote code.

B images or texts, V words (or the width of a dense embedding).
"""

import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL.Image import Image
from torch import Tensor

from stair.evaluate.scored import Scored
from stair.vocabulary import Vocabulary


def open_foreign(scheme: str, place: str, vocabulary: Vocabulary | None) -> Scored:
    """Opens a model of another project.

    Args:
        scheme: `open_clip` or `sentence_transformers`.
        place: what follows the scheme: `ARCHITECTURE:CHECKPOINT` or a folder.
        vocabulary: words for the vocabulary test.

    Raises:
        ValueError: if the package is not installed, or the model is not there or not of its kind.
    """
    try:
        return {"open_clip": _open_clip, "sentence_transformers": _sentence_transformers}[scheme](place, vocabulary)
    except ImportError as error:
        raise ValueError(f"{scheme} models need their package: pip install 'stair-embeddings[openclip]'") from error


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OpenClip:
    """A model of open_clip, with its own preprocessing and tokenizer.

    Args:
        architecture: such as `ViT-B-32`.
        checkpoint: a file, or the tag of published weights.

    Raises:
        ValueError: if open_clip has no such model.
    """

    similarity: Literal["dot", "cosine"] = "cosine"

    def __init__(self, architecture: str, checkpoint: str) -> None:
        import open_clip

        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=checkpoint or None, weights_only=True
            )
            self.tokenize = open_clip.get_tokenizer(architecture)
        except (RuntimeError, OSError, TypeError, ValueError, pickle.UnpicklingError) as error:
            # the message lists every model there is
            raise ValueError(
                f"open_clip cannot open {architecture!r} with {checkpoint!r}: {str(error)[:200]}"
            ) from error
        self.model, self.preprocess = model.to(_device()).eval(), preprocess
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
        ids = self._ids(texts, self.context)
        found: Tensor = self.model.encode_text(ids.to(_device()))
        return found

    def cut(self, texts: Sequence[str]) -> Tensor:
        """(B,) bool, True where a text is longer than the model takes."""
        longer = self._ids(["", *texts], self.context + 2)[:, self.context]
        return longer[1:] != longer[0]

    def _ids(self, texts: Sequence[str], length: int) -> Tensor:
        with self._lock:
            ids: Tensor = self.tokenize(list(texts), context_length=length)
        return ids


def _open_clip(place: str, vocabulary: Vocabulary | None) -> Scored:
    architecture, _, checkpoint = place.partition(":")
    if not checkpoint:
        raise ValueError(
            f"open_clip:{place}: give open_clip:ARCHITECTURE:CHECKPOINT, a file or the tag of published weights"
        )
    model = OpenClip(architecture, checkpoint)
    cut = f"texts cut at {model.context} tokens, images by open_clip's own preprocessing"
    return Scored(
        model, f"{architecture} {Path(checkpoint).name}", "dense", None, vocabulary, cut, {"source": "open_clip"}
    )


class SentenceModel:
    """A sentence-transformers model of images and texts, dense or sparse (`SparseEncoder`).

    Args:
        folder: where it lies.

    Raises:
        ValueError: if there is no such model.
    """

    def __init__(self, folder: str) -> None:
        path = Path(folder)
        if not (path / "modules.json").is_file():
            raise ValueError(f"{folder} is no sentence-transformers model: modules.json is missing")
        from sentence_transformers import SentenceTransformer, SparseEncoder

        settings = path / "config_sentence_transformers.json"
        self.sparse = settings.is_file() and '"SparseEncoder"' in settings.read_text(encoding="utf-8")
        family: Any = SparseEncoder if self.sparse else SentenceTransformer
        self.model: Any = family(folder, device=str(_device()), trust_remote_code=False)
        self._lock = threading.Lock()
        named = self.model.similarity_fn_name
        if named not in ("cosine", "dot"):
            raise ValueError(f"{folder} compares by {named!r}; only cosine and dot can be ranked here")
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

    def _encode(self, what: list[Any]) -> Tensor:
        with self._lock:  # `encode` sets the model's mode, and its tokenizer keeps how it cuts texts
            found: Tensor = self.model.encode(what, convert_to_tensor=True, show_progress_bar=False)
        return found.to_dense() if found.is_sparse or found.is_sparse_csr else found


def _sentence_transformers(place: str, vocabulary: Vocabulary | None) -> Scored:
    model = SentenceModel(place)
    cut = f"texts cut at {model.model.max_seq_length} tokens, images by the model's own preprocessing"
    # a sparse model of another tokenizer has other words: its dimensions stay nameless here
    words = vocabulary if model.sparse and vocabulary is not None and model.tokens == vocabulary.tokens else None
    return Scored(
        model,
        Path(place).name,
        "sparse" if model.sparse else "dense",
        words,
        vocabulary,
        cut,
        {"source": "sentence-transformers"},
    )

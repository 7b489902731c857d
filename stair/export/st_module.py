"""A STAIR model as a module of sentence-transformers. `modules.json` of exported folders names it: it stays here."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from sentence_transformers.base.modules import InputModule
from typing_extensions import Self

from stair.images import as_rgb, eval_pixels
from stair.model import Stair


class StairModule(InputModule):
    """Both towers behind the input of a `SparseEncoder`."""

    save_in_root = False

    def __init__(self, model: Stair) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        # names dimensions for `SparseEncoder.decode`; a copy, as calling it changes how it cuts texts
        self.tokenizer = copy.deepcopy(model.vocabulary._tokenizer)

    @property
    def modalities(self) -> list[Any]:
        """What it takes."""
        return ["text", "image"]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Texts to ids, or images (PIL) to pixels; ValueError if a batch has both. `{"image": image}` is an image."""
        inputs = [one[next(iter(one))] if isinstance(one, dict) and len(one) == 1 else one for one in inputs]
        if all(isinstance(one, str) for one in inputs):
            texts = [(prompt or "") + one for one in inputs]
            ids, mask = self.model.vocabulary.tokenize(texts, self.model.config.text.max_tokens)
            return {"input_ids": ids, "attention_mask": mask, "modality": "text"}
        if all(isinstance(one, Image) for one in inputs):
            pixels = [eval_pixels(as_rgb(one), self.model.config.image.image_size) for one in inputs]
            return {"pixel_values": torch.stack(pixels), "modality": "image"}
        raise ValueError(f"inputs are {sorted({type(one).__name__ for one in inputs})}; give texts, or PIL images")

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, V)."""
        if "pixel_values" in features:
            embedding_BV = self.model.embed_pixels(features["pixel_values"])
        else:
            embedding_BV = self.model.embed_tokens(features["input_ids"], features["attention_mask"].bool())
        return {**features, "sentence_embedding": embedding_BV}

    def get_embedding_dimension(self) -> int:
        """V."""
        return len(self.model.vocabulary)

    @property
    def max_seq_length(self) -> int:
        """Longest text in tokens."""
        return self.model.config.text.max_tokens

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Writes the model as `Stair.save_pretrained` does."""
        self.model.save_pretrained(output_path)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", *_: Any, **options: Any) -> Self:
        """Reads what `save` wrote, from a folder or the hub."""
        names = options.keys() & {"token", "cache_folder", "revision", "local_files_only"}
        folder = cls.load_dir_path(model_name_or_path, subfolder=subfolder, **{name: options[name] for name in names})
        if folder is None:
            raise ValueError(f"{model_name_or_path} has no folder {subfolder!r} with a STAIR model")
        return cls(Stair.from_pretrained(folder))

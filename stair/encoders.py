"""The two towers: any Vision Transformer of timm, any BERT-family encoder of transformers.

Both end in hidden states, one a position; the vocabulary head (stair/head.py) turns those into words.

B rows, T positions, D width.
"""

import math
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig

from stair.errors import FileError
from stair.files import folder_or_hub_name

# Families whose layers all take one mask
_FULL_ATTENTION = ("bert", "distilbert", "electra", "roberta")


@dataclass
class ImageTower:
    """Which image encoder to build.

    Args:
        name: a Vision Transformer of timm, `local-dir:PATH` for a folder in the hub's format, or `hf-hub:NAME`.
        pretrained: start from the published weights; False starts from scratch.
        image_size: side of the square input in pixels.
        positions: which hidden states may light up words. `patches` leaves class and register tokens out, so that every
            active term has the patch that won it; `all` keeps them.
        options: further arguments of the timm model, for example `{embed_dim: 192, depth: 4}`.
    """

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = True
    image_size: int = 224
    positions: Literal["patches", "all"] = "patches"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TextTower:
    """Which text encoder to build.

    Args:
        name: with `pretrained` a model of the hub or a folder; without, a model type of transformers such as `bert`.
        pretrained: start from the published weights, the masked-LM head included where there is one; False starts from
            scratch.
        max_tokens: longest caption in word pieces, [CLS] and [SEP] included; what is longer is cut.
        options: fields of the transformers configuration, for example `{hidden_size: 192, num_hidden_layers: 2}`.
    """

    name: str = "bert-base-uncased"
    pretrained: bool = True
    max_tokens: int = 77
    options: dict[str, Any] = field(default_factory=dict)


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """On the CPU in half precision plain products: torch's fused attention takes 2 to 5 times longer for short rows.

    CPU time of one core, bf16, forward and backward of 256 rows of 17 positions and 3 heads of 64: 15 against 60 ms.
    """
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return _plain_attention
    return nullcontext()


class _PlainAttention:
    """torch has one switch for the whole process: the first thread that enters sets it, the last that leaves resets it.

    `torch.nn.attention.sdpa_kernel` can only be left by the thread that entered it.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, (True, True, True, True)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                of = torch.backends.cuda
                self._before = (
                    of.flash_sdp_enabled(),
                    of.mem_efficient_sdp_enabled(),
                    of.cudnn_sdp_enabled(),
                    of.math_sdp_enabled(),
                )
                _switch(False, False, False, True)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _switch(*self._before)


def _switch(flash: bool, memory_efficient: bool, cudnn: bool, math_: bool) -> None:
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(memory_efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.backends.cuda.enable_math_sdp(math_)


_plain_attention = _PlainAttention()


class ImageEncoder(nn.Module):
    """A ViT that returns its hidden states.

    Args:
        tower: what to build.

    Attributes:
        width: D.

    Raises:
        ValueError: if timm has no such model, or it gives no sequence of positions.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, tower: ImageTower) -> None:
        super().__init__()
        folder = Path(tower.name.removeprefix("local-dir:"))
        if str(folder) != tower.name and not folder.is_dir():
            raise FileError(f"image tower {tower.name!r}: no such folder", folder)
        try:
            vit: Any = timm.create_model(
                tower.name, pretrained=tower.pretrained, num_classes=0, img_size=tower.image_size, **tower.options
            )
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"timm cannot build image tower {tower.name!r} at {tower.image_size} px with {tower.options}: {error}. "
                "Give the name of a Vision Transformer (timm.list_models('vit*')) and options it takes"
            ) from error
        if not hasattr(vit, "num_prefix_tokens"):
            raise ValueError(
                f"{tower.name!r} is no Vision Transformer: it has no sequence of positions to read words from"
            )
        vit.attn_pool = None  # some towers pool by attention: not used here, and DDP waits for unused parameters
        self.vit = vit
        self.width: int = vit.num_features
        self._first = vit.num_prefix_tokens if tower.positions == "patches" else 0
        data = resolve_model_data_config(vit)
        # kept with the weights: a saved model must not depend on the name it was built from
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(data["std"]).view(3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixels: (B, 3, H, W), uint8 in 0 to 255 or floating point in 0 to 1, not normalised.

        Returns:
            (B, T, D) hidden states of the positions chosen, row by row from the top left.
        """
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(self.mean.dtype) / 255
        with attention_on(pixels.device):
            hidden_BTD: Tensor = self.vit.forward_features((pixels.to(self.mean.dtype) - self.mean) / self.deviation)
        # where timm normalises after average pooling, the norm is applied to each position instead; else it is Identity
        patches_BTD: Tensor = self.vit.fc_norm(hidden_BTD[:, self._first :])
        return patches_BTD

    @property
    def has_class_token(self) -> bool:
        """Whether the ViT's first position is a class token."""
        return getattr(self.vit, "cls_token", None) is not None

    @property
    def architecture(self) -> str:
        """The timm name from which this tower can be built again without its source."""
        return str(self.vit.pretrained_cfg["architecture"])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.vit.patch_embed.grid_size
        return int(rows), int(columns)


@dataclass
class MaskedLMHead:
    """The layers of a published masked-LM head, from which the vocabulary heads start.

    Attributes:
        dense: Linear from D to D.
        norm: LayerNorm over D.
        bias_V: bias of every word.
    """

    dense: nn.Linear
    norm: nn.LayerNorm
    bias_V: Tensor


class TextEncoder(nn.Module):
    """A BERT-family encoder that returns its hidden states; `build` makes one.

    Args:
        bert: the transformers model.

    Attributes:
        width: D.
    """

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        if getattr(bert, "pooler", None) is not None:
            bert.pooler = None  # type: ignore[assignment]  # not used here, and DDP waits for unused parameters
        self.bert: Any = bert.float()
        self.width: int = getattr(self.config, "hidden_size", None) or self.config.dim

    @classmethod
    def build(cls, tower: TextTower, vocabulary_size: int) -> tuple["TextEncoder", MaskedLMHead | None]:
        """Builds the tower, and its published masked-LM head (None from scratch, or where none was published).

        Args:
            tower: what to build.
            vocabulary_size: V, which the word embeddings must have.

        Raises:
            ValueError: if the vocabulary sizes differ, captions may be longer than the tower's positions, weights of the
                encoder were not published, or it is of a family whose masked-LM head we do not know.
            FileError: if there is no such folder, and the hub gives no model of that name.
        """
        masked_lm = None
        if tower.pretrained:
            with folder_or_hub_name(tower.name):
                whole, loading = AutoModelForMaskedLM.from_pretrained(
                    tower.name, trust_remote_code=False, output_loading_info=True, **tower.options
                )
            masked_lm = _masked_lm_head(whole, tower, set(loading["missing_keys"]))
            encoder = cls(whole.base_model)
        else:
            encoder = cls(AutoModel.from_config(_text_config(tower, vocabulary_size), trust_remote_code=False))
        if encoder.words.num_embeddings != vocabulary_size:
            raise ValueError(
                f"text tower {tower.name!r} knows {encoder.words.num_embeddings} words but the vocabulary has "
                f"{vocabulary_size}; give the vocabulary the tower was trained with"
            )
        longest = getattr(encoder.config, "max_position_embeddings", None) or math.inf
        if tower.max_tokens > longest:
            raise ValueError(
                f"text.max_tokens is {tower.max_tokens} but {tower.name!r} takes {longest} positions at most"
            )
        return encoder, masked_lm

    @property
    def config(self) -> PretrainedConfig:
        """The tower's transformers configuration."""
        config: PretrainedConfig = self.bert.config
        return config

    @property
    def words(self) -> nn.Embedding:
        """The input word embeddings."""
        embeddings: nn.Embedding = self.bert.get_input_embeddings()
        return embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes captions.

        Args:
            ids: (B, T) int64.
            mask: (B, T) bool, True at real tokens.

        Returns:
            (B, T, D) hidden states; those at padding mean nothing.
        """
        attention_mask = mask.long()
        if ids.is_cuda and self.attends_everywhere:
            # of a mask per position transformers asks on the host whether it is needed, and the device runs dry
            attention_mask = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        with attention_on(ids.device):
            hidden_BTD: Tensor = self.bert(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return hidden_BTD

    @property
    def attends_everywhere(self) -> bool:
        """Whether every layer attends to every real position, by torch's fused attention."""
        return self.config.model_type in _FULL_ATTENTION and self.config._attn_implementation == "sdpa"


def _text_config(tower: TextTower, vocabulary_size: int) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(tower.name, **{"vocab_size": vocabulary_size, **tower.options})
    except ValueError as error:
        raise ValueError(
            f"transformers knows no model type {tower.name!r}. From scratch (text.pretrained: false) text.name is a "
            "model type such as 'bert'; with text.pretrained: true it is a hub name or a folder"
        ) from error


# model attribute paths of (dense, norm) in the masked-LM heads of the families we know
_MASKED_LM_PARTS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),  # BERT
    ("vocab_transform", "vocab_layer_norm"),  # DistilBERT
    ("lm_head.dense", "lm_head.layer_norm"),  # RoBERTa, MPNet
)


def _masked_lm_head(model: nn.Module, tower: TextTower, missing: set[str]) -> MaskedLMHead | None:
    """The published head; None where only the encoder was published. `missing`: weights that are new."""
    if lost := sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}.")):
        raise ValueError(
            f"text tower {tower.name!r} has no {lost[0]}{f' and {len(lost) - 1} more weights' if len(lost) > 1 else ''} of "
            f"its encoder (text.options: {tower.options}): give options that what is published fits, or text.pretrained: "
            "false"
        )
    for dense_path, norm_path in _MASKED_LM_PARTS:
        try:
            dense, norm = model.get_submodule(dense_path), model.get_submodule(norm_path)
        except AttributeError:
            continue
        if f"{dense_path}.weight" in missing:
            return None
        assert isinstance(dense, nn.Linear) and isinstance(norm, nn.LayerNorm)
        output: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
        return MaskedLMHead(dense, norm, output.bias)
    raise ValueError(
        f"{tower.name!r} ({type(model).__name__}) has no masked-LM head of a family known here (BERT, DistilBERT, RoBERTa, "
        "MPNet); choose such a model, or text.pretrained: false"
    )

"""The two towers: any backbone of timm with a feature map or tokens, any BERT-family encoder of transformers.

Both end in hidden states, one a position; the vocabulary head (stair/head.py) maps them to terms.

B rows, T positions, D width.
"""

import math
import re
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig

from stair.errors import SettingError, StairError
from stair.files import folder_or_hub_name

# families of which all layers take one mask
_FULL_ATTENTION = ("bert", "distilbert", "electra", "roberta")
# paths of (dense, norm) in the masked-LM heads of the known families
_MASKED_LM_PARTS = (
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm"),  # BERT
    ("vocab_transform", "vocab_layer_norm"),  # DistilBERT
    ("lm_head.dense", "lm_head.layer_norm"),  # RoBERTa, MPNet
)
_SDP = ("flash", "mem_efficient", "cudnn", "math")


@dataclass
class ImageTower:
    """Settings of the image encoder.

    Args:
        name: a timm model that outputs a feature map (CNN, Swin) or tokens (ViT), `local-dir:PATH` for a folder in the
            hub's format, or `hf-hub:NAME`.
        pretrained: start from the published weights; False: from random weights.
        image_size: side of the square input in pixels.
        positions: hidden states that the head reads. `patches` omits class and register tokens, so that every active
            term has an argmax patch; `all` keeps them.
        options: further arguments of the timm model, for example `{embed_dim: 192, depth: 4}`.
        freeze_until: a module of the timm model, such as `blocks.5`. Parameters and batch-norm statistics up to and
            including this module are not trained. An exported model has no such setting.
    """

    name: str = "vit_base_patch16_224.augreg_in21k"
    pretrained: bool = True
    image_size: int = 224
    positions: Literal["patches", "all"] = "patches"
    options: dict[str, Any] = field(default_factory=dict)
    freeze_until: str | None = None


@dataclass
class TextTower:
    """Settings of the text encoder.

    Args:
        name: with `pretrained`, a model on the hub or a folder; otherwise a model type of transformers such as `bert`.
        pretrained: start from the published weights, with the masked-LM head if there is one; False: from random weights.
        max_tokens: maximum length of a caption in tokens, including [CLS] and [SEP]; longer captions are truncated.
        options: fields of the transformers configuration, for example `{hidden_size: 192, num_hidden_layers: 2}`.
    """

    name: str = "bert-base-uncased"
    pretrained: bool = True
    max_tokens: int = 77
    options: dict[str, Any] = field(default_factory=dict)


class _PlainAttention:
    """Switches torch to plain attention: the first thread that enters sets it, the last that leaves resets it.

    torch has one switch for the whole process, and `torch.nn.attention.sdpa_kernel` cannot be left by another thread.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, [True] * len(_SDP)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in _SDP]
                self._switch([False, False, False, True])
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._switch(self._before)

    def _switch(self, enabled: list[bool]) -> None:
        for name, value in zip(_SDP, enabled, strict=True):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


_plain_attention = _PlainAttention()


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """Plain products on the CPU in half precision, where torch's fused attention takes 2 to 5 times longer for short rows.

    CPU time of one core, bf16, forward and backward of 256 rows of 17 positions and 3 heads of 64: 15 against 60 ms.
    """
    return _plain_attention if device.type == "cpu" and torch.is_autocast_enabled("cpu") else nullcontext()


class ImageEncoder(nn.Module):
    """A backbone of timm that returns its hidden states.

    Args:
        tower: what to build.

    Attributes:
        width: D.
        grid: rows and columns of patches: tokens, or cells of the last feature map.

    Raises:
        SettingError: if timm cannot build it, it gives neither a feature map nor a square of tokens, or
            `tower.freeze_until` is no module of it.
        FileError: if there is no such folder, and no model of that name on the hub.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, tower: ImageTower) -> None:
        from timm.data.config import resolve_model_data_config  # 0.1 s, which `lightning fit --help` does not need

        super().__init__()
        name = re.sub("^(local-dir|hf-hub):", "", tower.name)
        try:
            with folder_or_hub_name(name):
                self.backbone, self._output, hidden = _without_head(tower)
            self._channels_last = hidden.ndim == 3 or getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            self.grid, first = self._layout(hidden)
        except StairError:
            raise
        except Exception as error:  # models raise errors of any class
            raise SettingError(
                f"timm cannot build image encoder {tower.name!r} at {tower.image_size} px with {tower.options} so that it "
                f"gives a feature map or tokens: {error}. Give a CNN or Vision Transformer (timm.list_models()) and "
                "options it takes",
                "stair.image.name",
            ) from error
        self.width: int = hidden.shape[-1 if self._channels_last else 1]
        self._first = first if tower.positions == "patches" else 0
        data = resolve_model_data_config(self.backbone)
        # saved with the weights: a saved model must not depend on the name it was built from
        self.register_buffer("mean", torch.tensor(data["mean"]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(data["std"]).view(3, 1, 1))
        if tower.freeze_until is not None:
            self._freeze(tower.freeze_until)
        self.train()

    def _layout(self, hidden: Tensor) -> tuple[tuple[int, int], int]:
        """The grid, and how many tokens come before it."""
        if hidden.ndim == 4:
            rows, columns = hidden.shape[1:3] if self._channels_last else hidden.shape[2:]
            return (rows, columns), 0
        first = getattr(self.backbone, "num_prefix_tokens", int(getattr(self.backbone, "cls_token", None) is not None))
        side = math.isqrt(hidden.shape[1] - first)
        if side < 2 or side**2 != hidden.shape[1] - first:
            raise ValueError(f"its {hidden.shape[1]} tokens do not form a square")
        return (side, side), first

    def _freeze(self, until: str) -> None:
        names = [name for name, _ in self.backbone.named_parameters()]
        inside = [n for n, name in enumerate(names) if name.startswith(f"{until}.")]
        if not inside:
            allowed = dict.fromkeys(found[0] for name in names if (found := re.match(r"\w+(\.\d+)?(?=\.)", name)))
            raise SettingError(
                f"stair.image.freeze_until is {until!r}. Allowed: modules of the backbone, {', '.join(allowed)}",
                "stair.image.freeze_until",
            )
        for parameter in list(self.backbone.parameters())[: inside[-1] + 1]:
            parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """As in torch, but modules whose parameters are all frozen stay in eval mode, with their batch-norm statistics."""
        super().train(mode)
        for module in self.backbone.modules() if mode else ():
            frozen = [not parameter.requires_grad for parameter in module.parameters()]
            if frozen and all(frozen):
                module.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Encodes images.

        Args:
            pixels: (B, 3, H, W), uint8 in 0 to 255 or floating point in 0 to 1, not normalised.

        Returns:
            (B, T, D) hidden states of the selected positions, row by row from the top left.
        """
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(self.mean.dtype) / 255
        with attention_on(pixels.device):
            forward = getattr(self.backbone, self._output)
            pixels = (pixels.to(self.mean.dtype) - self.mean) / self.deviation
            # two cores, forward and backward of a ResNetV2 of two stages, 64 images of 64 px: 87 against 103 ms
            hidden: Tensor = forward(pixels.contiguous(memory_format=torch.channels_last))
        if hidden.ndim == 4:
            hidden = hidden.flatten(1, 2) if self._channels_last else hidden.flatten(2).transpose(1, 2)
        return hidden[:, self._first :]


def _without_head(tower: ImageTower) -> tuple[Any, str, Tensor]:
    """A timm model without classifier and pooling, its method that gives hidden states, and those of one image."""
    import timm

    build = partial(timm.create_model, tower.name, pretrained=tower.pretrained, num_classes=0, **tower.options)
    try:
        backbone: Any = build(img_size=tower.image_size)
    except TypeError:  # a CNN takes images of any size
        backbone = build()
    backbone.eval()
    pixels = torch.zeros(1, 3, tower.image_size, tower.image_size).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        with suppress(AssertionError):  # of heads that cannot do without pooling
            backbone.reset_classifier(0, "")
            if (hidden := backbone(pixels)).ndim > 2:
                return backbone, "forward", hidden
        backbone.head = nn.Identity()  # not used here, and DDP waits for unused parameters
        if not isinstance(hidden := backbone.forward_features(pixels), Tensor):
            raise ValueError("its features are several tensors")
        return backbone, "forward_features", hidden


class MaskedLMHead(NamedTuple):
    """The layers of a published masked-LM head: Linear from D to D, LayerNorm over D, bias of each term."""

    dense: nn.Linear
    norm: nn.LayerNorm
    bias_V: Tensor


class TextEncoder(nn.Module):
    """A BERT-family encoder of transformers that returns its hidden states; `build` makes one.

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
        """Builds the tower, and its published masked-LM head (None from scratch, or if none was published).

        Args:
            tower: what to build.
            vocabulary_size: V, which the word embeddings must have.

        Raises:
            ValueError: if the vocabulary sizes differ, captions may be longer than the tower's positions, weights of the
                encoder were not published, or its masked-LM head is of an unknown family.
            FileError: if there is no such folder, and no model of that name on the hub.
        """
        masked_lm = None
        if tower.pretrained:
            with folder_or_hub_name(tower.name):
                model, loading = AutoModelForMaskedLM.from_pretrained(
                    tower.name, trust_remote_code=False, output_loading_info=True, **tower.options
                )
            masked_lm = _masked_lm_head(model, tower, set(loading["missing_keys"]))
            encoder = cls(model.base_model)
        else:
            try:
                config = AutoConfig.for_model(tower.name, **{"vocab_size": vocabulary_size, **tower.options})
            except ValueError as error:
                raise ValueError(
                    f"transformers knows no model type {tower.name!r}. From scratch (text.pretrained: false) text.name is "
                    "a model type such as 'bert'; with text.pretrained: true it is a hub name or a folder"
                ) from error
            encoder = cls(AutoModel.from_config(config, trust_remote_code=False))
        if encoder.word_embeddings.num_embeddings != vocabulary_size:
            raise ValueError(
                f"text encoder {tower.name!r} has {encoder.word_embeddings.num_embeddings} tokens but the vocabulary has "
                f"{vocabulary_size}; give the vocabulary that it was trained with"
            )
        longest = getattr(encoder.config, "max_position_embeddings", None) or math.inf
        if tower.max_tokens > longest:
            raise ValueError(f"text.max_tokens is {tower.max_tokens}; {tower.name!r} takes {longest} positions at most")
        return encoder, masked_lm

    @property
    def config(self) -> PretrainedConfig:
        """The tower's transformers configuration."""
        config: PretrainedConfig = self.bert.config
        return config

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The input word embeddings."""
        embeddings: nn.Embedding = self.bert.get_input_embeddings()
        return embeddings

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encodes captions: (B, T) int64 ids, (B, T) bool mask, True at real tokens.

        Returns:
            (B, T, D) hidden states; those at padding are meaningless.
        """
        attention_mask = mask.long()
        if ids.is_cuda and self.attends_everywhere:
            # a mask per position makes transformers wait for the device
            attention_mask = mask[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        with attention_on(ids.device):
            hidden_BTD: Tensor = self.bert(input_ids=ids, attention_mask=attention_mask).last_hidden_state
        return hidden_BTD

    @property
    def attends_everywhere(self) -> bool:
        """Whether every layer attends to every real position, by torch's fused attention."""
        return self.config.model_type in _FULL_ATTENTION and self.config._attn_implementation == "sdpa"


def _masked_lm_head(model: nn.Module, tower: TextTower, missing: set[str]) -> MaskedLMHead | None:
    """The published head; None if only the encoder was published. `missing`: weights that are new."""
    if lost := sorted(key for key in missing if key.startswith(f"{model.base_model_prefix}.")):
        raise ValueError(
            f"text encoder {tower.name!r} has no {lost[0]}{f' and {len(lost) - 1} more weights' if len(lost) > 1 else ''} "
            f"(text.options: {tower.options}): give options that fit the published weights, or "
            "text.pretrained: false"
        )
    for dense_path, norm_path in _MASKED_LM_PARTS:
        try:
            dense, norm = model.get_submodule(dense_path), model.get_submodule(norm_path)
        except AttributeError:
            continue
        if f"{dense_path}.weight" in missing:
            return None
        assert isinstance(dense, nn.Linear) and isinstance(norm, nn.LayerNorm)
        return MaskedLMHead(dense, norm, model.get_output_embeddings().bias)  # type: ignore[operator]
    raise ValueError(
        f"{tower.name!r} ({type(model).__name__}) has no masked-LM head of a known family (BERT, DistilBERT, RoBERTa, "
        "MPNet); choose such a model, or text.pretrained: false"
    )

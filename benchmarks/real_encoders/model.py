"""Sparse model and dense CLIP over cached feature maps, built from the modules of the project.

B images, K captions of each, P positions, D width, V terms (or the width of the dense embedding).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real_encoders.features import Split
from stair.encoders import MaskedLMHead, TextEncoder, TextTower
from stair.evaluate.term_evidence import Lemmas, holds_neighbour, neighbours
from stair.evaluate.vocabulary_probe import correct_terms
from stair.head import VocabularyHead
from stair.vocabulary import Vocabulary, is_stop_word

_WIDTHS = {"clip": 512, "late": 128}  # of dense embeddings: one of an image, or one of each position and token
_MAX_TOKENS = 40
_LEAST = 3  # occurrences in training captions, for a token of the vocabulary `train`


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        kind: `stair`, three stages, `clip`, dense, or `late`, late interaction (`baselines.max_sim`).
        steps: in all; `stages` are their shares.
        captions: K of each image in a batch; each is compared with all images in a loss of its own.
        views: augmented views drawn from; 1 is the plain image only.
        lr_stage2: factor on the learning rate in stage 2.
        decay: weight decay of matrices.
        margin: `in_caption_margin`; text_shift: added to the published biases of texts at the start.
        masked: weight of the masked loss.
        hard_mask: the paper's: stage 1 has the masked loss only, later stages do not have it.
        ramp: share of the steps in which λ rises.
        caption: weight of the caption loss.
        caption_of: its terms: those of `all` captions of an image, or of the compared `one`.
        image_budgets: as `objective.image_budgets`.
        teacher: weight of the distillation loss from dense scores, instead of the contrastive one.
        least: a term can only be active if captions of so many training images have it, and it is no stop word; 0 for all.
        position_dropout: share of an image's positions that a step leaves out.
    """

    kind: str = "stair"
    steps: int = 800
    batch: int = 128
    captions: int = 1
    views: int = 1
    lr: float = 3e-3
    lr_stage2: float = 1.0
    decay: float = 0.05
    warmup: int = 30
    stages: tuple[float, float, float] = (0.25, 0.04, 0.71)
    margin: float = 3.0
    slope: float = 0.3
    text_shift: float = 0.0
    masked: float = 0.25
    hard_mask: bool = False
    flops_image: float = 3e-4
    flops_text: float = 3e-4
    ramp: float = 0.25
    scale: float = 14.3
    caption: float = 0.0
    caption_of: str = "all"
    image_budgets: list[int] | None = None
    teacher: float = 0.0
    least: int = 0
    position_dropout: float = 0.0


class Data:
    """Splits as tensors, texts as ids of the vocabulary in use.

    Attributes:
        in_captions, near_captions: of a split, (N, V) with 1 where captions of an image have a term, or a word near it;
            see `stair.evaluate.term_evidence`.
    """

    def __init__(self, splits: dict[str, Split], vocabulary: Vocabulary, tokens: str) -> None:
        encoded = {k: [vocabulary.encode(texts) for texts in split.captions] for k, split in splits.items()}
        self.kept = list(range(len(vocabulary)))
        if tokens == "train":
            counts = Counter(i for image in encoded["train"] for caption in image for i in caption)
            special = [i for i in vocabulary.never_active if "unused" not in vocabulary.tokens[i]]  # [PAD] is the first
            self.kept = [*special, *sorted(i for i, n in counts.items() if n >= _LEAST and i not in special)]
        self.published = len(vocabulary)
        place = {old: new for new, old in enumerate(self.kept)}
        unknown = place[vocabulary.unknown_id]
        self.never = [place[i] for i in vocabulary.never_active if i in place]
        self.tokens = vocabulary.tokens_of(self.kept)
        self.correct = {
            k: [[place[v] for v in correct_terms(vocabulary, texts) if v in place] for texts in split.captions]
            for k, split in splits.items()
            if k != "train"
        }
        self.maps = {k: split.maps for k, split in splits.items()}
        lemmas = Lemmas(vocabulary)
        self.in_captions = {k: lemmas.held(split.captions)[:, self.kept] for k, split in splits.items()}
        self.stop_V = np.array([is_stop_word(token) for token in self.tokens])
        near = neighbours(self.in_captions["train"], self.stop_V, [lemmas.of(token) for token in self.tokens])
        self.near_captions = {k: holds_neighbour(held_NV, near) for k, held_NV in self.in_captions.items()}
        self.ids = {
            k: [[[place.get(i, unknown) for i in caption][:_MAX_TOKENS] for caption in image] for image in images]
            for k, images in encoded.items()
        }

    def held(self, split: str, rows: Sequence[int] | None = None) -> Tensor:
        """(N, V) bool: the tokens of the captions of each image, or of those in `rows`."""
        images = self.ids[split] if rows is None else [self.ids[split][row] for row in rows]
        held_NV = torch.zeros(len(images), len(self.kept), dtype=torch.bool)
        for held_V, image in zip(held_NV, images, strict=True):
            held_V[[v for caption in image for v in caption]] = True
        held_NV[:, self.never] = False
        return held_NV

    def rare(self, least: int) -> list[int]:
        """Stop words, and tokens in captions of fewer than `least` training images; none for 0."""
        if not least:
            return []
        images_V = self.held("train").sum(0).tolist()
        return [v for v, n in enumerate(images_V) if n < least or is_stop_word(self.tokens[v])]

    def pad(self, captions: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(C, T) ids and mask."""
        ids_CT = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in captions], batch_first=True)
        lengths_C = torch.tensor([len(ids) for ids in captions])
        return ids_CT, torch.arange(ids_CT.shape[1]) < lengths_C[:, None]


class Model(nn.Module):
    """Both sides from cached maps: sparse or dense."""

    def __init__(self, settings: Settings, data: Data, text: str) -> None:
        super().__init__()
        self.settings = settings
        self.text_encoder, masked_lm = TextEncoder.build(
            TextTower(text, True, _MAX_TOKENS, {"attention_probs_dropout_prob": 0.0}), data.published
        )
        rows_VE = self.text_encoder.word_embeddings.weight[data.kept].detach().clone()
        self.text_encoder.bert.set_input_embeddings(nn.Embedding.from_pretrained(rows_VE, freeze=False))
        width_i, width_t = data.maps["train"].shape[-1], self.text_encoder.width
        if width := _WIDTHS.get(settings.kind):
            self.image_projection = nn.Linear(width_i, width, bias=False)
            self.text_projection = nn.Linear(width_t, width, bias=False)
        else:
            assert masked_lm is not None
            masked_lm = MaskedLMHead(masked_lm.dense, masked_lm.norm, masked_lm.bias_V[data.kept])
            tied: Any = self.text_encoder.word_embeddings.weight
            self.text_head = VocabularyHead(width_t, tied, data.never, masked_lm)
            self.image_head = VocabularyHead(width_i, nn.Parameter(tied.detach().clone()), data.never, masked_lm)
            active_V = torch.ones(len(data.kept), dtype=torch.bool)
            active_V[data.rare(settings.least)] = False
            self.register_buffer("active_V", active_V, persistent=False)
            with torch.no_grad():
                self.text_head.bias += settings.text_shift
        self.log_scale = nn.Parameter(torch.tensor([math.log(settings.scale)]))

    def images(self, maps_BPD: Tensor, caption_ids: Tensor | None = None) -> Tensor:
        """(B, V), of late interaction (B, P, V); `caption_ids` (B, W) get a slope below zero."""
        if self.settings.kind == "late":
            return unit(self.image_projection(maps_BPD))
        mask_BP = torch.ones(maps_BPD.shape[:2], dtype=torch.bool)
        if self.training and self.settings.position_dropout:
            mask_BP = torch.rand(mask_BP.shape) >= self.settings.position_dropout
            mask_BP[:, 0] |= ~mask_BP.any(1)
        if self.settings.kind == "clip":
            if mask_BP.all():
                pooled_BD = maps_BPD.mean(1)
            else:
                seen_BP1 = mask_BP[..., None].to(maps_BPD.dtype)
                pooled_BD = (maps_BPD * seen_BP1).sum(1) / seen_BP1.sum(1)
            dense_BV: Tensor = self.image_projection(pooled_BD).float()
            return dense_BV
        image_BV: Tensor = self.image_head(maps_BPD, mask_BP, caption_ids, negative_slope=self.settings.slope)
        return image_BV * self.active_V

    def texts(self, ids_CT: Tensor, mask_CT: Tensor) -> Tensor:
        """(C, V), of late interaction (C, T, V)."""
        hidden_CTD = self.text_encoder(ids_CT, mask_CT)
        real_CT1 = mask_CT[..., None].to(hidden_CTD.dtype)
        if self.settings.kind == "late":  # the sum over tokens is then their mean
            return unit(self.text_projection(hidden_CTD)) * real_CT1 / real_CT1.sum(1, keepdim=True)
        if self.settings.kind == "clip":
            dense_CV: Tensor = self.text_projection((hidden_CTD * real_CT1).sum(1) / real_CT1.sum(1)).float()
            return dense_CV
        text_CV: Tensor = self.text_head(hidden_CTD, mask_CT, ids_CT, self.settings.margin)
        return text_CV * self.active_V

    def groups(self, share: float = 1.0) -> list[dict[str, Any]]:
        """Matrices with weight decay, and all others, embeddings too, without."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        decays = [(p.ndim > 1 and "embeddings" not in name, p) for name, p in trained]
        return [
            {"params": params, "lr": share * self.settings.lr, "weight_decay": self.settings.decay * decayed}
            for decayed in (True, False)
            if (params := [p for kind, p in decays if kind == decayed])
        ]


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return nn.functional.normalize(rows.float(), dim=-1)


def images_of(model: Model, maps_NPC: Any) -> Tensor:
    parts = (torch.from_numpy(maps_NPC[i : i + 128]).bfloat16() for i in range(0, len(maps_NPC), 128))
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.images(part) for part in parts])


def texts_of(model: Model, data: Data, texts: Sequence[list[int]]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.texts(*data.pad(texts[i : i + 256])) for i in range(0, len(texts), 256)])

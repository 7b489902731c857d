"""Three stages and dense CLIP on cached feature maps, with the modules of the project, in one process.

B images, K captions of each, P positions, D width, V terms (or the width of the dense embedding).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real_encoders.features import Split
from stair.encoders import MaskedLMHead, TextEncoder, TextTower
from stair.evaluate.vocabulary_probe import correct_terms, vocabulary_probe
from stair.head import VocabularyHead
from stair.losses import flops, info_nces, ramp
from stair.ranking import SparseRows, retrieval_ranks
from stair.vocabulary import Vocabulary

_WIDTH, _MAX_TOKENS = 512, 40
_LEAST = 3  # occurrences in training captions, for a token of the vocabulary `train`


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        kind: `stair`, three stages, or `clip`, dense.
        steps: in all; `stages` are their shares.
        captions: K of each image in a batch; each is compared with all images in a loss of its own.
        views: augmented views drawn from; 1 is the plain image only.
        positions: share of positions kept in training, drawn anew for each image.
        grid: the sparse model reads cells of a grid of this side, each the mean of positions, and the mean of all; 0 reads
            positions as they are.
        token_drop: share of tokens hidden from the text encoder in training.
        lr_text, lr_terms, lr_stage2: factors on the rate of the text encoder, of word embeddings and biases, of stage 2.
        decay: weight decay of matrices; `decay_terms` of word embeddings.
        margin: `in_caption_margin`; text_shift: added to the published biases of texts at the start.
        term_drop: share of terms left out of both sides in a step.
        masked, masked_end: weight of the masked loss at the start and end of the run.
        ramp: share of the steps in which λ rises.
        teacher: weight of the distillation loss from dense scores, instead of the contrastive one.
    """

    kind: str = "stair"
    steps: int = 800
    batch: int = 128
    captions: int = 1
    views: int = 1
    positions: float = 1.0
    token_drop: float = 0.0
    grid: int = 0
    lr: float = 3e-3
    lr_text: float = 1.0
    lr_terms: float = 1.0
    lr_stage2: float = 1.0
    decay: float = 0.05
    decay_terms: float = 0.0
    warmup: int = 30
    stages: tuple[float, float, float] = (0.25, 0.04, 0.71)
    margin: float = 3.0
    slope: float = 0.3
    text_shift: float = 0.0
    term_drop: float = 0.0
    masked: float = 0.25
    masked_end: float = 0.25
    flops_image: float = 3e-4
    flops_text: float = 3e-4
    ramp: float = 0.25
    scale: float = 14.3
    teacher: float = 0.0


class Data:
    """Splits as tensors, texts as ids of the vocabulary in use."""

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
        self.ids = {
            k: [[[place.get(i, unknown) for i in caption][:_MAX_TOKENS] for caption in image] for image in images]
            for k, images in encoded.items()
        }

    def held(self, split: str) -> Tensor:
        """(N, V) bool: the tokens of each image's captions."""
        held_NV = torch.zeros(len(self.ids[split]), len(self.kept), dtype=torch.bool)
        for held_V, image in zip(held_NV, self.ids[split], strict=True):
            held_V[[v for caption in image for v in caption]] = True
        held_NV[:, self.never] = False
        return held_NV

    def pad(self, captions: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """(C, T) ids and mask."""
        ids_CT = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in captions], batch_first=True)
        lengths_C = torch.tensor([len(ids) for ids in captions])
        return ids_CT, torch.arange(ids_CT.shape[1]) < lengths_C[:, None]


class Model(nn.Module):
    """Both sides from cached maps: sparse or dense."""

    def __init__(self, settings: Settings, data: Data, text: str) -> None:
        super().__init__()
        self.settings, self.last_loss = settings, 0.0
        self.text_encoder, masked_lm = TextEncoder.build(
            TextTower(text, True, _MAX_TOKENS, {"attention_probs_dropout_prob": 0.0}), data.published
        )
        rows_VE = self.text_encoder.word_embeddings.weight[data.kept].detach().clone()
        self.text_encoder.bert.set_input_embeddings(nn.Embedding.from_pretrained(rows_VE, freeze=False))
        width_i, width_t = data.maps["train"].shape[-1], self.text_encoder.width
        if settings.kind == "clip":
            self.image_projection = nn.Linear(width_i, _WIDTH, bias=False)
            self.text_projection = nn.Linear(width_t, _WIDTH, bias=False)
        else:
            assert masked_lm is not None
            masked_lm = MaskedLMHead(masked_lm.dense, masked_lm.norm, masked_lm.bias_V[data.kept])
            tied: Any = self.text_encoder.word_embeddings.weight
            self.text_head = VocabularyHead(width_t, tied, data.never, masked_lm)
            self.image_head = VocabularyHead(width_i, nn.Parameter(tied.detach().clone()), data.never, masked_lm)
            with torch.no_grad():
                self.text_head.bias += settings.text_shift
        self.log_scale = nn.Parameter(torch.tensor([math.log(settings.scale)]))

    def images(self, maps_BPD: Tensor, caption_ids: Tensor | None = None) -> Tensor:
        """(B, V); `caption_ids` (B, W) get a slope below zero."""
        hidden_BPD = maps_BPD
        keep = round(self.settings.positions * hidden_BPD.shape[1])
        if self.training and keep < hidden_BPD.shape[1]:
            drawn_BP = torch.rand(hidden_BPD.shape[:2]).argsort(1)[:, :keep]
            hidden_BPD = hidden_BPD.gather(1, drawn_BP[..., None].expand(-1, -1, hidden_BPD.shape[2]))
        if self.settings.kind == "clip":
            dense_BV: Tensor = self.image_projection(hidden_BPD.mean(1)).float()
            return dense_BV
        if self.settings.grid:  # after dropout of positions there is no grid
            side = math.isqrt(hidden_BPD.shape[1])
            grid_BDHW = hidden_BPD.transpose(1, 2).unflatten(2, (side, side))
            pooled_BPD = nn.functional.adaptive_avg_pool2d(grid_BDHW, self.settings.grid).flatten(2).transpose(1, 2)
            hidden_BPD = torch.cat([pooled_BPD, hidden_BPD.mean(1, keepdim=True)], 1)
        mask_BP = torch.ones(hidden_BPD.shape[:2], dtype=torch.bool)
        image_BV: Tensor = self.image_head(hidden_BPD, mask_BP, caption_ids, negative_slope=self.settings.slope)
        return image_BV

    def texts(self, ids_CT: Tensor, mask_CT: Tensor) -> Tensor:
        """(C, V)."""
        seen_CT = mask_CT
        if self.training and self.settings.token_drop:
            drop = torch.rand(ids_CT.shape) < self.settings.token_drop
            drop[:, 0] = False
            seen_CT = mask_CT & ~drop
        hidden_CTD = self.text_encoder(ids_CT, seen_CT)
        if self.settings.kind == "clip":
            real_CT1 = seen_CT[..., None].to(hidden_CTD.dtype)
            dense_CV: Tensor = self.text_projection((hidden_CTD * real_CT1).sum(1) / real_CT1.sum(1)).float()
            return dense_CV
        text_CV: Tensor = self.text_head(hidden_CTD, seen_CT, ids_CT, self.settings.margin)
        return text_CV

    def groups(self, share: float = 1.0) -> list[dict[str, Any]]:
        """Parameters with rate and decay by part."""
        s, found = self.settings, {}
        for name, p in self.named_parameters():
            if not p.requires_grad:
                continue
            terms = "word_embeddings" in name or name.endswith("head.bias")
            text = s.lr_text if name.startswith("text_encoder") else 1.0
            scale = s.lr_terms if terms else text
            decay = (
                s.decay_terms if terms and p.ndim > 1 else s.decay if p.ndim > 1 and "embeddings" not in name else 0.0
            )
            found.setdefault((scale, decay), []).append(p)
        return [{"params": p, "lr": share * s.lr * scale, "weight_decay": decay} for (scale, decay), p in found.items()]


def train(settings: Settings, data: Data, seed: int, text: str, teachers: Sequence[Teacher] = ()) -> Model:
    """Trains one model; three stages each have an optimiser and a schedule of their own."""
    torch.manual_seed(seed)
    model = Model(settings, data, text)
    shares = settings.stages if settings.kind == "stair" else (0.0, 0.0, 1.0)
    batches = _batches(settings, data, seed)
    done, tail = 0, []
    for number, share in enumerate(shares, 1):
        steps = round(share * settings.steps)
        if not steps:
            continue
        frozen = number == 2
        for name, p in model.named_parameters():
            p.requires_grad_(not (frozen and name.startswith("image_")))
        groups = model.groups(settings.lr_stage2 if frozen else 1.0)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
        warmup = min(settings.warmup, steps // 4)

        def factor(step: int, steps: int = steps, warmup: int = warmup, constant: bool = number == 1) -> float:
            if step < warmup:
                return (step + 1) / warmup
            if constant:
                return 1.0
            return 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        model.train()
        if frozen:
            model.eval(), model.text_encoder.train()
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16):
                loss = _loss(model, data, next(batches), done, frozen, teachers)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.log_scale.clamp_(max=math.log(100))
            done += 1
            if done > 0.9 * settings.steps:
                tail.append(float(loss))
    model.last_loss = sum(tail) / max(1, len(tail))
    return model.eval()


class Batch(NamedTuple):
    """B images with K captions each: rows of the set, views, caption numbers."""

    rows_B: Tensor
    view_B: Tensor
    caption_BK: Tensor


def _batches(s: Settings, data: Data, seed: int) -> Iterator[Batch]:
    draw = torch.Generator().manual_seed(seed)
    counts = [len(image) for image in data.ids["train"]]
    while True:
        for rows_B in torch.randperm(len(counts), generator=draw).split(s.batch):
            if len(rows_B) < s.batch:
                continue
            view_B = torch.randint(s.views, (s.batch,), generator=draw)
            picked = [torch.randperm(counts[i], generator=draw)[: s.captions] for i in rows_B.tolist()]
            yield Batch(rows_B, view_B, torch.stack(picked))


def _loss(model: Model, data: Data, batch: Batch, step: int, frozen: bool, teachers: Sequence[Teacher]) -> Tensor:
    s = model.settings
    rows, K = batch.rows_B.tolist(), s.captions
    # caption k of all images together
    ids_CT, mask_CT = data.pad(
        [data.ids["train"][i][j] for k in range(K) for i, j in zip(rows, batch.caption_BK[:, k].tolist(), strict=True)]
    )
    own_BW = torch.cat(list(ids_CT.chunk(K)), 1)
    maps_BPD = torch.from_numpy(data.maps["train"][batch.view_B.numpy(), batch.rows_B.numpy()]).bfloat16()
    scale = model.log_scale.exp()
    signed_BV = model.images(maps_BPD, None if frozen or s.kind == "clip" else own_BW)
    text_CV = model.texts(ids_CT, mask_CT)
    scored_BV, scored_CV = signed_BV, text_CV
    if s.term_drop and model.training and s.kind == "stair":
        kept_V = torch.rand(text_CV.shape[1]) >= s.term_drop
        scored_BV, scored_CV = signed_BV * kept_V, scored_CV * kept_V
    texts, weights = list(scored_CV.chunk(K)), [1 / K] * K
    masked = s.masked + (s.masked_end - s.masked) * step / s.steps if s.kind == "stair" else 0.0
    if masked:
        mask_CV = torch.zeros(text_CV.shape, dtype=torch.bool).scatter_(1, ids_CT, True)
        texts += (scored_CV * mask_CV).chunk(K)
        weights = [(1 - masked) / K] * K + [masked / K] * K
    loss = sum(w * part.loss for w, part in zip(weights, info_nces(scored_BV, texts, scale, cosine=True), strict=True))
    if s.teacher:
        image_BV = scored_BV.relu() if s.kind == "stair" else scored_BV
        loss = (1 - s.teacher) * loss + s.teacher * _distil(image_BV, texts[:K], scale, batch, teachers)
    if s.kind == "stair":
        rising = ramp(step, round(s.ramp * s.steps))
        loss = loss + rising * (s.flops_image * flops(signed_BV.relu()) + s.flops_text * flops(text_CV))
    return loss


def _distil(
    image_BV: Tensor, texts: Sequence[Tensor], scale: Tensor, batch: Batch, teachers: Sequence[Teacher]
) -> Tensor:
    """Cross-entropy of the batch's scores with those of the teachers' mean scores, in both directions."""
    losses = []
    for k, text_BV in enumerate(texts):
        theirs_BB = torch.stack([teacher.scores(batch, k) for teacher in teachers]).mean(0)
        with torch.autocast("cpu", enabled=False):
            mine_BB = scale * unit(image_BV) @ unit(text_BV).T
        both = (mine_BB, theirs_BB), (mine_BB.T, theirs_BB.T)
        losses += [nn.functional.cross_entropy(mine, theirs.softmax(1)) for mine, theirs in both]
    return torch.stack(losses).mean()


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1."""
    return nn.functional.normalize(rows.float(), dim=1)


class Teacher(NamedTuple):
    """A dense model's unit embeddings of the training set."""

    images_LNV: Tensor
    texts_NKV: Tensor
    scale: float

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Model, data: Data) -> Teacher:
        """Embeds all views and captions."""
        views = [unit(_images(model, maps)).half() for maps in data.maps["train"]]
        ids = data.ids["train"]
        texts_CV = unit(_texts(model, data, [caption for image in ids for caption in image])).half()
        return cls(torch.stack(views), texts_CV.view(len(ids), len(ids[0]), -1), float(model.log_scale.exp()))

    def save(self, path: Path) -> None:
        """Writes the embeddings."""
        arrays = {"images": self.images_LNV.numpy(), "texts": self.texts_NKV.numpy(), "scale": np.array(self.scale)}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Teacher:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(torch.from_numpy(file["images"]), torch.from_numpy(file["texts"]), float(file["scale"]))

    def scores(self, batch: Batch, k: int) -> Tensor:
        """(B, B) of the batch's images with caption k of each."""
        image_BV = self.images_LNV[batch.view_B, batch.rows_B].float()
        return self.scale * image_BV @ self.texts_NKV[batch.rows_B, batch.caption_BK[:, k]].float().T


def _images(model: Model, maps_NPC: Any) -> Tensor:
    parts = (torch.from_numpy(maps_NPC[i : i + 128]).bfloat16() for i in range(0, len(maps_NPC), 128))
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.images(part) for part in parts])


def _texts(model: Model, data: Data, texts: Sequence[list[int]]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([model.texts(*data.pad(texts[i : i + 256])) for i in range(0, len(texts), 256)])


@torch.inference_mode()
def embed(model: Model, data: Data, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """(N, V) images, (C, V) texts, (C,) the image of each text."""
    ids = data.ids[split]
    owner = torch.tensor([i for i, image in enumerate(ids) for _ in image])
    images_NV = _images(model.eval(), data.maps[split][0])
    texts_CV = _texts(model, data, [caption for image in ids for caption in image])
    return images_NV.float(), texts_CV.float(), owner


def _word_rows(model: Model, data: Data) -> tuple[SparseRows, Tensor]:
    """Each whole word of the vocabulary, embedded by a dense model as a text, with its id."""
    never = set(data.never)
    ids = [v for v, token in enumerate(data.tokens) if v not in never and not token.startswith("##")]
    first, last = (data.tokens.index(token) for token in ("[CLS]", "[SEP]"))
    return SparseRows.of(unit(_texts(model, data, [[first, v, last] for v in ids]))), torch.tensor(ids)


def _ranks(images: SparseRows, texts_CV: Tensor, owner_C: Tensor) -> dict[str, Tensor]:
    found = retrieval_ranks(images.unit(), SparseRows.of(texts_CV).unit(), owner_C)
    return {way: ranks.first for way, ranks in found.items()}


def _recalls(ranks: dict[str, Tensor]) -> dict[str, float]:
    """R@1, 5, 10 both ways in percent, and their sum."""
    found = {f"{way}@{k}": 100 * float((ranks[way] <= k).float().mean()) for way in ("t2i", "i2t") for k in (1, 5, 10)}
    return found | {"sum": sum(found.values())}


@torch.inference_mode()
def measure(model: Model, data: Data, split: str) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Figures of a split, in percent or terms, and the rank of each query's best right answer."""
    images, texts, owner = embed(model, data, split)
    rows = SparseRows.of(images)
    ranks = _ranks(rows, texts, owner)
    found = _recalls(ranks) | {"train_loss": model.last_loss}
    terms = _word_rows(model, data) if model.settings.kind == "clip" else None
    probe = vocabulary_probe(rows.unit(), data.correct[split], images.shape[1], terms)
    found |= {"heaviest": 100 * probe["top1"], "heaviest_baseline": 100 * probe["frequency_baseline/top1"]}
    if model.settings.kind == "clip":
        return found, ranks
    order = images.topk(min(10, images.shape[1]))
    hits = data.held(split).gather(1, order.indices) & (order.values > 0)
    found |= {
        "terms_image": float((images > 0).sum(1).float().mean()),
        "terms_text": float((texts > 0).sum(1).float().mean()),
        "grounding": 100 * float(hits.float().mean()),
    }
    for k in (64, 16):
        cut = _recalls(_ranks(rows.largest(k), texts, owner))
        found |= {f"{key} of {k}": cut[key] for key in ("t2i@1", "i2t@1", "sum")}
        found |= {f"kept {key} of {k}": 100 * cut[key] / max(found[key], 1e-9) for key in ("t2i@1", "i2t@1")}
    return found, ranks

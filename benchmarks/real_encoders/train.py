"""Training of three stages or dense CLIP on cached feature maps, in one process.

B images, K captions of each, P positions, D width, V terms (or the width of the dense embedding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.real_encoders.baselines import late_loss
from benchmarks.real_encoders.model import Data, Model, Settings, images_of, texts_of, unit
from stair.losses import caption_loss, flops, info_nces, ramp
from stair.regularisers import within_budget


def train(settings: Settings, data: Data, seed: int, text: str, teachers: Sequence[Teacher] = ()) -> Model:
    """Trains one model; three stages each have an optimiser and a schedule of their own."""
    torch.manual_seed(seed)
    model = Model(settings, data, text)
    shares = settings.stages if settings.kind == "stair" else (0.0, 0.0, 1.0)
    batches = _batches(settings, data, seed)
    done = 0
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
    if s.caption and s.caption_of != "one":
        own_BW = data.pad([sorted({v for caption in data.ids["train"][i] for v in caption}) for i in rows])[0]
    maps_BPD = torch.from_numpy(data.maps["train"][batch.view_B.numpy(), batch.rows_B.numpy()]).bfloat16()
    scale = model.log_scale.exp()
    signed_BV = model.images(maps_BPD, None if frozen or s.kind == "clip" else own_BW)
    text_CV = model.texts(ids_CT, mask_CT)
    if s.kind == "late":
        return late_loss(signed_BV, text_CV.chunk(K), scale)
    scored_BV = _compared(signed_BV, s.image_budgets)
    texts, weights = list(text_CV.chunk(K)), [1 / K] * K
    masked = s.masked if s.kind == "stair" else 0.0
    if s.hard_mask:
        masked = float(step < round(s.stages[0] * s.steps))
    if masked:
        mask_CV = torch.zeros(text_CV.shape, dtype=torch.bool).scatter_(1, ids_CT, True)
        texts += (text_CV * mask_CV).chunk(K)
        weights = [(1 - masked) / K] * K + [masked / K] * K
    loss = sum(w * part.loss for w, part in zip(weights, info_nces(scored_BV, texts, scale, cosine=True), strict=True))
    if s.teacher:
        image_BV = scored_BV.relu() if s.kind == "stair" else scored_BV
        loss = (1 - s.teacher) * loss + s.teacher * _distil(image_BV, texts[:K], scale, batch, teachers)
    if s.kind == "stair":
        rising = ramp(step, round(s.ramp * s.steps))
        if s.caption and not frozen:
            held_BV = data.held("train", rows)
            if s.caption_of == "one":
                held_BV &= torch.zeros_like(held_BV).scatter_(1, own_BW, True)
            loss = loss + s.caption * caption_loss(signed_BV, held_BV & model.active_V)
        loss = loss + rising * (s.flops_image * flops(signed_BV.relu()) + s.flops_text * flops(text_CV))
    return loss


def _compared(signed_BV: Tensor, budgets: list[int] | None) -> Tensor:
    """As in `StairStage`: in half of the steps only the k heaviest terms."""
    if budgets is None or torch.rand(()) < 0.5:
        return signed_BV
    return within_budget(signed_BV, round(math.exp(float(torch.empty(()).uniform_(*map(math.log, budgets))))))


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


class Teacher(NamedTuple):
    """A dense model's unit embeddings of the training set."""

    images_LNV: Tensor
    texts_NKV: Tensor
    scale: float

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Model, data: Data) -> Teacher:
        """Embeds all views and captions."""
        views = [unit(images_of(model, maps)).half() for maps in data.maps["train"]]
        ids = data.ids["train"]
        texts_CV = unit(texts_of(model, data, [caption for image in ids for caption in image])).half()
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

"""STAIR in 100 lines: the whole method in plain PyTorch, in one process, without a trainer.

Chen et al., "STAIR: Learning Sparse Text and Image Representation in Grounded Tokens", EMNLP 2023, arXiv 2301.13081.

    python examples/stair_in_100_lines.py

trains the three stages on generated scenes in about a minute of CPU time. It prints recall on 300 held-out scenes and the
heaviest terms of four of them. The tests compare the project's head and losses with the functions of this file.

B pairs, T positions, D width, V terms of the vocabulary (BERT's WordPiece vocabulary in the product).
"""

from random import Random

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from datamodules.depictions import caption_scene, draw_scene
from datamodules.scenes import random_scene

PAD, D, SIDE, PATCH, TOKENS = 0, 64, 48, 8, 24


class Head(nn.Module):
    """Vocabulary head: p(h_j) = E · LayerNorm(GELU(W h_j + c)) + b and z = log(1 + ReLU(max_j p(h_j)))."""

    def __init__(self, embeddings_VD: Tensor) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(D, D), nn.LayerNorm(D)  # W, c and the LayerNorm
        self.E, self.b = nn.Parameter(embeddings_VD.clone()), nn.Parameter(torch.zeros(len(embeddings_VD)))

    def forward(self, hidden_BTD: Tensor, mask_BT: Tensor, margin_BV: Tensor | float = 0.0) -> Tensor:
        logits_BTV = self.norm(F.gelu(self.dense(hidden_BTD))) @ self.E.T + self.b
        logits_BV = logits_BTV.masked_fill(~mask_BT[:, :, None], float("-inf")).amax(1) - margin_BV
        return torch.log1p(torch.relu(logits_BV))


def info_nce(image_BV: Tensor, text_BV: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: cross entropy of each image among the texts, and of each text among the images."""
    logits_BB = scale * F.normalize(image_BV, dim=1) @ F.normalize(text_BV, dim=1).T
    pair_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, pair_B) + F.cross_entropy(logits_BB.T, pair_B)) / 2


def flops(rows_BV: Tensor) -> Tensor:
    """FLOPs regulariser: the sum over terms of the squared mean weight (Paria et al. 2020)."""
    return rows_BV.mean(0).square().sum()


def in_caption(ids_BT: Tensor, V: int) -> Tensor:
    """(B, V) bool: the terms in the caption. Stage 1 keeps only these."""
    caption_BV = torch.zeros(len(ids_BT), V, dtype=torch.bool).scatter(1, ids_BT, True)
    caption_BV[:, PAD] = False
    return caption_BV


class Stair(nn.Module):
    def __init__(self, V: int) -> None:
        super().__init__()
        self.patches, positions = nn.Conv2d(3, D, PATCH, PATCH), (SIDE // PATCH) ** 2
        self.tokens = nn.Embedding(V, D)
        self.place = nn.ParameterList([torch.randn(n, D) * 0.02 for n in (positions, TOKENS)])
        layer = nn.TransformerEncoderLayer(D, 4, 4 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.image, self.text = (nn.TransformerEncoder(layer, n, enable_nested_tensor=False) for n in (2, 1))
        nn.init.normal_(self.tokens.weight, std=0.05)
        self.image_head, self.text_head = Head(self.tokens.weight.data), Head(self.tokens.weight.data)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, pixels_B3HW: Tensor) -> Tensor:
        hidden_BTD = self.image(self.patches(pixels_B3HW / 127.5 - 1).flatten(2).mT + self.place[0])
        return self.image_head(hidden_BTD, torch.ones(hidden_BTD.shape[:2], dtype=torch.bool))

    def encode_text(self, ids_BT: Tensor, masked: bool, margin: float = 3.0) -> Tensor:
        hidden_BTD = self.text(self.tokens(ids_BT) + self.place[1], src_key_padding_mask=ids_BT == PAD)
        caption_BV = in_caption(ids_BT, self.tokens.num_embeddings)
        text_BV = self.text_head(hidden_BTD, ids_BT != PAD, margin * ~caption_BV)
        return text_BV * caption_BV if masked else text_BV


def train_stage(model: Stair, stage: int, steps: int, lr: float, weight: float, images: Tensor, ids: Tensor) -> None:
    image_side = [model.patches, model.place[0], model.image, model.image_head]
    for part in image_side:  # stage 2 trains the text side against a frozen image side
        part.requires_grad_(stage != 2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows_B = torch.randint(len(images), (64,))
        image_BV = model.encode_image(images[rows_B])
        text_BV = model.encode_text(ids[rows_B, step % ids.shape[1]], masked=stage == 1)
        ramp = min(1.0, (step + 1) / (steps / 2)) ** 2
        loss = info_nce(image_BV, text_BV, model.log_scale.exp()) + ramp * weight * (flops(image_BV) + flops(text_BV))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main() -> None:
    torch.manual_seed(0)
    scenes = [random_scene(rng) for rng in map(Random, range(2300))]
    captions = [caption_scene(scene, Random(i)) for i, scene in enumerate(scenes)]
    images = torch.stack([pil_to_tensor(draw_scene(scene, Random(i), SIDE)[0]) for i, scene in enumerate(scenes)])
    words = sorted({word for texts in captions for text in texts for word in text.lower().replace(",", " ").split()})
    terms = ["[PAD]", "[UNK]", *words]
    tokenizer = Tokenizer(models.WordLevel({term: v for v, term in enumerate(terms)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=TOKENS)
    tokenizer.enable_truncation(TOKENS)
    count = min(map(len, captions))
    ids = torch.tensor([[e.ids for e in tokenizer.encode_batch(texts[:count])] for texts in captions])
    model = Stair(len(terms))
    for stage, steps, lr, weight in ((1, 300, 2e-3, 1e-3), (2, 60, 1e-3, 1e-3), (3, 200, 1e-3, 3e-3)):
        train_stage(model, stage, steps, lr, weight, images[300:], ids[300:])
        with torch.no_grad():
            image_BV, text_BV = model.encode_image(images[:300]), model.encode_text(ids[:300, 0], stage == 1)
        right = (F.normalize(text_BV, dim=1) @ F.normalize(image_BV, dim=1).T).argmax(1) == torch.arange(300)
        active = (image_BV > 0).sum(1).float().mean()
        print(f"stage {stage}: text to image R@1 {100 * right.float().mean():.1f} %, {active:.1f} terms an image")
    for image_V, texts in zip(image_BV[:4], captions, strict=False):
        print([terms[v] for v in image_V.topk(6).indices], "|", texts[0])


if __name__ == "__main__":
    main()

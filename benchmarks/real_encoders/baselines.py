"""Baselines without a sparse head: codes of a dense model's embeddings, BM25 over captions, late interaction.

B rows of a batch, N images, C captions, P positions, T tokens, W words, D width of dense embeddings, E of late interaction,
V codes or terms, k active codes of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from benchmarks.real_encoders.model import unit
from stair.index.query import idf_factor
from stair.losses import info_nce
from stair.regularisers import within_budget

_BATCH, _RATE = 512, 2e-3  # of the autoencoder
_AUXILIARY, _DEAD_AFTER, _DEAD_CODES = 1 / 32, 30, 512  # weight, steps and codes of the loss of CSR's authors
_K1, _B = 1.2, 0.75  # of BM25 in Lucene


def max_sim(image_NPE: Tensor, text_CTE: Tensor) -> Tensor:
    """(N, C): the sum over tokens of the largest product with a position (ColBERT, arXiv 2004.12832)."""
    best_CTN = [torch.einsum("npe,cte->ctnp", part, text_CTE).amax(3) for part in image_NPE.split(128)]
    return torch.cat(best_CTN, 2).sum(1).T


def late_loss(image_BPE: Tensor, texts: Sequence[Tensor], scale: Tensor) -> Tensor:
    """InfoNCE of max-sim scores in both directions, the mean over texts (B, T, E)."""
    own_B = torch.arange(len(image_BPE))
    logits = [scale * max_sim(image_BPE, text_BTE) for text_BTE in texts]
    losses = [nn.functional.cross_entropy(way, own_B) for each_BB in logits for way in (each_BB, each_BB.T)]
    return torch.stack(losses).mean()


class BM25:
    """Lexical search if each image has captions: its document is all of them.

    Args:
        images: N images with captions of token ids below `width`.

    Attributes:
        documents_NV: weights, of all captions of each image.
    """

    def __init__(self, images: Sequence[Sequence[Sequence[int]]], width: int) -> None:
        self.captions, self.width = list(chain.from_iterable(images)), width
        self.owner_C = torch.tensor([i for i, captions in enumerate(images) for _ in captions])
        self.count_NV = self._counts([list(chain.from_iterable(captions)) for captions in images])
        self.idf_V = torch.from_numpy(idf_factor((self.count_NV > 0).sum(0).numpy(), len(images)))
        self.mean = self.count_NV.sum(1).mean()
        self.documents_NV = self._weights(self.count_NV)

    def _counts(self, texts: Sequence[Sequence[int]]) -> Tensor:
        rows = [torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=self.width).float() for ids in texts]
        return torch.stack(rows)

    def _weights(self, count_XV: Tensor) -> Tensor:
        length_X1 = count_XV.sum(1, keepdim=True)
        return self.idf_V * count_XV * (_K1 + 1) / (count_XV + _K1 * (1 - _B + _B * length_X1 / self.mean))

    def queries(self) -> Tensor:
        """(C, V) counts of each caption."""
        return self._counts(self.captions)

    def scores(self) -> Tensor:
        """(N, C): a caption is left out of the document of its own image, but counts in the IDF and the mean length."""
        query_CV = self.queries()
        score_NC = self.documents_NV @ query_CV.T
        own_CV = self._weights(self.count_NV[self.owner_C] - query_CV)
        score_NC[self.owner_C, torch.arange(len(query_CV))] = (own_CV * query_CV).sum(1)
        return score_NC


class Autoencoder(nn.Module):
    """Top-k sparse autoencoder of unit rows, for images and texts alike; the decoder is the encoder's transpose.

    `L = Σ_k w_k |x - x̂_k|² / |x|² + |r - r̂|² / |r|² / 32 + contrast · InfoNCE(codes of a pair)`, where x̂_k is decoded from
    the k largest codes, and r̂, from codes that were inactive for 30 steps, approximates the residual r of the first budget.
    Several budgets with equal weights: Matryoshka. Budgets k and 4k with weights 1 and 1/8 and a contrastive loss: CSR
    (arXiv 2503.01776).

    Args:
        width: D.
        codes: V.
        budgets: pairs of k and w_k, k falling or rising.
        contrast: weight of the contrastive loss.
    """

    def __init__(self, width: int, codes: int, budgets: Sequence[tuple[int, float]], contrast: float) -> None:
        super().__init__()
        self.budgets, self.contrast = budgets, contrast
        self.weight_VD = nn.Parameter(unit(torch.randn(codes, width)))
        self.bias_V, self.center_D = nn.Parameter(torch.zeros(codes)), nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.tensor([20.0]).log())
        self.idle_V = torch.zeros(codes, dtype=torch.int64)

    def forward(self, rows_BD: Tensor) -> Tensor:
        """(B, V), before ReLU."""
        return (rows_BD - self.center_D) @ self.weight_VD.T + self.bias_V

    def fit(self, images_LND: Tensor, texts_NKD: Tensor, steps: int) -> Autoencoder:
        """Trains on pairs: one of L views of an image, and one of its K captions, drawn anew in each step."""
        optimizer = torch.optim.Adam(self.parameters(), _RATE, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            counts = len(texts_NKD), len(images_LND), texts_NKD.shape[1]
            row_B, view_B, caption_B = (torch.randint(n, (_BATCH // 2,)) for n in counts)
            loss = self._loss(torch.cat([images_LND[view_B, row_B], texts_NKD[row_B, caption_B]]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return self.eval()

    def _loss(self, rows_BD: Tensor) -> Tensor:
        code_BV, k = self(rows_BD), self.budgets[0][0]
        self.idle_V += 1
        self.idle_V[code_BV.topk(max(budget for budget, _ in self.budgets)).indices.unique()] = 0
        loss, size = torch.zeros(()), rows_BD.square().sum()
        for budget, weight in self.budgets:
            loss = loss + weight * (rows_BD - self._decoded(code_BV, budget)).square().sum() / size
        dead_V = (self.idle_V > _DEAD_AFTER).nonzero()[:, 0]
        if len(dead_V):
            rest_BD = (rows_BD - self._decoded(code_BV, k)).detach()
            own_BV = code_BV.new_full(code_BV.shape, -1.0)
            own_BV[:, dead_V] = code_BV[:, dead_V]
            aux_BD = self._decoded(own_BV, min(_DEAD_CODES, len(dead_V)), 0.0)
            loss = loss + _AUXILIARY * (rest_BD - aux_BD).square().sum() / rest_BD.square().sum()
        if self.contrast:
            image_BV, text_BV = within_budget(code_BV.relu(), k).chunk(2)
            loss = loss + self.contrast * info_nce(image_BV, text_BV, self.log_scale.exp(), cosine=True).loss
        return loss

    def _decoded(self, code_BV: Tensor, k: int, center: float = 1.0) -> Tensor:
        best = code_BV.topk(k)
        rows_BD = nn.functional.embedding_bag(
            best.indices, self.weight_VD, mode="sum", per_sample_weights=best.values.relu()
        )
        return rows_BD + center * self.center_D


class Splice:
    """Sparse non-negative combination of words (SpLiCE, arXiv 2402.10376, recalled), k words by matching pursuit.

    In each of k steps, the word with the greatest product with the residual joins, and least squares gives all weights
    anew; words of negative weight leave for good. The authors solve a lasso, which is too slow here.

    Args:
        words_WD: unit rows.
    """

    def __init__(self, words_WD: Tensor) -> None:
        self.words_WD, self.gram_WW = words_WD, words_WD @ words_WD.T

    def codes(self, rows_ND: Tensor, k: int) -> Tensor:
        """(N, W)."""
        return torch.cat([self._pursued(part, k) for part in rows_ND.split(256)])

    def _pursued(self, rows_BD: Tensor, k: int) -> Tensor:
        product_BW = rows_BD @ self.words_WD.T
        taken_BW = torch.zeros(product_BW.shape, dtype=torch.bool)
        word_BK, weight_BK, rest_BD = taken_BW[:, :0].long(), product_BW[:, :0], rows_BD
        for _ in range(k):
            best_B1 = (rest_BD @ self.words_WD.T).masked_fill(taken_BW, -torch.inf).argmax(1, keepdim=True)
            taken_BW.scatter_(1, best_B1, True)
            word_BK = torch.cat([word_BK, best_B1], 1)
            free_BK = torch.cat([weight_BK > 0, torch.ones_like(best_B1, dtype=torch.bool)], 1)
            weight_BK = self._least_squares(product_BW, word_BK, free_BK)
            made_BD = nn.functional.embedding_bag(word_BK, self.words_WD, mode="sum", per_sample_weights=weight_BK)
            rest_BD = rows_BD - made_BD
        return torch.zeros_like(product_BW).scatter(1, word_BK, weight_BK)

    def _least_squares(self, product_BW: Tensor, word_BK: Tensor, free_BK: Tensor) -> Tensor:
        """(B, K) weights of the free words, none below 0; the others are 0."""
        gram_BKK, goal_BK = self.gram_WW[word_BK[:, :, None], word_BK[:, None]], product_BW.gather(1, word_BK)
        weight_BK, one_KK = torch.zeros_like(goal_BK), torch.eye(word_BK.shape[1])
        row_R = torch.arange(len(word_BK))
        while len(row_R):
            free_RK = free_BK[row_R]
            system_RKK = torch.where(free_RK[:, :, None] & free_RK[:, None], gram_BKK[row_R], one_KK)
            factor_RKK = torch.linalg.cholesky(system_RKK)
            weight_BK[row_R] = torch.cholesky_solve((goal_BK[row_R] * free_RK)[..., None], factor_RKK)[..., 0]
            row_R = (weight_BK < 0).any(1).nonzero()[:, 0]
            free_BK = free_BK & (weight_BK >= 0)
        return weight_BK

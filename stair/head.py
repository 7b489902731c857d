"""The vocabulary head: from hidden states to one weight a term.

B rows, T positions, D width of the tower, E width of the word embeddings, V words, W terms of a caption.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from stair.encoders import MaskedLMHead
from stair.kernels import vocabulary_max


class VocabularyHead(nn.Module):
    """BERT's masked-LM head, a max over positions, and `log(1 + ReLU(·))`.

    `p(h_j) = E · LayerNorm(GELU(W h_j + c)) + b` and `z_v = log(1 + ReLU(max_j p(h_j)_v))` (STAIR, section 2), with
    W, c = `dense`, `LayerNorm = norm`, E = `words` (V, E), b = `bias` (V,).

    Args:
        width: D of the tower.
        words: (V, E) parameter: for text the tower's own input embeddings (tied), for images a copy.
        never_active: sorted ids of words that stay zero.
        masked_lm: published weights to start from; `dense` is taken where the widths agree.
        bias_start: start of b without published weights.
    """

    def __init__(
        self,
        width: int,
        words: nn.Parameter,
        never_active: Sequence[int],
        masked_lm: MaskedLMHead | None = None,
        bias_start: float = 0.0,
    ) -> None:
        super().__init__()
        vocabulary_size, word_width = words.shape
        self.dense = nn.Linear(width, word_width)
        self.norm = nn.LayerNorm(word_width, eps=1e-12)  # BERT's epsilon
        self.words = words
        self.bias = nn.Parameter(torch.full((vocabulary_size,), float(bias_start)))
        self._active = _ranges(never_active, vocabulary_size)
        if masked_lm is not None:
            self._start_from(masked_lm)

    def _start_from(self, masked_lm: MaskedLMHead) -> None:
        with torch.no_grad():
            if masked_lm.dense.weight.shape == self.dense.weight.shape:
                self.dense.load_state_dict(masked_lm.dense.state_dict())
            self.norm.load_state_dict(masked_lm.norm.state_dict())
            self.norm.eps = masked_lm.norm.eps
            self.bias.copy_(masked_lm.bias_V)

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor,
        caption_ids: Tensor | None = None,
        margin: float = 0.0,
        negative_slope: float = 0.0,
    ) -> Tensor:
        """Computes term weights.

        With the greatest logit p_v of a term over positions, `z_v = log(1 + ReLU(p_v)) + negative_slope · min(p_v, 0)`
        for the terms of the row's caption, and `z_v = log(1 + ReLU(p_v - margin))` for all others.

        Args:
            hidden: (B, T, D).
            mask: (B, T) bool, True at real positions.
            caption_ids: (B, W) int64: terms of the row's caption. Doubles and never-active terms are harmless. None: no
                term is in a caption.
            margin: at least 0; infinity leaves all other terms at zero, and the head then computes W terms instead of V.
            negative_slope: for training. ReLU has no gradient below zero: a term inactive in every row never recovers.

        Returns:
            (B, V) in fp32, not negative but for in-caption terms with a slope.
        """
        hidden_BTE = self._normalised(torch.nn.functional.gelu(self.dense(hidden)))
        if caption_ids is None or (margin == 0 and negative_slope == 0):
            return vocabulary_max(hidden_BTE, mask, self.words, self.bias - margin, self._active)
        in_caption_BV = self._in_caption(hidden_BTE, mask, caption_ids, negative_slope)
        if math.isinf(margin):
            return in_caption_BV
        others_BV = vocabulary_max(hidden_BTE, mask, self.words, self.bias - margin, self._active)
        # logits lowered for all, then in-caption terms written over: where one is zero, the lowered one is zero too
        return others_BV.scatter(1, caption_ids, 0.0) + in_caption_BV

    def _normalised(self, hidden_BTE: Tensor) -> Tensor:
        """LayerNorm in the type of what comes in, with statistics in fp32: autocast would double what is read and kept."""
        with torch.autocast(hidden_BTE.device.type, enabled=False):
            scale, shift = self.norm.weight.to(hidden_BTE.dtype), self.norm.bias.to(hidden_BTE.dtype)
            return torch.nn.functional.layer_norm(hidden_BTE, self.norm.normalized_shape, scale, shift, self.norm.eps)

    def _in_caption(self, hidden_BTE: Tensor, mask_BT: Tensor, own_BW: Tensor, negative_slope: float) -> Tensor:
        own_BW = own_BW.sort(dim=1).values
        counts_BW = self._can_be_active(own_BW)
        counts_BW[:, 1:] &= own_BW[:, 1:] != own_BW[:, :-1]
        counts_BW &= mask_BT.any(1, keepdim=True)
        logits_BWT = self.words[own_BW] @ hidden_BTE.transpose(1, 2).to(self.words.dtype)
        # fp32 from here on, whatever the towers' precision
        logits_BW = logits_BWT.float().masked_fill(~mask_BT[:, None], float("-inf")).amax(dim=2) + self.bias[own_BW]
        weight_BW = torch.log1p(torch.relu(logits_BW))
        if negative_slope > 0:
            weight_BW = weight_BW + negative_slope * logits_BW.clamp(max=0)
        weight_BW = weight_BW.where(counts_BW, 0.0)
        return torch.zeros(len(own_BW), len(self.words), device=own_BW.device).scatter_add(1, own_BW, weight_BW)

    def _can_be_active(self, ids: Tensor) -> Tensor:
        active = torch.zeros_like(ids, dtype=torch.bool)
        for first, end in self._active:
            active |= (ids >= first) & (ids < end)
        return active


def _ranges(never_active: Sequence[int], vocabulary_size: int) -> list[tuple[int, int]]:
    """Ranges `[first, end)` of the words between those that are never active."""
    edges = [-1, *never_active, vocabulary_size]
    return [(a + 1, b) for a, b in pairwise(edges) if b > a + 1]

"""The vocabulary head: from hidden states to one weight a term.

B rows, T positions, D width of the tower, E width of the word embeddings, V terms, W terms of a caption.
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
    W, c = `dense`, `LayerNorm = norm`, E = `word_embeddings` (V, E), b = `bias` (V,).

    Args:
        width: D of the tower.
        word_embeddings: (V, E) parameter: for text the tower's own input embeddings (tied), for images a copy.
        never_active: sorted ids of terms that stay zero.
        masked_lm: published weights to start from; `dense` is used if its shape fits.
        bias_start: start of b without published weights.
    """

    def __init__(
        self,
        width: int,
        word_embeddings: nn.Parameter,
        never_active: Sequence[int],
        masked_lm: MaskedLMHead | None = None,
        bias_start: float = 0.0,
    ) -> None:
        super().__init__()
        V, E = word_embeddings.shape
        self.dense = nn.Linear(width, E)
        self.norm = nn.LayerNorm(E, eps=1e-12)  # BERT's epsilon
        self.word_embeddings = word_embeddings
        self.bias = nn.Parameter(torch.full((V,), float(bias_start)))
        #: ranges `[first, end)` of the terms between those that are never active
        self.active_ranges = [(a + 1, b) for a, b in pairwise([-1, *never_active, V]) if b > a + 1]
        if masked_lm is not None:
            if masked_lm.dense.weight.shape == self.dense.weight.shape:
                self.dense.load_state_dict(masked_lm.dense.state_dict())
            self.norm.load_state_dict(masked_lm.norm.state_dict())
            self.norm.eps = masked_lm.norm.eps
            with torch.no_grad():
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
        for in-caption terms, and `z_v = log(1 + ReLU(p_v - margin))` for all others.

        Args:
            hidden: (B, T, D).
            mask: (B, T) bool, True at real positions.
            caption_ids: (B, W) int64, the in-caption terms of each row; duplicates and never-active terms are ignored.
                None: there are none.
            margin: at least 0. If infinite, the others are zero and only W logits a position are computed instead of V.
            negative_slope: for training. Without a gradient below zero, a term inactive in every row never recovers.

        Returns:
            (B, V) in fp32, not negative except for in-caption terms with a slope.
        """
        hidden_BTE = self._normalised(nn.functional.gelu(self.dense(hidden)))
        if caption_ids is None:
            return vocabulary_max(hidden_BTE, mask, self.word_embeddings, self.bias - margin, self.active_ranges)
        in_caption_BV = self._in_caption(hidden_BTE, mask, caption_ids, negative_slope)
        if math.isinf(margin):
            return in_caption_BV
        others_BV = vocabulary_max(hidden_BTE, mask, self.word_embeddings, self.bias - margin, self.active_ranges)
        return others_BV.scatter(1, caption_ids, 0.0) + in_caption_BV

    def _normalised(self, hidden_BTE: Tensor) -> Tensor:
        """LayerNorm in the input's type, with statistics in fp32: autocast would double the memory traffic."""
        with torch.autocast(hidden_BTE.device.type, enabled=False):
            scale, shift = self.norm.weight.to(hidden_BTE.dtype), self.norm.bias.to(hidden_BTE.dtype)
            return nn.functional.layer_norm(hidden_BTE, self.norm.normalized_shape, scale, shift, self.norm.eps)

    def _in_caption(self, hidden_BTE: Tensor, mask_BT: Tensor, ids_BW: Tensor, negative_slope: float) -> Tensor:
        ids_BW = ids_BW.sort(dim=1).values
        valid_BW = torch.zeros_like(ids_BW, dtype=torch.bool)
        for first, end in self.active_ranges:
            valid_BW |= (ids_BW >= first) & (ids_BW < end)
        valid_BW[:, 1:] &= ids_BW[:, 1:] != ids_BW[:, :-1]
        valid_BW &= mask_BT.any(1, keepdim=True)
        logits_BWT = self.word_embeddings[ids_BW] @ hidden_BTE.transpose(1, 2).to(self.word_embeddings.dtype)
        # fp32 from here on, whatever the towers' precision
        logits_BW = logits_BWT.float().masked_fill(~mask_BT[:, None], float("-inf")).amax(dim=2) + self.bias[ids_BW]
        weight_BW = torch.log1p(torch.relu(logits_BW))
        if negative_slope > 0:
            weight_BW = weight_BW + negative_slope * logits_BW.clamp(max=0)
        weight_BW = weight_BW.where(valid_BW, 0.0)
        return torch.zeros(len(ids_BW), len(self.bias), device=ids_BW.device).scatter_add(1, ids_BW, weight_BW)

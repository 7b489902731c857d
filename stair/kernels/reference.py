"""The plain form of the vocabulary head: the formula, literally. It holds B·T·V numbers, so it is for tests only."""

import torch
from torch import Tensor


def vocabulary_max_reference(hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Computes `z_bv = max_t mask_bt · log(1 + ReLU(hidden_bt · weight_v + bias_v))`.

    The activation comes before the max here and after it in the fused form: both are monotone, so the result is the same.

    Args:
        hidden: (B, T, D).
        mask: (B, T) bool, True at positions that count.
        weight: (V, D).
        bias: (V,).

    Returns:
        (B, V), not negative.
    """
    logits_BTV = hidden @ weight.T + bias
    return (torch.log1p(torch.relu(logits_BTV)) * mask[..., None]).amax(dim=1)

"""Sparsity: the paper's FLOPs, with a given λ or one that is adapted to a target number of active terms, and budgets.

Both regularisers act on the mean weight of each term over the *global* batch, so λ means the same on any number of
devices. As in `stair.losses`, gradients are multiplied by the number of ranks, because data-parallel training averages
over ranks.

B rows here, G rows on all ranks, V terms.
"""

import math

import torch
from torch import Tensor, nn

from stair.exchange import ranks, total
from stair.losses import flops

_MOST = math.log(1e4)  # λ stays within 1e-4 to 1e4 times its start


class Flops(nn.Module):
    """`Σ_v m_v²` (Paria et al. 2020, and STAIR): the expected multiplications of two embeddings, were they independent.

    With the mean weight `m_v = 1/G Σ_i z_iv`. A term that is active in few rows costs little, so terms spread evenly over
    the vocabulary.
    """

    def forward(self, rows: Tensor, rising: float = 1.0) -> Tensor:
        """The value that λ is multiplied with; in training also updates the regulariser's state.

        Args:
            rows: (B, V), not negative.
            rising: the share of λ at this step, 0 to 1 (`stair.losses.ramp`).
        """
        return flops(rows)

    @property
    def factor(self) -> float | Tensor:
        """What λ is multiplied with."""
        return 1.0


class TargetTerms(Flops):
    """FLOPs with λ adapted so that embeddings have `target` active terms on average.

    After each step `factor ← factor · (active / target)^(rate · rising)`, with the mean number of active terms of the
    global batch: λ rises while there are too many. Not in the paper; a plain integral control.

    Args:
        target: active terms of an embedding, at least 1.
        rate: at 0.02, with twice as many terms as the target, λ doubles in 50 steps.
    """

    log_factor: Tensor

    def __init__(self, target: float, rate: float = 0.02) -> None:
        super().__init__()
        self.target, self.rate = target, rate
        self.register_buffer("log_factor", torch.zeros(()))

    def forward(self, rows: Tensor, rising: float = 1.0) -> Tensor:
        """See `Flops`."""
        if self.training and rows.requires_grad:  # a frozen side does not respond to λ
            active_V = total((rows.detach() > 0).sum(0).float() / (len(rows) * ranks()))
            self.log_factor.add_(self.rate * rising * (active_V.sum().clamp(min=1.0) / self.target).log())
            self.log_factor.clamp_(-_MOST, _MOST)
        return flops(rows)

    @property
    def factor(self) -> Tensor:
        """What λ is multiplied with."""
        return self.log_factor.exp()


def within_budget(signed: Tensor, budget: int) -> Tensor:
    """Keeps the heaviest terms of each row.

    Args:
        signed: (B, V) weights.
        budget: how many terms are kept, at least 1; all if there are fewer.

    Returns:
        (B, V). Weights below 0 (`objective.negative_slope`) stay, so that their terms keep a gradient.
    """
    heaviest_BK = signed.topk(min(budget, signed.shape[1])).indices
    return signed * (torch.zeros_like(signed, dtype=torch.bool).scatter_(1, heaviest_BK, True) | (signed < 0))

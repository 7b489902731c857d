"""What keeps embeddings sparse: the paper's FLOPs, with λ as given or adapted to a wanted number of active terms.

Both act on the mean weight of each term over the *global* batch, `m_v = 1/G Σ_i z_iv` over the G rows of all ranks, so λ
means the same on any number of devices. As in `stair.losses`, gradients are multiplied by the number of ranks, because
data-parallel training averages over ranks afterwards. Everything is fp32.

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

    A term that is active in few rows costs little, so it spreads the terms evenly over the vocabulary.
    """

    def forward(self, rows: Tensor, rising: float = 1.0) -> Tensor:
        """The value that λ is multiplied with, and in training one step of whatever the regulariser remembers.

        Args:
            rows: (B, V), not negative.
            rising: how much of λ acts at this step, 0 to 1 (`stair.losses.ramp`).

        Returns:
            Scalar, differentiable.
        """
        return flops(rows)

    @property
    def factor(self) -> float | Tensor:
        """What λ is multiplied with."""
        return 1.0


class TargetTerms(Flops):
    """FLOPs with λ adapted so that embeddings have `target` active terms on average.

    After each step `factor ← factor · (active / target)^(rate · rising)`, active being the mean number of active terms of
    the global batch: λ rises while there are too many and falls while there are too few. Ours, a plain integral control.

    Args:
        target: wanted active terms of an embedding, at least 1.
        rate: how fast; at 0.02 and twice too many terms λ doubles in 50 steps.
    """

    log_factor: Tensor

    def __init__(self, target: float, rate: float = 0.02) -> None:
        super().__init__()
        self.target, self.rate = target, rate
        self.register_buffer("log_factor", torch.zeros(()))

    def forward(self, rows: Tensor, rising: float = 1.0) -> Tensor:
        """See `Flops`."""
        if self.training and rows.requires_grad:  # a frozen side does not answer to λ
            active_V = total((rows.detach() > 0).sum(0).float() / (len(rows) * ranks()))
            self.log_factor.add_(self.rate * rising * (active_V.sum().clamp(min=1.0) / self.target).log())
            self.log_factor.clamp_(-_MOST, _MOST)
        return flops(rows)

    @property
    def factor(self) -> Tensor:
        """What λ is multiplied with."""
        return self.log_factor.exp()

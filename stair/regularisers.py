"""What keeps embeddings sparse: the paper's FLOPs, and four others to choose from.

All act on the mean weight of each word over the *global* batch, `m_v = 1/G Σ_i z_iv` over the G rows of all ranks, so λ
means the same on any number of devices. As in `stair.losses`, gradients are multiplied by the number of ranks, because
data-parallel training averages over ranks afterwards. Everything is fp32.

B rows here, G rows on all ranks, V words.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stair.exchange import ranks, total
from stair.losses import flops

Name = Literal["flops", "l1", "df_flops", "overuse", "target"]


def global_mean(rows: Tensor) -> Tensor:
    """(V,) mean over the rows of all ranks, differentiable by this rank's (B, V) rows; of equal numbers on each rank."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    own_V = rows.sum(0) / (len(rows) * ranks())
    # the value of all ranks; the gradient of this one's rows, times the number of ranks
    return total(own_V.detach()) + ranks() * (own_V - own_V.detach())


class Regulariser(nn.Module):
    """One side's regulariser: `forward` gives the value that λ is multiplied with.

    Attributes:
        quantity: what the value is called in the logs.
    """

    quantity: ClassVar[str]

    def forward(self, rows: Tensor, rising: float = 1.0) -> Tensor:
        """The value, and in training one step of whatever the regulariser remembers.

        Args:
            rows: (B, V), not negative.
            rising: how much of λ acts at this step, 0 to 1 (`stair.losses.ramp`).

        Returns:
            Scalar, differentiable.
        """
        with torch.autocast(rows.device.type, enabled=False):
            return self.value(rows, rising)

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """As `forward`, outside autocast."""
        raise NotImplementedError

    @property
    def factor(self) -> float | Tensor:
        """What λ is multiplied with; 1, unless the regulariser adapts it."""
        return 1.0


class Flops(Regulariser):
    """`Σ_v m_v²` (Paria et al. 2020, and STAIR): the expected products of two embeddings, were they independent.

    A word that is on in few rows costs little, so it spreads the words evenly over the vocabulary.
    """

    quantity = "flops"

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """See the class."""
        return flops(rows)


class L1(Regulariser):
    """`Σ_v m_v`, the mean L1 norm of an embedding: every weight costs the same, whoever else uses the word."""

    quantity = "l1"

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """See the class."""
        return global_mean(rows).sum()


class DfFlops(Regulariser):
    """`Σ_v (w_v · m_v)²` with `w_v = 1 / (1 + (d_v^(log_α 2) - 1)^β)` (DF-FLOPS, Porco et al. 2025, arXiv 2505.15070).

    d_v is word v's document frequency: the share of rows in which it is active. w is nearly 0 for rare words, 1/2 at
    `d = α` and 1 for words that are always on, so only words with long posting lists cost anything. The authors estimate d
    on their validation set every 100 steps; here it is a moving average over the steps, which needs no second pass.

    Args:
        vocabulary_size: V.
        alpha: the document frequency at which the penalty is half of FLOPs'.
        beta: how steeply it rises there.
        momentum: of the moving average of d.
    """

    quantity = "df_flops"
    frequency_V: Tensor
    steps: Tensor

    def __init__(self, vocabulary_size: int, alpha: float = 0.1, beta: float = 10.0, momentum: float = 0.99) -> None:
        super().__init__()
        self.alpha, self.beta, self.momentum = alpha, beta, momentum
        self.register_buffer("frequency_V", torch.zeros(vocabulary_size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """See the class."""
        mean_V = global_mean(rows)
        if self.training:
            active_V = global_mean((rows.detach() > 0).float())
            self.steps += 1
            # the plain mean of the first steps, before there is a history to average with
            kept = torch.minimum(1 - 1 / self.steps, torch.as_tensor(self.momentum, device=self.steps.device))
            self.frequency_V.copy_(kept * self.frequency_V + (1 - kept) * active_V)
        return (self.weight() * mean_V).square().sum()

    def weight(self) -> Tensor:
        """(V,) w."""
        power = math.log(2) / math.log(self.alpha)
        # a word that was never on has d = 0, where the power has no value and w is 0
        odds_V = (self.frequency_V.clamp(min=1e-6, max=1.0) ** power - 1) ** self.beta
        return 1 / (1 + odds_V)


class Overuse(Regulariser):
    """`Σ_v u_v · m_v` with `u_v = m_v / Σ_w m_w`, which gets no gradient: a word costs as much as it is used beyond others.

    After the overuse penalty of LexVLA (Li et al., NeurIPS 2024, arXiv 2407.17827), which weighs words by their
    normalised mean activation so that words that fire everywhere fall silent and rare meaningless ones are not preferred,
    as they are by FLOPs. Written from descriptions of it: the paper's exact form was not at hand.
    """

    quantity = "overuse"

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """See the class."""
        mean_V = global_mean(rows)
        use_V = mean_V.detach()
        return (use_V / use_V.sum().clamp(min=1e-12) * mean_V).sum()


class TargetWords(Regulariser):
    """FLOPs with λ adapted so that embeddings have `target` active words on average.

    After each step `factor ← factor · (active / target)^(rate · rising)`, active being the mean number of active words of
    the global batch: λ rises while there are too many and falls while there are too few. Ours, a plain integral control.

    Args:
        target: wanted active words of an embedding.
        rate: how fast; at 0.02 and twice too many words λ doubles in 50 steps.
    """

    quantity = "flops"
    log_factor: Tensor

    def __init__(self, target: float, rate: float = 0.02) -> None:
        super().__init__()
        if target < 1:
            raise ValueError(f"a target of {target} active words leaves embeddings empty; give 1 or more")
        self.target, self.rate = target, rate
        self.register_buffer("log_factor", torch.zeros(()))

    def value(self, rows: Tensor, rising: float) -> Tensor:
        """See the class."""
        if self.training and rows.requires_grad:  # a frozen side does not answer to λ
            active = global_mean((rows.detach() > 0).float()).sum().clamp(min=1.0)
            self.log_factor.add_(self.rate * rising * (active / self.target).log()).clamp_(-_MOST, _MOST)
        return flops(rows)

    @property
    def factor(self) -> Tensor:
        """What λ is multiplied with."""
        return self.log_factor.exp()


_MOST = math.log(1e4)  # λ stays within 1e-4 to 1e4 times its start


def regulariser(name: Name, vocabulary_size: int, target: float) -> Regulariser:
    """A regulariser by its name in the settings.

    Args:
        name: `flops`, `l1`, `df_flops`, `overuse` or `target`.
        vocabulary_size: V.
        target: wanted active words, of `target`.

    Raises:
        ValueError: if there is none of that name, or the target cannot be.
    """
    if name == "target":
        return TargetWords(target)
    if name == "df_flops":
        return DfFlops(vocabulary_size)
    plain: dict[str, type[Regulariser]] = {"flops": Flops, "l1": L1, "overuse": Overuse}
    if name not in plain:
        raise ValueError(f"no regulariser {name!r}; known are flops, l1, df_flops, overuse and target")
    return plain[name]()

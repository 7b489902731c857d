"""The objective: symmetric InfoNCE and the FLOPs regulariser, both over the global batch, whatever the number of ranks.

Every rank computes the *whole* gradient of its own embeddings, so no gradient travels between ranks. Both functions
multiply it by the number of ranks, because data-parallel training (DDP and FSDP alike) averages over ranks afterwards:
the update equals that of one process with the whole batch (tests/test_losses.py shows it, and that other scalings fail).

B pairs here, R ranks, G = R·B pairs on all ranks, V words. Everything is fp32 (fp64 stays fp64), whatever the towers use.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from stair.kernels.fused import refuse_second_derivative


class Contrastive(NamedTuple):
    """What `info_nce` returns.

    Attributes:
        loss: scalar, the mean over all pairs of all ranks; differentiable.
        logit_std: scalar, the spread of all scaled logits, detached; above 3 at the start, training collapses.
        pairs: G.
    """

    loss: Tensor
    logit_std: Tensor
    pairs: int


def ranks() -> int:
    """Number of processes training together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, in the order of ranks, without gradient."""
    if ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _sum(value: Tensor) -> Tensor:
    value = value.clone()
    if ranks() > 1:
        dist.all_reduce(value)
    return value


def _check_even(rows: int, device: torch.device) -> None:
    if ranks() > 1:
        counts = _gather(torch.tensor([rows], device=device)).tolist()
        if len(set(counts)) > 1:
            raise ValueError(
                f"ranks have different numbers of pairs: {counts}; the global batch needs the same on each. "
                "ImageTextShards gives equal batches; with another loader, drop the last incomplete batch"
            )


class _GlobalInfoNCE(torch.autograd.Function):
    """Each rank scores its rows and its columns against all; 2·G log-sum-exps are all that is exchanged besides.

    With logits `l_ij = scale · image_i · text_j`, `P_ij = exp(l_ij - lse_i)` over texts, `Q_ij = exp(l_ij - lse_j)` over
    images, the loss is `1/2G Σ_i (lse_i + lse'_i - 2 l_ii)` and its gradient `A_ij = (P_ij + Q_ij)/2G - δ_ij/G`.
    """

    @staticmethod
    def forward(ctx: Any, image_BV: Tensor, text_BV: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        B = len(image_BV)
        image_GV, text_GV = _gather(image_BV), _gather(text_BV)
        G, first = len(image_GV), (dist.get_rank() * B if ranks() > 1 else 0)
        own = torch.arange(first, first + B, device=image_BV.device), torch.arange(B, device=image_BV.device)
        from_image_BG = scale * (image_BV @ text_GV.T)
        # one process holds all pairs: both directions read the same products
        from_text_BG = from_image_BG.T if ranks() == 1 else scale * (text_BV @ image_GV.T)
        image_lse_B, text_lse_B = from_image_BG.logsumexp(1), from_text_BG.logsumexp(1)
        image_lse_G, text_lse_G = _gather(image_lse_B), _gather(text_lse_B)
        diagonal_B = from_image_BG[own[1], own[0]]
        # in fp64: of a spread far below the mean, fp32 leaves few digits, others on another number of ranks
        mean = from_image_BG.mean(dtype=torch.float64)
        variance = (from_image_BG - mean.to(scale.dtype)).square().mean(dtype=torch.float64)
        moments = _sum(
            torch.stack(
                [
                    (image_lse_B + text_lse_B - 2 * diagonal_B).sum(dtype=torch.float64) / (2 * G),
                    mean * B / G,
                    (variance + mean.square()) * B / G,
                ]
            )
        )
        logit_std = (moments[2] - moments[1].square()).clamp(min=0).sqrt().to(scale.dtype)

        def gradient(logits_BG: Tensor, lse_B: Tensor, other_lse_G: Tensor) -> Tensor:
            A_BG = (logits_BG - lse_B[:, None]).exp_().add_((logits_BG - other_lse_G).exp_()).div_(2 * G)
            A_BG[own[1], own[0]] -= 1 / G
            return A_BG

        A_BG = gradient(from_image_BG, image_lse_B, text_lse_G)
        scale_gradient = (A_BG * from_image_BG).sum() / scale
        image_gradient_BV = scale * (A_BG @ text_GV)
        text_A_BG = A_BG.T if ranks() == 1 else gradient(from_text_BG, text_lse_B, image_lse_G)
        text_gradient_BV = scale * (text_A_BG @ image_GV)
        ctx.save_for_backward(image_gradient_BV, text_gradient_BV, scale_gradient.reshape(scale.shape))
        ctx.mark_non_differentiable(logit_std)
        return moments[0].to(scale.dtype), logit_std

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative()
        return tuple(ranks() * grad_loss * saved for saved in ctx.saved_tensors)


def info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Contrastive:
    """Symmetric InfoNCE over the pairs of all ranks.

    `L = 1/2G Σ_i [-log softmax_j(l_ij)_i - log softmax_j(l_ji)_i]`, `l_ij = scale · image_i · text_j`; row i of both
    sides is a pair.

    Args:
        image: (B, V), this rank's images, of any floating type.
        text: (B, V), this rank's texts.
        scale: (1,) or scalar, positive: the inverse temperature.

    Raises:
        ValueError: if shapes differ or ranks hold different numbers of pairs.
    """
    if image.shape != text.shape:
        raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must have one shape (B, V)")
    _check_even(len(image), image.device)
    with torch.autocast(image.device.type, enabled=False):
        result = _GlobalInfoNCE.apply(_fp32(image), _fp32(text), _fp32(scale))
    return Contrastive(result[0], result[1], len(image) * ranks())


def flops(embedding: Tensor) -> Tensor:
    """The FLOPs regulariser `Σ_v (mean_i z_iv)²` (Paria et al. 2020), the mean over the rows of all ranks.

    The mean of each rank's own value would be larger, and λ would change its meaning with the number of ranks.

    Args:
        embedding: (B, V), not negative.

    Returns:
        Scalar, differentiable.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        own_V = _fp32(embedding).sum(0) / (len(embedding) * ranks())
        mean_V = _sum(own_V.detach())
        value = mean_V.square().sum()
        # same value, and the gradient 2·mean_v/G of every own entry, times the number of ranks
        carrier = 2 * ranks() * (mean_V * own_V).sum()
        return value + carrier - carrier.detach()


def ramp(step: int, length: int) -> float:
    """Weight of the regularisers at an optimiser step: `min(1, (step/length)²)`; 1 throughout for length 0."""
    return 1.0 if step >= length else (step / length) ** 2


def _fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()

"""The objective: InfoNCE, FLOPs regulariser and caption loss, over the global batch, whatever the number of ranks.

Every rank computes the *whole* gradient of its own embeddings, so no gradient travels between ranks. All functions
multiply it by the number of ranks, because data-parallel training (DDP and FSDP alike) averages over ranks afterwards:
the update equals that of one process with the whole batch (tests/test_losses.py shows it, and that other scalings fail).

B pairs here, R ranks, G = R·B pairs on all ranks, V terms, K of them: those that are active in the batch.
Sums are fp32 (fp64 stays fp64), whatever the towers use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stair.exchange import Gathered, exchange, gather, rank, ranks, total
from stair.kernels.fused import refuse_second_derivative


class Contrastive(NamedTuple):
    """A contrastive loss.

    Attributes:
        loss: scalar, the mean over all pairs of all ranks; differentiable.
        pair_loss_B: (B,) the loss of each pair of this rank, detached.
        logit_std: scalar, standard deviation of all scaled logits, detached; above 3 at the start, training collapses.
        pairs: G.
    """

    loss: Tensor
    pair_loss_B: Tensor
    logit_std: Tensor
    pairs: int


class _Side:
    """One side's embeddings: those of this rank, those of all, and what makes them comparable."""

    def __init__(self, own_BV: Tensor, gathered: Gathered, cosine: bool, exact: torch.dtype) -> None:
        self.own_BV, self.gathered, self.exact = own_BV, gathered, exact
        self.columns_K: Tensor | None = None
        # columns that are zero throughout add nothing; leaving them out is worth a copy if they are many
        if own_BV.device.type == "cpu" and len(columns_K := gathered.columns()) < gathered.shape[1] // 2:
            self.columns_K = columns_K
        self.factor_B = torch.ones(len(own_BV), dtype=exact, device=own_BV.device)
        if cosine:  # 1/length; an empty embedding stays empty
            length_B = torch.linalg.vector_norm(own_BV, dim=1, dtype=exact)
            self.factor_B = torch.where(length_B > 0, 1 / length_B, 0)
        self.factor_G = gather(self.factor_B) if cosine else self.factor_B.repeat(ranks())

    def scored(self, other: "_Side", scale: Tensor) -> Tensor:
        """(B, G) logits of this rank's rows with all of the other side's."""
        columns_K = min((self.columns_K, other.columns_K), key=lambda c: self.own_BV.shape[1] if c is None else len(c))
        own_BK = self.own_BV if columns_K is None else self.own_BV[:, columns_K]
        factor_B1 = (scale * self.factor_B)[:, None]
        blocks = (other.gathered.block(peer, columns_K).T for peer in range(ranks()))
        return torch.cat([_product(own_BK, block, self.exact, factor_B1) for block in blocks], 1) * other.factor_G

    def gradient(self, other: "_Side", A_BG: Tensor, logits_BG: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's rows: (B, K) in the other side's columns, and (B,) what multiplies the rows themselves.

        With unit rows u = f·x and the gradient g of u, that of x is `f·(g - u (u·g))`; `u·g = Σ_j A_ij l_ij`.
        """
        weight_BG = A_BG * (scale * self.factor_B)[:, None] * other.factor_G
        B, columns_K = len(self.own_BV), other.columns_K
        K = other.own_BV.shape[1] if columns_K is None else len(columns_K)
        grad_BK = torch.zeros(B, K, dtype=self.exact, device=A_BG.device)
        for peer in range(ranks()):
            grad_BK += _product(
                weight_BG[:, peer * B : (peer + 1) * B], other.gathered.block(peer, columns_K), self.exact
            )
        return grad_BK, -self.factor_B.square() * (A_BG * logits_BG).sum(1)


def _product(a: Tensor, b: Tensor, exact: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """The product of a matrix, its rows times a factor, and one of embeddings, as exact as in `exact`.

    Tensor cores multiply what was rounded to bf16 without a further loss, and add in fp32. An fp32 factor is the sum of
    three numbers in bf16, of 8 bits each.
    """
    if not (b.is_cuda and b.dtype == torch.bfloat16 and exact == torch.float32):
        return (a.to(exact) if factor is None else a.to(exact) * factor) @ b.to(exact)
    if factor is not None:
        return torch.mm(a, b, out_dtype=exact).mul_(factor)
    return torch.mm(torch.cat(_three_parts(a)), b, out_dtype=exact).view(3, len(a), -1).sum(0)


def _three_parts(value: Tensor) -> list[Tensor]:
    """Three matrices in bf16 whose sum is that in fp32."""
    parts: list[Tensor] = []
    for _ in range(3):
        parts.append(value.bfloat16())
        value = value - parts[-1]
    return parts


class _GlobalInfoNCE(torch.autograd.Function):
    """Each rank scores its rows and its columns against all; 2·G log-sum-exps are all that is exchanged besides.

    With logits `l_ij = scale · image_i · text_j`, `P_ij = exp(l_ij - lse_i)` over texts, `Q_ij = exp(l_ij - lse_j)` over
    images, the loss is `1/2G Σ_i (lse_i + lse'_i - 2 l_ii)` and its gradient `A_ij = (P_ij + Q_ij)/2G - δ_ij/G`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image_BV: Tensor,
        text_BV: Tensor,
        scale: Tensor,
        cosine: bool,
        wire: torch.dtype,
        gathered: tuple[Gathered, Gathered],
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, exact = len(image_BV), scale.dtype
        image_BV, text_BV = image_BV.to(wire), text_BV.to(wire)
        image, text = (_Side(*own, cosine, exact) for own in zip((image_BV, text_BV), gathered, strict=True))
        G = B * ranks()
        own = torch.arange(B, device=image_BV.device)
        pair = own, own + rank() * B
        from_image_BG = image.scored(text, scale)
        # one process holds all pairs: both directions read the same products
        from_text_BG = from_image_BG.T if ranks() == 1 else text.scored(image, scale)
        image_lse_B, text_lse_B = from_image_BG.logsumexp(1), from_text_BG.logsumexp(1)
        image_lse_G, text_lse_G = gather(image_lse_B), gather(text_lse_B)
        pair_loss_B = (image_lse_B + text_lse_B) / 2 - from_image_BG[pair]
        moments = total(
            torch.stack(
                [
                    pair_loss_B.sum(dtype=torch.float64) / G,
                    from_image_BG.sum(dtype=torch.float64) / G**2,
                    from_image_BG.double().square().sum() / G**2,
                ]
            )
        )
        # in fp64: of a spread far below the mean, fp32 leaves 4 digits, others on another number of ranks
        logit_std = (moments[2] - moments[1].square()).clamp(min=0).sqrt().to(exact)

        def pull(logits_BG: Tensor, lse_B: Tensor, other_lse_G: Tensor) -> Tensor:
            A_BG = (logits_BG - lse_B[:, None]).exp_().add_((logits_BG - other_lse_G).exp_()).div_(2 * G)
            A_BG[pair] -= 1 / G
            return A_BG

        A_BG = pull(from_image_BG, image_lse_B, text_lse_G)
        text_A_BG = A_BG.T if ranks() == 1 else pull(from_text_BG, text_lse_B, image_lse_G)
        saved: list[Tensor | None] = []
        for needed, side, other, pull_BG, logits_BG in (
            (ctx.needs_input_grad[0], image, text, A_BG, from_image_BG),
            (ctx.needs_input_grad[1], text, image, text_A_BG, from_text_BG),
        ):
            if not needed:  # a frozen side
                saved += [None] * 4
                continue
            grad_BK, along_B = side.gradient(other, pull_BG, logits_BG, scale)
            saved += [grad_BK, other.columns_K, *((along_B, side.own_BV) if cosine else (None, None))]
        ctx.save_for_backward((A_BG * from_image_BG).sum().div(scale).reshape(scale.shape), *saved)
        ctx.shape = image_BV.shape
        ctx.mark_non_differentiable(pair_loss_B, logit_std)
        return moments[0].to(exact), pair_loss_B, logit_std

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        scale_gradient, *saved = ctx.saved_tensors
        factor = ranks() * grad_loss
        image, text = (_expand(ctx.shape, factor, *saved[at : at + 4]) for at in (0, 4))
        return image, text, factor * scale_gradient, None, None, None


# under torch.compile a clean break: what travels is known from the numbers only
_global_info_nce: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.compiler.disable(_GlobalInfoNCE.apply)


def _expand(
    shape: tuple[int, int],
    factor: Tensor,
    grad_BK: Tensor | None,
    columns_K: Tensor | None,
    along_B: Tensor | None,
    own_BV: Tensor | None,
) -> Tensor | None:
    """(B, V) from what is kept of a gradient: numbers in some columns, and multiples of the rows."""
    if grad_BK is None:
        return None
    grad_BK = grad_BK * factor
    if own_BV is not None and along_B is not None:
        grad_BV = own_BV * (along_B * factor)[:, None]
    elif columns_K is None:
        return grad_BK
    else:
        grad_BV = grad_BK.new_zeros(shape)
    return grad_BV.add_(grad_BK) if columns_K is None else grad_BV.index_add_(1, columns_K, grad_BK)


def info_nce(image: Tensor, text: Tensor, scale: Tensor, cosine: bool = False) -> Contrastive:
    """Symmetric InfoNCE over the pairs of all ranks, of one form of the texts; see `info_nces`."""
    return info_nces(image, (text,), scale, cosine)[0]


def info_nces(image: Tensor, texts: Sequence[Tensor], scale: Tensor, cosine: bool = False) -> list[Contrastive]:
    """Symmetric InfoNCE over the pairs of all ranks, of each of several forms of the texts; images travel once.

    `L = 1/2G Σ_i [-log softmax_j(l_ij)_i - log softmax_j(l_ji)_i]`, `l_ij = scale · image_i · text_j`; row i of both
    sides is a pair. With `cosine`, `l_ij = scale · image_i · text_j / (|image_i| |text_j|)`; an empty embedding has
    similarity 0 with all, and no gradient.

    Under autocast the embeddings are rounded to its type, on any number of ranks alike, since they travel in it. The
    gradient is that at the rounded embeddings.

    Args:
        image: (B, V), this rank's images, of any floating type.
        texts: (B, V) each, this rank's texts.
        scale: (1,) or scalar, positive: the inverse temperature.
        cosine: compare directions only.

    Raises:
        ValueError: if shapes differ or ranks hold different numbers of pairs.
    """
    for text in texts:
        if image.shape != text.shape:
            raise ValueError(f"image {tuple(image.shape)} and text {tuple(text.shape)} must have the same shape (B, V)")
    device = image.device.type
    rounded = torch.is_autocast_enabled(device) and image.dtype != torch.float64
    wire = torch.get_autocast_dtype(device) if rounded else image.dtype
    with torch.autocast(device, enabled=False):
        images, *others = exchange(*(_fp32(each.detach()).to(wire) for each in (image, *texts)))
        parts = [
            _global_info_nce(_fp32(image), _fp32(text), _fp32(scale), cosine, wire, (images, other))
            for text, other in zip(texts, others, strict=True)
        ]
    return [Contrastive(*each, len(image) * ranks()) for each in parts]


def flops(embedding: Tensor) -> Tensor:
    """The FLOPs regulariser `Σ_v (mean_i z_iv)²` (Paria et al. 2020), the mean over the rows of all ranks.

    The mean of each rank's own value would be larger, and λ would change its meaning with the number of ranks.

    Args:
        embedding: (B, V), not negative.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        own_V = _fp32(embedding).sum(0) / (len(embedding) * ranks())
        mean_V = total(own_V.detach())
        value = mean_V.square().sum()
        # same value, and the gradient 2·mean_v/G of every own entry, times the number of ranks
        carrier = 2 * ranks() * (mean_V * own_V).sum()
        return value + carrier - carrier.detach()


def caption_loss(signed: Tensor, in_caption: Tensor) -> Tensor:
    """Cross-entropy between images and single terms: from an image to its caption's terms, and from a term to its images.

    `mean_i Σ_v y_iv (log Σ_u exp l_iu - l_iv) + Σ_v w_v (log Σ_j exp l_jv - mean_{i ∋ v} l_iv)` with the logit
    `l = exp(z) - 1` of an active term and `l = z` of others. Of the G captions of all ranks, df_v have term v. `y_iv` is
    proportional to `log(G/df_v)^0.75` for the terms of caption i, `w_v` to `√df_v`; 0.75 was chosen on the demo. The first
    sum is similar to the loss of SuperClass (arXiv 2411.03313, recalled), the second is ours. If some terms already
    distinguish the images of a batch, InfoNCE has nearly no gradient for the others. This loss has.

    Args:
        signed: (B, V) weights z of images. Inactive in-caption terms are below 0 (`objective.negative_slope`).
        in_caption: (B, V) bool, the terms of each image's caption.

    Returns:
        Its value over all ranks. The gradient is the whole one, times the number of ranks, as in `info_nces`.
    """
    with torch.autocast(signed.device.type, enabled=False):
        signed, captions = _fp32(signed), len(signed) * ranks()
        logits_BV = torch.where(signed > 0, signed.expm1(), signed)
        df_V = total(in_caption.sum(0)).to(signed.dtype)
        target_BV = in_caption * (captions / df_V.clamp(min=1)).log().pow(0.75)
        target_BV = target_BV / (captions * target_BV.sum(1, keepdim=True).clamp(min=1e-9))
        weight_V = df_V.sqrt() / df_V.sqrt().sum().clamp(min=1)
        with torch.no_grad():
            image_lse_B1 = logits_BV.logsumexp(1, keepdim=True)
            term_lse_V = gather(logits_BV.logsumexp(0)).view(ranks(), -1).logsumexp(0)
            own_BV = target_BV + in_caption * weight_V / df_V.clamp(min=1)
            pull_BV = (logits_BV - image_lse_B1).exp() * target_BV.sum(1, keepdim=True)
            pull_BV += (logits_BV - term_lse_V).exp() * weight_V - own_BV
            value = (target_BV.sum(1) * image_lse_B1[:, 0]).sum() - (own_BV * logits_BV).sum()
            value = total(value) + (weight_V * term_lse_V).sum()
        carrier = ranks() * (pull_BV * logits_BV).sum()
        return value + carrier - carrier.detach()


def ramp(step: int, length: int) -> float:
    """Weight of the regularisers at an optimiser step: `min(1, (step/length)²)`; 1 throughout for length 0."""
    return 1.0 if step >= length else (step / length) ** 2


def _fp32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()

"""Sizes and gradients for tests of kernels."""

import torch

SHAPES = [
    # B, T, D, V, share of positions that count
    (3, 5, 16, 40, 1.0),
    (5, 7, 24, 70, 0.5),  # blocks end inside rows, words and width
    (2, 300, 16, 33, 0.9),  # more positions than a byte counts, several tiles a row
    (4, 3, 70, 20, 0.2),  # rows without positions
    (20, 5, 16, 40, 0.6),  # several blocks of rows
    (1, 1, 16, 16, 0.0),  # nothing at all
]


def gradients(function, inputs, mask, **options):
    """What a head says, and its gradients, in fp32, for an incoming gradient that differs everywhere."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    out = function(leaves[0], mask, *leaves[1:], **options)
    seed = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return [out.detach().float(), *(g.float() for g in torch.autograd.grad((out * seed).sum(), leaves))]

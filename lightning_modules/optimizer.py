"""Optimiser and schedule: AdamW or the paper's LAMB, linear warm-up, cosine decay, stepped by optimiser step."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.optim.lamb import Lamb
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from stair.errors import SettingError, check_settings

_SPARED = ("pos_embed", "cls_token", "reg_token", "dist_token")  # of a ViT, stored as matrices


@dataclass
class Optimizer:
    """How parameters move.

    Args:
        name: `adamw` or `lamb` (You et al. 2020; recalled as the paper's choice at a batch of 16,384). LAMB's trust ratio
            is for what decays: the rest, token embeddings among it, moves as by Adam.
        lr: peak learning rate.
        weight_decay: on matrices only, never on embeddings, positions, class tokens, norms, biases or the scale.
        betas: decay of the two moments.
        eps: added to the denominator.
        warmup_steps: optimiser steps of linear warm-up from 0.
        final_lr_share: share of `lr` that the cosine ends at.

    Raises:
        SettingError: if a value is out of range.
    """

    name: Literal["adamw", "lamb"] = "adamw"
    lr: float = 5e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: int = 2000
    final_lr_share: float = 0.03

    def __post_init__(self) -> None:
        """Checks the ranges."""
        valid = {
            "lr": 0 < self.lr < math.inf,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "betas": all(0 <= beta < 1 for beta in self.betas),
            "eps": 0 < self.eps < math.inf,
            "warmup_steps": self.warmup_steps >= 0,
            "final_lr_share": 0 <= self.final_lr_share <= 1,
        }
        allowed = (
            "lr and eps above 0, betas in [0, 1), weight_decay and warmup_steps from 0 up, final_lr_share in [0, 1]"
        )
        check_settings("optimizer", self, valid, f"finite numbers: {allowed}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimiser over the parameters that require a gradient."""
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        decayed: list[nn.Parameter] = []
        spared: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_matrix = (
                    parameter.ndim > 1 and id(parameter) not in embeddings and not name.endswith(".word_embeddings")
                )
                (decayed if is_matrix and not name.endswith(_SPARED) else spared).append(parameter)
        both = (decayed, self.weight_decay), (spared, 0.0)
        groups = [{"params": params, "weight_decay": decay} for params, decay in both if params]
        settings: dict[str, Any] = {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps}
        if self.name == "lamb":
            return Lamb(groups, **settings, max_grad_norm=None)  # the trainer clips
        # on a GPU one kernel, instead of a dozen passes over parameters and moments
        fused = all(p.is_cuda for p in [*decayed, *spared])
        optimizer = torch.optim.AdamW(groups, **settings, fused=fused)
        # Lightning refuses to clip for optimisers that undo fp16's loss scale themselves; the scaler does it beforehand
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def apply_settings(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, model: nn.Module) -> None:
        """Puts these settings over those that a checkpoint brought, and keeps its moments and steps.

        Args:
            optimizer: as `build` made it of `model`, its state loaded.
            scheduler: of it, its state loaded.
            model: whose parameters move.
        """
        groups = self.build(model).param_groups
        for group, ours, factor in zip(optimizer.param_groups, groups, scheduler.lr_lambdas, strict=True):
            group |= {name: value for name, value in ours.items() if name != "params"}
            group |= {"initial_lr": self.lr, "lr": self.lr * factor(scheduler.last_epoch)}
            for parameter in group["params"] if group.get("fused") else ():
                # of a run on the CPU the step counts lie there, where the fused kernel does not read them
                if "step" in (state := optimizer.state.get(parameter, {})):
                    state["step"] = state["step"].to(parameter.device)
        scheduler.base_lrs = [self.lr for _ in groups]

    def schedule(self, total_steps: int) -> Callable[[int], float]:
        """Factor on `lr` at each optimiser step of a run of `total_steps`.

        Raises:
            SettingError: if warm-up is longer than the run.
        """
        if self.warmup_steps >= total_steps:
            raise SettingError(
                f"optimizer.warmup_steps is {self.warmup_steps} but the run has {total_steps} steps; "
                "set trainer.max_steps higher or the warm-up shorter",
                "optimizer.warmup_steps",
            )

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))

        return factor

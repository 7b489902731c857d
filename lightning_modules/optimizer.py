"""Optimiser and schedule: AdamW or the paper's LAMB, linear warm-up, cosine decay, stepped by optimiser step."""

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from stair.errors import require

# stored as matrices by timm
_SPARED = (".word_embeddings", "pos_embed", "cls_token", "reg_token", "dist_token", "relative_position_bias_table")
# as the `group_matcher` of timm's models, for those of transformers
_TEXT_LAYERS = {"stem": r"\w*embeddings", "blocks": [(r"(?:\w+\.)?layers?\.(\d+)", None)]}


@dataclass
class Optimizer:
    """The optimizer and its schedule.

    Args:
        name: `adamw` or `lamb` (You et al. 2020; recalled as the paper's choice at a batch of 16,384). LAMB's trust ratio
            applies to parameters with weight decay; the others, such as token embeddings, are updated as by Adam.
        lr: peak learning rate.
        weight_decay: weight decay of matrices; not of embeddings, positions, class tokens, norms, biases or the scale.
        betas: decay rates of the two moments.
        eps: constant added to the denominator.
        warmup_steps: optimizer steps of linear warm-up from 0.
        final_lr_share: learning rate at the end of the cosine schedule, as a share of `lr`.
        lr_scale: factors on `lr` by part of the model, such as `{image_encoder: 0.1, text_encoder.bert.embeddings: 0.01}`.
            The innermost part applies. 0 freezes the modules of a part; a matrix that another part shares is trained.
        layer_decay: factor on the learning rate from each layer of an encoder to the previous one (ELECTRA, Clark et al.
            2020), in (0, 1]. The heads keep `lr`.

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
    lr_scale: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        scales = self.lr_scale.values()
        for name, holds, allowed in (
            ("lr", 0 < self.lr < math.inf, "finite, above 0"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "finite, at least 0"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "numbers in [0, 1)"),
            ("eps", 0 < self.eps < math.inf, "finite, above 0"),
            ("warmup_steps", self.warmup_steps >= 0, "at least 0"),
            ("final_lr_share", 0 <= self.final_lr_share <= 1, "0 to 1"),
            ("lr_scale", all(0 <= factor < math.inf for factor in scales), "finite factors, at least 0"),
            ("layer_decay", 0 < self.layer_decay <= 1, "in (0, 1]"),
        ):
            require(holds, f"optimizer.{name}", getattr(self, name), allowed)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """An optimiser over the parameters that require a gradient.

        Args:
            model: the towers, whose parts `lr_scale` names.

        Raises:
            SettingError: if a part is unknown, or timm does not number the layers of the image encoder.
        """
        embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        scales, groups = self._lr_scales(model), defaultdict[tuple[bool, float], list[nn.Parameter]](list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and id(parameter) not in embeddings and not name.endswith(_SPARED)
                groups[decays, scales[name]].append(parameter)
        ordered = [
            {"params": params, "weight_decay": self.weight_decay * decays, "lr": self.lr * scale}
            for (decays, scale), params in sorted(groups.items(), key=lambda group: group[0], reverse=True)
        ]
        settings: dict[str, Any] = {"lr": self.lr, "betas": tuple(self.betas), "eps": self.eps}
        if self.name == "lamb":
            from timm.optim.lamb import Lamb

            return Lamb(ordered, **settings, max_grad_norm=None)  # the trainer clips
        # on a GPU one kernel, instead of a dozen passes over parameters and moments
        fused = all(p.is_cuda for params in groups.values() for p in params)
        optimizer = torch.optim.AdamW(ordered, **settings, fused=fused)
        # Lightning refuses to clip for optimisers that undo fp16's loss scale themselves; the scaler does it beforehand
        optimizer._step_supports_amp_scaling = False
        return optimizer

    def untrained(self, model: nn.Module) -> list[nn.Module]:
        """The modules of which every parameter has the factor 0."""
        if 0 not in self.lr_scale.values():
            return []
        scales = self._lr_scales(model)
        fixed = {id(parameter) for name, parameter in model.named_parameters() if not scales[name]}
        owned = ((module, {id(parameter) for parameter in module.parameters()}) for module in model.modules())
        return [module for module, own in owned if own and own <= fixed]

    def _lr_scales(self, model: nn.Module) -> dict[str, float]:
        """The factor on `lr` of each parameter."""
        from timm.models import group_parameters

        names = [name for name, _ in model.named_parameters()]
        scales = dict.fromkeys(names, 1.0)
        for part in sorted(self.lr_scale, key=len):
            inside = [name for name in names if f"{name}.".startswith(f"{part}.")]
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            require(bool(inside), "optimizer.lr_scale", part, f"{parts}, and modules inside them")
            scales |= dict.fromkeys(inside, self.lr_scale[part])
        for encoder in ("image_encoder.backbone", "text_encoder.bert") if self.layer_decay < 1 else ():
            module: Any = model.get_submodule(encoder)
            numbered = encoder.startswith("text") or hasattr(module, "group_matcher")
            why = f"1: timm does not number the layers of {type(module).__name__}"
            require(numbered, "optimizer.layer_decay", self.layer_decay, why)
            matcher = _TEXT_LAYERS if encoder.startswith("text") else module.group_matcher()
            layers = group_parameters(module, matcher, reverse=True)
            last = max(layers.values())
            for name, layer in layers.items():
                scales[f"{encoder}.{name}"] *= self.layer_decay ** (last - layer)
        return scales

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
            group |= {"initial_lr": ours["lr"], "lr": ours["lr"] * factor(scheduler.last_epoch)}
            for parameter in group["params"] if group.get("fused") else ():
                # of a run on the CPU the step counts lie there, where the fused kernel does not read them
                if "step" in (state := optimizer.state.get(parameter, {})):
                    state["step"] = state["step"].to(parameter.device)
        scheduler.base_lrs = [group["lr"] for group in groups]

    def schedule(self, total_steps: int) -> Callable[[int], float]:
        """Factor on `lr` at each step of a run of `total_steps`; SettingError if warm-up is not shorter."""
        shorter = f"less than trainer.max_steps ({total_steps})"
        require(self.warmup_steps < total_steps, "optimizer.warmup_steps", self.warmup_steps, shorter)

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
            return self.final_lr_share + (1 - self.final_lr_share) * 0.5 * (1 + math.cos(math.pi * progress))

        return factor

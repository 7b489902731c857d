"""How a model is laid over devices and memory: sharded, compiled, recomputed. Nothing here changes what is computed.

FSDP2's units are a tower's blocks and each module of the image side; the rest (the text side's embeddings and head, which
share a matrix, and the scale) is the root. So what stage 2 freezes is never reduced.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from stair.encoders import attention_on
from stair.towers import TwoTowers

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def blocks(*towers: nn.Module) -> list[nn.Module]:
    """The transformer blocks of towers: of each, of its lists of modules of one class, the one with the most parameters."""
    largest: list[nn.Module] = []
    for tower in towers:
        lists = [list(m) for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        lists = [members for members in lists if len({*map(type, members)}) == 1]
        largest += max(lists, key=lambda members: sum(p.numel() for m in members for p in m.parameters()), default=[])
    return largest


def recompute(towers: TwoTowers) -> None:
    """Keeps of every block and head only its input; backwards it is computed again, with the same random state.

    The forward methods are wrapped and not the modules: names of parameters stay, and FSDP's hooks remain outside.
    """
    encoders = towers.image_encoder, towers.text_encoder
    for module in [*blocks(*encoders), *(module for module in towers.children() if module not in encoders)]:
        module.forward = partial(checkpoint, partial(_again, module.forward), use_reentrant=False)


def _again(forward: Callable[..., Any], hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
    """A forward by the attention that its tower chose, which backwards is no longer around it."""
    with attention_on(hidden.device):
        return forward(hidden, *more, **named)


def compile_blocks(towers: TwoTowers, backend: str) -> None:
    """Compiles the blocks of both towers; all blocks of a tower are one code, compiled once."""
    for module in blocks(towers.image_encoder, towers.text_encoder):
        module.forward = torch.compile(module.forward, backend=backend)


def shard(towers: TwoTowers, mesh: DeviceMesh) -> None:
    """Shards a model, in place.

    Parameters are gathered and gradients reduced in fp32, also in bf16-mixed: the result is that of `ddp`.

    Args:
        towers: on any device; what is frozen must be so already.
        mesh: (ranks,).
    """
    images = [module for name, module in towers.named_children() if name.startswith("image")]
    for module in [*blocks(towers.image_encoder, towers.text_encoder), *images, towers]:
        fully_shard(module, mesh=mesh)


def gathered(towers: TwoTowers) -> TwoTowers | None:
    """The model itself; of a sharded one a whole copy on the CPU of the first rank, None on others. All ranks call it."""
    if not isinstance(towers, FSDPModule):
        return towers
    state = get_model_state_dict(towers, options=_WHOLE)
    if not state:
        return None
    family = next(cls for cls in type(towers).__mro__ if not issubclass(cls, FSDPModule))
    return rebuilt(family, towers.portable_config(), towers.config.vocabulary, state)


def rebuilt(family: type[Any], config: dict[str, Any], vocabulary: str, weights: dict[str, Any]) -> TwoTowers:
    """A model from its class, its portable configuration, its vocabulary and its weights."""
    values = family.config_class.from_dict(config)
    values.vocabulary = vocabulary
    model: TwoTowers = family(values)
    model.load_state_dict(weights)
    return model


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all ranks. A checkpoint is one file with the full state, which any strategy can resume from."""

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Connects the ranks; "auto" would shard over nodes and cut tensors within."""
        # private: the constructor takes a number that is known only here (upstream pull request 19878)
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's full state on rank 0, as an unsharded optimiser gives it; empty on other ranks."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        state = get_optimizer_state_dict(self.model, optimizer, options=_WHOLE)
        return _renamed(state, count()) if state else state

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimisers from a checkpoint of any strategy; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        saved: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, saved.pop("state_dict"), options=options)
        # Lightning takes the numbers for positions in model.parameters(), which several groups are not
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, saved.pop("optimizer_states", []), strict=False):
            ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=_renamed(state, ordered), options=options)
        return saved


def _renamed(state: dict[str, Any], names: Iterable[Any]) -> dict[str, Any]:
    """The state of an optimiser with other names for its parameters, in the order of the groups."""
    groups = state["param_groups"]
    new = dict(zip((old for group in groups for old in group["params"]), names, strict=False))
    return {
        "state": {new[old]: value for old, value in state["state"].items()},
        "param_groups": [{**group, "params": [new[old] for old in group["params"]]} for group in groups],
    }

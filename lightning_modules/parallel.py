"""How a model is laid over devices and memory: sharded, compiled, recomputed. Nothing here changes what is computed.

Sharding is FSDP2: every rank keeps its part of each parameter and of the optimiser's state, and a unit's parameters are
gathered for as long as the unit computes. A tower's blocks are units, each module of the image side is one, and the rest
(the text side's embeddings and head, which share a matrix, and the scale) is the root. So what stage 2 freezes lies in
units of its own, which are never reduced.
"""

import io
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
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

# neither may begin with "last": Lightning would resume from it
_UNFINISHED, _REPLACED = ".unfinished.ckpt", ".replaced.ckpt"
_NEW = "-new"


def blocks(tower: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a tower: of its lists of modules of one class, the one with the most parameters."""
    lists = [
        list(m) for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len({*map(type, m)}) == 1
    ]
    return max(lists, key=lambda members: sum(p.numel() for m in members for p in m.parameters()), default=[])


def recompute(towers: TwoTowers) -> None:
    """Keeps of every block and head only what goes in; backwards it is computed again, with the same random state.

    The forward methods are wrapped and not the modules: names of parameters stay, and FSDP's hooks remain outside.
    """
    heads = [module for module in towers.children() if module not in (towers.image_encoder, towers.text_encoder)]
    for module in chain(blocks(towers.image_encoder), blocks(towers.text_encoder), heads):
        module.forward = partial(checkpoint, partial(_again, module.forward), use_reentrant=False)


def _again(forward: Callable[..., Any], hidden: torch.Tensor, *more: Any, **named: Any) -> Any:
    """A forward by the attention that its tower chose, which backwards is no longer around it."""
    with attention_on(hidden.device):
        return forward(hidden, *more, **named)


def compile_blocks(towers: TwoTowers, backend: str) -> None:
    """Compiles the blocks of both towers; all blocks of a tower are one code, compiled once."""
    for module in chain(blocks(towers.image_encoder), blocks(towers.text_encoder)):
        module.forward = torch.compile(module.forward, backend=backend)


def shard(towers: TwoTowers, mesh: DeviceMesh) -> None:
    """Shards a model, in place.

    Parameters are gathered and gradients reduced in fp32, also in bf16-mixed, where autocast rounds what is gathered as it
    does without sharding: the result is that of `ddp`. Gathering blocks in bf16 would halve those bytes, and round norms.

    Args:
        towers: on any device; what is frozen must be so already.
        mesh: (ranks,).
    """
    for module in chain(blocks(towers.image_encoder), blocks(towers.text_encoder)):
        fully_shard(module, mesh=mesh)
    for name, module in towers.named_children():
        if name.startswith("image"):
            fully_shard(module, mesh=mesh)
    fully_shard(towers, mesh=mesh)


def gathered(towers: TwoTowers) -> TwoTowers | None:
    """The model itself; of a sharded one a whole copy on the CPU of the first rank, None on others. All ranks call it."""
    if not isinstance(towers, FSDPModule):
        return towers
    state = get_model_state_dict(towers, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not state:
        return None
    kind = next(kind for kind in type(towers).__mro__ if not issubclass(kind, FSDPModule))
    return rebuilt(kind, towers.portable_config(), towers.config.vocabulary, state)


def rebuilt(
    kind: type[TwoTowers], config: dict[str, Any], vocabulary: str, weights: dict[str, torch.Tensor]
) -> TwoTowers:
    """A model from its portable configuration, its vocabulary and its weights."""
    values = kind.config_class.from_dict(config)
    values.vocabulary = vocabulary
    model = kind(values)  # type: ignore[call-arg]  # every kind is made of its configuration
    model.load_state_dict(weights)
    return model


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all ranks.

    A checkpoint is one file that any strategy can resume from, or a folder to which each rank writes its part. Both are
    written beside their place and renamed.

    Args:
        sharded_checkpoints: write folders. Quicker where the model is large; only as many ranks can resume from any number
            of ranks, but `ddp` cannot: `stair consolidate` makes a file of a folder.
    """

    def __init__(self, sharded_checkpoints: bool = False) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=sharded_checkpoints)

    def setup_environment(self) -> None:
        """Connects the ranks; "auto" would have sharded over nodes and cut tensors within."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state: this rank's part, by names; on rank 0 the whole by numbers, as an optimiser gives it."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        return state if self._save_distributed_checkpoint or not state else numbered(state)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a file or a folder; whoever is killed meanwhile has the old one or the new one."""
        path = Path(self.broadcast(filepath))
        fresh = path.with_name(_UNFINISHED)
        if self.is_global_zero:
            remove(fresh)
        self.barrier()
        super().save_checkpoint(checkpoint, fresh, storage_options)
        self.barrier()
        if self.is_global_zero:
            put(fresh, path)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimisers from a folder, or from a file of any strategy; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            refuse_code(path)
            return super().load_checkpoint(path, weights_only)
        saved: dict[str, Any] = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, saved.pop("state_dict"), options=options)
        # Lightning's own way takes the numbers for places in model.parameters(), which several groups are not
        for optimizer, state in zip(self.optimizers, saved.pop("optimizer_states", []), strict=False):
            state = named(state, _names(self.model, optimizer))
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state, options=options)
        return saved


class _Plain(pickle.Unpickler):
    """Builds what torch lists a checkpoint's parts with, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        there = f"{module}.{name}"
        named = module.startswith("torch.distributed.checkpoint.") and name.endswith(_LISTED) and "." not in name
        plain = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        known = module.startswith("pathlib") and name.endswith("Path")
        if not (named or plain or known or there == "torch.serialization._get_layout"):
            raise pickle.UnpicklingError(there)
        return super().find_class(module, name)


_LISTED = ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING", "_StorageInfo")


def refuse_code(folder: Path) -> None:
    """Refuses a checkpoint in parts that would run anything: torch unpickles its list of parts and its plain values.

    Raises:
        ValueError: naming what it would call.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            listed: Metadata = _Plain(file).load()
        for index, place in (listed.storage_data or {}).items():
            if isinstance(listed.state_dict_metadata[index.fqn], BytesStorageMetadata):
                with (folder / place.relative_path).open("rb") as file:
                    file.seek(place.offset)
                    torch.load(io.BytesIO(file.read(place.length)), weights_only=True)
    except Exception as error:  # whatever damaged bytes make of a pickle
        raise ValueError(
            f"{folder} is damaged, or asks for what no checkpoint needs ({type(error).__name__}: {error}): it is not loaded"
        ) from error


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return (by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"])


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict with the numbers of parameters, in the order of the groups, for their names."""
    number = {name: i for i, name in enumerate(chain(*(group["params"] for group in state["param_groups"])))}
    return _renamed(state, number)


def named(state: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """An optimiser's state dict with names for the numbers of parameters; `names` are in the order of the groups."""
    numbers = chain(*(group["params"] for group in state["param_groups"]))
    return _renamed(state, dict(zip(numbers, names, strict=True)))


def _renamed(state: dict[str, Any], new: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [new[old] for old in group["params"]]} for group in state["param_groups"]]
    return {"state": {new[old]: value for old, value in state["state"].items()}, "param_groups": groups}


def put(fresh: Path, place: Path) -> None:
    """Moves a file or a folder to its place, for what may be there.

    A file takes the place of a file at once. That of a folder cannot be taken: a new `last.ckpt` is `last-new.ckpt` first,
    a name that `--ckpt_path last` finds as well, before the old one goes. So whoever is killed in between, or while the old
    one is being removed, leaves one of the two whole, and what is not whole has a name that nobody looks for.

    Args:
        fresh: what was written.
        place: what it is to be called; in the same folder.
    """
    new = place.with_stem(place.stem + _NEW)
    if new.exists():  # of a process that was killed below
        _take(place, new)
    if place.is_dir() or (fresh.is_dir() and place.exists()):
        fresh.rename(new)
        _take(place, new)
    else:
        fresh.replace(place)


def _take(place: Path, new: Path) -> None:
    replaced = place.with_name(_REPLACED)
    remove(replaced)
    if place.exists():
        place.rename(replaced)
    new.rename(place)
    remove(replaced)


def found(place: Path) -> Path:
    """A checkpoint under its name, or under the one that it has for as long as it takes the place of an older one."""
    new = place.with_stem(place.stem + _NEW)
    return new if new.exists() and not place.exists() else place


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""What a stage's folder holds, and what may resume it.

RUN/stage1/checkpoints/last.ckpt, best.ckpt   the paths follow from the folder alone
RUN/stage1/config.yaml                        the settings that trained what lies here
RUN/stage1/stair                              the exported model
RUN/stage1/lock                               of the job that trains here now

Checkpoints and exported models record the inputs of their training: the model it starts from, the data, and the settings
that determine the weights. So a later command can tell whether they are what it would train.
"""

import hashlib
import json
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from stair.data.remote import is_remote
from stair.data.tars import Shards, expand, mixture
from stair.errors import FileError
from stair.files import atomic_write, read_json, sha256

# bytes from which a file shows that a training has been here; an event file without a figure has 88
_TRACES = {"**/*.ckpt": 0, "config.yaml": 0, "**/metrics.csv": 1, "**/events.out.tfevents.*": 129}
# settings that determine the weights; the others change how fast, where or how often
_INPUTS = re.compile(
    r"seed_everything$"
    r"|trainer\.(max_steps|max_epochs|limit_train_batches|precision|gradient_clip_val|gradient_clip_algorithm)$"
    r"|data\.(?!(train|val|test|vocabulary|image_size|max_tokens|eval_batch_size|workers|max_bad_share|remote)\b)"
    r"|model\.(?!init_args\.(micro_batch_size|recompute|compile)$)"
)
_MAYBE_FILES = re.compile(r"model\.init_args\.stair\b.*\.(vocabulary|name|checkpoint_path)$")
_STOPS = "trainer.callbacks"  # of it, EarlyStopping
#: what no resumed run can change: name in the record, and the setting it follows from
_FIXED = {"init_from": "transition.init_from", "data": "data.train"}


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes checkpoints completely or not at all; Lightning moves them from the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replaces a checkpoint, or leaves it as it is: `stair.files.atomic_write`.

        Raises:
            OSError: if the disk is full.
        """
        with atomic_write(Path(path)) as part, part.open("wb") as file:  # by name, torch hides that a disk is full
            torch.save(checkpoint, file)


def write_atomically(trainer: Trainer) -> None:
    """Has a trainer write its checkpoints so, unless its strategy or the user has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpoints()


def save_last(trainer: Trainer) -> Path:
    """Saves the state as `last.ckpt`, between two batches, on all ranks together. Returns its path."""
    path = checkpoint_path(trainer.default_root_dir, "last")
    trainer.save_checkpoint(path, weights_only=False)
    return path


def checkpoint_path(home: str | Path, name: str) -> Path:
    """The path of `last.ckpt` or `best.ckpt` (`name` without its suffix) in a stage's folder. It may not exist."""
    return Path(home) / "checkpoints" / f"{name}.ckpt"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain values; its tensors stay on disk.

    Raises:
        FileError: if it is missing or damaged.
    """
    if not path.exists():
        there = ", ".join(sorted(each.name for each in path.parent.glob("*.ckpt"))) or "no other"
        raise FileError(f"{path}: no such checkpoint file; found: {there}", path)
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise FileError(
            f"{path} is missing, damaged, or no checkpoint of a training: {error}. Give --ckpt_path with another file, or "
            "start again with another --run",
            path,
        ) from error
    return content


def _traces(home: Path, export: Path) -> list[Path]:
    """What shows that a training has been here: export, checkpoints of any name, settings, curves."""
    evaluations = {home / name for name in ("validate", "test", "predict")}
    files = [(path, size) for pattern, size in _TRACES.items() for path in sorted(home.glob(pattern))]
    traces = [path for path, size in files if path.stat().st_size >= size and evaluations.isdisjoint(path.parents)]
    return [export, *traces] if export.exists() else traces


def checkpoint_to_resume(given: str | None, home: Path, export: Path, inputs: dict[str, Any]) -> str | None:
    """The checkpoint that `fit` with the `ckpt_path` given resumes from; None begins anew.

    Raises:
        FileError: if the checkpoint is missing or damaged, the training would replace another one, or it cannot be resumed
            with these inputs; names the inputs that differ.
    """
    last, traces = checkpoint_path(home, "last"), _traces(home, export)
    saved = [path for path in traces if path.suffix == ".ckpt" or path == export]
    untrained = saved == [last] and read_checkpoint(last).get("global_step") == 0  # as after an error in the first step
    remote = given is not None and is_remote(given)  # Lightning reads it, by weights_only
    path = checkpoint_path(home, given) if given in ("last", "best") else Path(given) if given and not remote else None
    state = read_checkpoint(path) if path is not None and (given != "last" or path.exists()) else None
    inside = path is not None and state is not None and home.resolve() in path.resolve().parents
    if traces and not inside and not untrained:
        raise FileError(
            f"{traces[0]} is of an earlier training, which this one would replace. To resume it: --ckpt_path "
            f"{f'FILE, as there is no {path}' if path and not state else 'last'}. To train again: pass another --run, or "
            f"remove {home}",
            traces[0],
        )
    if path is None or state is None:
        return given if remote else None
    recorded = state.get("callbacks", {}).get("StageTransition", {}).get("inputs", {})
    # without a step left nothing is trained with settings that are new. Else only _FIXED cannot change
    done = 0 < (inputs["trainer.max_steps"] or 0) <= state.get("global_step", 0)
    bound = {key for key in recorded if key in _FIXED or (done and key != _STOPS)}
    if changed := {key for key in bound if recorded[key] != inputs.get(key)}:
        if untrained:
            return None
        raise _other_inputs(path, recorded, inputs, changed)
    return str(path)


def is_complete(export: Path, inputs: dict[str, Any]) -> bool:
    """Whether an export is what these inputs would train. Not if they train longer: more steps, another EarlyStopping.

    Raises:
        FileError: if the export came from other inputs; names them.
    """
    if not (export / "config.json").is_file():
        return False
    training = read_json(export / "config.json").get("training", {})
    recorded = training.get("inputs", {})
    changed = {key for key in {*recorded, *inputs} if recorded.get(key) != inputs.get(key)}
    lengths = [(recorded.get(key) or 0, inputs.get(key) or 0) for key in ("trainer.max_steps", "trainer.max_epochs")]
    longer = any(0 < old < new for old, new in lengths) or (changed == {_STOPS} and "stopped_by" in training)
    if wrong := changed & _FIXED.keys() if longer else changed - {_STOPS}:
        raise _other_inputs(export, recorded, inputs, wrong)
    return not longer


def _other_inputs(path: Path, recorded: dict[str, Any], inputs: dict[str, Any], changed: set[str]) -> FileError:
    shown = [f"{_FIXED.get(k, k)}: {recorded.get(k)} there, {inputs.get(k)} now" for k in sorted(changed)]
    return FileError(
        f"{path} was trained from other inputs. {'; '.join(shown)}. Give another --run, or remove that stage", path
    )


def training_inputs(config: Namespace, init_from: str | None) -> dict[str, Any]:
    """The inputs of a training with these settings, from this exported model, as plain values by dotted name.

    `init_from` is a checksum of that model's weights, `data` of names, sizes and first bytes of the shards.
    """
    weights, callbacks = Path(init_from or "") / "model.safetensors", config.trainer.callbacks
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    stops = [each for each in callbacks if getattr(each, "class_path", "").endswith(".EarlyStopping")]
    settings, early_stopping = json.loads(json.dumps([config, stops], default=_plain))
    return {
        **{name: _content(name, value) for name, value in flat(settings).items() if _INPUTS.match(name)},
        _STOPS: early_stopping,
        "init_from": sha256(weights)[:16] if init_from and weights.is_file() else None,
        "data": _data_digest(config.data.train),
    }


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else str(value)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted name; an empty mapping is a value."""
    parts = (flat(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v} for k, v in values.items())
    return {name: value for part in parts for name, value in part.items()}


def _content(name: str, value: Any) -> Any:
    """A setting; for a file or folder of the model a checksum: a moved one is the same input."""
    if not _MAYBE_FILES.match(name) or not isinstance(value, str):
        return value
    path = Path(value)
    files = [path] if path.is_file() else [file for file in sorted(path.glob("*")) if file.is_file()]
    return _digest([(file.name if file != path else "", sha256(file)) for file in files]) if files else value


def _data_digest(train: Any) -> str | None:
    """Checksum of the shards; None of a spec that the data module will refuse."""
    if isinstance(train, dict):
        train = {name: Shards(**vars(spec)) if isinstance(spec, Namespace) else spec for name, spec in train.items()}
    try:
        with ThreadPoolExecutor(16) as readers:
            sources = mixture(train).items()
            return _digest([(n, each.weight, list(readers.map(_shard, expand(each.shards)))) for n, each in sources])
    except (OSError, ValueError):
        return None


def _shard(shard: str) -> tuple[str, int, str]:
    """Name, size, and a checksum of the first bytes: tars that were rewritten often have the same size."""
    if is_remote(shard):
        return shard, 0, ""
    with open(shard, "rb") as file:
        return Path(shard).name, os.fstat(file.fileno()).st_size, hashlib.sha256(file.read(2**16)).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]

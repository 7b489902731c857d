"""What a stage's folder holds, and what may resume it.

RUN/stage1/checkpoints/last.ckpt, best.ckpt   the paths follow from the folder alone
RUN/stage1/config.yaml                        the settings that trained what lies here
RUN/stage1/stair                              the exported model
RUN/stage1/lock                               of the job that trains here now (run_lock.py)

Checkpoints and exported models record the inputs of their training: the model it starts from, the data, and the settings
that determine the weights. So a later command can tell whether they are what it would train.
"""

import hashlib
import json
import os
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.fabric.plugins import TorchCheckpointIO

from stair.data.remote import is_remote
from stair.data.specs import Shards, mixture
from stair.data.tars import expand
from stair.errors import FileError
from stair.files import atomic_write, read_json, sha256

# bytes from which a file shows that a training has been here; an event file without a figure has 88
_TRACES = {"*.ckpt": 0, "config.yaml": 0, "metrics.csv": 1, "events.out.tfevents.*": 129}
# settings that change how fast, where or how often, not what is trained
_FREE = {"micro_batch_size", "recompute", "compile"}
_FREE_DATA = {
    *("train", "val", "test", "vocabulary", "image_size", "max_tokens"),
    *("eval_batch_size", "workers", "max_bad_share", "remote"),
}
_TRAINER = {
    *("max_steps", "max_epochs", "limit_train_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
}
_STOPS = "trainer.callbacks"  # of it, EarlyStopping
#: what no resumed run can change: name in the record, and the setting it follows from
_FIXED = {"init_from": "transition.init_from", "data": "data.train"}
_FILES = ("vocabulary", "name", "checkpoint_path")  # settings of a model that may be paths


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes local checkpoints completely or not at all.

    Lightning moves them from the system's temporary folder. If that is another file system, a kill meanwhile leaves neither
    the old nor the new one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replaces a checkpoint, or leaves it as it is.

        Raises:
            OSError: if the disk is full, with the path and the free bytes.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)


def write_atomically(trainer: Trainer) -> None:
    """Has a trainer write its checkpoints so, unless its strategy or the user has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpoints()


def save_last(trainer: Trainer) -> Path:
    """Saves the state as `last.ckpt`, between two batches, on all ranks together. Returns its path."""
    path = checkpoint_folder(trainer.default_root_dir) / "last.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return path


def checkpoint_folder(home: str | Path) -> Path:
    """The folder of `last.ckpt` and `best.ckpt` in a stage's folder."""
    return Path(home) / "checkpoints"


def checkpoint_path(home: str | Path, name: str) -> Path:
    """The path of `last.ckpt` or `best.ckpt` (`name` without its suffix) in a stage's folder. It may not exist.

    Raises:
        FileError: if it is damaged.
    """
    path = checkpoint_folder(home) / f"{name}.ckpt"
    if path.is_file() and not zipfile.is_zipfile(path):
        raise FileError(
            f"{path} is damaged: it is no complete checkpoint ({path.stat().st_size} bytes). Give --ckpt_path with "
            "another checkpoint of this folder, or begin anew with another --run",
            path,
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's plain values; its tensors stay on disk.

    Raises:
        FileError: if it is damaged.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise FileError(f"{path} is damaged, or is no checkpoint of a training: {error}", path) from error
    return content


def check_leftover(home: Path) -> None:
    """Refuses a checkpoint of Lightning's own requeueing: under SLURM, Lightning would load it unasked.

    Raises:
        FileError: naming the checkpoint.
    """
    if left := sorted(home.glob("hpc_ckpt_*.ckpt")):
        raise FileError(
            f"{left[-1]} is left over from Lightning's own requeueing, which is not used here. Lightning would load it. "
            "Remove it, or give it as --ckpt_path",
            left[-1],
        )


def _traces(home: Path, export: Path) -> list[Path]:
    """What shows that a training has been here: export, checkpoints of any name, settings, curves."""
    evaluations = {home / name for name in ("validate", "test", "predict")}
    traces = [
        path
        for pattern, size in _TRACES.items()
        for path in sorted(home.rglob(pattern) if pattern != "config.yaml" else home.glob(pattern))
        if path.stat().st_size >= size and evaluations.isdisjoint(path.parents)
    ]
    return [*([export] if export.exists() else []), *traces]


def _is_untrained(home: Path, export: Path) -> bool:
    """Whether a start in this folder saved nothing but its step 0, as after an out-of-memory error in the first step."""
    last = checkpoint_path(home, "last")
    saved = [path for path in _traces(home, export) if path.suffix == ".ckpt" or path == export]
    return saved == [last] and read_checkpoint(last).get("global_step") == 0


def checkpoint_to_resume(given: str | None, home: Path, export: Path, inputs: dict[str, Any]) -> str | None:
    """The checkpoint that `fit` resumes from; None begins anew, where the folder holds no trained step.

    Args:
        given: `ckpt_path`.
        home: the stage's folder.
        export: the stage's exported model.
        inputs: of the training.

    Raises:
        FileError: if the checkpoint is missing or damaged, the training would replace another one, or it cannot be resumed
            with these inputs; names the inputs that differ.
    """
    if given is None:
        check_leftover(home)
    remote = given is not None and is_remote(given)
    path = None if given is None or remote else Path(given)
    if given in ("last", "best"):
        path = checkpoint_path(home, given)
    present = path is not None and path.exists()
    if path is not None and not present and given != "last":
        raise FileError(f"--ckpt_path {given}: there is no {path}", path)
    inside = path is not None and present and home.resolve() in path.resolve().parents
    if not inside and (traces := _traces(home, export)) and not _is_untrained(home, export):
        missing = "" if path is None or present else f", and there is no {path}"
        raise FileError(
            f"{traces[0]} is of an earlier training, which this one would replace{missing}. To resume that: --ckpt_path "
            f"{'FILE' if missing else 'last'} (of that folder). To train anew: another --run, or remove {home}",
            traces[0],
        )
    if path is None or not present:
        return given if remote else None
    state = read_checkpoint(path)
    recorded = state.get("callbacks", {}).get("StageTransition", {}).get("inputs", {})
    # without a step left nothing is trained with settings that are new. Else only _FIXED cannot change
    done = 0 < (inputs["trainer.max_steps"] or 0) <= state.get("global_step", 0)
    bound = {key for key in recorded if key in _FIXED or (done and key != _STOPS)}
    if changed := {key for key in bound if recorded[key] != inputs.get(key)}:
        if _is_untrained(home, export):
            return None
        raise _other_inputs(path, recorded, inputs, changed)
    return str(path)


def is_complete(export: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished export is what these inputs would train.

    Returns:
        False also where there is no export, or where the training is to be longer than the export's: of more steps, or
        with another EarlyStopping than that which ended it.

    Raises:
        FileError: if the export came from other inputs; names them.
    """
    if not (export / "config.json").is_file():
        return False
    training = read_json(export / "config.json").get("training", {})
    recorded, absent = training.get("inputs", {}), object()
    changed = {key for key in {*recorded, *inputs} if recorded.get(key, absent) != inputs.get(key, absent)}
    if changed <= {_STOPS}:
        return not changed or "stopped_by" not in training
    lengths = [(recorded.get(key), inputs.get(key)) for key in ("trainer.max_steps", "trainer.max_epochs")]
    longer = any(isinstance(old, int) and isinstance(new, int) and 0 < old < new for old, new in lengths)
    if changed & _FIXED.keys() or not longer:
        raise _other_inputs(export, recorded, inputs, changed)
    return False


def _other_inputs(path: Path, recorded: dict[str, Any], inputs: dict[str, Any], changed: set[str]) -> FileError:
    def short(value: Any) -> str:
        return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)

    names = sorted(changed)
    shown = [f"{_FIXED.get(k, k)}: {short(recorded.get(k))} there, {short(inputs.get(k))} now" for k in names[:5]]
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    return FileError(
        f"{path} was trained from other inputs. {'; '.join(shown)}{more}. Give another --run, or remove that stage",
        path,
    )


def training_inputs(config: Namespace, init_from: str | None) -> dict[str, Any]:
    """The inputs of a training, as plain values by dotted name.

    Args:
        config: settings of `fit`.
        init_from: folder of the exported model that the stage starts from.

    Returns:
        `init_from`: checksum of that model's weights; `data`: checksum of names, sizes and first bytes of the shards;
        settings.
    """
    weights = Path(init_from or "") / "model.safetensors"
    trainer, data, model = config.trainer, vars(config.data), vars(config.model.init_args)
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
    stops = [each for each in callbacks if getattr(each, "class_path", "").endswith(".EarlyStopping")]
    settings = {
        "seed_everything": config.seed_everything,
        "trainer": {key: trainer[key] for key in _TRAINER} | {"callbacks": stops},
        "data": {key: data[key] for key in data.keys() - _FREE_DATA},
        "model": {
            "class_path": config.model.class_path,
            "init_args": {key: model[key] for key in model.keys() - _FREE},
        },
    }
    plain = json.dumps(settings, default=lambda value: value.as_dict() if isinstance(value, Namespace) else str(value))
    return {
        **_flat(json.loads(plain), ""),
        "init_from": sha256(weights) if init_from and weights.is_file() else None,
        "data": _data_digest(config.data.train),
    }


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(inner, f"{name}.{key}" if name else key) for key, inner in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}
    if name.startswith("model.init_args.stair") and name.split(".")[-1] in _FILES and isinstance(value, str):
        path = Path(value)  # a checksum in its place: a moved file is the same input
        files = {"": path} if path.is_file() else {file.name: file for file in sorted(path.glob("*")) if file.is_file()}
        value = _digest([(key, sha256(file)) for key, file in files.items()]) if files else value
    return {name: value}


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
    """Name, size, and a checksum of the first bytes: tars that were written anew often have the same size."""
    if is_remote(shard):
        return shard, 0, ""
    with open(shard, "rb") as file:
        return Path(shard).name, os.fstat(file.fileno()).st_size, hashlib.sha256(file.read(2**16)).hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

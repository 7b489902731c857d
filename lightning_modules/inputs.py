"""What a stage's weights follow from: the model it starts from, the data, and the settings that determine training.

A checkpoint and an exported model record it, so that a later command can tell whether they are still what it would train.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_modules.run_folder import is_untrained, read_checkpoint, resume_path
from stair.data.remote import is_remote
from stair.data.specs import Shards, mixture
from stair.data.tars import expand
from stair.errors import FileError
from stair.files import read_json, sha256

#: settings that change how fast, where or how often, not what is trained
_FREE = ("micro_batch_size", "recompute", "compile")
_FREE_DATA = (
    *("train", "val", "test", "vocabulary", "image_size", "max_tokens"),
    *("eval_batch_size", "workers", "max_bad_share", "remote"),
)
_TRAINER = (
    *("max_steps", "max_epochs", "limit_train_batches"),
    *("precision", "gradient_clip_val", "gradient_clip_algorithm"),
)
_STOPS = "trainer.callbacks"  # of it, EarlyStopping
_LENGTH = ("trainer.max_steps", "trainer.max_epochs")
#: what no resumed run can change: name in the record, and the setting it follows from
_FIXED = {"init_from": "transition.init_from", "data": "data.train"}
_HEAD = 2**16  # bytes
_FILES = ("vocabulary", "name", "checkpoint_path")  # settings of a model that may be paths


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
    trainer, data, model = config.trainer, config.data, config.model
    settings = {
        "seed_everything": config.seed_everything,
        "trainer": {key: trainer[key] for key in _TRAINER} | {"callbacks": _early_stopping(trainer.callbacks)},
        "data": {key: value for key, value in vars(data).items() if key not in _FREE_DATA},
        "model": {
            "class_path": model.class_path,
            "init_args": {key: value for key, value in vars(model.init_args).items() if key not in _FREE},
        },
    }
    return {
        "init_from": sha256(weights) if init_from and weights.is_file() else None,
        "data": _data(data.train),
        **_flat(json.loads(json.dumps(settings, default=_plain))),
    }


def _early_stopping(callbacks: Any) -> list[Any]:
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return [each for each in listed if getattr(each, "class_path", "").endswith(".EarlyStopping")]


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else str(value)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = [_flat(content, f"{name}.{part}" if name else part) for part, content in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}
    if name.startswith("model.init_args.stair") and name.split(".")[-1] in _FILES and isinstance(value, str):
        value = _content(Path(value)) or value
    return {name: value}


def _content(path: Path) -> str | None:
    """A checksum in place of a path: a moved file is the same input."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    return _digest([(file.name, sha256(file)) for file in files]) if files else None


def _data(train: Any) -> str | None:
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
        head = hashlib.sha256(file.read(_HEAD)).hexdigest()
        return Path(shard).name, os.fstat(file.fileno()).st_size, head


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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
    recorded = training.get("inputs", {})
    changed = _changed(recorded, inputs)
    if changed <= {_STOPS}:
        return not changed or "stopped_by" not in training
    if not changed & _FIXED.keys() and any(_longer(recorded.get(key), inputs[key]) for key in _LENGTH):
        return False
    raise _other_inputs(export, recorded, inputs, sorted(changed))


def checkpoint_to_resume(given: str | None, home: Path, export: Path, inputs: dict[str, Any]) -> str | None:
    """The checkpoint that `fit` resumes from; None begins anew.

    Args:
        given: `ckpt_path`.
        home: the stage's folder.
        export: the stage's exported model.
        inputs: of the training.

    Raises:
        FileError: if the folder holds a training that cannot be resumed so; names the inputs that differ.
    """
    remote = given is not None and is_remote(given)
    path = resume_path(None if remote else given, home, export)
    if path is None:
        return given if remote else None
    state = read_checkpoint(path)
    recorded = state.get("callbacks", {}).get("StageTransition", {}).get("inputs", {})
    # without a step left nothing is trained with settings that are new. Else only _FIXED cannot change
    done = 0 < (inputs["trainer.max_steps"] or 0) <= state.get("global_step", 0)
    if changed := sorted(
        key for key in recorded if recorded[key] != inputs.get(key) and ((done and key != _STOPS) or key in _FIXED)
    ):
        if is_untrained(home, export):
            return None
        raise _other_inputs(path, recorded, inputs, changed)
    return str(path)


def _changed(recorded: dict[str, Any], inputs: dict[str, Any]) -> set[str]:
    absent = object()
    return {key for key in recorded.keys() | inputs.keys() if recorded.get(key, absent) != inputs.get(key, absent)}


def _longer(before: Any, now: Any) -> bool:
    return isinstance(before, int) and isinstance(now, int) and 0 < before < now


def _other_inputs(path: Path, recorded: dict[str, Any], inputs: dict[str, Any], changed: list[str]) -> FileError:
    shown = [f"{_FIXED.get(k, k)}: {_short(recorded.get(k))} there, {_short(inputs.get(k))} now" for k in changed[:5]]
    listed, more = "; ".join(shown), f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return FileError(
        f"{path} was trained from other inputs. {listed}{more}. To train again: another --run, or remove that stage",
        path,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text

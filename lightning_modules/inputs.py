"""What a stage's weights follow from: the model it starts from, the data, and the settings that determine training.

A checkpoint and an exported model record it, so that a later command can tell whether they are still what it would train.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lightning_modules.run_folder import check_untouched, existing_checkpoint, read_checkpoint, resume_path
from stair.data.remote import is_remote
from stair.data.specs import Shards, mixture
from stair.data.tars import expand
from stair.errors import FileError
from stair.files import read_json, sha256

#: settings that change how fast, where or how often, not what is trained
_FREE = ("micro_batch_size", "recompute", "compile")
_FREE_DATA = ("train", "val", "test", "vocabulary", "image_size", "max_tokens", "eval_batch_size", "workers", "remote")
_TRAINER = (
    "max_steps",
    "max_epochs",
    "precision",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
_LENGTH = ("trainer.max_steps", "trainer.max_epochs")
#: what no resumed run can change: name in the record, and the setting it follows from
_FIXED = {"init_from": "transition.start_from", "data": "data.train"}
_FILES = ("vocabulary", "name", "checkpoint_path")  # settings of a model that may be paths


def training_inputs(config: Namespace, init_from: str | None) -> dict[str, Any]:
    """The inputs of a training, as plain values by dotted name.

    Args:
        config: settings of `fit`.
        init_from: folder of the exported model that the stage starts from.

    Returns:
        `init_from`: checksum of that model's weights; `data`: checksum of names and sizes of the shards; settings.
    """
    weights = Path(init_from or "") / "model.safetensors"
    trainer, data, model = config.trainer, config.data, config.model
    settings = {
        "seed_everything": config.seed_everything,
        "trainer": {key: trainer[key] for key in _TRAINER},
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


def _plain(value: Any) -> Any:
    return value.as_dict() if isinstance(value, Namespace) else str(value)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            key: inner
            for part, content in value.items()
            for key, inner in _flat(content, f"{name}.{part}" if name else part).items()
        }
    if name.startswith("model.init_args.stair") and name.split(".")[-1] in _FILES and isinstance(value, str):
        value = _content(Path(value)) or value
    return {name: value}


def _content(path: Path) -> str | None:
    """A checksum in place of a path: a moved file is the same input."""
    if path.is_file():
        return sha256(path)
    files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    return _digest([(file.name, file.stat().st_size) for file in files]) if files else None


def _data(train: Any) -> str | None:
    """Checksum of the shards; None of a spec that the data module will refuse."""
    if isinstance(train, dict):
        train = {name: Shards(**vars(spec)) if isinstance(spec, Namespace) else spec for name, spec in train.items()}
    try:
        return _digest(
            [
                (name, source.weight, source.samples, [_shard(shard) for shard in expand(source.shards)])
                for name, source in mixture(train).items()
            ]
        )
    except (OSError, ValueError):
        return None


def _shard(shard: str) -> tuple[str, int]:
    return (shard, 0) if is_remote(shard) else (Path(shard).name, Path(shard).stat().st_size)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def is_complete(export: Path, inputs: dict[str, Any]) -> bool:
    """Whether a finished export is what these inputs would train.

    Returns:
        False also where there is no export, or where the training is to be longer than the export's.

    Raises:
        FileError: if the export came from other inputs; names them.
    """
    if not (export / "config.json").is_file():
        return False
    recorded = read_json(export / "config.json").get("training", {}).get("inputs", {})
    changed = _changed(recorded, inputs)
    if not changed:
        return True
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
        FileError: if the folder holds a training that cannot be resumed so.
    """
    if given is None:
        check_untouched(home, export)
    if given not in ("last", "best"):
        return given
    path = resume_path(home, export) if given == "last" else existing_checkpoint(home, given)
    if path is None:
        return None
    _check_resumes(path, read_checkpoint(path)["callbacks"].get("StageTransition", {}).get("inputs", {}), inputs)
    return str(path)


def _check_resumes(path: Path, recorded: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Refuses a checkpoint that started from another model, or was trained on other data. Settings may change.

    Raises:
        FileError: naming what differs.
    """
    if changed := sorted(key for key in _FIXED.keys() & recorded.keys() if recorded[key] != inputs[key]):
        raise _other_inputs(path, recorded, inputs, changed)


def _changed(recorded: dict[str, Any], inputs: dict[str, Any]) -> set[str]:
    absent = object()
    return {key for key in recorded.keys() | inputs.keys() if recorded.get(key, absent) != inputs.get(key, absent)}


def _longer(before: Any, now: Any) -> bool:
    return isinstance(before, int) and isinstance(now, int) and 0 < before < now


def _other_inputs(path: Path, recorded: dict[str, Any], inputs: dict[str, Any], changed: list[str]) -> FileError:
    listed = "; ".join(
        f"{_FIXED.get(key, key)}: {_short(recorded.get(key))} there, {_short(inputs.get(key))} now"
        for key in changed[:5]
    )
    more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
    return FileError(
        f"{path} was trained from other inputs. {listed}{more}. To train again: another --run, or remove that stage",
        path,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text

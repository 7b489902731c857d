"""The folder of one stage: where its checkpoints are, whether it holds a training, and who is training in it.

RUN/stage1/checkpoints/last.ckpt, best.ckpt   follow from the folder alone, whatever loggers and callbacks there are
RUN/stage1/config.yaml                        the settings that trained what lies here
RUN/stage1/stair                              the exported model
RUN/stage1/lock                               of the job that trains here now
"""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch

from stair.errors import FileError

_EVENTS_HEADER = 128  # bytes: an event file of TensorBoard in which nothing is logged is shorter
_EVALUATIONS = ("validate", "test", "predict")


def checkpoints(home: str | Path) -> Path:
    """The folder of `last.ckpt` and `best.ckpt`."""
    return Path(home) / "checkpoints"


def checkpoint(home: str | Path, which: str) -> Path:
    """`last.ckpt` or `best.ckpt` of a stage's folder.

    Args:
        home: the stage's folder.
        which: `last` or `best`.

    Raises:
        FileError: if it is damaged. It may not exist.
    """
    path = checkpoints(home) / f"{which}.ckpt"
    if path.is_file() and not zipfile.is_zipfile(path):
        raise FileError(
            f"{path} is damaged: it is no complete checkpoint ({path.stat().st_size} bytes). Give --ckpt_path with "
            "another checkpoint of this folder, or begin anew with another --run",
            path,
        )
    return path


def traces(home: str | Path, export: str | Path) -> list[Path]:
    """What shows that a training has been here: export, checkpoints of any name, settings, curves."""
    home, export = Path(home), Path(export)
    below = [path for path in sorted(home.rglob("*")) if path.relative_to(home).parts[0] not in _EVALUATIONS]
    patterns = {
        "*.ckpt": lambda path: True,
        "config.yaml": lambda path: path.parent == home,
        "metrics.csv": lambda path: path.stat().st_size > 0,
        "events.out.tfevents.*": lambda path: path.stat().st_size > _EVENTS_HEADER,
    }
    left = [path for pattern, counts in patterns.items() for path in below if path.match(pattern) and counts(path)]
    return [*([export] if export.exists() else []), *left]


def is_untrained(home: str | Path, export: str | Path) -> bool:
    """Whether a start in this folder saved nothing but its step 0, as after an out-of-memory error in the first step."""
    last = checkpoint(home, "last")
    saved = [path for path in traces(home, export) if path.suffix == ".ckpt" or path == Path(export)]
    return saved == [last] and read_checkpoint(last).get("global_step") == 0


def resume_path(given: str | None, home: Path, export: Path) -> Path | None:
    """The checkpoint that `fit` resumes from. None begins anew, where the folder holds no trained step.

    Args:
        given: `ckpt_path`.
        home: the stage's folder.
        export: the stage's exported model.

    Raises:
        FileError: if the checkpoint is missing or damaged, or the training would replace another one.
    """
    if given is None:
        check_leftover(home)
    path = checkpoint(home, given) if given in ("last", "best") else Path(given) if given else None
    present = path is not None and path.exists()
    if path is not None and not present and given != "last":
        raise FileError(f"--ckpt_path {given}: there is no {path}", path)
    inside = path is not None and present and home.resolve() in path.resolve().parents
    if not inside and (left := traces(home, export)) and not is_untrained(home, export):
        missing, how = ("", "last") if path is None or present else (f", and there is no {path}", "FILE")
        raise FileError(
            f"{left[0]} is of an earlier training, which this one would replace{missing}. To resume that: --ckpt_path "
            f"{how} (a checkpoint of that folder). To train anew: another --run, or remove {home}",
            left[0],
        )
    return path if present else None


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


def existing_checkpoint(home: Path, which: str) -> Path:
    """`last.ckpt` or `best.ckpt`, for a command that needs it.

    Raises:
        FileError: if there is none, or it is damaged.
    """
    path = checkpoint(home, which)
    if not path.exists():
        raise FileError(f"--ckpt_path {which}: there is no {path}. Give the run's folder with --run, or a file", path)
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


def save_last(trainer: L.Trainer) -> Path:
    """Saves the state as `last.ckpt`, between two batches, on all ranks together. Returns its place."""
    target = checkpoints(trainer.default_root_dir) / "last.ckpt"
    trainer.save_checkpoint(target, weights_only=False)
    return target

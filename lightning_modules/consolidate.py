"""`stair consolidate`: of a checkpoint, whole or in parts, one file that any strategy resumes from, or a model to use."""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lightning_modules.parallel import found, numbered, rebuilt, refuse_code
from stair.clip import DenseClip
from stair.files import atomic_write
from stair.model import Stair

_KINDS = {kind.family: kind for kind in (Stair, DenseClip)}
_REST = "meta.pt"  # what Lightning keeps beside the parts


def consolidate(checkpoint: str, out: str) -> None:
    """Makes one file, or a model to use, of a checkpoint.

    A model made so says that its stage is not finished, and no stage starts from it.

    Args:
        checkpoint: a checkpoint of training: the folder that `fsdp2` with `sharded_checkpoints` writes, or a file.
        out: what to write. `NAME.ckpt` is a file for `--ckpt_path`, any other name a folder for `from_pretrained`.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it is none of ours, or `out` exists.
    """
    source, target = found(Path(checkpoint)), Path(out)
    if target.exists():
        raise ValueError(f"{target} exists; give another name, or remove it")
    content = _read(source)
    if "towers" not in content:
        raise ValueError(f"{source} does not say which model it holds: it was written by no run of this version")
    if target.suffix == ".ckpt":
        with atomic_write(target) as part:
            torch.save(content, part)
    else:
        _write_model(content, target)
    print(f"{target}: step {content['global_step']} of {source}")


def _read(source: Path) -> dict[str, Any]:
    """A checkpoint as a single process would have written it."""
    if source.is_file():
        try:
            return dict(torch.load(source, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{source} is damaged, or no checkpoint of plain weights: {error}") from error
    if not (source / _REST).is_file():
        raise FileNotFoundError(f"{source} is no checkpoint: neither a file nor a folder with {_REST}")
    refuse_code(source)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(source, whole)
        parts = torch.load(whole, map_location="cpu", weights_only=True)
    rest = torch.load(source / _REST, map_location="cpu", weights_only=True)
    states = [parts[name] for name in sorted(parts) if name.startswith("optimizer_")]
    return {**rest, "state_dict": parts["state_dict"], "optimizer_states": [numbered(state) for state in states]}


def _write_model(content: dict[str, Any], target: Path) -> None:
    described = content["towers"]
    kind = _KINDS[described["family"]]
    first = f"{described['family']}."
    weights = {name.removeprefix(first): w for name, w in content["state_dict"].items() if name.startswith(first)}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(described["words"]) + "\n", encoding="utf-8")
        model = rebuilt(kind, described["model"], str(vocabulary), weights)
        facts = {"stage": described["stage"], "steps": content["global_step"], "finished": False}
        model.save_pretrained(target, facts)

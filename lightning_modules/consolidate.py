"""`stair consolidate`: a model to use, of a training's checkpoint."""

import tempfile
from pathlib import Path
from typing import Any

from lightning_modules.parallel import rebuilt
from lightning_modules.run_folder import read_checkpoint
from stair.clip import DenseClip
from stair.errors import FileError
from stair.files import write_text
from stair.model import Stair

_KINDS = {kind.family: kind for kind in (Stair, DenseClip)}


def consolidate(checkpoint: str, out: str) -> None:
    """Writes the model of a checkpoint as a folder for `from_pretrained`.

    The folder states that its stage is not finished, and no stage starts from it.

    Args:
        checkpoint: a checkpoint file of a training.
        out: folder to write, which must not exist.

    Raises:
        FileError: if `checkpoint` is missing, damaged or of another program, or `out` exists.
    """
    source, target = Path(checkpoint), Path(out)
    if target.exists():
        raise FileError(f"{target} exists; give another name, or remove it", target)
    if not source.is_file():
        raise FileError(f"{source}: there is no such checkpoint file", source)
    content: dict[str, Any] = read_checkpoint(source)
    if "towers" not in content:
        raise FileError(
            f"{source} does not state which model it holds: it was written by no run of this version", source
        )
    described = content["towers"]
    prefix = f"{described['family']}."
    weights = {name.removeprefix(prefix): w for name, w in content["state_dict"].items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        write_text(vocabulary, "\n".join(described["words"]) + "\n")
        model = rebuilt(_KINDS[described["family"]], described["model"], str(vocabulary), weights)
        facts = {"stage": described["stage"], "steps": content["global_step"], "finished": False}
        model.save_pretrained(target, facts)
    print(f"{target}: step {content['global_step']} of {source}")

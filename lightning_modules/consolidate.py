"""`stair consolidate`: a model to use, from a training's checkpoint."""

import tempfile
from pathlib import Path

from lightning_modules.parallel import rebuilt
from lightning_modules.run_folder import read_checkpoint
from stair.clip import DenseClip
from stair.errors import FileError
from stair.files import write_text
from stair.model import Stair

_FAMILIES = {family.family: family for family in (Stair, DenseClip)}


def consolidate(checkpoint: str, out: str) -> None:
    """Writes the model of a checkpoint as a folder for `from_pretrained`. A stage cannot start from this folder.

    Args:
        checkpoint: a checkpoint file of a training run.
        out: folder to write, which must not exist.

    Raises:
        FileError: if `checkpoint` is missing, damaged or of another program, or `out` exists.
    """
    source, target = Path(checkpoint), Path(out)
    if target.exists():
        raise FileError(f"{target} exists; give another name, or remove it", target)
    content = read_checkpoint(source)
    if "towers" not in content:
        raise FileError(f"{source} does not state which model it holds: it was not written by a run of STAIR", source)
    towers, prefix = content["towers"], f"{content['towers']['family']}."
    weights = {name.removeprefix(prefix): w for name, w in content["state_dict"].items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "vocab.txt", "\n".join(towers["tokens"]) + "\n")
        model = rebuilt(_FAMILIES[towers["family"]], towers["model"], folder, weights)
        model.save_pretrained(target, {"stage": towers["stage"], "steps": content["global_step"], "finished": False})
    print(f"{target}: step {content['global_step']} of {source}")

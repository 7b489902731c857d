"""Checkpoints that are whole or absent: written beside their place, waited for, renamed.

Lightning writes a checkpoint into the system's folder for temporary files and moves it from there. Where that is another
file system, as on most clusters, moving is copying over the old checkpoint: a kill meanwhile leaves neither.
"""

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_modules.parallel import put
from stair.files import removed_on_failure

_FRESH = ".fresh.ckpt"  # not "last...": Lightning would resume from it


class WholeFiles(TorchCheckpointIO):
    """Writes local checkpoints; those elsewhere (`s3://`, ...) go Lightning's way."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Replaces a checkpoint, or leaves it as it is.

        Raises:
            OSError: if there is no room, naming the path and what is free.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(_FRESH)
        with removed_on_failure(target, fresh), fresh.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        put(fresh, target)


def keep_whole(trainer: L.Trainer) -> None:
    """Has a trainer write its checkpoints so, unless its strategy or the user has a way of its own."""
    if type(getattr(trainer.strategy, "_checkpoint_io", None)) in (type(None), TorchCheckpointIO):
        trainer.strategy._checkpoint_io = WholeFiles()

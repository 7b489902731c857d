"""Checkpoints that are complete or absent: written beside their place, synchronised, renamed.

Lightning writes a checkpoint into the system's folder for temporary files and moves it from there. Where that is another
file system, as on most clusters, moving is copying over the old checkpoint: a kill meanwhile leaves neither.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from stair.files import atomic_write


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
        with atomic_write(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)


def keep_whole(trainer: L.Trainer) -> None:
    """Has a trainer write its checkpoints so, unless its strategy or the user has a way of its own."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeFiles()

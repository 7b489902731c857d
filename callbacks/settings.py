"""The file that states the settings of a command, in the stage's folder."""

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser


class SaveSettings(L.Callback):
    """Saves the settings in the stage's folder.

    Those of a training are `config.yaml`, those of validate `validate/validate.yaml`, and so on. `config.yaml` states what
    trained the checkpoints beside it: it is written with them, and a command that trains nothing leaves it as it is.

    Args:
        parser: of the command.
        config: the settings, without what follows from them.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        self.parser, self.config = parser, config

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Saves the settings of a command that does not train."""
        if stage != "fit":
            command = trainer.state.fn.value
            self._save(trainer, Path(command, f"{command}.yaml"))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saves the settings of a training."""
        if trainer.training or trainer.validating:
            self._save(trainer, Path("config.yaml"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the settings of a training that keeps no checkpoints."""
        self._save(trainer, Path("config.yaml"))

    def _save(self, trainer: L.Trainer, name: Path) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=False)

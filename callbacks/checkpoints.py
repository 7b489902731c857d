"""What a training writes into its stage's folder: `last.ckpt`, `best.ckpt`, and the settings. Always on."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from callbacks.lightning_private import validation_seconds
from lightning_modules.run_folder import checkpoint_path, read_checkpoint, save_last
from stair.errors import SettingError


class _FixedCheckpoint(ModelCheckpoint):
    """A ModelCheckpoint in the stage's folder, of one name, whatever loggers and other callbacks there are."""

    @property
    def state_key(self) -> str:
        """The same whatever the settings and paths."""
        return type(self).__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the folder from the trainer; SettingError if another callback has the same folder and name."""
        self.dirpath = folder = os.path.realpath(checkpoint_path(trainer.default_root_dir, "last").parent)
        others = (
            each for each in trainer.callbacks if type(each) is ModelCheckpoint and each.filename == self.filename
        )
        if any(os.path.realpath(each.dirpath or ("" if trainer.loggers else folder)) == folder for each in others):
            name = f"a ModelCheckpoint of trainer.callbacks has the folder and name of our {self.filename}.ckpt"
            raise SettingError(f"{name}: leave it out, or give it another dirpath or filename", "trainer.callbacks")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores nothing: paths in a checkpoint may be those of another folder."""


class LastCheckpoint(_FixedCheckpoint):
    """Writes `last.ckpt`, which `--ckpt_path last` resumes from: at step 0, at each validation, and at an early stop.

    Without validations: every `trainer.val_check_interval` steps or seconds, at the end of each epoch if that is a share.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        times: dict[str, Any] = {}
        validates = trainer.limit_val_batches != 0 and bool(getattr(trainer.datamodule, "val_names", True))
        if stage == "fit" and not validates:
            if (seconds := validation_seconds(trainer)) is not None:
                times, when = {"train_time_interval": timedelta(seconds=seconds)}, f"every {seconds:g} s"
            elif isinstance(interval := trainer.val_check_interval, int):  # not there if it is a time
                times, when = {"every_n_train_steps": interval}, f"every {interval} steps"
            else:
                times, when = {"every_n_epochs": 1, "save_on_train_epoch_end": True}, "after each epoch"
            rank_zero_info(
                "no validation (data.val is not given, or trainer.limit_val_batches is 0), so no best.ckpt; "
                f"last.ckpt is written {when}"
            )
        ModelCheckpoint.__init__(self, filename="last", enable_version_counter=False, **times)
        super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and not trainer.fast_dev_run:
            save_last(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.should_stop and not trainer.fast_dev_run:
            save_last(trainer)


class BestCheckpoint(_FixedCheckpoint):
    """Writes `best.ckpt` if the score of a validation is better than that of the existing `best.ckpt`.

    Args:
        monitor: name of the score.
        mode: whether the highest (`max`) or the lowest (`min`) score is best.
    """

    def __init__(self, monitor: str = "val/recall", mode: Literal["max", "min"] = "max") -> None:
        super().__init__(filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the score to beat from the file; SettingError if `best.ckpt` was chosen by another score."""
        super().setup(trainer, pl_module, stage)
        path = checkpoint_path(trainer.default_root_dir, "best")
        if stage != "fit" or not path.exists():
            return
        state = read_checkpoint(path)["callbacks"].get(self.state_key, {})
        if state.get("monitor", self.monitor) != self.monitor:
            different = f"{path} is the best by {state['monitor']}, and best.monitor is {self.monitor}"
            raise SettingError(f"{different}: give the same, or move the file away", "best.monitor")
        score, name = state.get("best_model_score"), self.format_checkpoint_name({})
        if score is not None:
            self.best_model_score = self.kth_value = self.best_k_models[name] = score
            self.best_model_path = self.kth_best_model_path = name


class SaveSettings(Callback):
    """Saves the settings of a training as `config.yaml`, those of validate as `validate/validate.yaml`, and so on.

    `config.yaml` states what trained the checkpoints beside it: it is written with them, or at the end without any.
    `config` are the settings without what follows from them.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        self.parser, self.config = parser, config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._save(trainer, f"{trainer.state.fn.value}/{trainer.state.fn.value}.yaml")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if (trainer.training or trainer.validating) and trainer.global_step > 0:
            self._save(trainer, "config.yaml")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # after the checkpoint of step 0: settings alone would look like a training that lost its checkpoint
        if trainer.global_step == 0 and checkpoint_path(trainer.default_root_dir, "last").exists():
            self._save(trainer, "config.yaml")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "config.yaml")

    def _save(self, trainer: Trainer, name: str) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, str(path), skip_unset=False, overwrite=True, multifile=False)

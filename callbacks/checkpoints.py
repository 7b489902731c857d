"""The two checkpoints of a training, `last.ckpt` and `best.ckpt`. Always on; further ones go into `trainer.callbacks`.

Their place follows from the stage's folder alone (`lightning_modules/run_folder.py`): loggers, other callbacks and the
spelling of the path have no influence.
"""

import os
from datetime import timedelta
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from callbacks.lightning_private import validation_seconds
from lightning_modules.run_folder import checkpoint, checkpoints, read_checkpoint, save_last
from stair.errors import SettingError


class _InPlace(ModelCheckpoint):
    """A ModelCheckpoint in the stage's folder, of one fixed name."""

    @property
    def state_key(self) -> str:
        """The class: neither settings nor paths make it another one."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the folder from the trainer.

        Raises:
            SettingError: if a callback of `trainer.callbacks` has the same folder and name.
        """
        self.dirpath = str(checkpoints(trainer.default_root_dir))
        for other in trainer.callbacks:
            if type(other) is ModelCheckpoint and other.filename == self.filename:
                folder = other.dirpath or ("" if trainer.loggers else self.dirpath)
                if os.path.realpath(folder) == os.path.realpath(self.dirpath):
                    raise SettingError(
                        f"a ModelCheckpoint of trainer.callbacks writes {self.filename}.ckpt into {folder}, where there is "
                        "one already: leave it out, or give it another dirpath or filename",
                        "trainer.callbacks",
                    )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores nothing: a path in a checkpoint may be another spelling of this one, or of another folder."""


class LastCheckpoint(_InPlace):
    """Writes `last.ckpt`, which `--ckpt_path last` resumes from.

    At step 0, at each validation, and where something stops the training. Where nothing is validated: every
    `trainer.val_check_interval` steps, at the end of each epoch if that is a share of an epoch, or at its interval of time.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", enable_version_counter=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes folder and times from the trainer."""
        validates = trainer.limit_val_batches != 0 and bool(getattr(trainer.datamodule, "val_names", True))
        times = {} if stage != "fit" or validates else _times(trainer)
        ModelCheckpoint.__init__(self, filename="last", enable_version_counter=False, **times)
        super().setup(trainer, pl_module, stage)
        if times:
            rank_zero_info(
                "nothing is validated (data.val is not given, or trainer.limit_val_batches is 0), so there is no "
                f"best.ckpt. last.ckpt is written by {', '.join(f'{key}={value}' for key, value in times.items())}"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves the beginning, so that a run that is ended at any later time can be resumed."""
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0 and not trainer.fast_dev_run:
            save_last(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Saves where it is time to, and where a callback or `trainer.max_time` stops the training."""
        super().on_train_batch_end(trainer, pl_module, *args)
        if trainer.should_stop and not trainer.fast_dev_run:
            save_last(trainer)


class BestCheckpoint(_InPlace):
    """Writes `best.ckpt` at the validations whose score is better than that of the `best.ckpt` that is there.

    Args:
        monitor: the score.
        mode: whether the greatest (`max`) or the least (`min`) is best.
    """

    def __init__(self, monitor: str = "val/recall", mode: Literal["max", "min"] = "max") -> None:
        super().__init__(filename="best", monitor=monitor, mode=mode, enable_version_counter=False)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the place from the trainer, and the score to beat from the file.

        Raises:
            SettingError: if `best.ckpt` was chosen by another score.
        """
        super().setup(trainer, pl_module, stage)
        path = checkpoint(trainer.default_root_dir, "best")
        if stage != "fit" or not path.exists():
            return
        state = read_checkpoint(path)["callbacks"].get(self.state_key, {})
        if state.get("monitor", self.monitor) != self.monitor:
            raise SettingError(
                f"{path} is the best by {state['monitor']}, and best.monitor is {self.monitor}: the two do not compare. "
                f"Give --best.monitor {state['monitor']}, or move the file away",
                "best.monitor",
            )
        score, name = state.get("best_model_score"), self.format_checkpoint_name({})
        if score is not None:
            self.best_model_score = self.kth_value = self.best_k_models[name] = score
            self.best_model_path = self.kth_best_model_path = name


def _times(trainer: L.Trainer) -> dict[str, Any]:
    """When to save instead of at validations."""
    if (seconds := validation_seconds(trainer)) is not None:
        return {"train_time_interval": timedelta(seconds=seconds)}
    if isinstance(trainer.val_check_interval, int):
        return {"every_n_train_steps": trainer.val_check_interval}
    return {"every_n_epochs": 1, "save_on_train_epoch_end": True}  # a share of an epoch

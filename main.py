"""The roof: `python main.py fit --config configs/stage1.yaml …`, the same as `stair fit` and `lightning fit`.

Names the families (stages, data, callbacks that are always on) and joins the settings that must agree. Everything else is
Lightning's own command line: `--print_config`, `--help`, overlays by further `--config`.
"""

if __name__ == "__main__":  # before anything is imported that takes time
    from stair.cli import hold_signals

    hold_signals()

import importlib
import os
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from callbacks.health import Health
from callbacks.requeue import Requeue, refuse_leftover
from callbacks.retrieval_panels import RetrievalPanels
from callbacks.run_monitor import RunMonitor
from callbacks.source_monitor import SourceMonitor
from callbacks.sparsity_monitor import SparsityMonitor
from callbacks.stage_transition import StageTransition, stage_before
from callbacks.watchdog import Watchdog
from datamodules.shards import ImageTextShards
from lightning_modules.checkpoints import keep_whole
from lightning_modules.contrastive import ContrastiveModule

# said by the libraries to each other, once a run and rank; nothing a user could act on
for notice in (
    r".*treespec, LeafSpec.*is deprecated",
    r".*It is recommended to use `self.log\(.*sync_dist=True",  # ours are reduced over ranks before they are logged
    r"FSDP2-wrapped module .* returned a view tensor",  # nothing is written into hidden states
    r"Sparse CSR tensor support is in beta",
    r"Found \d+ module\(s\) in eval mode",  # the frozen side of stage 2, meant so
):
    warnings.filterwarnings("ignore", notice)

BASE = Path(__file__).parent / "configs" / "base.yaml"
RECORD = "tensorboard"  # the logger's name in base.yaml: the folder of a training's curves, settings and checkpoints

# when a ModelCheckpoint acts, where it is told to
_TIMES = ("every_n_train_steps", "train_time_interval", "every_n_epochs", "save_on_train_epoch_end")


class StairCLI(LightningCLI):
    """Lightning's command line with the project's callbacks, and `--run`."""

    _checkpoints: str | None = None  # where the training keeps them, for a command that logs elsewhere
    _start_from: str | None = None  # by --run; not in the settings, as saved ones serve other commands too

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the always-on callbacks under keys of their own, the run's name, and the links."""
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="folder of a run. Stage k then works in RUN/stagek and starts from RUN/stage(k-1)/stair; "
            "validate, test and predict load RUN/stagek/stair and log in RUN/stagek/validate, .../test and .../predict. "
            "The dense baseline works in RUN/clip",
        )
        parser.add_lightning_class_args(StageTransition, "transition")
        parser.add_lightning_class_args(SparsityMonitor, "sparsity")
        parser.add_lightning_class_args(RetrievalPanels, "panels")
        parser.add_lightning_class_args(RunMonitor, "monitor")
        parser.add_lightning_class_args(SourceMonitor, "sources")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(Requeue, "requeue")  # last: what it saves holds what the others noted
        parser.link_arguments("model.init_args.stair.vocabulary", "data.vocabulary")
        parser.link_arguments("model.init_args.stair.image.image_size", "data.image_size")
        parser.link_arguments("model.init_args.stair.text.max_tokens", "data.max_tokens")

    def before_instantiate_classes(self) -> None:
        """Spells out `--run`: where the stage works and what it starts from; and what follows from the command."""
        config = self.config[self.subcommand]
        if config.run is not None:
            self._spell_out(config)
        if config.weights_only is None:
            config.weights_only = True  # Lightning would unpickle, and so run, what comes over http
        if self.subcommand != "fit":
            if (self._start_from or config.transition.start_from or config.ckpt_path) is None:
                raise ValueError(
                    f"{self.subcommand} has no model, only weights as they start: give --run RUN, "
                    "--transition.start_from RUN/stage3/stair or --ckpt_path FILE"
                )
            self._set_apart(config)
            return
        if config.ckpt_path is None:
            refuse_leftover(config.trainer.default_root_dir or ".")
        if config.ckpt_path in (None, "last") and not config.trainer.fast_dev_run:
            _refuse_to_replace(config)
        if config.trainer.logger is False:  # it would refuse to run
            config.trainer.callbacks = [
                callback
                for callback in _listed(config.trainer.callbacks or [])
                if not callback.class_path.endswith(".LearningRateMonitor")
            ]
        if not config.data.val or config.trainer.limit_val_batches == 0:
            _save_without_validation(config.trainer)

    def instantiate_trainer(self, **more: Any) -> Trainer:
        """The trainer, whose checkpoints are whole or absent, and looked for where the training keeps them."""
        transition = self._get(self.config_init, "transition")
        transition.start_from = transition.start_from or self._start_from
        trainer = super().instantiate_trainer(**more)
        keep_whole(trainer)
        for keeper in trainer.checkpoint_callbacks:
            if self._checkpoints is not None and isinstance(keeper, ModelCheckpoint) and keeper.dirpath is None:
                keeper.dirpath = self._checkpoints
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Takes no settings from a checkpoint: Lightning would let it name the class that is built."""

    def _spell_out(self, config: Any) -> None:
        family = _family_of(config.model.class_path)
        home = Path(config.run) / family.home()
        config.trainer.default_root_dir = str(home)
        for logger in _listed(config.trainer.logger):
            if hasattr(logger, "init_args") and "save_dir" in logger.init_args:
                logger.init_args.save_dir = str(home)
        if config.transition.start_from is None:
            if self.subcommand == "fit":
                previous = stage_before(family, config.transition.after)
                source = home.with_name(f"stage{previous}") if previous > 0 else None
            else:  # a checkpoint that is named wins over the hand-over
                source = home if getattr(config, "ckpt_path", None) is None else None
            self._start_from = str(source / family.hand_over) if source else None

    def _set_apart(self, config: Any) -> None:
        """Keeps a command that does not train out of the record of the training, whose curves begin at step 0 too."""
        # a name of its own even so: a logger without a folder of its own would have the settings overwritten
        self.save_config_kwargs = {**self.save_config_kwargs, "config_filename": f"{self.subcommand}.yaml"}
        for place, logger in enumerate(_listed(config.trainer.logger)):
            if getattr(logger, "class_path", "").split(".")[-1] not in ("TensorBoardLogger", "CSVLogger"):
                continue  # their names are no folders
            options = logger.init_args
            if options.name != RECORD:
                continue  # the user's choice
            if place == 0:  # Lightning looks for checkpoints where the first logger writes
                version = options.version if isinstance(options.version, str) else f"version_{options.version}"
                self._checkpoints = os.path.join(options.save_dir, RECORD, version, "checkpoints")
            options.name = self.subcommand
        if self._checkpoints is None:
            return
        if config.ckpt_path == "best":  # to Lightning, the best of this process
            config.ckpt_path = os.path.join(self._checkpoints, "best.ckpt")
        if config.ckpt_path == "last" and not any(Path(self._checkpoints).glob("last*.ckpt")):
            # Lightning would measure weights as they start
            raise FileNotFoundError(
                f"--ckpt_path last: no last.ckpt in {self._checkpoints}. Give the run's folder with --run, or a file"
            )


def _refuse_to_replace(config: Any) -> None:
    """Keeps a training that begins anew from writing over one that is there.

    Raises:
        ValueError: naming what it would have replaced.
    """
    home = Path(config.trainer.default_root_dir or ".")
    hand_over = config.transition.hand_over or home / _family_of(config.model.class_path).hand_over
    names = {RECORD, *(each.init_args.get("name") or "." for each in _listed(config.trainer.logger) if _has_args(each))}
    kept = [path for name in sorted(names) for path in sorted((home / name).glob("**/checkpoints/last*.ckpt"))]
    kept += sorted((home / "checkpoints").glob("last*.ckpt"))  # where there is no logger
    finished = [hand_over] if Path(hand_over).exists() else []
    if config.ckpt_path is None and (kept or finished):
        raise ValueError(
            f"{[*kept, *finished][0]} is of an earlier training, which this one would replace. To go on with that: "
            f"--ckpt_path last. To begin anew: another --run, or remove {home}"
        )
    elsewhere = any(_has_args(each) and each.init_args.get("dirpath") for each in _listed(config.trainer.callbacks))
    if finished and not kept and not elsewhere:  # Lightning would begin anew, and hand over again
        raise ValueError(
            f"--ckpt_path last: {hand_over} is finished, and its checkpoints are gone, so there is nothing to go on from. "
            f"To train again: another --run, or remove {home}"
        )


def _has_args(component: Any) -> bool:
    return hasattr(component, "init_args")


def _save_without_validation(trainer: Any) -> None:
    """Has checkpoints written that would wait for validations, and says so: there would never be one."""
    interval = trainer.val_check_interval
    if isinstance(interval, int):
        name, value, said = "every_n_train_steps", interval, f"every {interval} steps (trainer.val_check_interval)"
    elif isinstance(interval, float | None):  # of an epoch
        name, value, said = "save_on_train_epoch_end", True, "at the end of each epoch"
    else:  # of time
        name, value, said = "train_time_interval", timedelta(minutes=15), "every 15 minutes"
    written = []
    for callback in _listed(trainer.callbacks):
        if getattr(callback, "class_path", "").split(".")[-1] != "ModelCheckpoint":
            continue
        options = callback.init_args
        # what monitors has nothing to monitor, what has a time of its own keeps it
        if all(options[key] is None for key in ("monitor", *_TIMES)):
            options[name] = value
            written.append(f"{options.filename}.ckpt" if options.filename else "a checkpoint")
    rank_zero_info(
        "nothing is validated (data.val is not given, or trainer.limit_val_batches is 0), so nothing chooses a best "
        "checkpoint" + (f"; {', '.join(written)} is written {said}" if written else "")
    )


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _family_of(class_path: str) -> type[ContrastiveModule]:
    module, name = class_path.rsplit(".", 1)
    family: type[ContrastiveModule] = getattr(importlib.import_module(module), name)
    return family


def main(args: list[str] | None = None) -> StairCLI:
    """Runs the command line.

    Args:
        args: the words after the command; those of the process if None.
    """
    return StairCLI(
        ContrastiveModule,
        ImageTextShards,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        args=args,
        save_config_kwargs={"overwrite": True},  # else a requeued run is refused its own folder
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "allow_abbrev": False,
            **{word: {"default_config_files": [str(BASE)]} for word in ("fit", "validate", "test", "predict")},
        },
    )


if __name__ == "__main__":
    main()

"""Lightning's command line with this project's callbacks, `--run`, and the checks of a stage's folder.

Of LightningCLI it uses the private methods `_instantiate_trainer`, `_run_subcommand`, `_parse_ckpt_path` (added for
upstream issue 20801) and `_parser`, which have no public equivalent.
"""

import gc
import importlib
import os
import re
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from callbacks.checkpoints import BestCheckpoint, LastCheckpoint, SaveSettings
from callbacks.health import Health
from callbacks.requeue import Requeue
from callbacks.retrieval_panels import RetrievalPanels
from callbacks.run_monitor import RunMonitor
from callbacks.sparsity_monitor import SparsityMonitor
from callbacks.stage_transition import StageTransition, stage_before
from callbacks.watchdog import Watchdog
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.run_folder import (
    checkpoint_path,
    checkpoint_to_resume,
    is_complete,
    read_checkpoint,
    training_inputs,
    write_atomically,
)
from stair.errors import FileError, SettingError, StairError, require
from stair.files import lock
from stair.launch import fail
from training.messages import reworded
from training.settings import (
    check_data,
    expand_paths,
    listed,
    match_launcher,
    place_loggers,
    report_defaults,
    stage_folder,
)

ALWAYS_ON = {
    "transition": StageTransition,
    "sparsity": SparsityMonitor,
    "panels": RetrievalPanels,
    "monitor": RunMonitor,
    "health": Health,
    "watchdog": Watchdog,
    "rates": LearningRateMonitor,
    "requeue": Requeue,  # after those above: what it saves holds their state
    "last": LastCheckpoint,
    "best": BestCheckpoint,
}


class Parser(LightningArgumentParser):
    """Lightning's parser; an error is one line that names the file, without the usage."""

    _reading = ""

    def parse_path(self, path: Any, *args: Any, **options: Any) -> Any:
        """Reads a file of settings."""
        self._reading = f"{path}: "
        config = super().parse_path(path, *args, **options)
        self._reading = ""
        return config

    def format_help(self) -> str:
        """Our settings first, Lightning's trainer last, and one line of usage."""
        trainer = "Customize every aspect of training via flags"  # Lightning's title of that group
        self._action_groups.sort(key=lambda group: group.title == trainer)
        self.usage = f"{self.prog.replace(' [options]', '')} --config FILE ... [--run RUN] [--SETTING VALUE ...]"
        return str(super().format_help())

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:  # type: ignore[misc]
        """Ends the process after `--help` or `--print_config`, without the 0.8 s in which Python frees the libraries."""
        if status == 0 and not gc.isenabled():  # in a process of our own, before any training
            with suppress(BrokenPipeError):
                sys.stdout.flush()
            os._exit(0)
        super().exit(status, message)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with status 2."""
        if re.search(r"required: \w+\.model$", message):
            fail("no stage is given: give --config configs/stage1.yaml (or stage2, stage3, clip)", 2)
        fail(self._reading + reworded(self, message), 2)


class StairCLI(LightningCLI):
    """Lightning's command line with the project's callbacks, and `--run`."""

    _home: Path  # the stage's folder
    _complete = False  # the stage is trained, and there is nothing to do
    _init_from: str | None = None  # by --run; not in the settings, as saved ones serve other commands too

    def __init__(self, *args: Any, **options: Any) -> None:
        given, names = (options.get("args") or sys.argv[1:])[:1], set(super().subcommands())
        self._others = names.difference(given) if names.intersection(given) else set[str]()
        options["parser_kwargs"] = {k: v for k, v in options["parser_kwargs"].items() if k not in self._others}
        self._inputs: dict[str, Any] = {}
        with ExitStack() as self._held:
            super().__init__(*args, **options)

    def subcommands(self) -> dict[str, set[str]]:
        """The one that is given, or all if none is: each parser takes 0.2 s to build."""
        return {name: skip for name, skip in super().subcommands().items() if name not in self._others}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the always-on callbacks under keys of their own, the run's name, and the links."""
        parser.add_argument(
            "--run",
            type=str,  # and not None, which `--run null` would be
            default=None,
            help="folder of a run. Stage k then works in RUN/stagek and starts from RUN/stage(k-1)/stair; "
            "validate, test and predict load RUN/stagek/stair and log in RUN/stagek/validate, .../test and .../predict. "
            "The dense baseline works in RUN/clip",
        )
        for key, callback in ALWAYS_ON.items():
            parser.add_lightning_class_args(callback, key)
        parser.set_defaults({"rates.logging_interval": "step"})
        for name in ("vocabulary", "image.image_size", "text.max_tokens"):
            parser.link_arguments(f"model.init_args.stair.{name}", f"data.{name.split('.')[-1]}")

    def before_instantiate_classes(self) -> None:
        """Resolves paths and `--run`: the stage's folder, what it starts from, and the checkpoint to load."""
        gc.enable()  # which `stair.launch.prepare` switched off
        command, config = self.subcommand, self.config[self.subcommand]
        match_launcher(config.trainer)
        expand_paths(config)
        self._saved = config.clone()  # what follows from it may change when the folder has moved
        module, name = config.model.class_path.rsplit(".", 1)
        family: type[ContrastiveModule] = getattr(importlib.import_module(module), name)
        self._home = stage_folder(config, family.home())
        if config.weights_only is None:
            config.weights_only = True  # Lightning would unpickle, and so run, what comes over http
        place_loggers(config.trainer, self._home, command)
        export = Path(config.transition.export_to or self._home / family.export_name)
        if command == "fit":
            report_defaults(config)
            check_data(command, config)
            allowed = "false: timm's batch norms would lose their activations"
            require(not config.trainer.sync_batchnorm, "trainer.sync_batchnorm", True, allowed)
            self._prepare_fit(config, family, export)
            return
        if config.ckpt_path in ("last", "best"):
            path = checkpoint_path(self._home, config.ckpt_path)
            read_checkpoint(path)
            config.ckpt_path = str(path)
        elif config.ckpt_path is None:
            if left := sorted(self._home.glob("hpc_ckpt_*.ckpt")):  # under SLURM Lightning would load it unasked
                raise FileError(f"{left[-1]} was written by Lightning's own requeueing: remove it", left[-1])
            self._init_from = str(export) if config.run is not None else None
        if (self._init_from or config.transition.init_from or config.ckpt_path) is None:
            given = "--run RUN, --transition.init_from RUN/stage3/stair or --ckpt_path FILE"
            raise SettingError(f"{command} has no model, only initial weights: give {given}", "run")
        check_data(command, config)

    def _prepare_fit(self, config: Any, family: type[ContrastiveModule], export: Path) -> None:
        """What the stage starts from, and what it does in a folder where a training has been."""
        if config.run is not None and (previous := stage_before(family, config.transition.init_stage)) > 0:
            self._init_from = str(Path(config.run) / f"stage{previous}" / family.export_name)
        if config.trainer.fast_dev_run:
            return
        self._inputs = training_inputs(config, config.transition.init_from or self._init_from)
        if config.ckpt_path == "last" and is_complete(export, self._inputs):
            rank_zero_info(f"{export} is finished, with the same inputs: nothing to do")
            self._complete = True
            return
        if not any(int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK")):
            busy = f"another job trains in {self._home}. Wait for it, end it, or give another --run"
            self._held.enter_context(lock(self._home / "lock", busy))
        config.ckpt_path = checkpoint_to_resume(config.ckpt_path, self._home, export, self._inputs)

    def instantiate_classes(self) -> None:
        """Builds what the command needs, which is nothing for a stage that is complete."""
        if not self._complete:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._complete:
            super()._run_subcommand(subcommand)

    def after_fit(self) -> None:
        """Raises a StairError if the planned steps were not done: a later stage would find no model to start from."""
        if reason := self.config_init[self.subcommand].transition.unfinished:
            raise StairError(reason)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        transition = self.config_init[self.subcommand].transition
        transition.init_from, transition.inputs = transition.init_from or self._init_from, self._inputs
        settings = SaveSettings(self._parser(self.subcommand), self._saved)
        always_on = [each for each in [*callbacks, settings] if _applies(each, config)]
        config = {**config, "default_root_dir": str(self._home)}
        terminal = sys.stdout.isatty() and sys.stderr.isatty()
        if not terminal and not any(isinstance(each, ProgressBar) for each in listed(config["callbacks"])):
            config["enable_progress_bar"] = False  # in a log file each refresh would be a line
        trainer = super()._instantiate_trainer(config, always_on)
        write_atomically(trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Takes no settings from a checkpoint: Lightning would let it name the class that is built."""


def _applies(callback: Callback, trainer: dict[str, Any]) -> bool:
    """Whether an always-on callback goes with the trainer's settings, by which the user may have disabled something."""
    if isinstance(callback, LearningRateMonitor):
        return trainer["logger"] is not False
    if isinstance(callback, ModelCheckpoint):
        return trainer["enable_checkpointing"] is not False
    return not (isinstance(callback, SaveSettings) and trainer["fast_dev_run"])

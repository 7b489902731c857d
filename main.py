"""The roof: `python main.py fit --config configs/stage1.yaml …`, the same as `stair fit` and `lightning fit`.

Names the families (stages, data, callbacks that are always on) and joins the settings that must agree. Everything else is
Lightning's own command line: `--print_config`, `--help`, overlays by further `--config`.
"""

if __name__ == "__main__":  # before anything is imported that takes time
    from stair.cli import hold_signals

    hold_signals()

import importlib
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

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
    r"Found \d+ module\(s\) in eval mode",  # the frozen side of stage 2, meant so
):
    warnings.filterwarnings("ignore", notice)

BASE = Path(__file__).parent / "configs" / "base.yaml"


class StairCLI(LightningCLI):
    """Lightning's command line with the project's callbacks, and `--run`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the always-on callbacks under keys of their own, the run's name, and the links."""
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="folder of a run. Stage k then works in RUN/stagek and starts from RUN/stage(k-1)/stair; "
            "validate, test and predict load RUN/stagek/stair. The dense baseline works in RUN/clip",
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
        """Spells out `--run`: where the stage works and what it starts from."""
        config = self.config[self.subcommand]
        if config.run is not None:
            self._spell_out(config)
        if config.weights_only is None:
            config.weights_only = True  # Lightning would unpickle, and so run, what comes over http
        if self.subcommand == "fit" and config.ckpt_path is None:
            refuse_leftover(config.trainer.default_root_dir or ".")

    def instantiate_trainer(self, **more: Any) -> Trainer:
        """The trainer, whose checkpoints are whole or absent."""
        trainer = super().instantiate_trainer(**more)
        keep_whole(trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Takes no settings from a checkpoint: Lightning would let it name the class that is built."""

    def _spell_out(self, config: Any) -> None:
        family = _family_of(config.model.class_path)
        home = Path(config.run) / family.home()
        config.trainer.default_root_dir = str(home)
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            if hasattr(logger, "init_args") and "save_dir" in logger.init_args:
                logger.init_args.save_dir = str(home)
        if config.transition.start_from is None:
            if self.subcommand == "fit":
                previous = stage_before(family, config.transition.after)
                source = home.with_name(f"stage{previous}") if previous > 0 else None
            else:  # a checkpoint that is named wins over the hand-over
                source = home if getattr(config, "ckpt_path", None) is None else None
            config.transition.start_from = str(source / family.hand_over) if source else None


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

"""From one stage to the next: load the weights of the exported model, freeze what the stage freezes, export at the end.

Loading happens in `setup("fit")`: after the modules exist, before the strategy wraps them (DDP and FSDP read
`requires_grad` once), and before Lightning restores a checkpoint. So a resumed run ends up with its own checkpoint's
weights, whatever was loaded first. The frozen set comes from the stage's class, never from a checkpoint.
"""

import logging
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.contrastive import ContrastiveModule, planned_steps, refuse_other_model, sides
from lightning_modules.parallel import gathered
from lightning_modules.stage import StairStage
from stair.errors import FileError, SettingError
from stair.towers import load_weights, read_description

log = logging.getLogger(__name__)


class StageTransition(L.Callback):
    """Loads the previous stage's exported model, and exports this one's. The dense baseline only exports.

    Args:
        init_from: exported model of the previous stage, the folder `stair` in its run. Stage 1 has none; stages 2 and 3
            need one.
        export_to: folder that the model is exported to after the planned steps. Null: the folder `stair` (`clip` for the
            dense baseline) in `default_root_dir`.
        init_stage: stage to start from instead of the previous one. 1 lets stage 3 follow stage 1; 0 starts any stage from
            random weights.
        on_early_stop: what follows when a callback such as EarlyStopping ends the training before its planned steps:
            `export` what was reached, or `fail`, so that the command ends with an error and no later stage starts.

    Attributes:
        unfinished: why the fit ended without an export, None if it did not.
        inputs: what the weights follow from (lightning_modules/inputs.py); recorded in checkpoints and the export.
    """

    unfinished: str | None = None

    def __init__(
        self,
        init_from: str | None = None,
        export_to: str | None = None,
        init_stage: int | None = None,
        on_early_stop: Literal["export", "fail"] = "export",
    ) -> None:
        self.init_from, self.export_to, self.init_stage = init_from, export_to, init_stage
        self.on_early_stop = on_early_stop
        self.inputs: dict[str, Any] = {}
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        """Records the inputs in checkpoints."""
        return {"inputs": self.inputs}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the patience of EarlyStopping that the settings give: Lightning would restore the checkpoint's."""
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
                state["patience"] = callback.patience

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Loads weights and freezes.

        Raises:
            FileError: if `init_from` is missing, not of the previous stage, unfinished, or of another stage or model than
                the one that is measured; names both sides.
            SettingError: if a setting contradicts it, or a scale is to be kept and there is none of this similarity.
        """
        if not isinstance(pl_module, ContrastiveModule):
            return
        if stage == "fit":
            self._start(pl_module)
        elif self.init_from is not None and trainer.ckpt_path is None:
            # evaluating an exported model: its own stage, not the one before
            folder = Path(self.init_from)
            theirs = read_description(folder)["training"].get("stage")
            if None not in (theirs, pl_module.stage) and theirs != pl_module.stage:
                raise FileError(
                    f"{folder} was exported by stage {theirs}, and this is stage {pl_module.stage}: measured as that it "
                    f"would pass for it. Give configs/stage{theirs}.yaml, or another --transition.init_from",
                    folder,
                )
            _load(pl_module, folder)
        for side in pl_module.frozen:
            for module in sides(pl_module.towers)[side]:
                module.requires_grad_(False).eval()

    def _start(self, module: ContrastiveModule) -> None:
        previous = stage_before(module, self.init_stage)
        if self.init_from is None:
            if previous > 0:
                raise SettingError(
                    f"stage {module.stage} starts from stage {previous}: give --transition.init_from "
                    f"RUN/stage{previous}/stair, or --run RUN where both stages live",
                    "transition.init_from",
                )
            _check_scale(module, None)
            return
        if previous == 0:
            what = "stage 1 is the first" if module.stage == 1 else f"{module.home()} begins from nothing"
            raise SettingError(
                f"{what}, but --transition.init_from says it starts from {self.init_from}; leave it out",
                "transition.init_from",
            )
        folder = Path(self.init_from)
        if not folder.is_dir():
            raise FileError(
                f"no exported model of stage {previous} at {folder}: it is written when that stage has finished its "
                "planned steps. Finish it, or correct --transition.init_from",
                folder,
            )
        description = read_description(folder)
        training = description["training"]
        if training.get("stage") != previous:
            raise FileError(
                f"stage {module.stage} starts from stage {previous}, but {folder} was exported by stage "
                f"{training.get('stage')}; correct --transition.init_from",
                folder,
            )
        if not training.get("finished"):
            raise FileError(f"{folder} comes from a stage {previous} that did not finish; finish it first", folder)
        _check_scale(module, description["model"].get("similarity"))
        # a stage has its own similarity; under the hard mask no other term was active, and the margin had no effect yet
        _load(module, folder, "similarity", *(["in_caption_margin"] if training.get("masked_loss_weight") == 1 else []))
        log.info("stage %d starts from %s", module.stage, folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports, if the planned steps are done: this is also called when a time limit stopped the run."""
        self._trained = True
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports in a run that was killed between its last checkpoint and the export, and is resumed.

        It has no step left, and Lightning then calls nothing of training; the model is on the CPU again by now.
        """
        if not self._trained:
            pl_module.to(trainer.strategy.root_device)
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, ContrastiveModule):
            return
        if trainer.fast_dev_run:
            log.warning("a dry run (trainer.fast_dev_run) exports nothing")
            return
        facts = {"stage": pl_module.stage, "steps": trainer.global_step, "finished": True, "inputs": self.inputs}
        if isinstance(pl_module, StairStage):
            facts["masked_loss_weight"] = pl_module.weights.get("text_masked", 0.0)
        planned = planned_steps(trainer)
        if trainer.global_step < planned:
            reason, deliberate = _stop_reason(trainer)
            reached = f"step {trainer.global_step} of {planned}: {reason}"
            if not deliberate or self.on_early_stop == "fail":
                self.unfinished = f"the training ended at {reached}. Nothing is exported. To go on: --ckpt_path last"
                return
            rank_zero_info(f"the training ended at {reached}. What was reached is exported")
            facts |= {"planned_steps": planned, "stopped_by": reason}
        model = gathered(pl_module.towers)
        if trainer.is_global_zero and model is not None:
            target = Path(self.export_to or Path(trainer.default_root_dir) / pl_module.export_name)
            model.save_pretrained(target, facts)
            log.info("%s is exported to %s", pl_module.home(), target)
        trainer.strategy.barrier("export")


def _stop_reason(trainer: L.Trainer) -> tuple[str, bool]:
    """What ended a training before its planned steps, and whether that was a decision on the model's state."""
    for callback in trainer.callbacks:
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None and left <= 0:
            return "trainer.max_time is over", False
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping ({callback.stopping_reason_message})", True
    if trainer.should_stop:
        return "a callback stopped it (trainer.should_stop)", True
    return "no batch was left to train on (trainer.limit_train_batches?)", False


def stage_before(module: ContrastiveModule | type[ContrastiveModule], init_stage: int | None) -> int:
    """The stage that a module starts from, 0 for none.

    Raises:
        SettingError: if `init_stage` is no earlier stage.
    """
    if module.stage is None:
        return 0
    if init_stage is not None and not 0 <= init_stage < module.stage:
        allowed = f"stage {module.stage} can start from 0 (nothing) to {module.stage - 1}"
        raise SettingError(f"--transition.init_stage is {init_stage}: {allowed}", "transition.init_stage")
    return module.stage - 1 if init_stage is None else init_stage


def _check_scale(module: ContrastiveModule, similarity: str | None) -> None:
    """Checks a scale that is to be kept. `similarity` is that of the stage before, None if there is none."""
    if not isinstance(module, StairStage) or module.objective.scale_start != "keep":
        return
    ours = module.stair.similarity
    if similarity != ours:
        before = "it begins from nothing" if similarity is None else f"the stage before compares by {similarity!r}"
        raise SettingError(
            f"objective.scale_start is 'keep' in stage {module.stage}, but {before}: there is no scale for {ours!r} to "
            f"keep. Give --model.init_args.objective.scale_start {'14.3' if ours == 'cosine' else 'measure'}",
            "objective.scale_start",
        )


def _load(module: ContrastiveModule, folder: Path, *free: str) -> None:
    """Strict: every weight must be there and fit, and both models must be one design over one vocabulary."""
    description, towers = read_description(folder), module.towers
    if description["family"] != towers.family:
        raise FileError(
            f"{folder} holds a model of family {description['family']!r}, this run is {towers.family!r}", folder
        )
    theirs, ours = description["vocabulary_fingerprint"], towers.vocabulary.fingerprint
    if theirs != ours:
        raise FileError(
            f"{folder} has vocabulary {theirs[:12]}…, this run has {ours[:12]}… ({towers.config.vocabulary}): every "
            "dimension would mean another word. Use the same stair.vocabulary in all stages",
            folder,
        )
    refuse_other_model(towers, str(folder), description["model"], free)
    load_weights(towers, folder)

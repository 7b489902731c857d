"""From one stage to the next: load the exported model, freeze what the stage freezes, export at the end.

Loading happens in `setup("fit")`: the modules exist, the strategy has not wrapped them (DDP and FSDP2 read `requires_grad`
once), and Lightning has not restored a checkpoint, whose weights win. The stage's class and `lr_scale` 0 name what is
frozen; the next stage is a new module, in which everything trains again.
"""

from pathlib import Path
from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.contrastive import ContrastiveModule, check_same_model, planned_steps
from lightning_modules.parallel import gathered
from lightning_modules.stage import StairStage
from stair.errors import FileError, require
from stair.towers import load_weights, read_description


class StageTransition(Callback):
    """Loads the model of the previous stage, freezes encoders, and exports the model. Dense CLIP only exports.

    Args:
        init_from: exported model of the previous stage, RUN/stageK/stair. Stage 1 needs none; stages 2 and 3 need one.
        export_to: folder of the model that is exported after the planned steps; if null, `stair` (`clip` for dense CLIP)
            in `default_root_dir`.
        init_stage: stage to start from instead of the previous one, for ablations. 1: stage 3 starts from stage 1.
            0: any stage starts without an exported model.
        on_early_stop: action if a callback such as EarlyStopping ends the training early: `export` the model, or `fail`
            with an error, so that no later stage starts.

    Attributes:
        unfinished: why the fit ended without an export, None if it did not.
        inputs: what the weights follow from (lightning_modules/run_folder.py); recorded in checkpoints and the export.
    """

    unfinished: str | None = None

    def __init__(
        self,
        init_from: str | None = None,
        export_to: str | None = None,
        init_stage: int | None = None,
        on_early_stop: Literal["export", "fail"] = "export",
    ) -> None:
        self.init_from, self.export_to = init_from, export_to
        self.init_stage, self.on_early_stop = init_stage, on_early_stop
        self.inputs: dict[str, Any] = {}
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        return {"inputs": self.inputs}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping) and (state := checkpoint["callbacks"].get(callback.state_key)):
                state["patience"] = callback.patience

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Loads weights and freezes.

        Raises:
            FileError: if `init_from` is missing, not of the previous stage, unfinished, or of another model.
            SettingError: if a setting contradicts it, or a scale is to be kept and there is none of this similarity.
        """
        if stage == "fit":
            self._init(pl_module)
            for module in pl_module.frozen_modules():
                module.requires_grad_(False).eval()
        elif self.init_from is not None and trainer.ckpt_path is None:  # evaluates an exported model
            folder = Path(self.init_from)
            exported_by = read_description(folder)["training"].get("stage")
            if None not in (exported_by, pl_module.stage) and exported_by != pl_module.stage:
                other = f"{folder} was exported by stage {exported_by}, and this is stage {pl_module.stage}"
                raise FileError(f"{other}. Give --config configs/stage{exported_by}.yaml, or another folder", folder)
            _load(pl_module, folder)

    def _init(self, module: ContrastiveModule) -> None:
        previous = stage_before(module, self.init_stage)
        allowed = f"null: {module.home()} starts from initial weights"
        if previous:
            allowed = f"the export of stage {previous}, or --run RUN with both stages, to start {module.home()}"
        require((self.init_from is not None) == (previous > 0), "transition.init_from", self.init_from, allowed)
        if self.init_from is None:
            _check_scale(module, None)
            return
        folder = Path(self.init_from)
        if not folder.is_dir():
            missing = f"no exported model of stage {previous} at {folder}"
            raise FileError(f"{missing}: finish that stage, or correct --transition.init_from", folder)
        description = read_description(folder)
        training = description["training"]
        if training.get("stage") != previous or not training.get("finished"):
            state = f"of stage {training.get('stage')}, {'' if training.get('finished') else 'un'}finished"
            rule = f"stage {module.stage} starts from a finished stage {previous}"
            raise FileError(f"{rule}, but {folder} is {state}. Correct --transition.init_from", folder)
        _check_scale(module, description["model"].get("similarity"))
        # a stage has its own similarity; under the hard mask no other term was active, and the margin had no effect yet
        _load(module, folder, "similarity", *(["in_caption_margin"] if training.get("masked_loss_weight") == 1 else []))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exports where a run was killed between its last checkpoint and the export, and has no step left."""
        if not self._trained:  # Lightning called no hook of training, and the model is on the CPU again
            pl_module.to(trainer.strategy.root_device)
            self._export(trainer, pl_module)

    def _export(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.fast_dev_run:
            return
        facts = {"stage": pl_module.stage, "steps": trainer.global_step, "finished": True, "inputs": self.inputs}
        if isinstance(pl_module, StairStage):
            facts["masked_loss_weight"] = pl_module.weights.get("text_masked", 0.0)
        planned = planned_steps(trainer)
        if trainer.global_step < planned:
            reason, deliberate = _stop_reason(trainer)
            reached = f"step {trainer.global_step} of {planned}: {reason}"
            if not deliberate or self.on_early_stop == "fail":
                self.unfinished = f"the training ended at {reached}. Nothing is exported; --ckpt_path last resumes it"
                return
            rank_zero_info(f"the training ended at {reached}. The model is exported as it is")
            facts |= {"planned_steps": planned, "stopped_by": reason}
        model = gathered(pl_module.towers)
        if trainer.is_global_zero and model is not None:
            target = Path(self.export_to or Path(trainer.default_root_dir) / pl_module.export_name)
            model.save_pretrained(target, facts)
            recall = trainer.callback_metrics.get("val/recall")
            measured = "" if recall is None else f"; val/recall {float(recall):.4f}"
            rank_zero_info(f"{pl_module.home()} is exported to {target}{measured}")
        trainer.strategy.barrier("export")


def _stop_reason(trainer: Trainer) -> tuple[str, bool]:
    """What ended a training before its planned steps, and whether that was a decision on the model's state."""
    for timer in (each for each in trainer.callbacks if isinstance(each, Timer)):
        if (left := timer.time_remaining()) is not None and left <= 0:
            return "trainer.max_time is over", False
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping ({callback.stopping_reason_message})", True
    if trainer.should_stop:
        return "a callback stopped it (trainer.should_stop)", True
    return "no batch was left to train on (trainer.limit_train_batches?)", False


def stage_before(module: ContrastiveModule | type[ContrastiveModule], init_stage: int | None) -> int:
    """The stage that a module starts from, 0 for none; SettingError if `init_stage` is no earlier stage."""
    if module.stage is None:
        return 0
    previous = module.stage - 1 if init_stage is None else init_stage
    allowed = f"0 (initial weights) to {module.stage - 1} in stage {module.stage}"
    require(0 <= previous < module.stage, "transition.init_stage", init_stage, allowed)
    return previous


def _check_scale(module: ContrastiveModule, similarity: str | None) -> None:
    """Checks a scale that is to be kept. `similarity` is that of the stage before, None if there is none."""
    kept, ours = isinstance(module, StairStage) and module.objective.scale_start == "keep", module.towers.similarity
    start = "14.3" if ours == "cosine" else "measure"
    allowed = f"{start}, as no earlier stage has a scale of {ours!r} (the previous similarity is {similarity})"
    require(not kept or similarity == ours, "objective.scale_start", "keep", allowed)


def _load(module: ContrastiveModule, folder: Path, *free: str) -> None:
    """Loads all weights of a model of the same family, vocabulary and design, but for the settings `free`."""
    check_same_model(module.towers, folder, read_description(folder), *free)
    load_weights(module.towers, folder)

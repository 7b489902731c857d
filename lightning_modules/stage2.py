"""Stage 2, expansion: the text side learns terms that a caption leaves out, from grounded images that no longer move."""

from typing import Any

from lightning_modules.optimizer import Optimizer
from lightning_modules.stage import StairStage, TextObjective
from stair.model import StairDesign


class Stage2(StairStage):
    """Text side only; starts from stage 1 (STAIR, section 3, stage 2). Its objective has no settings of images."""

    stage = 2
    frozen = ("image",)

    def __init__(self, stair: StairDesign, objective: TextObjective, optimizer: Optimizer, **layout: Any) -> None:
        super().__init__(stair, objective, optimizer, **layout)  # type: ignore[arg-type]  # has the same fields

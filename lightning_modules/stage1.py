"""Stage 1, grounding: an image can match "a red circle" only through `red`, `circle` and `a`, which gives terms meaning."""

from lightning_modules.stage import StairStage


class Stage1(StairStage):
    """Text masked to in-caption terms (STAIR, section 3, stage 1)."""

    stage = 1
    text_form = "masked"

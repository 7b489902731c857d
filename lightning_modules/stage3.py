"""Stage 3, fine-tuning: both sides train together, unmasked. Its exported model is the release."""

from lightning_modules.stage import StairStage


class Stage3(StairStage):
    """Both sides, all terms; starts from stage 2 (STAIR, section 3, stage 3)."""

    stage = 3

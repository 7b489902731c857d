"""Stage 2, expansion: the image side is frozen, the text is unmasked.

The text side learns to add words a caption leaves out (synonyms, consequences), taught by grounded image embeddings that
no longer move.
"""

from lightning_modules.stage import StairStage


class Stage2(StairStage):
    """Text side only; starts from stage 1 (STAIR, section 3, stage 2)."""

    stage = 2
    frozen = ("image",)

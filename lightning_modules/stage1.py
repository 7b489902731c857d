"""Stage 1, grounding: both sides train, and a text may activate only its in-caption terms.

The mask gives terms their meaning: an image can match "a red circle" only through `red`, `circle` and `a`. Without it
retrieval still works, but terms become arbitrary codes (docs/method/design.md).
"""

from lightning_modules.stage import StairStage


class Stage1(StairStage):
    """Text masked to the caption's own terms (STAIR, section 3, stage 1)."""

    stage = 1
    text_form = "masked"

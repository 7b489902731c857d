"""Stage 1, grounding: both sides train, and a text may light up only its in-caption terms.

The mask is what gives words their own meaning: an image can match "a red circle" only through `red`, `circle` and `a`.
Without it retrieval still works, but words become arbitrary codes (docs/method/design.md). With `masked_loss_weight`
below 1 it is soft: the rest of the loss compares texts without it.
"""

from lightning_modules.stage import StairStage


class Stage1(StairStage):
    """Text masked to the in-caption terms (STAIR, section 3, stage 1)."""

    stage = 1
    text_form = "masked"

"""The three training stages and the dense baseline. They share everything but a page each."""

from lightning_modules.clip import Clip
from lightning_modules.stage1 import Stage1
from lightning_modules.stage2 import Stage2
from lightning_modules.stage3 import Stage3

__all__ = ["Clip", "Stage1", "Stage2", "Stage3"]

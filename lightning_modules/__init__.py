"""The three training stages. They share everything but a page each."""

from lightning_modules.stage1 import Stage1
from lightning_modules.stage2 import Stage2
from lightning_modules.stage3 import Stage3

__all__ = ["Stage1", "Stage2", "Stage3"]

"""The bar of a terminal. Where there is no terminal, `callbacks/run_monitor.py` writes lines."""

import sys

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar


class StepProgress(TQDMProgressBar):
    """Lightning's bar, shown only on a terminal: in a log file each refresh would be a line."""

    def __init__(self) -> None:
        super().__init__()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leaves out the bar where nobody sees it."""
        super().setup(trainer, pl_module, stage)
        if not sys.stderr.isatty():
            self.disable()

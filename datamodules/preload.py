"""Imported by the server that data-loading processes are forked from: their imports are made once, and signals ignored."""

import signal
from contextlib import suppress

import torch.utils.data._utils.worker  # noqa: F401

import datamodules.dataset  # noqa: F401

with suppress(ImportError):
    import fsspec.implementations.http  # noqa: F401

for _number in (signal.SIGTERM, signal.SIGUSR1):  # under SLURM they reach every process; without the server readers end
    signal.signal(_number, signal.SIG_IGN)

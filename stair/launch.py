"""The start of a training process, before torch is imported: held signals, named files, and errors in one line.

A process is one of several: ranks that srun, torchrun or Lightning's own launcher started with the same command. Only
the first of them prints what a user did wrong.
"""

import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from stair.errors import StairError
from stair.plain import plain

TRAINER = {
    "fit": "train a stage; `stair fit` and `lightning fit` are the same command",
    "validate": "measure recall on the validation sets, as in training",
    "test": "measure recall on the test sets",
    "predict": "embed the test sets for a callback of yours; `stair embed` writes embeddings",
}
_LOOP = "training_epoch_loop.py"  # of Lightning: every training step is inside it
_PATIENCE = 30.0  # seconds in which the end of the first rank should end the others; nodes import at different speeds


def prepare(args: Sequence[str]) -> None:
    """Holds signals and checks the named files. Called first, as the imports that follow take seconds.

    Garbage collection stays off until training starts: it takes a sixth of the time that the imports take.

    Args:
        args: the subcommand and its options.
    """
    gc.disable()
    if "SLURM_JOB_ID" in os.environ and args[:1] == ["fit"]:
        # a task that a signal ends meanwhile is a failed job to SLURM; callbacks/requeue.py releases them
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM))
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        if match := re.match(r"(?:--config|-c)(?:=(.*))?\Z|-c(.+)\Z", arg, re.DOTALL):
            name = next((group for group in match.groups() if group is not None), following)
            # settings may stand there themselves
            if not re.search(r"[{:\n]", name) and not Path(name).expanduser().is_file():
                fail(f"--config {name}: no such file; the current folder is {Path.cwd()}")


def launched_processes() -> tuple[str, int, int] | None:
    """The launcher of this process, its number of nodes, and of processes a node; None for a process on its own."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        processes = int(env["LOCAL_WORLD_SIZE"])
        return "torchrun", int(env["WORLD_SIZE"]) // processes, processes
    # as Lightning: these names mean a shell in which a user types
    by_srun = "SLURM_STEP_ID" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    if by_srun and "SLURM_NTASKS_PER_NODE" in env:
        return "srun", int(env["SLURM_NNODES"]), int(env["SLURM_NTASKS_PER_NODE"])
    return None


@contextmanager
def one_line_errors(*types: type[Exception]) -> Iterator[None]:
    """Ends the process with one line instead of a traceback if an error is the user's.

    That is a `StairError`, and before the first training step a ValueError, an OSError or one of `types`.
    """
    try:
        yield
    except Exception as raised:
        files = [frame.filename for frame in traceback.extract_tb(raised.__traceback__)]
        # of a class that was built; the text of jsonargparse around it lists all its settings
        error = raised.__cause__ if "jsonargparse" in files[-1] and isinstance(raised.__cause__, Exception) else raised
        training = any(name.endswith(_LOOP) for name in files)
        if not isinstance(error, StairError if training else (ValueError, OSError, *types)):
            raise
        fail(str(error))


def fail(message: str, status: int = 1) -> NoReturn:
    """Prints one line and ends the process with a status. Ranks with the error of the first one end without a line.

    Raises:
        SystemExit: with the status.
    """
    if max(int(os.environ.get(name) or 0) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK")) > 0:
        _wait_for_first_rank()
    if job := os.environ.get("STAIR_JOB"):  # slurm/run_stage.sh does not restart after it
        Path(f"{job}.error").touch()
    line = plain(" ".join(part.strip() for part in message.splitlines()))
    print(f"{Path(sys.argv[0]).stem}: error: {line}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _wait_for_first_rank() -> None:
    """Leaves if the first rank ends meanwhile: its launcher then sends SIGTERM, or is that rank."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(0.5)

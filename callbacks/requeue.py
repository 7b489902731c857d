"""A signal becomes one checkpoint between two batches, and under SLURM the same job once more.

Lightning saves inside the signal handler, which can deadlock (upstream issue 21406). Here a handler only notes the signal.
"""

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.lightning_private import restore_at_end, stop_own_requeueing, validation_is_due
from lightning_modules.contrastive import planned_steps
from lightning_modules.run_folder import save_last
from stair.errors import require
from stair.files import read_json, write_json

_ORDER = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # the greatest over all ranks counts
_IDLE_STARTS = 2  # in a row, after which a job is not requeued
_log = rank_zero_only(logging.getLogger(__name__).log)


class Requeue(Callback):
    """Saves `last.ckpt` and ends the run on SIGUSR1, SIGTERM and SIGINT (Ctrl-C), without validation or export.

    All ranks agree between batches. Then

    - SIGUSR1 under SLURM (`#SBATCH --signal=SIGUSR1@300`, without `B:`): the job is requeued. If SLURM refuses, training
      continues, and SIGTERM at the time limit saves again.
    - SIGTERM under SLURM: the job is requeued if it was preempted or reached its time limit, not if it was cancelled.
    - else: the process ends with 128 + the signal's number. A second SIGINT ends it at once, without saving.

    Signals that came while Python started wait until training starts: SIGTERM then ends the run before the first step,
    SIGUSR1 after it. After two starts in a row without progress (`requeue.json` in the stage's folder) a job is not
    requeued. A signal waits for a validation that is due or runs. After the last planned step it is ignored.

    Args:
        every: steps between two checks of all ranks for a signal; at least 1.
    """

    def __init__(self, every: int = 5) -> None:
        self.every = every
        require(every >= 1, "requeue.every", every, "at least 1")
        self._previous: dict[int, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._noted = self._agreed = 0  # on this rank, on all ranks: 0, or 1 + the position in _ORDER
        self._waited = False  # for a validation
        self._saved: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._clear()
        self._pid = os.getpid()
        stop_own_requeueing(trainer)
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in _ORDER}

    def _note(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._pid:  # a forked worker
            return
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # not print: a buffered stream may be in use
            os.write(2, b"SIGINT: saving after this step. Once more ends the process at once, without saving\n")
        self._noted = max(self._noted, 1 + _ORDER.index(signal.Signals(signum)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Acts on signals that came before. Lightning's handler of SIGTERM, set by now, would wait for other ranks."""
        if self._previous:
            signal.signal(signal.SIGTERM, self._note)
            restore_at_end(trainer, self._previous)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDER)
        self._agree(trainer)
        self._began, self._early = trainer.global_step, self._agreed > 0
        if self._agreed >= 1 + _ORDER.index(signal.SIGTERM):
            self._leave(trainer, f"step {trainer.global_step}, where it had started: nothing is new to save")

    def on_exception(self, trainer: Trainer, *args: Any) -> None:
        restore_at_end(trainer, self._previous)  # also before training has begun

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if not self._agreed and (trainer.world_size == 1 or trainer.global_step % self.every == 0):
            self._agree(trainer)
        if not self._agreed or trainer.global_step >= planned_steps(trainer):
            return
        if trainer.strategy.reduce_boolean_decision(validation_is_due(trainer), all=False) and not self._waited:
            self._waited = True
            return
        self._saved = save_last(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        """Leaves, if the state is saved."""
        if self._saved is not None:
            self._leave(trainer, f"step {trainer.global_step}, saved in {self._saved}")

    def _agree(self, trainer: Trainer) -> None:
        noted = torch.tensor(self._noted, device=trainer.strategy.root_device)
        self._agreed = int(trainer.strategy.reduce(noted, reduce_op="max"))

    def _leave(self, trainer: Trainer, state: str) -> None:
        signum, refusal = _ORDER[self._agreed - 1], ""
        if SLURMEnvironment.detect() and signum != signal.SIGINT:
            if trainer.is_global_zero:
                progress = trainer.global_step > self._began and not self._early
                refusal = _requeue(signum, _count_idle(Path(trainer.default_root_dir) / "requeue.json", progress))
            refusal = trainer.strategy.broadcast(refusal)
            if not refusal:
                _log(logging.WARNING, f"{signum.name}: this SLURM job is requeued and will resume from {state}")
                raise SystemExit(0)
            if signum == signal.SIGUSR1:
                alone = "Training continues until the time limit. The job will NOT be requeued: submit it again"
                _log(logging.ERROR, f"SIGUSR1: {refusal}{alone}. The saved state is that of {state}")
                later = self._noted if self._noted > self._agreed else 0  # SIGTERM, meanwhile
                self._clear()
                self._noted = later
                return
        resume = "To resume, run the same command with --ckpt_path last"
        _log(logging.WARNING, f"{signum.name}: stopped at {state}. {refusal}{resume}")
        # 0 on other ranks: their launcher would kill the first
        raise SystemExit(128 + signum if trainer.is_global_zero else 0)


def _count_idle(record: Path, progress: bool) -> int:
    """How many starts of this job in a row made no progress, with this one. The record is of one job."""
    if progress:
        record.unlink(missing_ok=True)
        return 0
    job, last = os.environ["SLURM_JOB_ID"], read_json(record) if record.exists() else {}
    idle = 1 + (last["idle_starts"] if last.get("job") == job else 0)
    write_json(record, {"job": job, "idle_starts": idle})
    return idle


def _requeue(signum: signal.Signals, idle: int) -> str:
    """Asks SLURM to run this job again, after `idle` starts without progress. Returns why not, empty if it will."""
    job = os.environ["SLURM_JOB_ID"]
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):  # the id of one task is also that of the array
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if signum == signal.SIGTERM:
        state = _scontrol("show", "job", "-o", job).stdout
        # a preempted job still runs in its grace time. What ends for another reason was cancelled or is being requeued
        if "JobState=RUNNING" not in state and "Reason=TimeLimit" not in state:
            return "SLURM is ending this job. "
    if idle >= _IDLE_STARTS:
        longer = "--time must be longer than the lead of --signal and the start of the program together"
        return f"{idle} starts in a row made no progress, so this job is not requeued: {longer}. "
    result = _scontrol("requeue", job)
    if result.returncode in (0, -signal.SIGTERM):  # requeueing ends the job's processes, scontrol among them
        return ""
    output = (result.stderr + result.stdout).strip()
    return f"SLURM does not requeue this job: `scontrol requeue {job}` ended with {result.returncode}: {output}. "


def _scontrol(*args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *args], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(args, 1, "", str(error))

"""Leaving in time: a signal becomes one checkpoint between two batches, and under SLURM the same job once more.

Lightning's own requeueing saves inside the signal handler, with a barrier. A rank that sits in an all-reduce meanwhile
never gets there, and both wait until the time limit (upstream issue 21406). Here a handler only notes the signal.
"""

import json
import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only

from callbacks.lightning_private import restore_at_end, stop_own_requeueing, validation_is_due
from lightning_modules.contrastive import planned_steps
from lightning_modules.run_folder import save_last
from stair.errors import SettingError

log = logging.getLogger(__name__)

#: the greatest over all ranks counts: a job that is being ended is not queued again
_ORDER = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_IDLE_STARTS = 2  # in a row, after which a job is not requeued


class Requeue(L.Callback):
    """Saves and leaves on SIGUSR1, SIGTERM and SIGINT (Ctrl-C).

    All ranks agree between batches, save `last.ckpt`, and leave before the next batch without validation or export. Then

    - SIGUSR1 under SLURM (`#SBATCH --signal=SIGUSR1@300`, without `B:`): the job is requeued. If SLURM refuses, training
      continues, and SIGTERM at the time limit saves again.
    - SIGTERM under SLURM: the job is requeued if it was preempted or reached its time limit. A cancelled job stays so.
    - else: the process ends with 128 + the signal's number, so that nothing takes the stage for finished. A second SIGINT
      ends it at once, without saving.

    Signals that came while Python started wait until training starts (`stair.launch.prepare`). SIGTERM then ends the run
    before the first step; after SIGUSR1 there is time for one. A job is not requeued after two starts in a row without
    progress, counted in `requeue.json` of the stage's folder.

    Where a validation is due or runs, a signal waits for its end, as a resumed run would leave it out: the signal's lead
    must be longer than a validation. After the last planned step it is ignored.

    Args:
        every: steps between two agreements of the ranks, at least 1; a signal is acted on at most that much late. A
            single process needs none.

    Raises:
        SettingError: if `every` is out of range.
    """

    def __init__(self, every: int = 5) -> None:
        if every < 1:
            raise SettingError(f"every={every}: give at least 1", "requeue.every")
        self.every = every
        self._previous: dict[int, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._noted = 0  # on this rank: 0, or 1 + the place in _ORDER
        self._agreed = 0  # on all ranks
        self._waited = False  # for a validation
        self._saved: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replaces the signal handlers, before workers start and before Lightning would."""
        self._clear()
        self._pid = os.getpid()
        stop_own_requeueing(trainer)
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in _ORDER}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replaces Lightning's handler of SIGTERM, which waits for other ranks, and acts on signals that came before.

        Raises:
            SystemExit: to leave, where the job is being ended already.
        """
        if self._previous:
            signal.signal(signal.SIGTERM, self._note)
            restore_at_end(trainer, self._previous)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDER)
        self._agree(trainer)
        self._began, self._early = trainer.global_step, self._agreed > 0
        if self._agreed >= 1 + _ORDER.index(signal.SIGTERM):
            self._leave(trainer, f"step {trainer.global_step}, where it had started: nothing is new to save")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Restores the handlers, also before training has begun."""
        restore_at_end(trainer, self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # forked workers have the handler too
            if signum == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                # not print: a buffered stream may be in use
                os.write(2, b"SIGINT: saving after this step. Once more ends the process at once, without saving\n")
            self._noted = max(self._noted, 1 + _ORDER.index(signal.Signals(signum)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agrees, and saves. The step's figures are logged after this."""
        if not self._agreed and (trainer.world_size == 1 or trainer.global_step % self.every == 0):
            self._agree(trainer)
        if not self._agreed or trainer.global_step >= planned_steps(trainer):
            return
        if trainer.strategy.reduce_boolean_decision(validation_is_due(trainer), all=False) and not self._waited:
            self._waited = True
            return
        self._saved = save_last(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leaves, if the state is saved.

        Raises:
            SystemExit: to leave; the status is that of the first rank, 0 on others (their launcher would kill the first).
        """
        if self._saved is not None:
            self._leave(trainer, f"step {trainer.global_step}, saved in {self._saved}")

    def _agree(self, trainer: L.Trainer) -> None:
        noted = torch.tensor(self._noted, device=trainer.strategy.root_device)
        self._agreed = int(trainer.strategy.reduce(noted, reduce_op="max"))

    def _leave(self, trainer: L.Trainer, where: str) -> None:
        signum, refusal = _ORDER[self._agreed - 1], ""
        if SLURMEnvironment.detect() and signum != signal.SIGINT:
            if trainer.is_global_zero:
                progress = trainer.global_step > self._began and not self._early
                refusal = _requeue(signum, _count_idle(Path(trainer.default_root_dir) / "requeue.json", progress))
            refusal = trainer.strategy.broadcast(refusal)
            if not refusal:
                _log(logging.WARNING, f"{signum.name}: this SLURM job goes on later from {where}")
                raise SystemExit(0)
            if signum == signal.SIGUSR1:
                self._stay(refusal, where)
                return
        how = "To go on, give the same command with --ckpt_path last"
        _log(logging.WARNING, f"{signum.name}: stopped at {where}. {refusal}{how}")
        raise SystemExit(128 + signum if trainer.is_global_zero else 0)

    def _stay(self, refusal: str, where: str) -> None:
        _log(
            logging.ERROR,
            f"SIGUSR1. {refusal}Training goes on until the time limit, and this job will NOT come back by itself: submit "
            f"it again, with --requeue. The state is that of {where}",
        )
        later = self._noted if self._noted > self._agreed else 0  # SIGTERM, meanwhile
        self._clear()
        self._noted = later


def _count_idle(record: Path, progress: bool) -> int:
    """How many starts of this job in a row made no progress, with this one. The record is of one job."""
    job = os.environ["SLURM_JOB_ID"]
    if progress:
        record.unlink(missing_ok=True)
        return 0
    last = json.loads(record.read_text()) if record.exists() else {}
    idle = 1 + (last["idle_starts"] if last.get("job") == job else 0)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps({"job": job, "idle_starts": idle}))
    return idle


def _requeue(signum: signal.Signals, idle: int = 0) -> str:
    """Asks SLURM to run this job again, after `idle` starts without progress. Returns why not, empty if it will."""
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:  # the id of one task is also that of the array
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    if signum == signal.SIGTERM:
        state = _scontrol("show", "job", "-o", job).stdout
        # within the grace time of a preemption it still runs, and would be a failed job if it ended by itself. What is
        # ending for another reason was cancelled, or is being requeued already
        if "JobState=RUNNING" not in state and "Reason=TimeLimit" not in state:
            return "SLURM is ending this job. "
    if idle >= _IDLE_STARTS:
        return (
            f"{idle} starts in a row made no progress, so this job is not requeued. --time must be longer than the lead of "
            "--signal and the start of the program together. "
        )
    done = _scontrol("requeue", job)
    if done.returncode in (0, -signal.SIGTERM):  # requeueing ends the job's processes, scontrol among them
        return ""
    output = (done.stderr + done.stdout).strip()
    return f"SLURM does not requeue this job: `scontrol requeue {job}` ended with {done.returncode}: {output}. "


def _scontrol(*args: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


@rank_zero_only
def _log(level: int, message: str) -> None:
    log.log(level, message)

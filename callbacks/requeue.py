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

from lightning_modules.contrastive import planned_steps
from lightning_modules.run_folder import save_last

log = logging.getLogger(__name__)

#: the greatest over all ranks counts: a job that is being ended is not queued again
_ORDER = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
_IDLE_STARTS = 2  # in a row, after which a job is not requeued


class Requeue(L.Callback):
    """Saves and leaves on SIGUSR1, SIGTERM and SIGINT (Ctrl-C).

    All ranks agree between batches, save `last.ckpt` where the run keeps its checkpoints (so `--ckpt_path last` finds it),
    and leave before the next batch without validating or handing over. Then

    - SIGUSR1 under SLURM (`#SBATCH --signal=SIGUSR1@300`, without `B:`): the job is requeued. If SLURM refuses, training
      goes on: the minutes left are not thrown away, and SIGTERM at the time limit saves again.
    - SIGTERM under SLURM: the job is requeued, unless SLURM is ending it for another reason than preemption or the time
      limit: one that was cancelled stays so.
    - any other, and SIGINT anywhere: the process ends with 128 + the signal's number, so that nothing takes the stage for
      finished.

    Signals that came while Python started wait until here (`stair.launch.prepare`). SIGTERM then ends the run before
    the first step, as nothing is new; after SIGUSR1 there is time for one, so that no start is for nothing.

    A second SIGINT ends the process at once, without saving.

    A job is not requeued where two starts in a row made no progress: no step, or only the one after a SIGUSR1 that came
    before the first, as where `--time` is not longer than the signal's lead. `requeue.json` in the stage's folder counts.

    A signal that comes where a validation is due, or during it, waits for its end: a checkpoint from just before would
    make the resumed run leave it out. So the lead of the signal must be longer than a validation. After the last planned
    step it is ignored, the run is about to end.

    Args:
        every: steps between two agreements of the ranks, at least 1; a signal is acted on at most that much late. A
            single process needs none.

    Raises:
        ValueError: if `every` is out of range.
    """

    def __init__(self, every: int = 5) -> None:
        if every < 1:
            raise ValueError(f"every={every}: wanted at least 1")
        self.every = every
        self._previous: dict[int, Any] = {}
        self._clear()

    def _clear(self) -> None:
        self._noted = 0  # on this rank: 0, or 1 + the place in _ORDER
        self._agreed = 0  # on all ranks
        self._waited = False  # for a validation
        self._saved: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Takes the signals over, before workers are forked and before Lightning would."""
        self._clear()
        self._pid = os.getpid()
        environment: Any = trainer._accelerator_connector.cluster_environment
        if hasattr(environment, "auto_requeue"):
            environment.auto_requeue = False
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in _ORDER}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes SIGTERM over from Lightning, whose handler waits for other ranks, and hears what came before.

        Raises:
            SystemExit: to leave, where the job is being ended already.
        """
        if self._previous:
            signal.signal(signal.SIGTERM, self._note)
            self._give_back(trainer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDER)
        self._agree(trainer)
        self._began, self._early = trainer.global_step, self._agreed > 0
        if self._agreed >= 1 + _ORDER.index(signal.SIGTERM):
            self._leave(trainer, f"step {trainer.global_step}, where it had started: nothing is new to save")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Sees that the handlers found are put back, also before training has begun."""
        self._give_back(trainer)

    def _give_back(self, trainer: L.Trainer) -> None:
        # at every end of a fit Lightning puts back the handlers it found. It found ours: tell it what was there before
        trainer._signal_connector._original_handlers.update(self._previous)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # forked workers have the handler too
            if signum == signal.SIGINT:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                _say_now("SIGINT: saving after this step. Once more ends the process at once, without saving")
            self._noted = max(self._noted, 1 + _ORDER.index(signal.Signals(signum)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Agrees, and saves. The step's figures are logged after this."""
        if not self._agreed and (trainer.world_size == 1 or trainer.global_step % self.every == 0):
            self._agree(trainer)
        if not self._agreed or trainer.global_step >= planned_steps(trainer):
            return
        loop = trainer.fit_loop
        due = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
        if trainer.strategy.reduce_boolean_decision(due, all=False) and not self._waited:
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
                _say(trainer, logging.WARNING, f"{signum.name}: this SLURM job goes on later from {where}")
                raise SystemExit(0)
            if signum == signal.SIGUSR1:
                self._stay(trainer, refusal, where)
                return
        _say(
            trainer,
            logging.WARNING,
            f"{signum.name}: stopped at {where}. {refusal}To go on, give the same command with --ckpt_path last",
        )
        raise SystemExit(128 + signum if trainer.is_global_zero else 0)

    def _stay(self, trainer: L.Trainer, refusal: str, where: str) -> None:
        _say(
            trainer,
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


def _job() -> str:
    if "SLURM_ARRAY_JOB_ID" in os.environ:  # the id of one task is also that of the array
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _requeue(signum: signal.Signals, idle: int = 0) -> str:
    """Asks SLURM to run this job again, after `idle` starts without progress. Returns why not, empty if it will."""
    if signum == signal.SIGTERM:
        state = _scontrol("show", "job", "-o", _job()).stdout
        # within the grace time of a preemption it still runs, and would be a failed job if it ended by itself. What is
        # ending for another reason was cancelled, or is being requeued already
        if "JobState=RUNNING" not in state and "Reason=TimeLimit" not in state:
            return "SLURM is ending this job. "
    if idle >= _IDLE_STARTS:
        return (
            f"{idle} starts in a row made no progress, so this job is not requeued. --time must be longer than the lead of "
            "--signal and the start of the program together. "
        )
    done = _scontrol("requeue", _job())
    if done.returncode in (0, -signal.SIGTERM):  # requeueing ends the job's processes, scontrol among them
        return ""
    said = (done.stderr + done.stdout).strip()
    return (
        f"SLURM does not requeue this job: `scontrol requeue {_job()}` ended with {done.returncode}"
        + (f", saying: {said}" if said else "")
        + ". "
    )


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _say_now(message: str) -> None:
    os.write(2, f"{message}\n".encode())  # in a signal handler, where a buffered stream may be in use


def _say(trainer: L.Trainer, level: int, message: str) -> None:
    if trainer.is_global_zero:
        log.log(level, message)

"""Reading processes: forked from a server that has imported what they need; they leave signals to the training process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

import torch
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stair.processes import without_main

_ENDING = 5.0  # seconds in which a process whose connection broke off has ended; it takes milliseconds


def start_server(*modules: str) -> None:
    """Starts the process that data-loading processes are forked from, which imports `modules` meanwhile."""
    multiprocessing.set_forkserver_preload(["datamodules.preload", *modules])
    with without_main(), _sigterm_held():
        forkserver.ensure_running()


# a forked process, as of the strategy ddp_fork, has no server of its own yet
os.register_at_fork(after_in_child=forkserver._forkserver.__init__)  # type: ignore[misc]


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Keeps a blocked SIGTERM blocked: Python (3.11) unblocks it where it starts its resource tracker."""
    if signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ()):
        yield
        return
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, _: received.append(signum))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        signal.signal(signal.SIGTERM, previous)
        if received:
            os.kill(os.getpid(), signal.SIGTERM)  # pending again


class ReadingLoader(DataLoader[Any]):
    """A DataLoader whose processes come from a fork server, outlive signals to the job, and end with this process.

    If `lasting`, they live on from one iteration to the next.
    """

    def __init__(self, *args: Any, workers: int, lasting: bool = False, **settings: Any) -> None:
        if workers:
            start_server()
            settings |= {"multiprocessing_context": "forkserver", "worker_init_fn": begin}
            settings["persistent_workers"] = lasting
        settings |= {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        settings["generator"] = torch.Generator()  # the default one would draw from the global state
        super().__init__(*args, **settings)

    def _get_iterator(self) -> Any:
        if not self.num_workers:
            return super()._get_iterator()
        with without_main():
            return _Reading(self)


class _Reading(_MultiProcessingDataLoaderIter):
    """Names a killed process where torch may only report that a connection broke off."""

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except (RuntimeError, OSError, EOFError) as error:
            # sockets and files of a process close before it counts as ended
            broken = isinstance(error, ConnectionError | FileNotFoundError | EOFError)
            for process in self._workers:
                process.join(_ENDING if broken else 0)
            codes = {process.pid: process.exitcode or 0 for process in self._workers}
            killed = {pid: signal.strsignal(-code) for pid, code in codes.items() if code < 0}
            if not killed:
                raise
            raise RuntimeError(
                f"{len(killed)} of {len(self._workers)} data-loading processes were killed: {killed}. After SIGKILL "
                "request more memory, or lower data.workers. To resume, run the same command with --ckpt_path last"
            ) from error


def begin(worker: int) -> None:
    """For `worker_init_fn`: SIGTERM counts from the training process only, SIGINT and SIGUSR1 not at all.

    Under SLURM a signal to the job reaches every process. A reader that ended at once would take away the batches that the
    training process needs to reach the point where it saves.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for number in (signal.SIGINT, signal.SIGUSR1):  # Ctrl-C reaches every process of a terminal
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(trainer: Any) -> None:
    """Ends this process at the trainer's SIGTERM, or when the trainer is gone."""
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 2)
        if not trainer.is_alive() or (received is not None and received.si_pid == trainer.pid):
            os._exit(0)

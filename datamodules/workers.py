"""Reading processes: all of them come to life, leave signals to the training process, and end with it.

Under SLURM a signal to the job reaches every process of it. A reader that ended at once would take away the batches that
the training process still needs to come to the point where it saves.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

logger = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds that processes have from their fork to their first line; it takes milliseconds
_ATTEMPTS = 3
_FAREWELL = 5.0  # seconds in which a process whose connection broke off is gone; it takes milliseconds


class LivelyLoader(DataLoader[Any]):
    """A DataLoader whose processes are all alive before it is asked for a batch; `worker_init_fn` is its own.

    A process that is forked while another thread holds a lock waits for that lock for ever, and the training process for
    its batches. The interpreter itself has such a lock (seen in CPython 3.11: the list of its threads, which a thread of a
    collective had locked). Processes that have not said a word after a minute are ended, and all are started again; what
    they read follows from the dataset alone. One that is killed later ends the iteration with an error that says so.
    """

    def _get_iterator(self) -> Any:
        return _Reading(self) if self.num_workers else super()._get_iterator()

    def __iter__(self) -> Any:
        """Starts the processes, unless those of an epoch before live on, then iterates.

        Raises:
            RuntimeError: if some did not come to life, three times over.
        """
        if not self.num_workers or multiprocessing.get_start_method() != "fork":
            self.worker_init_fn = begin
            return super().__iter__()
        if self._iterator is not None:  # those of the epoch before go on
            return super().__iter__()
        for _ in range(_ATTEMPTS):
            hears, says = multiprocessing.Pipe(duplex=False)
            with hears:
                with says:
                    self.worker_init_fn = partial(begin, says=says)
                    iterator = super().__iter__()
                try:
                    silent = self.num_workers - _heard(hears, self.num_workers)
                except BaseException:  # Ctrl-C: a process that is stuck would hold up the end of this one
                    _end(iterator)
                    raise
            if not silent:
                return iterator
            logger.warning(
                "%d of %d reading processes did not start within %.0f s of their fork, most likely for a lock that another "
                "thread held: starting all of them again",
                *(silent, self.num_workers, _PATIENCE),
            )
            _end(iterator)
            self._iterator = None  # torch would take up the one that ended, with persistent workers
        raise RuntimeError(
            f"{silent} of {self.num_workers} reading processes did not start, {_ATTEMPTS} times over; set "
            "data.workers: 0 to read in the training process, or look for what starts threads in it before training"
        )


class _Reading(_MultiProcessingDataLoaderIter):
    """Says that a process was killed where torch may only find that its batches break off.

    Torch's own handler of SIGCHLD says it too, at any line of the training process, these included, if it is the first.
    """

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except (RuntimeError, OSError, EOFError) as error:
            # sockets and files of a process close before it counts as ended
            broken = isinstance(error, ConnectionError | FileNotFoundError | EOFError)
            closed = wait([process.sentinel for process in self._workers], _FAREWELL if broken else 0)
            gone = [process for process in self._workers if process.sentinel in closed]
            for process in gone:
                process.join(_FAREWELL)
            killed = {p.pid: signal.strsignal(-p.exitcode) for p in gone if p.exitcode is not None and p.exitcode < 0}
            if not killed:
                raise
            raise RuntimeError(
                f"{len(killed)} of {len(self._workers)} reading processes were killed: {killed}. SIGKILL is most often the "
                "system's answer to want of memory (its log, or that of the SLURM job, says): ask for more of it, or set "
                "data.workers or data.shuffle lower. A training goes on from its last checkpoint by the same command with "
                "--ckpt_path last"
            ) from error


def _heard(hears: Connection, expected: int) -> int:
    """How many processes have begun, all `expected` if one has ended: DataLoader tells of that better."""
    limit = time.monotonic() + _PATIENCE
    for heard in range(expected):
        if not hears.poll(max(limit - time.monotonic(), 0)):
            return heard
        try:
            hears.recv_bytes()
        except EOFError:
            break
    return expected


def _end(iterator: Any) -> None:
    processes = iterator._workers
    iterator._shutdown_workers()  # as Lightning does, and an iterator that nobody needs any more
    for process in processes:
        process.kill()  # one that is stuck in its fork heeds no other signal
        process.join()


def begin(worker: int, says: Connection | None = None) -> None:
    """For `worker_init_fn`: heeds SIGTERM only from the training process, and no SIGUSR1; tokenises without threads.

    Args:
        worker: number of this process.
        says: is told that this process lives, and closed.
    """
    try:
        # a tokenizer that starts threads in a forked worker can lock up
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if hasattr(signal, "sigtimedwait"):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            parent = multiprocessing.parent_process()
            ours = parent.pid if parent else os.getppid()  # under forkserver it is not the parent of the system
            threading.Thread(target=_end_with, args=(os.getppid(), ours), daemon=True).start()
        if says is not None:
            says.send_bytes(b"!")
    finally:
        if says is not None:
            says.close()


def _end_with(parent: int, trainer: int | None) -> None:
    """Ends this process when the trainer says so, or the parent is gone: it may have been killed with no farewells."""
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, 2)
        if os.getppid() != parent or (received is not None and received.si_pid == trainer):
            os._exit(0)

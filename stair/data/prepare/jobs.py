"""Many independent jobs in parallel, each recorded when done: what is killed goes on, what is done is not done again.

A record is a small JSON file, written after the job's result lies in its place. Records, unfinished results and the lock
lie in `.prepare` of the folder that is written.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stair.files import lock, write_json

STATE = ".prepare"

_done: "Synchronized[int] | None" = None  # inputs finished by all processes, for the bar


@dataclass(frozen=True)
class Job:
    """A piece of work.

    Attributes:
        name: of its record; unique in the folder.
        inputs: how many the bar counts for it.
        arguments: for the function that does it; small, as it is sent to another process.
    """

    name: str
    inputs: int
    arguments: tuple[Any, ...] = field(repr=False)


def tell_done(inputs: int = 1) -> None:
    """To be called in a job for each input that is finished."""
    if _done is not None:
        with _done.get_lock():
            _done.value += inputs


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _start(done: "Synchronized[int]") -> None:
    global _done
    _done = done
    if parent := multiprocessing.parent_process():
        # a worker whose parent is killed would wait for ever, and hold the lock
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file or it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """Holds the folder for this process; gives the place for records.

    Raises:
        ValueError: if another process prepares data in it.
    """
    state = folder / STATE
    busy = f"another `stair prepare` writes to {folder}; wait for it or give another folder"
    try:
        with lock(state / "lock", busy):
            yield state
    finally:
        with contextlib.suppress(OSError):  # records of what is unfinished stay
            state.rmdir()


def run(
    jobs: list[Job],
    work: Callable[..., dict[str, Any]],
    records: Path,
    workers: int,
    label: str,
    judge: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """Does the jobs that have no record yet.

    Args:
        jobs: what is to be done.
        work: does one, given its arguments; returns its record. A function of a module.
        records: folder of the records.
        workers: processes; 1 works in this one.
        label: of the bar.
        judge: given each record, old ones too; raises to stop the rest.

    Returns:
        All records, by name of the job, in the order of the jobs.

    Raises:
        ChildProcessError: if a process dies.
    """
    found = {job.name: read_json(_record(records, job)) for job in jobs}
    done = {name: record for name, record in found.items() if record}
    todo = [job for job in jobs if job.name not in done]
    for record in done.values():
        judge(record)
    finished = multiprocessing.Value("Q", sum(job.inputs for job in jobs if job.name in done))
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # no thread that redraws: processes are forked beside it
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        bar = progress.add_task(label, total=sum(job.inputs for job in jobs))

        def tell() -> None:
            progress.update(bar, completed=finished.value, refresh=True)

        for job, record in _results(todo, work, workers, finished, tell):
            write_json(_record(records, job), record)
            done[job.name] = record
            judge(record)
            tell()
    return {job.name: done[job.name] for job in jobs}


def _record(records: Path, job: Job) -> Path:
    return records / f"{job.name}.json"


def _results(
    jobs: list[Job],
    work: Callable[..., dict[str, Any]],
    workers: int,
    finished: "Synchronized[int]",
    tell: Callable[[], None],
) -> Iterator[tuple[Job, dict[str, Any]]]:
    if workers == 1 or not jobs:
        _start(finished)
        for job in jobs:
            yield job, work(*job.arguments)
            tell()
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_start, initargs=(finished,)) as pool:
        waiting = iter(jobs)
        running: dict[Future[dict[str, Any]], Job] = {}
        try:
            while True:
                # few at a time: the arguments of all of them together may be large
                for job in itertools.islice(waiting, 2 * workers - len(running)):
                    running[pool.submit(work, *job.arguments)] = job
                if not running:
                    return
                ready, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                tell()
                for future in ready:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process died, most likely killed for want of memory; run the same command again with fewer "
                "--workers: what is finished is kept"
            ) from error
        finally:
            for future in running:
                future.cancel()

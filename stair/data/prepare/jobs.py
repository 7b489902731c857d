"""Many independent jobs in parallel, each recorded when done: what was killed resumes, what is done is not done again.

A record is a small JSON file, written after the job's result lies in its place. Records, unfinished results and the lock
lie in `.prepare` of the folder that is written.
"""

import contextlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stair.files import lock, write_json

STATE = ".prepare"


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
    known = {job.name: read_json(records / f"{job.name}.json") for job in jobs}
    done = {name: record for name, record in known.items() if record}
    for record in done.values():
        judge(record)
    with tqdm(total=sum(job.inputs for job in jobs), desc=label, disable=None) as bar:
        bar.update(sum(job.inputs for job in jobs if job.name in done))
        for job, record in _results([job for job in jobs if job.name not in done], work, workers):
            write_json(records / f"{job.name}.json", record)
            done[job.name] = record
            judge(record)
            bar.update(job.inputs)
    return {job.name: done[job.name] for job in jobs}


def _results(
    jobs: list[Job], work: Callable[..., dict[str, Any]], workers: int
) -> Iterator[tuple[Job, dict[str, Any]]]:
    if workers == 1 or not jobs:
        yield from ((job, work(*job.arguments)) for job in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_end_with_parent) as pool:
        try:
            # few at a time: the arguments of all of them together may be large
            for start in range(0, len(jobs), 8 * workers):
                some = jobs[start : start + 8 * workers]
                yield from zip(some, pool.map(work, *zip(*(job.arguments for job in some), strict=True)), strict=True)
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process died, most likely because the machine ran out of memory; run the same command again with "
                "fewer --workers: what is finished is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for ever, and hold the lock."""
    threading.Thread(target=_wait_for, args=(multiprocessing.parent_process(),), daemon=True).start()


def _wait_for(parent: Any) -> None:
    parent.join()
    os._exit(1)

"""A lock on a stage's folder: two jobs do not train in one.

A file with a sign of life, not a lock of the file system: not every cluster's file system has those, and the processes
that a training starts would inherit one.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stair.errors import FileError
from stair.files import lock, process_start, read_json, write_json

HEARTBEAT = 30.0  # seconds between two signs of life of a lock's holder
STALE = 300.0  # seconds without one, after which a holder that cannot be checked counts as dead
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "JSM_NAMESPACE_RANK")


@contextmanager
def training_lock(home: Path) -> Iterator[None]:
    """Holds `home/lock`, so that two jobs do not train in one folder. Only the first process of a job takes it.

    The file names host, process, job and time; its modification time is a sign of life every 30 s. It is taken over from
    a process of this machine that has ended, from an earlier start of the same SLURM job, and from a process of another
    machine that has shown no sign of life for 5 minutes.

    Raises:
        FileError: if another process holds it; names the holder.
    """
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        yield
        return
    path, holder = home / "lock", lock_holder()
    with lock(home / "lock.changing", wait=True):
        _check_free(path, holder, home / "lock.changing")
        write_json(path, holder)
    end = threading.Event()
    thread = threading.Thread(target=_beat, args=(path, holder, end), daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
        if _read(path) == holder:
            path.unlink(missing_ok=True)


def lock_holder() -> dict[str, Any]:
    """What this process writes into a lock."""
    task = [os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID")]
    return {
        "host": socket.gethostname(),
        "namespace": os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else "",
        "process": os.getpid(),
        "started": process_start(os.getpid()),
        "job": "_".join(map(str, task)) if all(task) else os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, FileError):
        return {}


def _check_free(path: Path, mine: dict[str, Any], now: Path) -> None:
    """Refuses a lock whose holder may be alive. Age is by the file system's clock, as clocks of machines differ."""
    if not path.exists():
        return
    held = _read(path)
    if held.get("job") and held["job"] == mine["job"] and held["restart"] != mine["restart"]:
        return
    same_machine = (held.get("host"), held.get("namespace")) == (mine["host"], mine["namespace"])
    if same_machine and mine["started"] is not None:
        ended = process_start(held["process"]) != held["started"]
    else:
        os.utime(now)
        ended = now.stat().st_mtime - path.stat().st_mtime > STALE
    if not ended:
        job = f"SLURM job {held['job']}, " if held.get("job") else ""
        raise FileError(
            f"another job trains in {path.parent}: {job}process {held.get('process')} on {held.get('host')}, since "
            f"{held.get('time')}. Wait for its end or end it, or give another --run. The lock of a job that was killed on "
            f"another machine is void after {STALE / 60:.0f} minutes",
            path,
        )


def _beat(path: Path, holder: dict[str, Any], end: threading.Event) -> None:
    while not end.wait(HEARTBEAT):
        if _read(path) == holder:
            os.utime(path)
        elif path.exists():
            print(f"stair: another job has taken over {path}: this one ends", file=sys.__stderr__, flush=True)
            os._exit(1)

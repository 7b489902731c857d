"""A lock on a stage's folder: two jobs do not train in one.

A file with a sign of life, and not a lock of the file system: not every cluster's file system has those, and the processes
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
from stair.files import lock, read_json, write_json

HEARTBEAT = 30.0  # seconds between two signs of life of a lock's holder
STALE = 300.0  # seconds without one, after which a holder on another machine counts as dead
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK", "GROUP_RANK", "JSM_NAMESPACE_RANK")


@contextmanager
def training_lock(home: Path) -> Iterator[None]:
    """Holds `home/lock`, so that two jobs do not train in one folder. Only the first process of a job takes it.

    The file names host, process, job and time, and its time of modification is a sign of life every 30 s. It is taken
    over from a process of this machine that has ended, from an earlier start of the same SLURM job, and from a process
    of another machine that has shown no sign of life for 5 minutes.

    Raises:
        FileError: if another process holds it; names the holder.
    """
    if any(os.environ.get(name, "0") != "0" for name in _RANKS):
        yield
        return
    path, mine = home / "lock", _holder()
    with lock(home / "lock.changing", wait=True):
        _check_holder(path, mine, home / "lock.changing")
        write_json(path, mine)
    end = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, end), daemon=True)
    heart.start()
    try:
        yield
    finally:
        end.set()
        heart.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _holder() -> dict[str, Any]:
    task = [os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID")]
    return {
        "host": socket.gethostname(),
        "space": os.readlink("/proc/self/ns/pid") if Path("/proc/self/ns/pid").exists() else "",
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "job": "_".join(task) if all(task) else os.environ.get("SLURM_JOB_ID"),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _started(process: int) -> str | None:
    """When a process of this machine started, None if it has ended. Numbers of processes are used again."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else fields[18]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, FileError):
        return {}


def _check_holder(path: Path, mine: dict[str, Any], now: Path) -> None:
    """Refuses a lock whose holder may be alive. Age is by the file system's clock, as clocks of machines differ."""
    if not path.exists():
        return
    theirs = _read(path)
    if theirs.get("job") and theirs["job"] == mine["job"] and theirs["restart"] != mine["restart"]:
        return
    if (theirs.get("host"), theirs.get("space")) == (mine["host"], mine["space"]):
        if _started(theirs["process"]) != theirs["started"]:
            return
    else:
        os.utime(now)
        if now.stat().st_mtime - path.stat().st_mtime > STALE:
            return
    job = f"SLURM job {theirs['job']}, " if theirs.get("job") else ""
    raise FileError(
        f"another job trains in {path.parent}: {job}process {theirs.get('process')} on {theirs.get('host')}, since "
        f"{theirs.get('time')}. Wait for its end or end it, or give another --run. The lock of a job that was killed on "
        f"another machine is void after {STALE / 60:.0f} minutes",
        path,
    )


def _beat(path: Path, mine: dict[str, Any], end: threading.Event) -> None:
    while not end.wait(HEARTBEAT):
        if _read(path) == mine:
            os.utime(path)
        elif path.exists():
            print(f"stair: another job has taken over {path}: this one ends", file=sys.__stderr__, flush=True)
            os._exit(1)

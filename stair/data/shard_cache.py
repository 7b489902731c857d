"""Local copies of remote shards, in a folder of limited size that several processes share.

A copy is fetched whole under another name and renamed, so whoever finds it has all of it. One process fetches a shard,
the others that want it wait. What was used longest ago is removed first; who still reads it keeps what it has open.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from stair.data.remote import BUFFER, Remote, is_remote, open_directly

logger = logging.getLogger(__name__)

_COPIES, _LOCKS = "*.shard", "locks"


def check_folder(cache: str) -> None:
    """Makes the folder of copies.

    Raises:
        ValueError: if nothing can be written there.
    """
    try:
        (Path(cache) / _LOCKS).mkdir(parents=True, exist_ok=True)
        with _locked(Path(cache) / _LOCKS / "room"):
            pass
    except OSError as error:
        wanted = "wanted a folder that can be written to, with file locks"
        raise ValueError(
            f"data.remote.cache={cache!r} cannot hold copies ({error}): {wanted}; null keeps none"
        ) from error


def open_shard(shard: str, remote: Remote) -> BinaryIO:
    """Opens a shard for reading forwards.

    Args:
        shard: a path, `pipe:COMMAND`, `http(s)://…`, or a URL that fsspec knows (`s3://`, `gs://`, `hf://`, …).
        remote: how to go about what is not a local file.

    Raises:
        OSError: if it cannot be opened, or on reading if it cannot be read to its end.
    """
    if not is_remote(shard):
        return open(shard, "rb", buffering=BUFFER)
    if remote.cache and not shard.startswith("pipe:") and (copy := open_cached(shard, remote)):
        return copy
    return open_directly(shard, remote)


def open_cached(shard: str, remote: Remote) -> BinaryIO | None:
    """Opens the local copy of a remote shard, fetched if need be.

    Args:
        shard: URL; what it names is taken never to change.
        remote: how to fetch, where to keep copies (`cache` must be set) and their size limit.

    Returns:
        The copy, or None if the shard is larger than the limit.

    Raises:
        OSError: if it cannot be fetched, or the folder cannot be written to.
    """
    assert remote.cache
    folder = Path(remote.cache)
    (folder / _LOCKS).mkdir(parents=True, exist_ok=True)
    mark = hashlib.sha256(shard.encode()).hexdigest()[:24]
    copy = folder / f"{mark}-{PurePosixPath(shard.partition('?')[0]).name[:80]}.shard"
    with _locked(folder / _LOCKS / mark):
        with suppress(FileNotFoundError):
            file = open(copy, "rb", buffering=BUFFER)  # noqa: SIM115 - the caller's
            os.utime(file.fileno())
            return file
        for left in folder.glob(f"{mark}.*.part"):  # of a process that was killed: nobody else fetches this now
            left.unlink(missing_ok=True)
        return _fetched(shard, remote, copy, folder / f"{mark}.{os.getpid()}.part")


def _fetched(shard: str, remote: Remote, copy: Path, fresh: Path) -> BinaryIO | None:
    limit = int(remote.cache_gib * 2**30)
    try:
        with open(fresh, "wb") as target, open_directly(shard, remote) as source:
            while part := source.read(BUFFER):
                if target.tell() + len(part) > limit:
                    logger.warning("%s has more bytes than the whole cache may hold: it is not kept", shard)
                    return None
                target.write(part)
        with _locked(copy.parent / _LOCKS / "room"):
            _make_room(copy.parent, limit - fresh.stat().st_size)
            file = open(fresh, "rb", buffering=BUFFER)  # noqa: SIM115 - open before others can remove it
            fresh.replace(copy)
            return file
    finally:
        fresh.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # the system takes the lock back when its holder dies, however it dies
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path, limit: int) -> None:
    found = []
    for copy in folder.glob(_COPIES):
        with suppress(FileNotFoundError):
            state = copy.stat()
            found.append((state.st_mtime_ns, state.st_size, copy))
    total = sum(size for _, size, _ in found)
    for _, size, copy in sorted(found):
        if total <= limit:
            return
        copy.unlink(missing_ok=True)
        total -= size

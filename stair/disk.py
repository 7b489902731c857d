"""Writes that fail for want of room: said with the path and the room there is, and nothing half-written left behind."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_IN_RUST = re.compile(r"os error (\d+)")


@contextmanager
def whole(path: Path, unfinished: Path) -> Iterator[None]:
    """While a file or folder is written beside its place: removes it if that fails, and says so if room was wanting.

    Args:
        path: what is to appear, or to be replaced.
        unfinished: what is being written.

    Raises:
        OSError: of the number the system gave, naming `path` and the bytes that are free there.
    """
    try:
        yield
    except BaseException as error:
        number = _number(error)
        free = _free(path) if number else 0
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        if number is None:
            raise
        why = f"{os.strerror(number)}: {free} bytes were left. What stood there before is untouched; make room, go on"
        raise OSError(number, why, str(path)) from error


def _number(error: BaseException | None) -> int | None:
    """The number of a failed write, however the writer wrapped it."""
    while error is not None:
        found = _IN_RUST.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number in _NO_ROOM:
            return number
        error = error.__cause__ or error.__context__
    return None


def _free(path: Path) -> int:
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free

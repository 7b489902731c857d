"""What an index needs of a file system: writes that are whole or absent after a kill, one writer at a time, checksums.

New files are written and synced beside the old ones; then the manifest, which alone says which files count, is replaced
by a rename. POSIX only.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from stair.files import atomic_write, lock, removed_on_failure, sha256

Record = dict[str, Any]  # of a file: `bytes`, `sha256`


class _Hashing:
    """A file that hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def write_array(path: Path, array: NDArray[Any]) -> Record:
    """Writes a `.npy` file and waits until it is on disk.

    Returns:
        Its `bytes` and `sha256`.
    """
    with removed_on_failure(path, path), path.open("wb") as file:
        hashing = _Hashing(file)
        np.lib.format.write_array(hashing, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.hash.hexdigest()}


def write_bytes(path: Path, data: bytes) -> Record:
    """Writes a file atomically and returns its record."""
    with atomic_write(path) as part:
        part.write_bytes(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def check(path: Path, record: Record, content: bool) -> None:
    """Compares a file with what was written.

    Args:
        path: the file.
        record: what `write_array` or `write_bytes` returned.
        content: compare the checksum too, which reads all of it; else only the length.

    Raises:
        ValueError: if it is missing or differs.
    """
    size = path.stat().st_size if path.is_file() else None
    if size != record["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes, {record['bytes']} were written: the index is damaged, build it again"
        )
    if content and sha256(path) != record["sha256"]:
        raise ValueError(f"{path} is not what was written (sha256 differs): the index is damaged, build it again")


def write_manifest(path: Path, content: Record) -> None:
    """Replaces a manifest; from here on, and not before, its files are the index."""
    body = json.dumps(content, sort_keys=True)
    write_bytes(path, json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}).encode())


def read_manifest(path: Path) -> Record:
    """Reads a manifest and checks it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged.
    """
    try:
        outer = json.loads(path.read_bytes())
        body: str = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            raise ValueError("sha256 differs")
        content: Record = json.loads(body)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no manifest of an index, or damaged: {error}") from error
    return content


@contextlib.contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Holds the right to write an index; the system gives it back when the process ends, however it ends.

    Raises:
        ValueError: if another process holds it.
    """
    with lock(folder / "lock", f"{folder}: another process is writing this index; try again when it is done"):
        yield

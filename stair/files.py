"""Files on disk: atomic writes, locks, checksums, JSON. Every other module writes through this one.

A file or folder appears complete under its name, or not at all. It has the mode that the umask gives, and it is on disk
when the call returns. Files of others in the same folder stay. POSIX only.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stair.errors import FileError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unreadable(path: Path | str) -> FileError:
    """What to raise for a file that this user may not read."""
    return FileError(
        f"{path}: no permission to read it; run `chmod +r` on it as its owner, or start as its owner", path
    )


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields where to write a file, and renames it to `path`. A symbolic link is replaced, its target stays.

    Raises:
        FileError: if `path` is a folder.
        OSError: if the disk is full, with `path` and the free bytes.
    """
    if path.is_dir() and not path.is_symlink():
        raise FileError(f"{path} is a folder; give the name of a file", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{platform.node()}."
    for stale in path.parent.glob(f"{glob.escape(prefix)}*.part"):  # of killed processes of this machine
        process = stale.name.split(".")[-3]
        if process.isdecimal() and _has_ended(int(process)):
            remove(stale)
    part = path.with_name(f"{prefix}{os.getpid()}.{secrets.token_hex(4)}.part")
    with removed_on_failure(path, part):
        mode = new_file_mode(part)
        yield part
        part.chmod(mode)  # some writers make files that their owner alone can read
        sync(part)
        part.replace(path)
    sync(path.parent)


def _has_ended(process: int) -> bool:
    """Also of one that nobody waits for, a zombie, which keeps its number; usual where containers have no init."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # of another user, or there is no /proc
        return False


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 as `atomic_write` does."""
    with atomic_write(path) as part:
        part.write_bytes(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as `atomic_write` does; equal values give equal bytes."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


@contextmanager
def atomic_folder(folder: Path, last: str, names: Collection[str], is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty folder to write files to, which then replace those of `folder`.

    A new folder appears at once. In a folder that exists, `last`, the file that makes it valid, goes first and comes last:
    it is never valid with a mix of old and new files. Of `names`, all files that such a folder can hold, those that are not
    written again are removed. `is_ours` states whether an existing `last` was written by this project.

    Raises:
        FileError: before anything is written, if `folder` is a file, holds files of others, or is being written.
        OSError: if the disk is full, with `folder` and the free bytes.
    """
    # a folder may be a mount point or a link: only inside is the same file system
    stage = (folder if folder.is_dir() else folder.parent) / f".{folder.absolute().name}.part"
    with lock(stage.with_suffix(".lock"), f"{folder} is being written; try again later"):
        _check_folder(folder, stage, last, names, is_ours)
        remove(stage)
        stage.mkdir()
        with removed_on_failure(folder, stage):
            mode = new_file_mode(stage / ".mode")
            yield stage
            written = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
            for path in written:
                (stage / path).chmod(mode)
                sync(stage / path)
            if not folder.is_dir():
                stage.rename(folder)
                sync(folder.parent)
                return
            for name in [last, *({*names} - {str(path) for path in written})]:
                (folder / name).unlink(missing_ok=True)
            for path in sorted(written, key=lambda path: path == Path(last)):
                (folder / path.parent).mkdir(parents=True, exist_ok=True)
                (stage / path).replace(folder / path)
            shutil.rmtree(stage)
            sync(folder)


def _check_folder(
    folder: Path, stage: Path, last: str, names: Collection[str], is_ours: Callable[[Path], bool]
) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; give the name of a folder", folder)
    present = sorted(name for name in {last, *names} if os.path.lexists(folder / name))
    ours = is_ours(folder / last) if last in present else (stage / last).is_file()  # killed between two renames
    if present and not ours:
        files = f"{', '.join(present)}, which this project did not write"
        raise FileError(f"{folder} holds {files}. Give another folder, or move them", folder)


@contextmanager
def removed_on_failure(path: Path, unfinished: Path) -> Iterator[None]:
    """Removes `unfinished`, which is to become `path`, if writing it fails; a full disk's OSError states the free bytes."""
    try:
        yield
    except BaseException as error:
        number = _no_room_number(error)
        existing = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(existing).free if number else 0
        with suppress(OSError):
            remove(unfinished)
        if number is None:
            raise
        why = f"{os.strerror(number)}: {free} bytes were left. Existing files are unchanged; free space and try again"
        raise OSError(number, why, str(path)) from error


def _no_room_number(error: BaseException | None) -> int | None:
    """The system's number of a write that failed for lack of room, however the writer wrapped it."""
    while error is not None:
        in_rust = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(in_rust[1]) if in_rust else None
        if number in _NO_ROOM:
            return number
        error = error.__cause__ or error.__context__
    return None


def new_file_mode(path: Path) -> int:
    """The mode of a new file there: of the umask, or of the folder's access list. The umask cannot be read in a thread."""
    path.open("xb").close()
    mode = path.stat().st_mode & 0o777
    path.unlink()
    return mode


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there. Never what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock(path: Path, message: str = "", wait: bool = False) -> Iterator[None]:
    """Holds a lock; the system releases it when the process ends. A file system without locks gives none.

    The file names the holder, and is removed afterwards. If another process or thread holds it, FileError with `message`
    and the holder; or waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    job = os.environ.get("SLURM_JOB_ID")
    holder = f"process {os.getpid()} on {platform.node()}" + (f", SLURM job {job}" if job else "")
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                other = path.read_text() if path.exists() else ""
                raise FileError(f"{message or f'{path} is in use'}: by {other or 'another process'}", path) from error
            except OSError:
                pass
            try:
                if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    continue  # the holder before removed it
            except FileNotFoundError:
                continue
            with suppress(OSError):  # no room
                file.truncate(0)
                os.write(file.fileno(), holder.encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def keys_as_text(text: str) -> str:
    """YAML with the same values and its keys quoted: `on` and `2024` stay text, which YAML reads as true and a number.

    Raises:
        yaml.YAMLError: if the text is not YAML.
    """
    import yaml

    root = yaml.compose(text, yaml.SafeLoader)
    _quote_keys(root, set())
    return str(yaml.serialize(root, Dumper=yaml.SafeDumper, width=sys.maxsize))


def _quote_keys(node: Any, seen: set[int]) -> None:
    """Makes the keys of a YAML node text; `seen` has the nodes of anchors that refer to themselves."""
    if node is None or isinstance(node.value, str) or id(node) in seen:
        return
    seen.add(id(node))
    for one in node.value:
        key, value = one if isinstance(one, tuple) else (None, one)
        if key is not None and isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
            key.tag, key.style = "tag:yaml.org,2002:str", '"'
        _quote_keys(value, seen)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; FileError if the file holds anything else, FileNotFoundError if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}", path) from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds a {type(value).__name__}; it must hold one JSON object", path)
    return value


@contextmanager
def folder_or_hub_name(source: str | Path, local: str = "a local path") -> Iterator[None]:
    """Around a call that takes a folder or a name on the hub: a FileError if there is neither."""
    text = str(source)
    if not Path(text).exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
        missing = f"{source}: no such folder, in {Path.cwd()}"
        raise FileError(f"{missing}. A finished stage exports its model to RUN/stageK/stair", source)
    try:
        yield
    except OSError as error:
        if Path(text).exists():
            raise
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        missing = f"{source}: no such folder or file, and it could not be fetched from the hub ({why}). Pass {local}"
        raise FileError(missing, source) from error

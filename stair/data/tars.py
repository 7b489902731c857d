"""Shards: which files a spec names, and the samples of a tar by the rules of `samples.py`."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from stair.data.members import BrokenTarError, Member, members
from stair.data.remote import LOCAL, Remote, is_remote, open_shard
from stair.data.samples import Grouped, group, is_wanted
from stair.errors import FileError

_OTHER_BACKSLASH = re.compile(r"\\(?![{},])")  # a command's own: only a brace's or comma's is for the pattern


def expand(spec: str | list[str]) -> list[str]:
    """The shards a spec names, in a fixed order.

    Args:
        spec: a path, a glob (`a/*.tar`), a brace pattern (`a/{0000..0004}.tar`), a URL or `pipe:` command (braces
            allowed; `\\{`, `\\}` and `\\,` stand for themselves, any other backslash stays), or a list of these.

    Raises:
        FileNotFoundError: if a part of the spec matches no file.
        ValueError: if its braces do not pair, or a URL has a star or a password in it.
    """
    if not isinstance(spec, str):
        return [shard for part in spec for shard in expand(part)]
    try:
        patterns = list(braceexpand.braceexpand(_OTHER_BACKSLASH.sub(r"\\\\", spec)))
    except ValueError as error:  # unbalanced braces
        raise ValueError(
            f"{spec!r} has a brace without its counterpart: wanted a pattern such as {{0000..0004}}"
        ) from error
    return [shard for pattern in patterns for shard in _matches(pattern, spec)]


def _matches(pattern: str, spec: str) -> list[str]:
    if pattern.startswith(("http://", "https://")) and "@" in (there := urlsplit(pattern)).netloc:
        raise ValueError(
            f"a shard on {there.hostname} has a name or password in its URL, which would stand in logs and checkpoints: "
            f"put `machine {there.hostname} login NAME password WORD` into ~/.netrc"
        )
    if "*" in pattern and is_remote(pattern) and not pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r}: nobody is asked which URLs there are; give a brace pattern such as {{0000..0004}}.tar"
        )
    if is_remote(pattern) or Path(pattern).is_file():
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        where = "" if pattern == spec else f" (of {spec!r})"
        if os.path.isdir(pattern):
            raise FileNotFoundError(
                f"{pattern!r}{where} is a folder, no shard: give {os.path.join(pattern, '*.tar')!r}"
            )
        raise FileNotFoundError(
            f"no shard matches {pattern!r}{where}, looked for from {Path.cwd()}; "
            "give a path, a glob such as data/*.tar or a brace pattern such as data/{0000..0004}.tar"
        )
    return found


def walk(
    shard: str,
    remote: Remote = LOCAL,
    compressed: bool = False,
) -> Iterator[Grouped[tuple[int, int]]]:
    """Walks the headers of a tar, one sample at a time, without reading what the members hold where the file can seek.

    Args:
        shard: path or URL.
        remote: how to read what is not local.
        compressed: whether compressed tars are accepted, in which offsets mean nothing.

    Yields:
        Samples; the values of their members are offset and length in bytes.

    Raises:
        FileError: where the file stops being a tar, with the byte; every complete sample before has been yielded by then.
    """
    try:
        with open_shard(shard, remote) as file:
            mode = "r:" if file.seekable() and not compressed else "r|*" if compressed else "r|"
            yield from group(members(file, mode), lambda member: (member.offset, member.size))
    except (BrokenTarError, OSError) as error:
        raise FileError(f"{shard} {error}", shard) from error


def stream(
    shard: str,
    on_error: Callable[[Exception], Any],
    select: Callable[[str], bool] | None = is_wanted,
    remote: Remote = LOCAL,
) -> Iterator[dict[str, Any]]:
    """Reads the samples of one shard from front to end.

    Args:
        shard: path, URL or `pipe:` command.
        on_error: called with what breaks the shard, after which nothing more comes.
        select: which members are read, by name; None for all, those that belong to no sample as b"".
        remote: how shards that are not local files are read.

    Yields:
        `__key__`, `__wrong__` (a reason to skip the sample, else empty), `__odd__` (a list of notes that are no
        such reason) and, by type in lower case, the bytes of each member.
    """

    def read(member: Member) -> bytes:
        return member.read() if select is not None or is_wanted(member.name) else b""

    try:
        with open_shard(shard, remote) as file:
            for sample in group(members(file, "r|*"), read, select):
                wrong = sample.problems[0] if sample.problems else ""
                yield {"__key__": sample.key, "__wrong__": wrong, "__odd__": sample.warnings, **sample.members}
    except (BrokenTarError, OSError) as error:
        on_error(error)

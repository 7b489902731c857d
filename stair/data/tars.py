"""Shards: which files a spec names, and the samples of a tar by the rules of `samples.py`."""

import glob
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import braceexpand

from stair.data.remote import Remote, is_remote
from stair.data.samples import group, is_wanted
from stair.data.shard_cache import open_shard
from stair.data.tar_members import BrokenTarError, Member, Tar

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
    except braceexpand.UnbalancedBracesError as error:
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


def index(path: Path | str, mode: str = "r:") -> Iterator[tuple[str, dict[str, tuple[int, int]], str]]:
    """As `walk`, and with each sample what is wrong with its names, empty if nothing is."""
    try:
        with open(path, "rb") as file:
            for sample in group(Tar(file, mode != "r:"), lambda member: (member.offset, member.size)):
                yield sample.key, sample.members, "; ".join(sample.problems[:1])
    except (BrokenTarError, OSError) as error:
        raise ValueError(f"{path} is cut short or no {'uncompressed ' * (mode == 'r:')}tar ({error})") from error


def walk(path: Path | str, mode: str = "r:") -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Walks the headers of a local tar, one sample at a time, without reading what the members hold.

    Args:
        path: the tar.
        mode: `r:` refuses compressed tars, in which offsets mean nothing, `r:*` takes them.

    Yields:
        A sample's key and, by type (`jpg`, `json`, ...), offset and length of its members in bytes.

    Raises:
        ValueError: where the file stops being a tar; every whole sample before has been yielded by then.
    """
    for key, places, _ in index(path, mode):
        yield key, places


def stream(
    shard: str,
    on_error: Callable[[Exception], Any],
    select: Callable[[str], bool] | None = is_wanted,
    remote: Remote | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads the samples of one shard from front to end.

    Args:
        shard: path, URL or `pipe:` command.
        on_error: told of what breaks the shard, after which nothing more comes.
        select: which members are handed out, by name; None for all, those that belong to no sample as b"".
        remote: how shards that are not local files are read.

    Yields:
        `__key__`, `__wrong__` (a reason to leave the sample out, else empty), `__odd__` (a list of what is no such reason)
        and, by type in lower case, the bytes of each member.
    """
    try:
        with open_shard(shard, remote or Remote()) as file:
            tar = Tar(file)

            def read(member: Member) -> bytes:
                # the others are passed over at any size, as in training
                return tar.read(member.size) if select is not None or is_wanted(member.name) else b""

            for sample in group(tar, read, select):
                wrong = sample.problems[0] if sample.problems else ""
                yield {"__key__": sample.key, "__wrong__": wrong, "__odd__": sample.warnings, **sample.members}
    except (BrokenTarError, OSError) as error:
        on_error(error)

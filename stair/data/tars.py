"""Shards: what a user names, the members of a tar by `tarfile`, and its samples by the rules of `samples.py`."""

import glob
import io
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import braceexpand

from stair.data.remote import LOCAL, Remote, is_remote, open_shard
from stair.data.samples import BLOCK, Grouped, Member, content, group
from stair.errors import FileError, require
from stair.files import unreadable

COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # how gzip, bzip2 and xz begin: positions in such a tar mean nothing
LARGEST = 1 << 28  # bytes of one member that are read into memory; a damaged header may say 2^60
_LONGEST_HEADER = 1 << 20  # bytes of a long name or an extended header
_EXTENDED = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE}
_EXTENDED |= {tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, lzma.LZMAError, zlib.error)
_OTHER_BACKSLASH = re.compile(r"\\(?![{},])")  # a command's own: only a brace's or comma's is for the pattern


def expand(spec: str | list[str]) -> list[str]:
    """The shards a spec names, in a fixed order.

    A spec is a path, a glob (`a/*.tar`), a brace pattern (`a/{0000..0004}.tar`), a URL or `pipe:` command (braces allowed;
    `\\{`, `\\}` and `\\,` stand for themselves, any other backslash stays), or a list of these.

    Raises:
        FileNotFoundError: if a part of the spec matches no file.
        FileError: if a file may not be read.
        ValueError: if its braces do not pair, or a URL has a star or a password in it.
    """
    if not isinstance(spec, str):
        return [shard for part in spec for shard in expand(part)]
    try:
        patterns = list(braceexpand.braceexpand(_OTHER_BACKSLASH.sub(r"\\\\", spec)))
    except ValueError as error:
        raise ValueError(f"{spec!r} has a brace without its counterpart. Give a pattern such as {{00..04}}") from error
    return [shard for pattern in patterns for shard in _matches(pattern, spec)]


def _matches(pattern: str, spec: str) -> list[str]:
    if pattern.startswith(("http://", "https://")) and "@" in (url := urlsplit(pattern)).netloc:
        raise ValueError(
            f"a shard on {url.hostname} has a name or password in its URL, which would appear in logs and checkpoints: "
            f"put `machine {url.hostname} login NAME password WORD` into ~/.netrc"
        )
    if "*" in pattern and is_remote(pattern) and not pattern.startswith("pipe:"):
        raise ValueError(f"{pattern!r}: URLs cannot be listed; give a brace pattern such as {{0000..0004}}.tar")
    if is_remote(pattern):
        return [pattern]
    if Path(pattern).is_file():
        paths = [pattern]
    else:
        paths = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not paths:
        where = "" if pattern == spec else f" (of {spec!r})"
        if os.path.isdir(pattern):
            shards = os.path.join(pattern, "*.tar")
            raise FileNotFoundError(f"{pattern!r}{where} is a folder, not a shard: give {shards!r}")
        raise FileNotFoundError(
            f"no shard matches {pattern!r}{where} (working directory: {Path.cwd()}); "
            "give a path, a glob such as data/*.tar or a brace pattern such as data/{0000..0004}.tar"
        )
    for path in paths:
        if not os.access(path, os.R_OK):
            raise unreadable(path)
    return paths


@dataclass(frozen=True)
class Shards:
    """A source of a mixture.

    Args:
        shards: shard spec, or a list of them.
        weight: share of the pairs, relative to the other sources' weights; more than 0.
    """

    shards: str | list[str]
    weight: float | None = None


def mixture(train: str | list[str] | dict[str, str | list[str] | Shards] | None) -> dict[str, Shards]:
    """The sources by name, "" of an only one; ValueError if some have no weight, or a mapping was not understood as one."""
    given = list(train.values()) if isinstance(train, dict) else [train] if isinstance(train, str) else train or []
    for spec in given:
        if isinstance(spec, str) and spec.startswith("{") and ": " in spec:
            raise ValueError(
                f"data.train={spec!r} cannot be read as a mapping: expected {{NAME: SPEC, ...}} or {{NAME: {{shards: SPEC, "
                "weight: NUMBER}, ...}; patterns with braces stand between quotes, as in {name: 'data/{00..09}.tar'}"
            )
    if not isinstance(train, dict):
        return {"": Shards(train)} if train else {}
    mixed = {name: given if isinstance(given, Shards) else Shards(given) for name, given in train.items()}
    without = [name for name, given in mixed.items() if given.weight is None]
    if without and len(without) < len(mixed):
        raise ValueError(f"sources {without} have no weight and others have: give all of them one, or none")
    if "" in mixed:
        raise ValueError("a source of the mixture has an empty name")
    for name, source in mixed.items():
        weight = source.weight
        is_weight = weight is None or 0 < weight < float("inf")
        require(is_weight, f"weight of source {name!r}", weight, "more than 0, or none")
    return mixed


# ------------------------------------------------------------------ members


class BrokenTarError(ValueError):
    """The bytes stop being a tar."""


class _Header(tarfile.TarInfo):
    """A header that is an error unless it is one, or the block of zeros that ends an archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise BrokenTarError("truncated, without an end-of-archive mark") from error
        except tarfile.HeaderError as error:  # which `tarfile` takes for the end of the archive
            raise BrokenTarError(f"no header of a tar ({error})") from error
        if header.size < 0:
            raise BrokenTarError(f"a header with the size {header.size}")
        return header

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _LONGEST_HEADER:
            raise BrokenTarError(f"an extended header of {self.size} bytes, the limit is {_LONGEST_HEADER}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise BrokenTarError("a sparse member, which is not read")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member


def members(file: BinaryIO, mode: str = "r:") -> Iterator[Member]:
    """The regular files of a tar in order; BrokenTarError names the byte where it is damaged or truncated.

    The mode is `r:` for an uncompressed file that can seek, `r|*` for any tar that is read forwards, compressed or not.
    """
    archive = None
    try:
        archive = tarfile.open(fileobj=file, mode=mode, tarinfo=_Header)  # type: ignore[call-overload] # noqa: SIM115
        # an offset of 0 is an empty archive, in which Python 3.10 would seek backwards
        while archive.offset and (header := archive.next()) is not None:
            if header.sparse is not None:
                raise BrokenTarError("a sparse member, which is not read")
            if header.isreg():
                read = lambda: _content(archive, header)  # noqa: E731
                yield Member(header.name, header.offset, header.offset_data, header.size, read)
            archive.members = []  # it would keep them all
    except _DAMAGED as error:
        kind = "a tar" if mode.endswith("*") else "an uncompressed tar"
        byte = archive.offset if archive else 0
        raise BrokenTarError(f"is truncated, damaged or not {kind} at byte {byte}: {error}") from error


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    if header.size > LARGEST:
        raise BrokenTarError(f"a member of {header.size} bytes, the limit is {LARGEST}")
    try:
        data: bytes = archive.extractfile(header).read()  # type: ignore[union-attr]
    except _DAMAGED as error:
        raise BrokenTarError(f"is truncated or damaged after byte {header.offset_data}: {error}") from error
    if len(data) < header.size:
        raise BrokenTarError("truncated within a member")
    return data


def members_of_part(data: bytes) -> Iterator[Member]:
    """The regular files in a part of a tar that was cut out at headers. Usual headers are read at a tenth of the time."""
    at = 0
    while at < len(data):
        header = data[at : at + BLOCK]
        name, digits, kind = header[:100].partition(b"\0")[0], header[124:136].strip(b" \0"), header[156:157]
        start, size = at + BLOCK, int(digits, 8) if digits.isdigit() else -1
        records = data[start : start + size] if kind == tarfile.XHDTYPE else b""  # as WebDataset writes them, of times
        unusual = kind not in b"0\0x" or header[345] or not name.isascii() or size < 0
        if unusual or b"path=" in records or b"size=" in records:
            yield from members(io.BytesIO(data[at:] + bytes(2 * BLOCK)))
            return
        if kind != tarfile.XHDTYPE:
            yield Member(name.decode(), at, start, size, partial(bytes, memoryview(data)[start : start + size]))
        at = start + -(-size // BLOCK) * BLOCK


# ------------------------------------------------------------------ samples


def walk(
    shard: str,
    remote: Remote = LOCAL,
    compressed: bool = False,
    value: Callable[[Member], Any] = lambda member: (member.offset, member.size),
    everything: bool = False,
) -> Iterator[Grouped[Any]]:
    """Walks a tar one sample at a time. Where the file can seek, only headers and what `value` takes are read.

    `value` is what is kept of a member: offset and length in bytes, or `samples.content`. Compressed tars are accepted with
    `compressed`; offsets mean nothing in them. With `everything`, members of types that no sample uses are kept too.
    FileError where the file stops being a tar, with the byte, after every complete sample before it.
    """
    try:
        with open_shard(shard, remote) as file:
            mode = "r|*" if compressed else "r:" if file.seekable() else "r|"
            yield from group(members(file, mode), value, everything)
    except (BrokenTarError, OSError) as error:
        raise FileError(f"{shard} {error}", shard) from error


def read_samples(shard: str, remote: Remote = LOCAL, everything: bool = False) -> Iterator[Grouped[bytes]]:
    """Reads the samples of a tar, compressed or not, sequentially; arguments and errors as of `walk`."""
    return walk(shard, remote, True, content, everything)

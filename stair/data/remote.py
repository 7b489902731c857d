"""Bytes of shards: from a file, a server or bucket that `fsspec` reads, or a command.

A failed read is tried again, after pauses that double. The last failure is an `OSError` with its cause.
"""

import hashlib
import io
import ipaddress
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stair.errors import SettingError, install, require
from stair.files import lock

logger = logging.getLogger(__name__)

_PART, _PARTS = 1 << 20, 8  # bytes of a request where a shard is read sequentially, and requests at once
_GAP = 1 << 16  # bytes between two ranges that are read along rather than by a second request
_REQUESTS = 32  # of a process at a time
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before the second try, doubled each time
_LASTING = (400, 401, 403, 404, 405, 410)  # statuses for which another try would get the same answer
_BEHIND_END = 416
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Range = tuple[str, int, int]  # path or URL, first byte, and the byte behind the last


@dataclass(frozen=True)
class Remote:
    """How remote shards are read.

    Args:
        timeout: seconds without data until a connection is considered dead; more than 0.
        retries: number of retries, with pauses that double from 0.5 to 30 seconds; 0 or more.
        cache: folder for local copies of remote shards; processes can share it. None: `Range` requests for samples.
        cache_gib: size limit of that folder in GiB; the least recently used copies are deleted first. More than 0.
    """

    timeout: float = 60.0
    retries: int = 6
    cache: str | None = None
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        require(self.timeout > 0, "data.remote.timeout", self.timeout, "more than 0")
        require(self.retries >= 0, "data.remote.retries", self.retries, "0 or more")
        require(self.cache_gib > 0, "data.remote.cache_gib", self.cache_gib, "more than 0")

    def at_first(self) -> "Remote":
        """For reading before the first step: gives up within a minute."""
        return replace(self, timeout=min(self.timeout, 10.0), retries=min(self.retries, 3))


LOCAL = Remote()  # the default of functions that read local files too


class LastingError(OSError):
    """A failure that another try would not change."""


class NoRangeError(LastingError):
    """A server sends whole files only."""


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL or a `pipe:` command rather than a local file."""
    return "://" in shard or shard.startswith("pipe:")


def read_ranges(ranges: Sequence[Range], remote: Remote) -> Iterator[bytes | OSError]:
    """Reads parts of files: remote ones all at once, neighbours by one request; local ones when they are taken.

    Yields the bytes of each range, fewer where the file ends; or why they cannot be read.
    """
    remote_ranges = [each for each in ranges if is_remote(each[0]) and not remote.cache]
    fetched = iter(_fetched(remote_ranges, remote) if remote_ranges else ())
    for path, start, stop in ranges:
        if is_remote(path) and not remote.cache:
            yield next(fetched)
            continue
        try:
            with local_copy(path, remote) if is_remote(path) else open(path, "rb", buffering=0) as file:
                yield os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            yield error


def _fetched(ranges: Sequence[Range], remote: Remote) -> Iterator[bytes | OSError]:
    requests: list[Range] = []
    owners = dict[int, int]()  # place in `requests` by place in `ranges`
    for i in sorted(range(len(ranges)), key=ranges.__getitem__):
        (url, start, stop), (last, first, end) = ranges[i], requests[-1] if requests else ("", 0, 0)
        if url == last and start <= end + _GAP and stop - first <= _PART:
            requests[-1] = url, first, max(stop, end)
        else:
            requests.append(ranges[i])
        owners[i] = len(requests) - 1
    with ThreadPoolExecutor(min(len(requests), _REQUESTS)) as threads:
        results = list(threads.map(partial(_fetch, remote), requests))
    for i, (_, start, stop) in enumerate(ranges):
        result, first = results[owners[i]], requests[owners[i]][1]
        yield result if isinstance(result, OSError) else result[start - first : stop - first]


def _fetch(remote: Remote, request: Range) -> bytes | OSError:
    """A range of a remote file, tried again after failures that may pass."""
    url, start, stop = request
    failure = OSError()
    for attempt in range(remote.retries + 1):
        if attempt:
            logger.info("%s, try %d: %s", url, attempt, failure)
            time.sleep(min(_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
        try:
            files, path = _system(url, remote)
            data: bytes = files.cat_file(path, start, stop)
            return data
        except Exception as error:
            if getattr(error, "status", None) == _BEHIND_END:
                return b""
            failure = _as_os_error(url, error)
            if isinstance(failure, LastingError):
                return failure
    return OSError(f"{url} cannot be read at byte {start}, tried {remote.retries + 1} times: {failure}")


def _system(url: str, remote: Remote) -> tuple[Any, str]:
    """The file system of a URL and the path in it; LastingError if there is none, or its library is not installed."""
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme in ("http", "https"):
        options = {"client_kwargs": {"seconds": remote.timeout}, "get_client": _client}
    elif scheme in ("s3", "s3a"):
        options = {"config_kwargs": {"connect_timeout": remote.timeout, "read_timeout": remote.timeout}}
    try:
        import fsspec

        files, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        remedy = f"; {install('remote')}" if isinstance(error, ImportError) else ""
        raise LastingError(f"{url} cannot be opened: {error}{remedy}") from error
    return files, path


def _as_os_error(url: str, error: Exception) -> OSError:
    kind = type(error).__name__
    lasting = isinstance(error, FileNotFoundError | PermissionError) or getattr(error, "status", None) in _LASTING
    if lasting or "Credential" in kind:  # as botocore's NoCredentialsError
        return LastingError(f"{url}: {kind}: {error}")
    return error if isinstance(error, LastingError) else OSError(f"{kind}: {error}")


# ------------------------------------------------------------------ http


async def _client(seconds: float, loop: Any = None) -> Any:
    """A session that gives up after so many silent seconds, reads passwords in ~/.netrc, and checks answers."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    trace.on_request_end.append(_check_range)
    limits = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    return aiohttp.ClientSession(loop=loop, timeout=limits, trace_configs=[trace], trust_env=True)


async def _check_range(session: Any, context: Any, answer: Any) -> None:
    if answer.response.status == 200 and answer.method == "GET" and "Range" in answer.headers:
        raise NoRangeError(f"{answer.url}: the server sends whole files only. Set data.remote.cache to a folder")


async def _check_redirect(session: Any, context: Any, answer: Any) -> None:
    """Follows no redirect from the web into this machine or its network."""
    location = answer.response.headers.get("Location", "")
    target = answer.url.join(type(answer.url)(location))
    if target.scheme not in ("http", "https"):
        raise LastingError(f"{answer.url} redirects to {location!r}: only http and https are followed")
    if target.authority != answer.url.authority and (address := _local_address(target.host or "")):
        raise LastingError(
            f"{answer.url} redirects to {location!r}, which is the local address {address}: not followed. "
            "To read it, give that URL itself"
        )


def _local_address(host: str) -> str | None:
    """The first address of a host that is not a public one."""
    for text in sorted({str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}):
        address = ipaddress.ip_address(text)
        if isinstance(address, ipaddress.IPv6Address):
            inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
            # where a router would send it on to
            address = inside or address.ipv4_mapped or address.sixtofour or address
        if not address.is_global or address.is_multicast:
            return text
    return None


# ------------------------------------------------------------------ sequentially


def open_shard(shard: str, remote: Remote) -> BinaryIO:
    """Opens a path, `pipe:COMMAND`, `http(s)://…`, or a URL that fsspec knows, for reading sequentially.

    OSError if it cannot be opened, or on reading if it cannot be read to its end.
    """
    if not is_remote(shard):
        return open(shard, "rb", buffering=_PART)
    if remote.cache and not shard.startswith("pipe:"):
        return local_copy(shard, remote)
    parts = _output(shard[5:], remote.timeout) if shard.startswith("pipe:") else _parts(shard, remote)
    return io.BufferedReader(_Parts(parts), _PART)


class _Parts(io.RawIOBase):
    """A file of parts that a generator yields."""

    def __init__(self, parts: Generator[bytes, None, None]) -> None:
        self._parts, self._data = parts, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._data = self._data or memoryview(next(self._parts, b""))
        count = min(len(self._data), len(buffer))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count

    def close(self) -> None:
        self._parts.close()
        super().close()


def _parts(url: str, remote: Remote) -> Generator[bytes, None, None]:
    """A remote file by small requests, which succeed over a connection that breaks off often."""
    start, count = 0, 1  # one at first: it shows whether the server knows `Range`
    while True:
        starts = range(start, start + count * _PART, _PART)
        for part in read_ranges([(url, each, each + _PART) for each in starts], remote):
            if isinstance(part, NoRangeError):
                yield from _whole(url, remote)
                return
            if isinstance(part, OSError):
                raise part
            yield part
            if len(part) < _PART:
                return
        start, count = start + count * _PART, _PARTS


def _whole(url: str, remote: Remote) -> Generator[bytes, None, None]:
    files, path = _system(url, remote)
    try:
        with files.open(path, "rb", block_size=0) as file:
            while block := file.read(_PART):
                yield block
    except Exception as error:
        raise _as_os_error(url, error) from error


def _output(command: str, timeout: float) -> Generator[bytes, None, None]:
    """The output of a shell command in a process group of its own, so that what it started ends with it."""
    # not buffered: poll does not see what lies in a buffer
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
    assert process.stdout
    try:
        poll = select.poll()  # select takes no descriptor above 1023
        poll.register(process.stdout, select.POLLIN)
        while True:
            if not poll.poll(1000 * timeout):
                raise TimeoutError(f"`{command}` gave no byte for {timeout:g} s")
            if not (part := process.stdout.read(_PART)):
                break
            yield part
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout)
        if process.returncode is None:
            raise TimeoutError(f"`{command}` closed its output and did not end for {timeout:g} s")
        if process.returncode:
            raise OSError(f"`{command}` ended with {process.returncode}")
    finally:
        process.stdout.close()
        if process.returncode is None:  # else its number may be another's by now
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(OSError):  # all of them have ended
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(5)


# ------------------------------------------------------------------ local copies


def check_cache(remote: Remote) -> None:
    """Makes the folder of copies; SettingError if nothing can be written there."""
    if remote.cache:
        with _cache_errors(remote.cache), lock(Path(remote.cache) / "room.lock", wait=True):
            pass


@contextmanager
def _cache_errors(folder: str) -> Iterator[None]:
    """Makes errors of this machine's files, which have a number, those of the setting."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise SettingError(
            f"data.remote.cache={folder!r} cannot hold copies ({error}): free space there, lower data.remote.cache_gib, "
            "give a folder that can be written to, or null for no copies", "data.remote.cache",
        ) from error  # fmt: skip


def local_copy(url: str, remote: Remote) -> BinaryIO:
    """Opens the local copy of a remote file, fetched whole if need be, once for all processes.

    OSError if it cannot be fetched, SettingError if there is no room for it or no permission.
    """
    assert remote.cache
    folder, digest = Path(remote.cache), hashlib.sha256(url.encode()).hexdigest()[:24]
    copy = folder / f"{digest}-{PurePosixPath(url.partition('?')[0]).name[-80:]}.copy"
    with _cache_errors(remote.cache):
        if not copy.exists():
            with lock(folder / f"{digest}.lock", wait=True):
                if not copy.exists():
                    part = folder / f"{digest}.part"  # of a killed process too: nobody else fetches this now
                    try:
                        with open_shard(url, replace(remote, cache=None)) as source, open(part, "wb") as target:
                            shutil.copyfileobj(source, target, _PARTS * _PART)
                        _make_room(folder, int(remote.cache_gib * 2**30), part)
                        part.replace(copy)
                    finally:
                        part.unlink(missing_ok=True)
        file = open(copy, "rb")  # noqa: SIM115 - the caller's, who keeps it when the copy is deleted
        os.utime(file.fileno(), ns=(time.time_ns(),) * 2)  # the kernel's own clock has ticks of 4 ms
        return file


def _make_room(folder: Path, limit: int, part: Path) -> None:
    with lock(folder / "room.lock", wait=True):
        total, copies = part.stat().st_size, []
        if total > limit:
            raise SettingError(
                f"{folder} cannot hold a copy of {total} bytes, more than data.remote.cache_gib ({limit} bytes): raise it",
                "data.remote.cache_gib",
            )
        for copy in folder.glob("*.copy"):
            with suppress(FileNotFoundError):
                status = copy.stat()
                copies.append((status.st_mtime_ns, status.st_size, copy))
                total += status.st_size
        for _, size, copy in sorted(copies):
            if total > limit:
                copy.unlink(missing_ok=True)
                total -= size

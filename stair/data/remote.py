"""Where the bytes of a shard come from: a file, a server or bucket that `fsspec` reads, or a command.

Samples are read by position: `read_ranges` fetches many ranges at once. A failure is tried again, after pauses that double.
The last failure, or one that another try would repeat, is an `OSError` with its cause.
"""

import hashlib
import io
import ipaddress
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stair.data.specs import require
from stair.errors import SettingError, install
from stair.files import lock

logger = logging.getLogger(__name__)

BUFFER = 1 << 20  # bytes
_PART, _PARTS = 1 << 20, 8  # bytes of a request where a shard is read from front to end, and requests at once
_SMALL = 1 << 28  # bytes of an index: a million shards have a tenth of it
_AT_ONCE = 32  # requests of a process under way
_PAUSE = 0.5  # seconds before the second try; doubled each time
_LONGEST_PAUSE = 30.0
_FIRST_TIMEOUT, _FIRST_RETRIES = 10.0, 3  # before a run has begun, a user waits for the answer
_LASTING = (400, 401, 403, 404, 405, 410)  # statuses for which another try would get the same answer
_BEHIND_END = 416
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Range = tuple[str, int, int]  # path or URL, first byte, and the byte behind the last


@dataclass(frozen=True)
class Remote:
    """How shards that are not local files are read.

    Args:
        timeout: seconds without a byte after which a connection counts as dead; more than 0.
        retries: new tries, after pauses that double from half a second to half a minute. 0 or more.
        cache: folder for local copies of remote shards, which may be shared by processes. None: single samples are read
            by `Range` requests.
        cache_gib: size limit of that folder in GiB; copies that were used longest ago are deleted first. More than 0.

    Raises:
        SettingError: if a value is out of range.
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
        return replace(self, timeout=min(self.timeout, _FIRST_TIMEOUT), retries=min(self.retries, _FIRST_RETRIES))


LOCAL = Remote()  # the default of functions that read local files too


class LastingError(OSError):
    """A failure that another try would not change."""


class NoRangeError(LastingError):
    """A server sends whole files only."""


def is_remote(shard: str) -> bool:
    """Whether a shard is something else than a local file: a URL or a `pipe:` command."""
    return "://" in shard or shard.startswith("pipe:")


def read_ranges(ranges: Sequence[Range], remote: Remote) -> Iterator[bytes | OSError]:
    """Reads parts of files: those that are not local at the same time, local ones when they are taken.

    Args:
        ranges: path or URL, first byte, and the byte behind the last.
        remote: time-out, retries and cache.

    Yields:
        The bytes of each, fewer where the file ends; or why they cannot be read.
    """
    far = iter(_fetched([each for each in ranges if is_remote(each[0]) and not remote.cache], remote))
    for path, start, stop in ranges:
        if is_remote(path) and not remote.cache:
            yield next(far)
            continue
        try:
            with local_copy(path, remote) if is_remote(path) else open(path, "rb", buffering=0) as file:
                yield os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            yield error


def _fetched(ranges: Sequence[Range], remote: Remote) -> list[bytes | OSError]:
    """Ranges from afar, each tried again after a failure that may pass."""
    results = _tried(ranges, remote)
    for attempt in range(remote.retries):
        due = [i for i, result in enumerate(results) if _may_pass(result)]
        if not due:
            break
        logger.info("%s, try %d: %s", ranges[due[0]][0], attempt + 1, results[due[0]])
        time.sleep(min(_PAUSE * 2**attempt, _LONGEST_PAUSE))
        for i, result in zip(due, _tried([ranges[i] for i in due], remote), strict=True):
            results[i] = result
    for i, ((url, start, _), result) in enumerate(zip(ranges, results, strict=True)):
        if isinstance(result, OSError) and _may_pass(result):
            tries = remote.retries + 1
            results[i] = OSError(f"{url} cannot be read at byte {start}, tried {tries} times: {result}")
    return results


def _may_pass(result: bytes | OSError) -> bool:
    return isinstance(result, OSError) and not isinstance(result, LastingError)


def _tried(ranges: Sequence[Range], remote: Remote) -> list[bytes | OSError]:
    """One try of each."""
    found: list[Any] = [None] * len(ranges)
    by_system: dict[int, tuple[Any, dict[int, Range]]] = {}
    for i, (url, start, stop) in enumerate(ranges):
        try:
            files, path = _system(url, remote)
            by_system.setdefault(id(files), (files, {}))[1][i] = path, start, stop
        except OSError as error:
            found[i] = error
    for files, which in by_system.values():
        more = {"batch_size": _AT_ONCE} if files.async_impl else {}
        spans = map(list, zip(*which.values(), strict=True))
        for i, result in zip(which, files.cat_ranges(*spans, on_error="return", **more), strict=True):
            if getattr(result, "status", None) == _BEHIND_END:
                found[i] = b""
            else:
                found[i] = _as_os_error(ranges[i][0], result) if isinstance(result, Exception) else result
    return found


def _system(url: str, remote: Remote) -> tuple[Any, str]:
    """The file system of a URL and the path in it.

    Raises:
        LastingError: if there is none, or its library is not installed.
    """
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
    """An error of a library of fsspec, lasting or not."""
    if isinstance(error, LastingError):
        return error
    status = getattr(error, "status", None)
    lasting = isinstance(error, FileNotFoundError | PermissionError) or status in _LASTING
    if lasting or "Credential" in type(error).__name__:  # as botocore's NoCredentialsError
        return LastingError(f"{url}: {type(error).__name__}: {error}")
    return OSError(f"{type(error).__name__}: {error}")


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
    """Else a server without `Range` would send the whole shard for each sample."""
    if answer.response.status == 200 and answer.method == "GET" and "Range" in answer.headers:
        raise NoRangeError(
            f"{answer.url}: the server sends whole files only (no Range): set data.remote.cache to a folder for copies"
        )


async def _check_redirect(session: Any, context: Any, answer: Any) -> None:
    """Redirects are followed, but not from the web into this machine or its network."""
    place = answer.response.headers.get("Location", "")
    there = answer.url.join(type(answer.url)(place))
    if there.scheme not in ("http", "https"):
        raise LastingError(f"{answer.url} redirects to {place!r}: only http and https are followed")
    if there.authority != answer.url.authority and (local := _local_address(there.host or "")):
        raise LastingError(
            f"{answer.url} redirects to {place!r}, which is the local address {local}: not followed. "
            "Give that URL itself if it is meant"
        )


def _local_address(host: str) -> str | None:
    """The first address of a host that is not a public one."""
    found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    return next((address for address in sorted(found) if not _is_public(ipaddress.ip_address(address))), None)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:  # a router would send it on to that one
            return _is_public(inner)
    return address.is_global and not address.is_multicast


# ------------------------------------------------------------------ from front to end


def open_shard(shard: str, remote: Remote) -> BinaryIO:
    """Opens a shard for reading from front to end.

    Args:
        shard: a path, `pipe:COMMAND`, `http(s)://…`, or a URL that fsspec knows (`s3://`, `gs://`, `hf://`, …).
        remote: time-out, retries and cache.

    Raises:
        OSError: if it cannot be opened, or on reading if it cannot be read to its end.
    """
    if shard.startswith("pipe:"):
        return io.BufferedReader(Command(shard.removeprefix("pipe:"), remote.timeout), BUFFER)
    if not is_remote(shard):
        return open(shard, "rb", buffering=BUFFER)
    if remote.cache:
        return local_copy(shard, remote)
    try:
        return io.BufferedReader(_Blocks(shard, remote), BUFFER)
    except NoRangeError:
        files, path = _system(shard, remote)
        stream: BinaryIO = files.open(path, "rb", block_size=0)
        return stream


def read_small(url: str, remote: Remote) -> bytes | None:
    """A small file beside remote shards; None if there is none.

    Raises:
        OSError: if it is not known whether there is one, or it cannot be read.
    """
    try:
        with open_shard(url, replace(remote, cache=None)) as file:
            content = file.read(_SMALL + 1)
    except LastingError:
        return None
    if len(content) > _SMALL:
        raise OSError(f"{url} has more than {_SMALL} bytes, which no such file has")
    return content


class _Blocks(io.RawIOBase):
    """A remote file, read by small parts, which arrive over a connection that breaks off often too.

    One part at first, since a server without `Range` is noticed by it; then several at once.
    """

    def __init__(self, url: str, remote: Remote) -> None:
        self._url, self._remote, self._next = url, remote, 0
        self._data = memoryview(self._read(1))

    def _read(self, count: int) -> bytes:
        starts = range(self._next, self._next + count * _PART, _PART)
        data = b""
        for part in read_ranges([(self._url, start, start + _PART) for start in starts], self._remote):
            if isinstance(part, OSError):
                raise part
            data += part
            self._next += len(part)
            if len(part) < _PART:
                break
        return data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._data and self._next % _PART == 0:  # a shorter part is the last one
            self._data = memoryview(self._read(_PARTS))
        count = min(len(self._data), len(buffer))
        buffer[:count], self._data = self._data[:count], self._data[count:]
        return count


class Command(io.RawIOBase):
    """The output of a shell command.

    The command has a process group of its own, so that what it started ends with it.

    Args:
        command: for the shell.
        timeout: seconds of silence after which it is given up.
    """

    def __init__(self, command: str, timeout: float) -> None:
        self._command, self._timeout = command, timeout
        # not buffered: poll does not see what lies in a buffer
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        self._output = select.poll()  # select takes no descriptor above 1023
        self._output.register(self._process.stdout, select.POLLIN)  # type: ignore[arg-type]

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what has arrived.

        Raises:
            OSError: if nothing arrives in time, or the command fails.
        """
        if not self._output.poll(1000 * self._timeout):
            raise TimeoutError(f"`{self._command}` gave no byte for {self._timeout:g} s")
        count = self._process.stdout.readinto(buffer)  # type: ignore[union-attr]
        if not count:
            try:
                status = self._process.wait(self._timeout)
            except subprocess.TimeoutExpired:
                raise TimeoutError(
                    f"`{self._command}` closed its output and did not end for {self._timeout:g} s"
                ) from None
            if status:
                raise OSError(f"`{self._command}` ended with {status}")
        return count or 0

    def close(self) -> None:
        """Ends the command and what it started."""
        if not self.closed:
            self._process.stdout.close()  # type: ignore[union-attr]
            if self._process.returncode is None:  # else its number may be another's by now
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(OSError):  # all of them have ended
                        os.killpg(self._process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(5)
        super().close()


# ------------------------------------------------------------------ local copies


def check_cache(remote: Remote) -> None:
    """Makes the folder of copies.

    Raises:
        SettingError: if nothing can be written there.
    """
    if remote.cache:
        with _names_cache(remote.cache), lock(Path(remote.cache) / "room.lock", wait=True):
            pass


@contextmanager
def _names_cache(folder: str) -> Iterator[None]:
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

    Raises:
        OSError: if it cannot be fetched.
        SettingError: if there is no room for it, or no permission.
    """
    assert remote.cache
    folder, mark = Path(remote.cache), hashlib.sha256(url.encode()).hexdigest()[:24]
    copy = folder / f"{mark}-{PurePosixPath(url.partition('?')[0]).name[-80:]}.copy"
    with _names_cache(remote.cache):
        if not copy.exists():
            with lock(folder / f"{mark}.lock", wait=True):
                if not copy.exists():
                    fresh = folder / f"{mark}.part"  # of a process that was killed, too: nobody else fetches this now
                    try:
                        _fetch(url, fresh, remote)
                        _make_room(folder, int(remote.cache_gib * 2**30), fresh)
                        fresh.replace(copy)
                    finally:
                        fresh.unlink(missing_ok=True)
        file = open(copy, "rb")  # noqa: SIM115 - the caller's, who keeps it when the copy is deleted
        os.utime(file.fileno(), ns=(time.time_ns(),) * 2)  # the kernel's own clock has ticks of 4 ms
        return file


def _fetch(url: str, target: Path, remote: Remote) -> None:
    with open_shard(url, replace(remote, cache=None)) as source, open(target, "wb") as file:
        while True:
            try:
                block = source.read(_PARTS * _PART)
            except Exception as error:
                raise _as_os_error(url, error) from error
            if not block:
                return
            file.write(block)


def _make_room(folder: Path, limit: int, fresh: Path) -> None:
    with lock(folder / "room.lock", wait=True):
        total, found = fresh.stat().st_size, []
        if total > limit:
            raise SettingError(
                f"{folder} cannot hold a copy of {total} bytes, more than data.remote.cache_gib ({limit} bytes): raise it",
                "data.remote.cache_gib",
            )
        for copy in folder.glob("*.copy"):
            with suppress(FileNotFoundError):
                state = copy.stat()
                found.append((state.st_mtime_ns, state.st_size, copy))
                total += state.st_size
        for _, size, copy in sorted(found):
            if total > limit:
                copy.unlink(missing_ok=True)
                total -= size

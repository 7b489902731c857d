"""Where the bytes of a shard come from: a file, a command, the web, or a bucket.

Whoever reads a shard sees one unbroken run of bytes. A connection that is slow, refused, dropped or cut short is made
again, and reading goes on at the byte where it stopped; so a sample is neither lost nor repeated by it. When that does
not help, the shard is broken, with the cause, and nothing waits for ever.
"""

import base64
import io
import ipaddress
import logging
import netrc
import os
import select
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import Any, BinaryIO
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

BUFFER = 1 << 20  # bytes
_SMALL = 1 << 28  # bytes of an index: a million shards have a tenth of it
_PAUSE = 0.5  # seconds before the first new try; doubled each time
_LONGEST_PAUSE = 30.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_FIRST_TIMEOUT, _FIRST_RETRIES = 10.0, 3  # before a run has begun: who waits there wants to know soon
_LASTING = (400, 401, 403, 404, 405, 410, 416)  # another try would get the same answer


@dataclass(frozen=True)
class Remote:
    """How shards that are not local files are read.

    Args:
        timeout: seconds without a byte after which a connection counts as dead; more than 0.
        retries: new tries, with pauses that double from half a second to half a minute, before a shard counts as broken;
            any byte that arrives starts the count again. 0 or more.
        cache: folder for local copies of remote shards, which may be shared by processes and machines. None: no copies.
        cache_gib: size limit of that folder in GiB; what was used longest ago goes first. More than 0.

    Raises:
        ValueError: if a value is out of range.
    """

    timeout: float = 60.0
    retries: int = 6
    cache: str | None = None
    cache_gib: float = 100.0

    def __post_init__(self) -> None:
        """Refuses what cannot work."""
        if self.timeout <= 0 or self.retries < 0 or self.cache_gib <= 0:
            raise ValueError(f"{self}: wanted timeout and cache_gib above 0 and retries of 0 or more")

    def at_first(self) -> "Remote":
        """For looking at shards before the first step: gives up within a minute."""
        return replace(self, timeout=min(self.timeout, _FIRST_TIMEOUT), retries=min(self.retries, _FIRST_RETRIES))


class LastingError(OSError):
    """A failure that another try would not mend."""


def is_remote(shard: str) -> bool:
    """Whether a shard is something else than a local file: a URL or a `pipe:` command."""
    return "://" in shard or shard.startswith("pipe:")


def open_directly(shard: str, remote: Remote) -> BinaryIO:
    """As `open_shard`, without local copies."""
    return io.BufferedReader(Steady(shard, remote), BUFFER)


def read_small(url: str, remote: Remote) -> bytes | None:
    """A small file beside remote shards; None if there is none.

    Raises:
        OSError: if it cannot be told whether there is one, or it cannot be read.
    """
    try:
        with open_directly(url, remote) as file:
            content = file.read(_SMALL + 1)
    except LastingError:
        return None
    if len(content) > _SMALL:
        raise OSError(f"{url} has more than {_SMALL} bytes, which no such file has")
    return content


class Steady(io.RawIOBase):
    """A remote file as one unbroken run of bytes.

    Args:
        shard: `pipe:` command or URL.
        remote: time-out and number of retries.
    """

    def __init__(self, shard: str, remote: Remote) -> None:
        self._shard, self._remote = shard, remote
        self._connect = _connection(shard)
        self._stream: Connection | None = None
        self._tag: str | None = None
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads what has arrived, after as many new connections as it takes.

        Raises:
            OSError: when it is given up, with the last cause.
        """
        for attempt in range(self._remote.retries + 1):
            try:
                if self._stream is None:
                    self._stream = self._connect(self._at, self._remote.timeout)
                    self._same_file(self._stream.tag)
                count = self._stream.readinto(buffer)
                if not count:
                    self._stream.check_end(self._at)
                self._at += count
                return count
            except LastingError:
                raise
            except (OSError, HTTPException, EOFError) as error:
                self._drop()
                cause = f"{type(error).__name__}: {error}"
                logger.info("%s, byte %d, try %d: %s", self._shard, self._at, attempt + 1, cause)
                if attempt < self._remote.retries:
                    time.sleep(min(_PAUSE * 2**attempt, _LONGEST_PAUSE))
        raise OSError(
            f"{self._shard} cannot be read beyond byte {self._at}, tried {self._remote.retries + 1} times: {cause}"
        )

    def _same_file(self, tag: str | None) -> None:
        if self._at and tag != self._tag:
            raise LastingError(f"{self._shard} was changed while it was read: its tag was {self._tag}, now it is {tag}")
        self._tag = tag

    def _drop(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with suppress(OSError, HTTPException):
                stream.close()

    def close(self) -> None:
        """Ends the connection or the command."""
        self._drop()
        super().close()


class Connection:
    """A running transfer from some byte of a shard on.

    Args:
        stream: gives the bytes.
        length: bytes of the whole shard, None if nobody said.
        tag: what changes when the shard is replaced by another of the same name, None if nobody said.
    """

    def __init__(self, stream: Any, length: int | None, tag: str | None = None) -> None:
        self._stream, self._length, self.tag = stream, length, tag

    def readinto(self, buffer: Any) -> int:
        """Bytes read into the buffer, 0 at the end."""
        return self._stream.readinto(buffer) or 0

    def check_end(self, at: int) -> None:
        """Tells an end from a break.

        Raises:
            EOFError: if the shard is longer than what has come.
        """
        if self._length is not None and at < self._length:
            raise EOFError(f"the transfer ended after {at} of {self._length} bytes")

    def close(self) -> None:
        """Ends the transfer."""
        self._stream.close()


def _connection(shard: str) -> Callable[[int, float], Connection]:
    if shard.startswith("pipe:"):
        return lambda at, timeout: _Command(shard.removeprefix("pipe:"), at, timeout)
    if urlsplit(shard).scheme in ("http", "https"):
        return lambda at, timeout: _over_http(shard, at, timeout)
    return lambda at, timeout: _Bucket(shard, at, timeout)


def _skip(stream: Any, size: int) -> None:
    while size > 0:
        read = len(stream.read(min(size, BUFFER)))
        if not read:
            raise EOFError("the transfer ended before the byte where reading had stopped")
        size -= read


class _Command(Connection):
    """A shell command's output. It is run again from its beginning where it failed or said nothing for `timeout` seconds.

    It has a process group of its own, so that what it started ends with it: a shell that is ended leaves its pipeline.
    """

    def __init__(self, command: str, at: int, timeout: float) -> None:
        self._command, self._timeout = command, timeout
        # not buffered: what lies in a buffer is not seen by who waits at the pipe
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        super().__init__(self._process.stdout, None)
        self._output = select.poll()  # select takes no descriptor above 1023
        self._output.register(self._stream, select.POLLIN)
        try:
            _skip(self, at)
        except BaseException:
            self.close()
            raise

    def readinto(self, buffer: Any) -> int:
        if not self._output.poll(1000 * self._timeout):
            raise TimeoutError(f"`{self._command}` gave no byte for {self._timeout:g} s")
        return super().readinto(buffer)

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end."""
        buffer = bytearray(min(size, 1 << 16))  # a pipe holds no more
        return bytes(buffer[: self.readinto(buffer)])

    def check_end(self, at: int) -> None:
        try:
            status = self._process.wait(self._timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"`{self._command}` closed its output and did not end for {self._timeout:g} s") from None
        if status:
            raise EOFError(f"`{self._command}` ended with {status} after {at} bytes")

    def close(self) -> None:
        self._stream.close()
        if self._process.returncode is not None:  # its number may be another's by now
            return
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(OSError):  # all of them have ended
            os.killpg(self._process.pid, number)


# ------------------------------------------------------------------ http


def _over_http(url: str, at: int, timeout: float) -> Connection:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "stair"})
    if at:
        request.add_header("Range", f"bytes={at}-")
    if authorization := _authorization(urlsplit(url).hostname or ""):
        request.add_unredirected_header("Authorization", authorization)
    opener = urllib.request.build_opener(_GuardedRedirects(urlsplit(url).netloc))
    try:
        answer = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _LASTING or 300 <= error.code < 400:
            raise LastingError(f"{url}: the server says {error.code} {error.reason}") from error
        raise
    declared = answer.headers.get("Content-Length")
    resumed = answer.status == 206
    if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {at}-"):
        answer.close()
        raise LastingError(f"{url}: asked for bytes from {at} on, got {answer.headers.get('Content-Range')!r}")
    if at and not resumed:  # a server that always begins at the beginning
        _skip(answer, at)
    length = int(declared) + at * resumed if declared and declared.isdigit() else None
    return Connection(answer, length, answer.headers.get("ETag"))


def _authorization(host: str) -> str | None:
    """What `~/.netrc` has for a host: a password in a URL would stand in logs and checkpoints."""
    try:
        entry = netrc.netrc().hosts.get(host)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:  # what is public needs none of it
        warnings.warn(f"~/.netrc cannot be read, so no password is sent: {error}", stacklevel=2)
        return None
    return "Basic " + base64.b64encode(f"{entry[0]}:{entry[2]}".encode()).decode() if entry else None


class _GuardedRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from the web into this machine or its network, where a server has no business."""

    def __init__(self, given: str) -> None:
        self._given = given

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        there = urlsplit(newurl)
        if there.scheme not in ("http", "https"):
            raise LastingError(f"{req.full_url} sends on to {newurl!r}: only http and https are followed")
        if there.netloc != self._given and (local := _local_address(there.hostname or "")):
            raise LastingError(
                f"{req.full_url} sends on to {newurl!r}, which is the local address {local}: refused. "
                "Give that URL itself if it is meant"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _local_address(host: str) -> str | None:
    """The first address of a host that is not a public one."""
    found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    return next((address for address in sorted(found) if not _is_public(ipaddress.ip_address(address))), None)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:  # a router would hand it on to that one
            return _is_public(inner)
    return address.is_global and not address.is_multicast


# ------------------------------------------------------------------ buckets and hubs


class _Bucket(Connection):
    """A file that fsspec opens. Its libraries' failures are of many kinds; here they are `OSError`, to be tried again."""

    def __init__(self, url: str, at: int, timeout: float) -> None:
        with _as_os_error():
            try:
                import fsspec

                files, path = fsspec.core.url_to_fs(url, **_time_out(url, timeout))
            except ImportError as error:
                raise LastingError(
                    f"{url} cannot be opened: {error}; `pip install 'stair-embeddings[remote]'`"
                ) from error
            except ValueError as error:
                raise LastingError(f"{url} cannot be opened: {error}") from error
            try:
                stream = files.open(path, "rb", block_size=8 << 20, cache_type="readahead")
            except (FileNotFoundError, PermissionError) as error:
                raise LastingError(f"{url}: {type(error).__name__}: {error}") from error
            except Exception as error:
                if "Credential" in type(error).__name__:  # botocore's NoCredentialsError and its like
                    raise LastingError(f"{url}: {type(error).__name__}: {error}") from error
                raise
            stream.seek(at)
        super().__init__(stream, getattr(stream, "size", None))

    def readinto(self, buffer: Any) -> int:
        with _as_os_error():
            return super().readinto(buffer)

    def close(self) -> None:
        with _as_os_error():
            super().close()


def _time_out(url: str, timeout: float) -> dict[str, Any]:
    """What makes a library give up a transfer that stands still; only that of s3 is known to take it."""
    if urlsplit(url).scheme not in ("s3", "s3a"):
        return {}
    return {"config_kwargs": {"connect_timeout": timeout, "read_timeout": timeout}}


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error

"""The members of a tar by Python's `tarfile`, which alone would take a damaged header for the end of the archive."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

LARGEST = 1 << 28  # bytes of one member that are read into memory; a damaged header may say 2^60
_LONGEST_HEADER = 1 << 20  # bytes of a long name or an extended header
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")  # how gzip, bzip2 and xz begin: positions in such a tar mean nothing
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, RecursionError, lzma.LZMAError, zlib.error)


class BrokenTarError(ValueError):
    """The bytes stop being a tar."""


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: path in the archive.
        offset: where its bytes begin in the (uncompressed) archive.
        size: their number.
        read: reads them; only before the next member is taken.
    """

    name: str
    offset: int
    size: int
    read: Callable[[], bytes]


class _Header(tarfile.TarInfo):
    """A header that is an error unless it is one, or the block of zeros that ends an archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError as error:  # type: ignore[attr-defined]
            raise BrokenTarError("cut short, without an end-of-archive mark") from error
        except tarfile.HeaderError as error:
            raise BrokenTarError(f"no header of a tar ({error})") from error
        if header.size < 0:
            raise BrokenTarError(f"a header with the size {header.size}")
        return header

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _LONGEST_HEADER:
            raise BrokenTarError(f"an extended header of {self.size} bytes, the limit is {_LONGEST_HEADER}")
        if self.type == tarfile.GNUTYPE_SPARSE:
            raise BrokenTarError("a sparse member, which is not read")
        found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return found


def members(file: BinaryIO, mode: str = "r:") -> Iterator[Member]:
    """The regular files of a tar in order; links, devices and folders are passed over.

    Args:
        file: the archive.
        mode: `r:` for an uncompressed file that can seek, `r|*` for whatever is read forwards, compressed or not.

    Raises:
        BrokenTarError: where the archive is damaged or cut short; names the byte.
    """
    archive = None
    try:
        archive = tarfile.open(fileobj=file, mode=mode, tarinfo=_Header)  # type: ignore[call-overload] # noqa: SIM115
        while (header := archive.next()) is not None:
            if header.sparse is not None:
                raise BrokenTarError("a sparse member, which is not read")
            if header.isreg():
                yield Member(header.name, header.offset_data, header.size, lambda: _content(archive, header))
            archive.members = []  # it would keep them all
    except _DAMAGED as error:
        at = archive.offset if archive else 0
        kind = "tar" if mode.endswith("*") else "uncompressed tar"
        raise BrokenTarError(f"is cut short, damaged or no {kind} at byte {at}: {error}") from error


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> bytes:
    if header.size > LARGEST:
        raise BrokenTarError(f"a member of {header.size} bytes, the limit is {LARGEST}")
    try:
        data: bytes = archive.extractfile(header).read()  # type: ignore[union-attr]
    except _DAMAGED as error:
        raise BrokenTarError(f"is cut short or damaged after byte {header.offset_data}: {error}") from error
    if len(data) < header.size:
        raise BrokenTarError("cut short within a member")
    return data

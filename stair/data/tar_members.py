"""The members of a tar, one after the other, from anything that can be read forwards.

A shard's members are small and many, and the standard library's reader spends more time on a header than Pillow on a
small picture. It also takes a damaged header for the archive's end, so that what follows is lost in silence; here only
a block of zeros ends an archive, and anything else that is not a header is an error. Tests hold both readers together.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
LARGEST = 1 << 28  # bytes of one member; a damaged or hostile header may say 2^60
_LONGEST_HEADER = 1 << 20  # bytes of a name or an extended header

_ZEROS = bytes(BLOCK)
_REGULAR = b"0\x007"
_WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: a size there means nothing
_OPENERS = {b"\x1f\x8b": gzip.GzipFile, b"BZh": bz2.BZ2File, b"\xfd7zXZ\0": lzma.LZMAFile}


class BrokenTarError(ValueError):
    """The bytes stop being a tar."""


class Member(NamedTuple):
    """A regular file in a tar: its name, where its bytes begin in the (uncompressed) archive, and how many they are."""

    name: str
    offset: int
    size: int


class Tar:
    """Walks a tar forwards; members that are not asked for are skipped, by seeking where that is possible.

    Args:
        file: the archive, at its start; compressed by gzip, bzip2 or xz or not at all.
        compressed: whether compressed archives are taken.

    Raises:
        BrokenTarError: if it is compressed and must not be.
    """

    def __init__(self, file: BinaryIO, compressed: bool = True) -> None:
        buffered = file if hasattr(file, "peek") else io.BufferedReader(file, 1 << 20)  # type: ignore[type-var]
        opener = next((opener for magic, opener in _OPENERS.items() if buffered.peek(6).startswith(magic)), None)
        if opener and not compressed:
            raise BrokenTarError("it is compressed, and positions in it mean nothing")
        self._file = opener(fileobj=buffered) if opener is gzip.GzipFile else opener(buffered) if opener else buffered
        self._seeks = opener is None and buffered.seekable()
        # a seek past the end is no error, the next read only finds nothing: the length tells the two apart
        self._length = _length(buffered) if self._seeks else None
        self._at = self._next = 0

    def __iter__(self) -> Iterator[Member]:
        """The regular members; `read` gives the bytes of the one that came last.

        Raises:
            BrokenTarError: where the archive is cut short or damaged.
        """
        name, size = None, None  # what a header before this one says of it
        while (header := self._block()) != _ZEROS:
            kind, data_size = header[156:157], _number(header[124:136])
            if size is not None:
                data_size, size = size, None
            self._next = self._at if kind in _WITHOUT_DATA else self._at + -(-data_size // BLOCK) * BLOCK
            if self._length is not None and self._at + data_size > self._length and kind not in _WITHOUT_DATA:
                raise BrokenTarError(f"it ends after {self._length} bytes, within a member of {data_size}")
            if kind in b"Lx" and data_size > _LONGEST_HEADER:
                raise BrokenTarError(f"it has an extended header of {data_size} bytes, the limit is {_LONGEST_HEADER}")
            if kind == b"L":
                name = _text(self.read(data_size))
            elif kind == b"x":
                said = _extended(self.read(data_size))
                name, size = said.get("path", name), _given_size(said)
            elif kind == b"S":
                raise BrokenTarError("it has a sparse member, which is not read")
            elif kind in b"Kg":
                pass
            else:
                own, name = name if name is not None else _name(header), None
                if kind in _REGULAR and not own.endswith("/"):
                    yield Member(own, self._at, data_size)

    def read(self, size: int) -> bytes:
        """The first `size` bytes of the member the walk stands at.

        Raises:
            BrokenTarError: if they are not all there, or more than `LARGEST`.
        """
        if size > LARGEST:
            raise BrokenTarError(f"it has a member of {size} bytes, the limit is {LARGEST}")
        data = self._bytes(size)
        if len(data) < size:
            raise BrokenTarError(f"it ends after {self._at} bytes, within a member")
        return data

    def _block(self) -> bytes:
        self._skip(self._next - self._at)
        at, block = self._at, self._bytes(BLOCK)
        if len(block) < BLOCK:
            raise BrokenTarError(f"it ends after {self._at} bytes without an end-of-archive mark")
        if block != _ZEROS and not _is_header(block):
            raise BrokenTarError(f"what stands at byte {at} is no header" if at else "its beginning is no header")
        self._next = self._at
        return block

    def _skip(self, size: int) -> None:
        if self._seeks and size > 0:
            self._file.seek(size, io.SEEK_CUR)
            self._at += size
        while size > 0 and not self._seeks:
            read = len(self._bytes(min(size, 1 << 20)))
            size -= read
            if not read:
                raise BrokenTarError(f"it ends after {self._at} bytes, within a member")

    def _bytes(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except (EOFError, lzma.LZMAError, zlib.error) as error:  # compressed, and damaged or cut short
            raise BrokenTarError(f"it cannot be decompressed after {self._at} bytes: {error}") from error
        self._at += len(data)
        return data


def _length(file: BinaryIO) -> int:
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    return end


def _is_header(block: bytes) -> bool:
    try:
        said = _number(block[148:156])
    except BrokenTarError:
        return False
    # the checksum is the sum of all bytes, its own eight taken for blanks; Adler's lower half is a sum modulo 65521, and a
    # tenth of the time
    total = said - 8 * 32 + sum(block[148:156])
    if total % 65_521 == zlib.adler32(block, 0) & 0xFFFF:
        return True
    # some old writers summed signed bytes
    signed = sum(byte - 256 * (byte > 127) for byte in block[:148] + block[156:])
    return said == signed + 8 * 32


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's form for what does not fit eleven octal digits
        value = int.from_bytes(field, "big", signed=True) & ((1 << (8 * len(field) - 1)) - 1)
        return value
    digits = field.partition(b"\0")[0].strip()
    try:
        value = int(digits or b"0", 8)
    except ValueError:
        raise BrokenTarError(f"a header has {field!r} where a number was wanted") from None
    if value < 0:
        raise BrokenTarError(f"a header has the number {value}")
    return value


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), header[345:500]
    posix = header[257:263] == b"ustar\0" and prefix[0]
    return f"{_text(prefix)}/{name}" if posix else name


def _extended(data: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE` and line end, LENGTH counting the whole record, of a pax header."""
    said, data, at = {}, data.rstrip(b"\0"), 0
    while at < len(data):
        # no slice of the rest: of many short records that would take the square of their number
        digits = data[at : at + 10].partition(b" ")[0]
        length = int(digits) if digits.isdigit() and len(digits) < 10 else 0
        record = data[at + len(digits) + 1 : at + length - 1]
        if not record or len(data) < at + length:
            raise BrokenTarError("it has an extended header that cannot be read")
        key, _, value = record.partition(b"=")
        said[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at += length
    if any(key.startswith("GNU.sparse") for key in said):
        raise BrokenTarError("it has a sparse member, which is not read")
    return said


def _given_size(said: dict[str, str]) -> int | None:
    size = said.get("size")
    if size is not None and not (size.isascii() and size.isdigit() and len(size) < 20):
        raise BrokenTarError(f"an extended header gives the size {size[:30]!r}")
    return None if size is None else int(size)

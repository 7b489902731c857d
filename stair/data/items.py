"""Images and texts to embed: a folder, tar shards, a table, or lines of standard input.

A source is listed before anything is encoded: what is used, what is skipped and why. So the work can be counted, divided
into parts and resumed, and mistakes show at once.
"""

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, time
from pathlib import Path
from typing import Any, BinaryIO, Literal

from stair.data.folders import find_file, image_files
from stair.data.remote import is_remote
from stair.data.samples import (
    CAPTION_TYPES,
    IMAGE_TYPES,
    Grouped,
    NoCaptionError,
    Skipped,
    caption_lines,
    captions,
    check_caption,
    group,
    image_type,
    other_members,
    printable,
)
from stair.data.tables import SUFFIXES, Row, Table, cell_text, open_table, read_group
from stair.data.tars import BrokenTarError, expand
from stair.data.tars import members as members_of
from stair.errors import FileError, SettingError

Side = Literal["images", "texts"]
_MAX_PICTURE_BYTES = 1 << 28
COLUMNS: dict[Side, str] = {"images": "image", "texts": "text"}  # of a table, by default
LONGEST_ID = 512  # bytes; the limit of Elasticsearch and OpenSearch

_TAR = re.compile(r"\.(tar(\.\w+)?|t[gbx]z2?)$", re.IGNORECASE)  # compressed ones are refused by their content
# columns of a parquet file that hold images, as Arrow spells their types
_IMAGES = re.compile(r"(large_)?binary(_view)?|struct<.*\bbytes: (large_)?binary.*>")


@dataclass(frozen=True)
class Item:
    """One image or text.

    `source` states where it came from: `file` of an image (relative to the source), in tars with `offset` and `length` in
    bytes and the sample's `key` and `captions`; in cells of a parquet file with `row_group`, `row` in it and `column`.
    `text` of a text, in tars with `key`.
    """

    id: str  # unique in its source
    path: Path | None = None  # of the file that holds an image
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # the other columns of its row, if it came from a table
    source: dict[str, Any] = field(default_factory=dict)
    place: str = ""  # file and line, if it came from a table

    def read(self) -> bytes:
        """The bytes of an image; ValueError `image missing: ...` or `file unreadable: ...`."""
        if self.path is None:
            raise ValueError("image missing: the item is a text")
        try:
            return _read_image(self.path, self.source)
        except OSError as error:
            raise ValueError(f"file unreadable: {error.strerror or error}") from error


class Note(Skipped):
    """What a user should know of an item that is used."""


Entry = Item | Skipped


@dataclass(frozen=True)
class Listing:
    """A source, listed."""

    items: list[Item] = field(default_factory=list)  # what is used, in the order of the source
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)


def _read_image(path: Path, source: dict[str, Any]) -> bytes:
    if "row_group" in source:  # bytes, or Hugging Face's `{bytes, path}`
        column = source["column"]
        cell = read_group(path, source["row_group"], (column,))[column][source["row"]].as_py()
        if (data := cell.get("bytes") if isinstance(cell, dict) else cell) is None:
            raise ValueError("image missing: the cell contains no bytes; a path alone is not followed")
        return bytes(data)
    with path.open("rb") as file:
        file.seek(int(source.get("offset", 0)))
        return file.read(min(int(source.get("length", _MAX_PICTURE_BYTES)), _MAX_PICTURE_BYTES))


def picture_bytes(root: Path, source: dict[str, Any]) -> bytes:
    """The file of a picture in a folder, from where `Embeddings.source` states it is.

    FileNotFoundError if it is not there, cannot be read, or lies outside of the folder.
    """
    try:
        path = find_file(root.resolve(), source["file"]).resolve()
        if not path.is_relative_to(root.resolve()) or not path.is_file():
            raise ValueError("it is not in the folder")
        return _read_image(path, source)
    except (OSError, ValueError, TypeError, OverflowError, LookupError) as error:
        raise FileNotFoundError(f"no image of this document in {root}: {error}") from error


def list_items(source: str, side: Side, column: str | None = None, id_column: str | None = None) -> Listing:
    """Lists the images, or the texts (of tars, the captions), of a source. Arguments as of `stair embed`.

    Raises:
        FileNotFoundError: if there is nothing.
        FileError: if it is none of these, two items have one id, a value cannot be kept, or no item can be used.
        SettingError: if a column is not there.
    """
    listing = Listing()
    lists = {Item: listing.items, Skipped: listing.skipped, Note: listing.notes}
    for entry in _entries(source, side, column, id_column):
        lists[type(entry)].append(entry)  # type: ignore[attr-defined]
    if not listing.items and not listing.skipped:
        kinds = f" ({' '.join(f'.{kind}' for kind in IMAGE_TYPES)}, also in sub-folders)" if side == "images" else ""
        raise FileNotFoundError(f"{source!r} contains no {side}{kinds}")
    if not listing.items:
        first = listing.skipped[0]
        raise FileError(f"{source!r}: no {side} can be used; {first.place}: {first.reason}", source)
    by_id: dict[str, Item] = {}
    for item in listing.items:
        if (other := by_id.setdefault(item.id, item)) is not item:
            remedy = "Choose another column with --id_column" if item.place else "Rename one, or embed them separately"
            places = f"{other.place or other.path} and {item.place or item.path}"
            raise FileError(f"{source!r}: id {item.id!r} occurs twice ({places}). {remedy}", source)
        if len(item.id.encode()) > LONGEST_ID:
            reason = f"long id: {len(item.id.encode())} bytes; Elasticsearch and OpenSearch take {LONGEST_ID}"
            listing.notes.append(Note(item.place or f"{item.id[:40]}...", reason))
    return listing


def _entries(source: str, side: Side, column: str | None, id_column: str | None) -> Iterator[Entry]:
    path = Path(source)
    if source == "-":
        return _lines(sys.stdin.buffer.read(), side)
    if path.is_dir():
        if side == "texts":
            raise FileError(f"{source} is a folder: it gives images. Texts come from tars, tables or stdin", path)
        return (
            found
            if isinstance(found, Skipped)
            else Item(name := printable(found.name), found.path, source={"file": name})
            for found in image_files(path)
        )
    if is_remote(source):
        raise FileError(f"{source!r} is not local: items are read by position. Copy it to a local path", source)
    if not path.exists() and not _TAR.search(source):
        wanted = f"give a folder of images, a table ({', '.join(SUFFIXES)}), tars in quotes, or - for standard input"
        raise FileError(f"{source!r}: no such file or folder (working directory: {Path.cwd()}); {wanted}", path)
    files = [path] if path.is_file() else [Path(name) for name in expand(source)]
    if all(_TAR.search(file.name) for file in files):
        return (entry for file in files for entry in _tar(file, side))
    if len(files) == 1 and files[0].suffix.lower() in SUFFIXES:
        return _table(open_table(files[0]), side, column or COLUMNS[side], id_column)
    raise FileError(f"{source!r} is not a folder, tar or table ({', '.join(SUFFIXES)}), or `-` for lines", path)


def _lines(data: bytes, side: Side) -> Iterator[Entry]:
    # neither text mode nor `splitlines`: they also cut at \r, form feeds, U+0085 and U+2028, which texts hold
    lines = enumerate(re.split("\r?\n", data.decode("utf-8", "surrogateescape")), 1)
    for number, (line, text) in enumerate((line, text) for line, text in lines if text.strip()):
        name = printable(text) if side == "images" else str(number)
        try:
            yield _item(side, f"standard input:{line}", name, text, Path(text), {})
        except ValueError as error:
            yield Skipped(f"standard input:{line}", str(error))


def _item(side: Side, place: str, name: str, text: str, path: Path, metadata: dict[str, Any]) -> Item:
    """The item of a text, or of an image that the text names; ValueError if it cannot be used."""
    if side == "texts":
        check_caption(text)
        return Item(name, text=text, metadata=metadata, source={"text": text}, place=place)
    if not os.path.isfile(path):
        raise ValueError(f"image missing: no file {printable(str(path))}")
    return Item(name, path, metadata=metadata, source={"file": printable(text)}, place=place)


def _table(table: Table, side: Side, column: str, id_column: str | None) -> Iterator[Entry]:
    id_column = id_column or ("id" if "id" in table.columns else None)
    _check_columns(table, side, column, id_column)
    in_cells = _IMAGES.fullmatch(table.columns[column]) is not None
    if unread := [name for name in table.bytes_columns if name != column]:
        yield Note(table.path.name, f"columns of bytes: {unread} are not stored as metadata")
    for number, row in enumerate(table.rows()):
        if "-" in row.place.rpartition(":")[2] and not row.problem:
            yield Note(row.place, "row of several lines: a quoted cell holds line ends")
        try:
            if row.problem:
                raise ValueError(row.problem)
            name, metadata = _id(row, id_column, number), _metadata(table, row, (column, id_column))
            if in_cells:
                source = {"file": table.path.name, "row_group": row.group, "row": row.row, "column": column}
                yield Item(name, table.path, metadata=metadata, source=source, place=row.place)
            else:
                text = cell_text(row, column, "caption empty" if side == "texts" else "image unnamed")
                text = text if side == "texts" else text.strip()
                yield _item(side, row.place, name, text, table.path.parent / text, metadata)
        except FileError:
            raise
        except ValueError as error:
            yield Skipped(row.place, str(error))


def _check_columns(table: Table, side: Side, column: str, id_column: str | None) -> None:
    for name, setting in ((column, "column"), (id_column, "id_column")):
        if name is not None and name not in table.columns:
            known = sorted(table.columns)
            raise SettingError(f"{table.path}: no column {name!r}; there are {known}. Choose with --{setting}", setting)
    kind = table.columns[column]
    # lists and bytes would be taken for a path or text by the way Python spells them
    is_text = column not in table.bytes_columns and ("<" not in kind or kind.startswith("dictionary<"))
    if not is_text and not (side == "images" and _IMAGES.fullmatch(kind)):
        expected = {"images": "paths of images, their bytes, or {bytes, path}", "texts": "one text a row"}[side]
        remedy = "Choose with --column, or make shards with `stair prepare datasets` and embed these"
        raise SettingError(f"{table.path}: column {column!r} holds {kind}; expected {expected}. {remedy}", "column")
    if id_column in table.bytes_columns:
        kind = table.columns[id_column]
        raise SettingError(f"{table.path}: column {id_column!r} holds {kind}; expected texts or numbers", "id_column")


def _id(row: Row, column: str | None, number: int) -> str:
    value = number if column is None else row.cells.get(column)
    if value is None or value == "" or value != value:  # NaN means that there is no value
        raise ValueError(f"id empty: nothing in column {column!r}")
    if isinstance(value, (list, dict, tuple)):
        raise ValueError(f"id not usable: column {column!r} holds a {type(value).__name__}")
    if isinstance(value, bool):
        return json.dumps(value)
    return printable(value.isoformat() if isinstance(value, (date, time)) else str(value))


def _metadata(table: Table, row: Row, others: tuple[str | None, ...]) -> dict[str, Any]:
    metadata = {}
    for key, value in row.cells.items():
        if key in others or value is None:
            continue
        try:
            metadata[key] = _plain(value)
        except UnicodeError as error:
            raise ValueError(f"not UTF-8: column {key!r}; save the table as UTF-8") from error
        except ValueError as error:
            allowed = "a text, a finite number (integers of 64 bits), a truth value, a date, a list of these, or null"
            raise FileError(f"{table.path}, {row.place}: {key!r} is {error}; expected {allowed}", table.path) from error
    return metadata


def _plain(value: Any) -> Any:
    """A value as JSON has it, of the same type and exact."""
    if isinstance(value, str):
        value.encode()
    elif isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    elif isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    elif isinstance(value, dict):
        return {_plain(name): _plain(part) for name, part in value.items()}
    elif isinstance(value, (int, float)):
        if not (math.isfinite(value) if isinstance(value, float) else -(1 << 63) <= value < 1 << 63):
            raise ValueError(f"{value}")
    elif value is not None:
        raise ValueError(f"a {type(value).__name__}")
    return value


def _tar(path: Path, side: Side) -> Iterator[Entry]:
    stem, lines = printable(path.stem), caption_lines(str(path))
    try:
        with open(path, "rb") as file:
            members = list(members_of(file))
            samples = list(group(members, lambda member: (member.offset, member.size)))
            for sample in samples:
                name = f"{stem}/{sample.key}"
                yield from (Note(name, warning) for warning in sample.warnings)
                try:
                    yield from _sample(file, name, sample, side, lines)
                except ValueError as error:
                    yield Skipped(name, str(error))
    except (BrokenTarError, OSError) as error:
        raise FileError(f"{path} is not an uncompressed tar, or is truncated: {error}", path) from error
    for other in other_members((member.name for member in members), (sample.key for sample in samples)):
        yield Skipped(f"{stem}/{other.place}", other.reason)


def _sample(file: BinaryIO, name: str, sample: Grouped[tuple[int, int]], side: Side, lines: bool) -> Iterator[Entry]:
    """The image or the captions of a sample of a tar; ValueError if it cannot be used."""
    if sample.problems:
        raise ValueError(sample.problems[0])
    path, kind = Path(file.name), image_type(sample.members) if side == "images" else ""
    read = {k: os.pread(file.fileno(), n, at) for k, (at, n) in sample.members.items() if k in CAPTION_TYPES}
    texts: list[str] = []
    try:
        texts = captions(dict.fromkeys(sample.members, b"") | read, lines)
    except ValueError as error:
        if side == "texts":
            raise
        if not isinstance(error, NoCaptionError):
            yield Note(name, f"without captions: {error}")
    if kind:
        offset, length = sample.members[kind]
        source = {"file": printable(path.name), "offset": offset, "length": length, "key": sample.key}
        yield Item(name, path, source=source | ({"captions": list(filter(None, texts))} if texts else {}))
        return
    for number, text in enumerate(texts):
        place = f"{name}#{number}"
        blank = Skipped(place, "caption empty: nothing but white space")
        yield Item(place, text=text, source={"text": text, "key": sample.key}) if text else blank

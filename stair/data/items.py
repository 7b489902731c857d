"""Where pictures and texts to embed come from: a folder, tar shards, a table, the lines of standard input.

A source is turned into a list of items first, none of them read: so the work can be counted, divided into parts, shared
and taken up again where it stopped.
"""

import csv
import glob
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from stair.data.tar_members import BrokenTarError, Member, Tar

Side = Literal["images", "texts"]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
COLUMNS: dict[Side, str] = {"images": "image", "texts": "text"}  # of a table, where none is given

# columns of a parquet file, as Arrow spells their types; a colon would make it the name of a field
_BYTES = re.compile(r"binary(?!:)")
_PICTURES = re.compile(r"(large_)?binary(_view)?|struct<.*\bbytes: (large_)?binary.*>")


@dataclass(frozen=True)
class Item:
    """One picture or text. With neither path nor text it only stands for what cannot be used, and counts as left out.

    Attributes:
        id: unique in its source.
        path: file of a picture.
        offset: where the picture begins in the file, in bytes.
        length: bytes of the picture; None for the whole file.
        text: a text, where it is one.
        metadata: the other columns of its row, if it came from a table.
        source: where it came from: `file` of a picture (relative to the source), in tars with `offset` and `length` in
            bytes and the sample's `key` and `captions`; in cells of a parquet file with `row_group`, `row` in it and
            `column`. `text` of a text.
        complaint: why it cannot be used, or what of it: a picture whose captions cannot be read is still a picture.
    """

    id: str
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    complaint: str = ""

    def read(self) -> bytes:
        """The bytes of a picture.

        Raises:
            ValueError: saying why there are none.
        """
        if self.path is None:
            raise ValueError(self.complaint)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.length is None else file.read(self.length)


@dataclass(frozen=True)
class _Cell(Item):
    """A picture that is a cell of a parquet file: bytes, or Hugging Face's `{bytes, path}`.

    Attributes:
        place: row group, row in it.
        column: its column.
    """

    place: tuple[int, int] = (0, 0)
    column: str = ""

    def read(self) -> bytes:
        """The bytes of a picture.

        Raises:
            ValueError: if the cell has none.
        """
        assert self.path is not None
        group, row = self.place
        cell = _group(self.path, self.path.stat().st_mtime_ns, group, self.column)[row].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if data is None:
            raise ValueError(f"image missing: no bytes in the cell, {cell!r}; a path alone is not followed")
        return bytes(data)


@lru_cache(maxsize=1)  # parquet is read by row groups, and pictures one after another
def _group(path: Path, changed: int, group: int, column: str) -> Any:
    """A column of a row group; `changed` tells a file from another one that takes its place."""
    return _parquet_file(path).read_row_group(group, columns=[column])[column]


def items_of(source: str, side: Side, column: str | None = None, id_column: str = "id") -> list[Item]:
    """Lists a source.

    Args:
        source: a folder of pictures; tars (`a.tar`, or a glob such as `shards/*.tar`) of KEY.jpg beside KEY.json or
            KEY.txt; a `.csv`, `.tsv` or `.parquet` table; `-` for lines of standard input (paths, or texts).
        side: whether its pictures or its texts are wanted. Texts of tars are the captions.
        column: of a table: paths of pictures (relative to the table), in parquet also their bytes or Hugging Face's
            `{bytes, path}`; or texts. `image` or `text` where left out.
        id_column: of a table: ids; numbers of rows where there is none.

    Returns:
        Items in the order of the source; what is wrong with a caption or a line is that item's `complaint`.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is none of these, two items have one id, or none can be used.
    """
    items = list(_items(source, side, column, id_column))
    if not items:
        raise FileNotFoundError(f"{source!r} holds no {side}")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(
                f"{source!r}: id {item.id!r} occurs twice. Tars of one name in several folders give the same ids: embed "
                "each folder by itself. Of a table choose ids with --id_column"
            )
        seen.add(item.id)
    if all(item.path is None and item.text is None for item in items):
        raise ValueError(f"{source!r}: no {side} can be used; {items[0].id}: {items[0].complaint}")
    return items


def _items(source: str, side: Side, column: str | None, id_column: str) -> Iterator[Item]:
    path = Path(source)
    if source == "-":
        return _lines(_standard_input(), side)
    if path.is_dir():
        if side == "texts":
            raise ValueError(f"{source} is a folder: it gives images. Texts come from tars, tables or standard input")
        return _folder(path)
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source))]
    if not files:
        raise FileNotFoundError(f"no such file or folder: {source!r}")
    if all(file.suffix == ".tar" for file in files):
        return (item for file in files for item in _tar(file, side))
    if len(files) == 1 and path.suffix in (".csv", ".tsv", ".parquet"):
        return _table(path, side, column or COLUMNS[side], id_column)
    raise ValueError(f"{source!r} is no folder, tar, csv, tsv or parquet file, nor `-` for standard input")


def _standard_input() -> list[str]:
    try:
        # neither text mode nor `splitlines`: they also cut at \r, form feeds, U+0085 and U+2028, which texts hold
        return re.split("\r?\n", sys.stdin.buffer.read().decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is no UTF-8 ({error}); convert it, such as with iconv -t UTF-8") from error


def _lines(lines: Sequence[str], side: Side) -> Iterator[Item]:
    for number, line in enumerate(line for line in lines if line.strip()):
        if side == "texts":
            yield Item(str(number), text=line, source={"text": line})
        else:
            yield Item(line, Path(line), source={"file": line})


def _folder(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS and path.is_file():
            name = path.relative_to(folder).as_posix()
            yield Item(name, path, source={"file": name})


def _table(path: Path, side: Side, column: str, id_column: str) -> Iterator[Item]:
    rows = _parquet(path, side, column) if path.suffix == ".parquet" else _csv(path, column)
    for number, row in enumerate(rows):
        if isinstance(row, Item):
            yield row
            continue
        name = str(row.get(id_column) if row.get(id_column) is not None else number)
        if row[column] is None or (isinstance(row[column], str) and not row[column].strip()):
            yield Item(name, complaint=f"row {number} has nothing in column {column!r}")
            continue
        metadata = _metadata(f"{path}, row {number}", row, (column, id_column))
        if isinstance(row[column], tuple):
            group, number = row[column]
            source = {"file": path.name, "row_group": group, "row": number, "column": column}
            yield _Cell(name, path, metadata=metadata, source=source, place=row[column], column=column)
            continue
        value = str(row[column])
        if side == "texts":
            yield Item(name, text=value, metadata=metadata, source={"text": value})
        else:
            yield Item(name, path.parent / value, metadata=metadata, source={"file": value})


def _demand_column(path: Path, column: str, names: Iterable[str]) -> None:
    if column not in names:
        raise ValueError(f"{path}: no column {column!r}; there are {sorted(names)}. Choose with --column")


def _metadata(where: str, row: dict[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """What a row says besides, as json has it: found out here, not when a part has been encoded."""
    known = {}
    for key, value in row.items():
        if key in without or value is None:
            continue
        try:
            known[key] = _plain(value)
        except ValueError as error:
            raise ValueError(
                f"{where}: {key!r} is {error}; wanted a text, a finite number, true or false, a date, or a list of "
                "these. Leave the value empty (null) or the column out"
            ) from error
    return known


def _plain(value: Any) -> Any:
    if isinstance(value, (date, time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value}, which json has no word for")
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"a {type(value).__name__}")


def _csv(path: Path, column: str) -> Iterator[dict[str, Any] | Item]:
    """Rows; one that cannot be read, or has more cells than columns, is an item that cannot be used, named by its line."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    # spreadsheets write a mark before the first column's name
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            _demand_column(path, column, names := reader.fieldnames or ())
            while (row := _next_row(reader)) is not None:
                if isinstance(row, str):
                    yield Item(f"{path.name}:{reader.reader.line_num}", complaint=row)
                elif None not in row:
                    yield row
                else:
                    cells = len(names) + len(row[None])
                    wrong = f"{cells} cells, the first line has {len(names)}: is a text with {delimiter!r} not quoted?"
                    yield Item(f"{path.name}:{reader.line_num}", complaint=wrong)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}; save the table as UTF-8") from error


def _next_row(reader: "csv.DictReader[str]") -> dict[Any, Any] | str | None:
    """A row, what is wrong with it, or None at the end."""
    try:
        return next(reader, None)
    except csv.Error as error:  # a text of more than 131,072 characters: a quote that is never closed makes one
        return f"{error}; is a quote never closed?"


def _parquet(path: Path, side: Side, column: str) -> Iterator[dict[str, Any]]:
    """Rows without bytes; those of pictures stay unread, their column holds row group and row of each."""
    file = _parquet_file(path)
    kinds = {field.name: str(field.type) for field in file.schema_arrow}
    _demand_column(path, column, kinds)
    inside = side == "images" and _PICTURES.fullmatch(kinds[column]) is not None
    if not inside:
        _demand_text(path, side, column, kinds[column])
    names = [name for name, kind in kinds.items() if not _BYTES.search(kind)]
    for group in range(file.num_row_groups):
        rows = (row for batch in file.iter_batches(row_groups=[group], columns=names) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield {**row, column: (group, number)} if inside else row


def _demand_text(path: Path, side: Side, column: str, kind: str) -> None:
    """Refuses columns of which every cell would be taken for a path or text by the way Python spells it."""
    if _BYTES.search(kind) or ("<" in kind and not kind.startswith("dictionary<")):
        wanted = {"images": "paths of pictures, their bytes, or {bytes, path}", "texts": "one text a row"}[side]
        raise ValueError(
            f"{path}: column {column!r} holds {kind}; wanted {wanted}. Choose with --column, or make shards of the "
            "folder's pictures and captions with `stair prepare datasets`, and embed these"
        )


def _parquet_file(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("parquet needs pyarrow: `pip install 'stair-embeddings[search]'`") from error
    return parquet.ParquetFile(path)


def _tar(path: Path, side: Side) -> Iterator[Item]:
    for key, members in _samples(path):
        picture = next((info for kind, info in members.items() if f".{kind}" in IMAGE_ENDINGS), None)
        try:
            captions, complaint = _captions(path, members), ""
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            captions, complaint = [], f"captions of {key!r} cannot be read: {type(error).__name__}: {error}"
        if side == "texts" and complaint:
            yield Item(f"{path.stem}/{key}", complaint=complaint)
        elif side == "texts":
            for number, caption in enumerate(captions):
                yield Item(f"{path.stem}/{key}#{number}", text=caption, source={"text": caption, "key": key})
        elif picture is not None:
            source = {"file": path.name, "offset": picture.offset, "length": picture.size, "key": key}
            source |= {"captions": captions} if captions else {}
            name = f"{path.stem}/{key}"
            yield Item(name, path, picture.offset, picture.size, source=source, complaint=complaint)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Member]]]:
    """The members of each sample by type: names up to the first dot of the last part make a key."""
    key, members = "", dict[str, Member]()
    try:
        with open(path, "rb") as file:
            for member in Tar(file, compressed=False):
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if not stem:
                    continue
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                members.setdefault(kind.lower(), member)
    except BrokenTarError as error:
        raise ValueError(f"{path} is no uncompressed tar, or cut short: {error}") from error
    if members:
        yield key, members


def _captions(path: Path, members: dict[str, Member]) -> list[str]:
    """The captions of a sample, as training takes them (stair/data/tars.py, which this side may not import)."""

    def read(kind: str) -> str:
        return Item("", path, members[kind].offset, members[kind].size).read().decode()

    fields = json.loads(read("json")) if "json" in members else {}
    found = fields.get("captions") or [fields[name] for name in ("caption",) if fields.get(name)]
    if not found and "txt" in members:
        found = [read("txt")]
    if not (isinstance(found, list) and all(isinstance(caption, str) for caption in found)):
        raise TypeError(f"they are {found!r:.80}, wanted a list of strings")
    for caption in found:
        caption.encode()  # json can spell half a character, which the tokenizer does not take
    return [caption.strip() for caption in found if caption.strip()]

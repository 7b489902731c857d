"""The reader of tables (.csv, .tsv, .txt, .jsonl, .parquet): every row with its place, or with what is wrong with it.

Cells of .csv, .tsv and .txt are text as typed. Cells of .jsonl and .parquet keep their types; columns of bytes stay unread.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ArrowException, ipc, memory_map, parquet

from stair.data.samples import printable
from stair.errors import FileError

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet")
_BYTES = re.compile(r"binary(?!:)")  # in the name of an Arrow type; with a colon it is the name of a field


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    place: str  # file and line (`a.csv:3`, `a.csv:3-5`), or file and row from 1 in .parquet
    cells: dict[str, Any]  # by column; empty if there is a problem
    problem: str = ""  # why the row cannot be used; begins with its cause and a colon
    group: int = 0  # row group of a .parquet file
    row: int = 0  # row in that group


@dataclass(frozen=True)
class Table:
    """A table whose rows are read when they are asked for."""

    path: Path
    columns: dict[str, str]  # Arrow types by name, empty outside of .parquet; of .jsonl, the keys of all objects
    rows: Callable[[], Iterator[Row]]

    @property
    def bytes_columns(self) -> list[str]:
        """Columns that hold bytes. Rows do not have them."""
        return [name for name, kind in self.columns.items() if _BYTES.search(kind)]


def open_table(path: Path, delimiter: str | None = None) -> Table:
    """Opens a table by the suffix of its name.

    Args:
        path: the file.
        delimiter: of cells; a tab in .tsv and a comma in .csv and .txt if None.

    Raises:
        FileError: if it is no table, has no columns, or two columns of one name.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        table = _parquet_table(path)
    elif kind in (".jsonl", ".ndjson"):
        names = dict.fromkeys((name for row in _jsonl_rows(path) for name in row.cells), "")
        table = Table(path, names, lambda: _jsonl_rows(path))
    elif kind in SUFFIXES:
        sign = delimiter or ("\t" if kind == ".tsv" else ",")
        table = Table(path, dict.fromkeys(_header(path, sign), ""), lambda: _csv_rows(path, sign))
    else:
        raise FileError(f"{path} is no table of a known kind; wanted {', '.join(SUFFIXES)}", path)
    if not table.columns:
        problem = next((f"{row.place}: {row.problem}" for row in table.rows() if row.problem), f"{path} is empty")
        raise FileError(f"{problem}; wanted a table whose first line names its columns, or a JSON object a line", path)
    if wrong := [name for name in table.columns if printable(name) != name]:
        raise FileError(
            f"{path}: the name of column {printable(wrong[0])!r} is no UTF-8; save the table as UTF-8", path
        )
    return table


def cell_text(row: Row, column: str, empty: str) -> str:
    """The text in a cell; ValueError `cell of another type: ...`, or with the cause `empty` if nothing is in it."""
    value = row.cells.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{empty}: nothing in column {column!r}")
    if not isinstance(value, str):
        raise ValueError(f"cell of another type: column {column!r} holds a {type(value).__name__}, wanted a text")
    return value


def _reader(lines: Iterator[str], delimiter: str) -> Any:
    # tab-separated files have no quotes: a caption may begin with one
    if delimiter == "\t":
        return csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE, skipinitialspace=True, strict=True)
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)


def _text(path: Path) -> Any:
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise FileError(f"{path} is UTF-16; save the table as UTF-8", path)
    # spreadsheets write a mark before the first column's name; bytes that are no UTF-8 are judged where they are used
    return open(path, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _header(path: Path, delimiter: str) -> list[str]:
    with _text(path) as file:
        try:
            first: list[str] = next(filter(None, _reader(file, delimiter)), [])
        except csv.Error as error:
            raise FileError(f"{path}:1: {error}; wanted the names of the columns", path) from error
    names = [name.strip() or f"column {number}" for number, name in enumerate(first, 1)]
    _check_names(path, names)
    return names


def _check_names(path: Path, names: Sequence[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise FileError(f"{path}: two columns are called {printable(twice[0])!r}; rename one", path)


class _Lines:
    """The lines of a file, of which some can be given back."""

    def __init__(self, file: Iterator[str]) -> None:
        self.file, self.waiting, self.number = file, list[str](), 0
        self.taken: list[str] = []  # since `number`

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.waiting.pop() if self.waiting else next(self.file)
        self.taken.append(line)
        return line

    def accept(self, count: int) -> str:
        """Counts lines as read, gives back the others that were taken; returns where the counted ones lie."""
        first = self.number + 1
        self.number += count
        self.waiting += reversed(self.taken[count:])
        self.taken = []
        return f"{first}" if count == 1 else f"{first}-{self.number}"


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows. A quote that is never closed costs its own line alone: reading goes on at the next one."""
    names = _header(path, delimiter)
    with _text(path) as file:
        lines = _Lines(file)
        next(filter(None, reader := _reader(lines, delimiter)), None)
        lines.accept(len(lines.taken))
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                place = f"{path.name}:{lines.accept(1)}"
                yield Row(
                    place, {}, f"line malformed: {error}; is a quote not closed, or a cell with quotes not quoted?"
                )
                reader = _reader(lines, delimiter)  # the old one still waits for the quote
                continue
            if cells is None:
                return
            place = f"{path.name}:{lines.accept(len(lines.taken))}"
            if len(cells) == len(names):
                yield Row(place, dict(zip(names, cells, strict=True)))
            elif cells:
                wrong = f"{len(cells)} cells, the first line has {len(names)}"
                yield Row(place, {}, f"line malformed: {wrong}: is a cell with {delimiter!r} not quoted?")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _text(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as error:
                yield Row(place, {}, f"line malformed: {error}")
                continue
            yield Row(place, cells) if isinstance(cells, dict) else Row(place, {}, "line malformed: no JSON object")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def arrow_schema(path: Path) -> Any:
    """The columns of a file in Arrow's stream format or in parquet.

    Raises:
        FileError: if it is none.
    """
    try:
        return _arrow_stream(path).schema if path.suffix == ".arrow" else parquet.read_schema(path)
    except ArrowException as error:
        raise FileError(f"{path} cannot be read: {error}", path) from error


@lru_cache(maxsize=2)
def _arrow_stream(path: Path) -> Any:
    """All rows; mapped, so that nothing is read yet."""
    return ipc.open_stream(memory_map(str(path))).read_all()


@lru_cache(maxsize=64)
def rows_of_groups(path: Path) -> tuple[int, ...]:
    """Rows of each row group of a parquet file; an Arrow file is one group."""
    if path.suffix == ".arrow":
        return (_arrow_stream(path).num_rows,)
    about = parquet.read_metadata(path)
    return tuple(about.row_group(i).num_rows for i in range(about.num_row_groups))


def read_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    """Columns of a row group as an Arrow table. The last groups are kept, so rows are best read in their order."""
    if path.suffix == ".arrow":
        return _arrow_stream(path).select(list(columns))
    return _read_group(path, path.stat().st_mtime_ns, group, columns)


@lru_cache(maxsize=2)
def _read_group(path: Path, changed: int, group: int, columns: tuple[str, ...]) -> Any:
    """`changed` tells a file from another one that takes its place."""
    return parquet.ParquetFile(path).read_row_group(group, columns=list(columns))


def _parquet_table(path: Path) -> Table:
    schema = arrow_schema(path)
    _check_names(path, schema.names)
    table = Table(path, {field.name: str(field.type) for field in schema}, lambda: _parquet_rows(path, names))
    names = [name for name in table.columns if name not in table.bytes_columns]
    return table


def _parquet_rows(path: Path, names: list[str]) -> Iterator[Row]:
    file, total = parquet.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        # a table of bytes alone has rows too, which its batches do not say
        count = file.metadata.row_group(group).num_rows
        for row, cells in enumerate(_cells(file, group, names, path) if names else ({} for _ in range(count))):
            total += 1
            yield Row(f"{path.name}:{total}", cells, group=group, row=row)


def _cells(file: parquet.ParquetFile, group: int, names: list[str], path: Path) -> Iterator[dict[str, Any]]:
    name = names[0]
    try:
        for batch in file.iter_batches(row_groups=[group], columns=names):
            columns = []
            for name in names:
                column = batch.column(name)
                if pa.types.is_float32(column.type):  # 0.1 rather than 0.10000000149, which no filter names
                    column = column.cast(pa.string()).cast(pa.float64())
                columns.append(column.to_pylist())
            yield from (dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True))
    except (ArrowException, OSError, ValueError) as error:  # damaged, or values that Python has no type for
        raise FileError(f"{path}: column {name!r} cannot be read: {error}", path) from error

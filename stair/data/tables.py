"""Rows of tables (.csv, .tsv, .txt, .jsonl, .parquet), each with its place or with what is wrong with it.

Cells of .csv, .tsv and .txt are text as typed. Those of .jsonl and .parquet keep their types; bytes are not read.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import ipc, parquet

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
    """A table whose rows are parsed when they are asked for."""

    path: Path
    columns: dict[str, str]  # Arrow types by name, empty outside of .parquet; of .jsonl, the keys of all objects
    rows: Callable[[], Iterator[Row]]

    @property
    def bytes_columns(self) -> list[str]:
        """Columns that hold bytes. Rows do not have them."""
        return [name for name, kind in self.columns.items() if _BYTES.search(kind)]


def open_table(path: Path, delimiter: str | None = None) -> Table:
    """Opens a table by the suffix of its name; FileError if it is none, has no columns, or two columns of one name.

    Cells are divided by `delimiter`: by default a tab in .tsv, a comma in .csv and .txt.
    """
    if not path.exists():
        there = ", ".join(sorted(each.name for each in path.parent.glob("*") if each.suffix.lower() in SUFFIXES)[:5])
        missing = f"no table {path} (working directory: {Path.cwd()})"
        raise FileError(f"{missing}; {f'there is {there}' if there else f'give one of {SUFFIXES}'}", path)
    suffix, types = path.suffix.lower(), {}
    if suffix == ".parquet":
        schema = arrow_schema(path)
        names, types = schema.names, {column.name: str(column.type) for column in schema}
        rows = partial(_parquet_rows, path, [name for name in names if not _BYTES.search(types[name])])
    elif suffix in (".jsonl", ".ndjson"):
        rows = partial(_jsonl_rows, path)
        names = list(dict.fromkeys(name for row in rows() for name in row.cells))
    elif suffix in SUFFIXES:
        sign = delimiter or ("\t" if suffix == ".tsv" else ",")
        place, cells, problem = next(_csv_records(path, sign), ("", [], ""))
        if problem:
            raise FileError(f"{place}: {problem} The first line must name the columns", path)
        names = [name.strip() or f"column {number}" for number, name in enumerate(cells, 1)]
        rows = partial(_csv_rows, path, sign, names)
    else:
        raise FileError(f"{path} is not a table; expected {', '.join(SUFFIXES)}", path)
    if not names:
        problem = next((f"{row.place}: {row.problem}" for row in rows() if row.problem), f"{path} is empty")
        raise FileError(f"{problem}; expected a table whose first line names its columns, or JSON objects", path)
    if wrong := [name for name in names if printable(name) != name]:
        raise FileError(f"{path}: the name of column {printable(wrong[0])!r} is not UTF-8; save it as UTF-8", path)
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise FileError(f"{path}: two columns are called {twice[0]!r}; rename one", path)
    return Table(path, dict.fromkeys(names, "") | types, rows)


def cell_text(row: Row, column: str, empty: str) -> str:
    """The text in a cell; ValueError `cell of the wrong type: ...`, or with the cause `empty` if nothing is in it."""
    value = row.cells.get(column)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{empty}: nothing in column {column!r}")
    if not isinstance(value, str):
        raise ValueError(f"cell of the wrong type: column {column!r} holds a {type(value).__name__}, expected a text")
    return value


def _lines(path: Path) -> list[str]:
    with open(path, "rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise FileError(f"{path} is UTF-16; save the table as UTF-8", path)
    # spreadsheets begin files with a mark; bytes that are no UTF-8 are an error of the cell that is used
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        return list(text)


def _csv_records(path: Path, delimiter: str) -> Iterator[tuple[str, list[str], str]]:
    """Place, cells and problem of each record that is not blank."""
    lines, start = _lines(path), 0
    # .tsv has no quotes: a caption may begin with one
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    while start < len(lines):
        first = start
        rest = map(lines.__getitem__, range(first, len(lines)))
        reader = csv.reader(rest, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
        try:
            for cells in reader:
                place, start = start + 1, first + reader.line_num
                if cells:
                    yield f"{path.name}:{place}" + f"-{start}" * (start > place), cells, ""
        except csv.Error as error:
            # an unclosed quote costs its own line: reading goes on at the next one
            start += 1
            problem = f"line malformed: {error}; is a quote not closed, or a cell with quotes not quoted?"
            yield f"{path.name}:{start}", [], problem


def _csv_rows(path: Path, delimiter: str, names: list[str]) -> Iterator[Row]:
    for place, cells, problem in islice(_csv_records(path, delimiter), 1, None):
        if not problem and len(cells) != len(names):
            counts = f"{len(cells)} cells, the first line has {len(names)}"
            problem = f"line malformed: {counts}: is a cell with {delimiter!r} not quoted?"
        yield Row(place, {} if problem else dict(zip(names, cells, strict=True)), problem)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        place = f"{path.name}:{number}"
        try:
            cells = json.loads(line, object_pairs_hook=_object) if line.strip() else None
            if isinstance(cells, dict):
                yield Row(place, cells)
            elif line.strip():
                raise ValueError("no JSON object")
        except (ValueError, RecursionError) as error:
            yield Row(place, {}, f"line malformed: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) < len(pairs):
        raise ValueError("a key occurs twice")
    return cells


def arrow_schema(path: Path) -> Any:
    """The columns of a file in parquet or, with the suffix .arrow, in Arrow's stream format; FileError if it is neither."""
    try:
        return _arrow_stream(path).schema if path.suffix == ".arrow" else parquet.read_schema(path)
    except pa.ArrowException as error:
        raise FileError(f"{path} cannot be read: {error}", path) from error


def _arrow_stream(path: Path) -> Any:
    """All rows; mapped, so that nothing is read yet."""
    return ipc.open_stream(pa.memory_map(str(path))).read_all()


def rows_of_groups(path: Path) -> list[int]:
    """Rows of each row group of a parquet file; an Arrow file is one group."""
    if path.suffix == ".arrow":
        return [_arrow_stream(path).num_rows]
    metadata = parquet.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def read_group(path: Path, group: int, columns: tuple[str, ...]) -> Any:
    """Columns of a row group as an Arrow table. The last groups are kept, so rows are best read in their order."""
    return _read_group(path, path.stat().st_mtime_ns, group, columns)


@lru_cache(maxsize=2)
def _read_group(path: Path, modified: int, group: int, columns: tuple[str, ...]) -> Any:
    if path.suffix == ".arrow":
        return _arrow_stream(path).select(list(columns))
    return parquet.ParquetFile(path).read_row_group(group, columns=list(columns))


def _parquet_rows(path: Path, names: list[str]) -> Iterator[Row]:
    total = 0
    for group, count in enumerate(rows_of_groups(path)):
        columns = {name: _cells(path, group, name) for name in names}
        for row in range(count):
            total += 1
            yield Row(f"{path.name}:{total}", {name: columns[name][row] for name in names}, group=group, row=row)


def _cells(path: Path, group: int, name: str) -> list[Any]:
    try:
        column = parquet.ParquetFile(path).read_row_group(group, columns=[name])[name]
        if pa.types.is_float32(column.type):  # 0.1 rather than 0.10000000149, which no filter names
            column = column.cast(pa.string()).cast(pa.float64())
        # else a value of pandas, where it is installed
        if pa.types.is_timestamp(column.type) and column.type.unit == "ns":
            column = column.cast(pa.timestamp("us", column.type.tz))
        return list(column.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:  # damaged, or values that Python has no type for
        raise FileError(f"{path}: column {name!r} cannot be read: {error}", path) from error

"""Typed metadata of documents as an Arrow table, and filters on it.

A value keeps its type. Each type that a key's values have is a column of its own, named `owner:type:key`. Columns of `user`
came with the data; columns of `stair` are our own record of each item, such as its `file`, and the ids. Nulls are missing
values. N documents.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stair.errors import SettingError

Row = Mapping[str, Any]
ID = "stair:text:id"  # the column of ids
_TEXT = pa.large_string()
_ARROW = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "none": pa.null()}  # all others hold text
_PARSE = {"date": date.fromisoformat, "datetime": datetime.fromisoformat, "json": json.loads}
_COMPARE: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "=": (operator.eq, pc.equal),
    "!=": (operator.eq, pc.equal),  # `Documents.matching` inverts the result
    "<": (operator.lt, pc.less),
    "<=": (operator.le, pc.less_equal),
    ">": (operator.gt, pc.greater),
    ">=": (operator.ge, pc.greater_equal),
}
_EQUALITY = ("=", "!=")
_HALF = re.compile("[\ud800-\udfff]")  # half of a character, as in file names that are no UTF-8
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_QUOTED = r'"((?:[^"]|"")*)"'
_CONDITION = rf"(?:\s*{_QUOTED}\s*|([^\"=<>!]+))(!=|<=|>=|=|<|>)\s*(?:{_QUOTED}\s*|((?!and\s|[\s=<>!]).*?))(?:{{}}$)"
_FIRST = re.compile(_CONDITION.format(r"\sand\s|"), re.DOTALL)
_WHOLE = re.compile(_CONDITION.format(""), re.DOTALL)


def _number(text: str) -> int | float | None:
    """The number that a text is, with its last digit."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


@dataclass(frozen=True)
class Condition:
    """One condition of a filter, such as `year>=2010`; a quoted value compares with text as text."""

    owner: str  # of the column, `user` or `stair`
    key: str
    sign: str
    value: str  # as typed, without quotes
    quoted: bool

    def __str__(self) -> str:
        return f"{'stair:' if self.owner == 'stair' else ''}{self.key}{self.sign}{self.value}"

    @cached_property
    def number(self) -> int | float | None:
        """The value as a number, if it is one."""
        return _number(self.value)

    def holds(self, value: Any) -> bool | None:
        """Whether it is true of a value, `!=` read as `=`; None if the two do not compare. A list equals its members."""
        literal: Any = None
        if isinstance(value, list):
            return None if self.sign not in _EQUALITY else any(self.holds(member) for member in value)
        if isinstance(value, bool):
            literal = None if self.sign not in _EQUALITY else {"true": True, "false": False}.get(self.value.lower())
        elif isinstance(value, (int, float)):
            literal = self.number
        elif isinstance(value, str):
            as_text = self.quoted or self.number is None
            value, literal = (value, self.value) if as_text else (_number(value), self.number)
        elif isinstance(value, date):
            try:
                literal = type(value).fromisoformat(self.value)
            except ValueError:
                return None
        try:
            return None if literal is None or value is None else bool(_COMPARE[self.sign][0](value, literal))
        except TypeError:  # times with and without a zone
            return None

    def compare(self, kind: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """Whether it is true of each value of a column, `!=` read as `=`; null where the two do not compare."""
        compare, as_text = _COMPARE[self.sign][1], self.quoted or self.number is None
        if kind == "text" and as_text:
            return compare(column, pa.scalar(self.value, _TEXT))
        try:
            literal = {"int": int, "float": float}[kind](self.number)
            if literal == self.number:  # Arrow compares numbers of one type exactly
                return compare(column, pa.scalar(literal, _ARROW[kind]))
        except (KeyError, TypeError, OverflowError, pa.ArrowInvalid):
            pass
        distinct, parse = column.unique(), _PARSE.get(kind, lambda value: value)
        truth = [None if value is None else self.holds(parse(value)) for value in distinct.to_pylist()]
        return pc.take(pa.array(truth, pa.bool_()), pc.index_in(column, value_set=distinct))


def conditions(where: str | Sequence[str]) -> list[Condition]:
    """The conditions of a filter: a text with ` and ` between them, or one in each text; SettingError if unreadable."""
    if not isinstance(where, str):
        return [_condition(_WHOLE.fullmatch(text), text) for text in where if text.strip()]
    parsed, at = [], 0
    while at < len(where.rstrip()):
        match = _FIRST.match(where, at)
        parsed.append(_condition(match, where[at:]))
        at = match.end() if match else at
    return parsed


def _condition(match: re.Match[str] | None, text: str) -> Condition:
    if not match:
        raise SettingError(
            f"filter {text!r:.80} is not NAME=VALUE, with one of = != < <= > >=. Put a name or value that holds one of "
            "these or ' and ' between double quotes", "where",
        )  # fmt: skip
    quoted_key, key, sign, quoted, value = match.groups()
    owner = "stair" if key is not None and key.strip().startswith("stair:") else "user"
    name = key.strip().removeprefix("stair:") if quoted_key is None else quoted_key.replace('""', '"')
    value = value.strip() if quoted is None else quoted.replace('""', '"')
    return Condition(owner, name, sign, value, quoted is not None)


def to_table(ids: Sequence[str], metadata: Sequence[Row] = (), source: Sequence[Row] = ()) -> pa.Table:
    """N ids, the user's values and our own (N dictionaries, or none at all) as a table.

    SettingError, with key and id, if one is no valid Unicode, or a value has no type here.
    """
    if wrong := [name for name in ids if _HALF.search(name)]:
        raise SettingError(f"id {wrong[0]!r} is not valid Unicode; rename it", "ids")
    columns: dict[str, list[Any]] = {ID: list(ids)}
    for owner, rows in (("user", metadata), ("stair", source)):
        for n, row in enumerate(rows):
            for key, value in row.items():
                try:
                    kind, stored = _typed(value)
                    name = f"{owner}:{kind}:" + key
                    if name not in columns:
                        name.encode()
                        columns[name] = [None] * len(ids)
                except (TypeError, ValueError, RecursionError) as error:
                    raise SettingError(
                        f"metadata {key!r} of {ids[n]!r}: {error}. Keys are text; values are text, finite numbers, true or "
                        "false, dates, None, or lists and dictionaries of these", "metadata",
                    ) from error  # fmt: skip
                columns[name][n] = stored
    return pa.table({name: pa.array(values, _ARROW.get(name.split(":")[1], _TEXT)) for name, values in columns.items()})


def _typed(value: Any) -> tuple[str, Any]:
    """Type and stored form of a value. A TypeError or ValueError says why it has none."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, (float, datetime)) and value != value):
        return "none", None
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, float) and math.isfinite(value):
        return "float", value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return "int", value
    if isinstance(value, date):
        return ("datetime" if isinstance(value, datetime) else "date"), value.isoformat()
    if isinstance(value, str):
        value.encode()
        return "text", value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if json.loads(text) != value:
        raise ValueError("it holds keys that are not strings, or tuples")
    text.encode()
    return "json", text


class Documents:
    """Ids and metadata of N documents: one or several tables of `to_table`, concatenated."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._names = [tuple(name.split(":", 2)) for name in table.column_names]
        if ID not in table.column_names or any(len(name) != 3 for name in self._names):
            raise ValueError(f"columns are {table.column_names}; it is not a table of documents")
        self.column = lru_cache(maxsize=None)(self._checked_column)
        self._matching = lru_cache(maxsize=16)(self._evaluate)  # a filter is often used for many searches

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _checked_column(self, name: str) -> pa.ChunkedArray:
        column = self.table.column(name)
        column.validate(full=True)  # offsets of a damaged file would be read as addresses
        return column

    @property
    def ids(self) -> pa.ChunkedArray:
        """N strings."""
        return self.column(ID)

    def find(self, name: str) -> int | None:
        """The number of the document with an id."""
        number = -1 if _HALF.search(name) else pc.index(self.ids, pa.scalar(name, _TEXT)).as_py()
        return None if number < 0 else number

    def has(self, names: Iterable[Any]) -> pa.ChunkedArray:
        """(N,) whether the id of a document is one of some names."""
        usable = [name for name in names if isinstance(name, str) and not _HALF.search(name)]
        return pc.is_in(self.ids, value_set=pa.array(usable, _TEXT))

    def present(self, names: Iterable[Any]) -> set[str]:
        """Those of some names that are ids of documents."""
        return set(self.ids.filter(self.has(names)).to_pylist())

    @property
    def keys(self) -> list[str]:
        """Sorted names of all columns, as a filter takes them: those of our own begin with `stair:`."""
        columns = {(owner, key) for owner, _, key in self._names} - {("stair", "id")}
        return sorted(f"stair:{key}" if owner == "stair" else key for owner, key in columns)

    def rows(self, owner: str, start: int, count: int) -> list[dict[str, Any]]:
        """Values of consecutive documents that belong to `user` or `stair`, without the missing ones."""
        rows: list[dict[str, Any]] = [{} for _ in range(count)]
        for column_owner, kind, key in self._names:
            name = f"{column_owner}:{kind}:{key}"
            if column_owner == owner and name != ID:
                parse = _PARSE.get(kind, lambda value: value)
                for row, value in zip(rows, self.column(name).slice(start, count).to_pylist(), strict=True):
                    if value is not None:
                        row[key] = parse(value)
        return rows

    def matching(self, where: str | Sequence[str]) -> tuple[NDArray[np.bool_], dict[str, int]]:
        """Which documents match a filter: (N,) bool, of length 0 without a condition; and `Hits.not_comparable`.

        SettingError if a condition cannot be read, or compares with no document.
        """
        mask_N, not_comparable = np.zeros(0, np.bool_), dict[str, int]()
        for condition in conditions(where):
            true_N, compared = self._matching(condition)
            mask_N = mask_N & true_N if len(mask_N) else true_N
            if condition.sign not in _EQUALITY and compared < len(self):
                not_comparable[str(condition)] = len(self) - compared
        return mask_N, not_comparable

    def _evaluate(self, condition: Condition) -> tuple[NDArray[np.bool_], int]:
        kinds = [kind for owner, kind, key in self._names if (owner, key) == (condition.owner, condition.key)]
        if not kinds:
            known = sorted({*self.keys, "stair:id"})
            raise SettingError(f"filter {str(condition)!r}: no document has it; known are {known}", "where")
        true_N, compared_N = np.zeros(len(self), np.bool_), np.zeros(len(self), np.bool_)
        for kind in {*kinds} - {"none"}:
            result = condition.compare(kind, self.column(f"{condition.owner}:{kind}:{condition.key}"))
            true_N |= pc.fill_null(result, False).to_numpy()
            compared_N |= result.is_valid().to_numpy()
        if not compared_N.any() and not {"text", "none"} & {*kinds}:
            given = f"filter {str(condition)!r}: values are of type {', '.join(sorted(kinds))}"
            raise SettingError(f"{given}; {condition.value!r} does not compare with them by {condition.sign}", "where")
        return (~true_N if condition.sign == "!=" else true_N), int(compared_N.sum())

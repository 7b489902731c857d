"""Typed metadata of documents in Arrow, and filters on it.

A value keeps the type that it was given with. A key can have values of several types: each type is a column of its own,
named `owner:type:key`. Columns of `user` came with the data; columns of `stair` are our own record of each item, such as
the file that it is in. `None` and NaN are missing values.

N documents.
"""

import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stair.errors import SettingError

Owner = Literal["user", "stair"]
ID = "stair:text:id"  # the column of ids
_TEXT = pa.large_string()
_ARROW = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "none": pa.null()}  # all others hold text
_LOADS: dict[str, Callable[[str], Any]] = {
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "json": json.loads,
}
_TESTS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "=": (operator.eq, pc.equal),
    "<": (operator.lt, pc.less),
    "<=": (operator.le, pc.less_equal),
    ">": (operator.gt, pc.greater),
    ">=": (operator.ge, pc.greater_equal),
}
_INT64 = range(-(1 << 63), 1 << 63)
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_QUOTED = r'"((?:[^"]|"")*)"'
_CONDITION = rf"(?:\s*{_QUOTED}\s*|([^\"=<>!]+))(!=|<=|>=|=|<|>)\s*(?:{_QUOTED}\s*|((?!and\s|[\s=<>!]).*?))(?:{{}}$)"
_FIRST = re.compile(_CONDITION.format(r"\sand\s|"), re.DOTALL)
_WHOLE = re.compile(_CONDITION.format(""), re.DOTALL)


def _number(text: str) -> int | float | None:
    """The number that a text is, with its last digit."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)


@dataclass(frozen=True)
class Condition:
    """One condition of a filter, such as `year>=2010`.

    Attributes:
        owner: of the column.
        key: name of the column.
        sign: `=`, `!=`, `<`, `<=`, `>` or `>=`.
        value: as typed, without quotes.
        quoted: whether the value was in double quotes: then text is compared with it as text.
    """

    owner: Owner
    key: str
    sign: str
    value: str
    quoted: bool

    def __str__(self) -> str:
        key = f"stair:{self.key}" if self.owner == "stair" else self.key
        return f"{key}{self.sign}{self.value}"

    @cached_property
    def number(self) -> int | float | None:
        """The value as a number, if it is one."""
        return _number(self.value)

    @property
    def equality(self) -> str:
        """The sign, `!=` read as `=`."""
        return "=" if self.sign == "!=" else self.sign

    def holds(self, value: Any) -> bool | None:
        """Whether it is true of a value, `!=` read as `=`; None if the two do not compare. A list equals its members."""
        ordered = self.equality != "="
        if isinstance(value, list):
            return None if ordered else any(self.holds(member) for member in value)
        literal: Any = None
        if isinstance(value, bool):
            literal = None if ordered else {"true": True, "false": False}.get(self.value.lower())
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
            return None if literal is None or value is None else bool(_TESTS[self.equality][0](value, literal))
        except TypeError:  # times with and without a zone
            return None

    def scalar(self, kind: str) -> pa.Scalar | None:
        """The value as Arrow compares it exactly with a column of a type; None if only `holds` does."""
        if kind == "text":
            return pa.scalar(self.value, _TEXT) if self.quoted or self.number is None else None
        if kind not in ("int", "float") or self.number is None:
            return None
        try:
            converted = int(self.number) if kind == "int" else float(self.number)
        except OverflowError:
            return None
        exact = converted == self.number and (kind == "float" or converted in _INT64)
        return pa.scalar(converted, _ARROW[kind]) if exact else None

    def compare(self, kind: str, column: pa.Array) -> pa.Array:
        """Whether it is true of each value of a column, `!=` read as `=`; null where the two do not compare."""
        if (scalar := self.scalar(kind)) is not None:
            return _TESTS[self.equality][1](column, scalar)
        distinct = column.dictionary_encode()
        values = map(_LOADS.get(kind, lambda value: value), distinct.dictionary.to_pylist())
        return pa.array(map(self.holds, values), pa.bool_()).take(distinct.indices)


def conditions(where: str | Sequence[str]) -> list[Condition]:
    """The conditions of a filter.

    Args:
        where: a text with ` and ` between conditions, or a list with one condition in each text. Names and values that
            hold signs, quotes or ` and ` go between double quotes, a double quote doubled. `stair:NAME` without quotes is
            a column of our own.

    Raises:
        SettingError: if a condition cannot be read.
    """
    if not isinstance(where, str):
        return [_condition(_WHOLE.fullmatch(text), text) for text in where if text.strip()]
    found, at = [], 0
    while at < len(where.rstrip()):
        match = _FIRST.match(where, at)
        found.append(_condition(match, where if match else where[at:]))
        at = match.end() if match else at
    return found


def _condition(match: re.Match[str] | None, text: str) -> Condition:
    if not match:
        raise SettingError(
            f"filter {text!r:.80} is not NAME=VALUE, with one of = != < <= > >=. A name or value with one of these or "
            "' and ' in it goes between double quotes",
            "where",
        )
    quoted_key, key, sign, quoted, value = match.groups()
    owner: Owner = "stair" if key is not None and key.strip().startswith("stair:") else "user"
    name = key.strip().removeprefix("stair:") if quoted_key is None else quoted_key.replace('""', '"')
    value = value.strip() if quoted is None else quoted.replace('""', '"')
    return Condition(owner, name, sign, value, quoted is not None)


def to_table(
    ids: Sequence[str], metadata: Sequence[Mapping[str, Any]], source: Sequence[Mapping[str, Any]] = ()
) -> pa.Table:
    """Ids and metadata as a table.

    Args:
        ids: N strings.
        metadata: N dictionaries of the user's values, or none at all.
        source: N dictionaries of our own, or none at all.

    Raises:
        SettingError: if a key is no string, a text is no valid Unicode, or a value has no type here: with key and id.
    """
    if wrong := [name for name in ids if not is_unicode(name)]:
        raise SettingError(f"id {wrong[0]!r} is not valid Unicode; rename it", "ids")
    columns: dict[str, list[Any]] = {ID: list(ids)}
    for owner, rows in (("user", metadata), ("stair", source)):
        for n, row in enumerate(rows):
            for key, value in row.items():
                try:
                    kind, stored = _stored(value)
                    if (name := f"{owner}:{kind}:{key}") not in columns or not isinstance(key, str):
                        _check_key(key)
                        columns[name] = [None] * len(ids)
                except (TypeError, ValueError, RecursionError) as error:
                    raise SettingError(
                        f"metadata {key!r} of {ids[n]!r}: {error}. Give text, a finite number, true or false, a date, "
                        "None, or lists and dictionaries of these",
                        "metadata",
                    ) from error
                columns[name][n] = stored
    return pa.table({name: pa.array(values, _ARROW.get(_kind(name), _TEXT)) for name, values in columns.items()})


def _kind(column: str) -> str:
    return column.split(":", 2)[1]


def _check_key(key: Any) -> None:
    if not isinstance(key, str):
        raise TypeError(f"the key is a {type(key).__name__}, keys are strings")
    key.encode()


def _stored(value: Any) -> tuple[str, Any]:
    """Type and stored form of a value. A TypeError or ValueError says why it has none."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or (isinstance(value, (float, datetime)) and value != value):
        return "none", None
    if isinstance(value, bool):
        return "bool", value
    if isinstance(value, float) and math.isfinite(value):
        return "float", value
    if isinstance(value, int) and value in _INT64:
        return "int", value
    if isinstance(value, date):
        return ("datetime" if isinstance(value, datetime) else "date"), value.isoformat()
    if isinstance(value, str):
        value.encode()
        return "text", value
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    if json.loads(text) != value:
        raise ValueError("it holds keys that are no strings, or tuples")
    text.encode()
    return "json", text


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: file names that are no UTF-8 hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Documents:
    """Ids and metadata of the documents of a table.

    Args:
        batch: a table as `to_table` makes it, in one batch.

    Raises:
        ValueError: here or later, if it is damaged.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self._columns: list[tuple[str, ...]] = [tuple(name.split(":", 2)) for name in batch.schema.names]
        if ID not in batch.schema.names or any(len(name) != 3 for name in self._columns):
            raise ValueError(f"columns are {batch.schema.names}; it is no table of documents")
        self._column = lru_cache(maxsize=None)(self._checked_column)
        self.matching = lru_cache(maxsize=16)(self._matching)  # a filter is often used for many searches

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def _checked_column(self, name: str) -> pa.Array:
        column = self.batch.column(self.batch.schema.get_field_index(name))
        column.validate(full=True)  # offsets of a damaged file would be read as addresses
        return column

    @cached_property
    def ids(self) -> pa.Array:
        """N strings."""
        return self._column(ID)

    @cached_property
    def _id_buffers(self) -> tuple[memoryview, memoryview]:
        _, offsets, text = self.ids.buffers()
        return memoryview(offsets).cast("q")[self.ids.offset :], memoryview(text or b"")

    def id(self, n: int) -> str:
        """The id of a document, in a third of the time of `ids[n].as_py()`: ten of them are a tenth of a search."""
        offsets, text = self._id_buffers
        return str(text[offsets[n] : offsets[n + 1]], "utf-8")

    def find(self, name: str) -> int | None:
        """The document of an id."""
        place = pc.index(self.ids, pa.scalar(name, _TEXT)).as_py() if is_unicode(name) else -1
        return place if place >= 0 else None

    @cached_property
    def names(self) -> list[str]:
        """Names of all columns, as a filter takes them: those of our own begin with `stair:`."""
        return [
            f"stair:{key}" if owner == "stair" else key
            for owner, _, key in self._columns
            if (owner, key) != ("stair", "id")
        ]

    def row(self, n: int, owner: Owner) -> dict[str, Any]:
        """Values of one document, without the missing ones."""
        return {
            key: _LOADS[kind](value) if kind in _LOADS else value
            for whose, kind, key in self._columns
            if whose == owner and f"{whose}:{kind}:{key}" != ID
            if (value := self._column(f"{whose}:{kind}:{key}")[n].as_py()) is not None
        }

    def kinds(self, condition: Condition) -> list[str]:
        """Types that a condition's column has."""
        return [kind for owner, kind, key in self._columns if (owner, key) == (condition.owner, condition.key)]

    def _matching(self, condition: Condition) -> tuple[NDArray[np.bool_], int]:
        """Which documents a condition is true of: (N,) bool. How many have a value that compares with the condition's.

        A document without such a value matches `!=` only. The result is shared: do not write to it.
        """
        true_N, compared_N = np.zeros(len(self), np.bool_), np.zeros(len(self), np.bool_)
        for kind in self.kinds(condition):
            if kind != "none":
                result = condition.compare(kind, self._column(f"{condition.owner}:{kind}:{condition.key}"))
                true_N |= pc.fill_null(result, False).to_numpy(zero_copy_only=False)
                compared_N |= result.is_valid().to_numpy(zero_copy_only=False)
        return ~true_N if condition.sign == "!=" else true_N, int(compared_N.sum())


def filtered(parts: Sequence[Documents], where: str | Sequence[str]) -> tuple[list[NDArray[np.bool_]], dict[str, int]]:
    """Which documents match a filter.

    Args:
        parts: all documents.
        where: as for `conditions`.

    Returns:
        For each part (N,) bool, of length 0 where there is no filter; for each condition with `<`, `<=`, `>` or `>=` how
        many documents have no value that compares with it. These do not match.

    Raises:
        SettingError: if no document has the column, or none of its values compares with the condition's.
    """
    masks, missing = [np.zeros(0, np.bool_) for _ in parts], dict[str, int]()
    for condition in conditions(where):
        kinds = {kind for part in parts for kind in part.kinds(condition)}
        if parts and not kinds:
            known = sorted({name for part in parts for name in part.names} | {"stair:id"})
            raise SettingError(f"filter {str(condition)!r}: no document has it; known are {known}", "where")
        results = [part.matching(condition) for part in parts]
        compared = sum(count for _, count in results)
        if not compared and not kinds & {"text", "none"}:
            raise SettingError(
                f"filter {str(condition)!r}: values are of type {', '.join(sorted(kinds))}; {condition.value!r} does not "
                f"compare with them by {condition.sign}",
                "where",
            )
        masks = [mask & result if len(mask) else result for mask, (result, _) in zip(masks, results, strict=True)]
        if condition.sign not in ("=", "!=") and (rest := sum(map(len, parts)) - compared):
            missing[str(condition)] = rest
    return masks, missing

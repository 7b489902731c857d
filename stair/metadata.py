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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
_ARROW = {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "none": pa.null()}  # all others hold text
_LOADS: dict[str, Callable[[str], Any]] = {
    "date": date.fromisoformat,
    "datetime": datetime.fromisoformat,
    "json": json.loads,
}
_NOUNS = {"int": "numbers", "float": "numbers", "bool": "true or false", "date": "dates", "datetime": "times"}
_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_ARROW_TESTS: dict[str, Any] = {
    "=": pc.equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_INT64 = range(-(1 << 63), 1 << 63)
_INTEGER = r"^[-+]?0*([0-9]{1,18}|[1-8][0-9]{18})$"  # within 64 bits
_LONG = r"^-?[1-9][0-9]{18,}$"
_NUMBER = r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
_QUOTED = r'"((?:[^"]|"")*)"'
_CONDITION = rf"(?:\s*{_QUOTED}\s*|([^\"=<>!]+))(!=|<=|>=|=|<|>)\s*(?:{_QUOTED}\s*|((?!and\s|[\s=<>!]).*?))(?:{{}}$)"
_FIRST = re.compile(_CONDITION.format(r"\sand\s|"), re.DOTALL)
_WHOLE = re.compile(_CONDITION.format(""), re.DOTALL)


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
        if not re.fullmatch(_NUMBER, self.value):
            return None
        try:
            return int(self.value)
        except ValueError:
            return float(self.value)

    def literal(self, value: Any) -> Any:
        """This condition's value in the type of another value; None if it cannot be read so."""
        if isinstance(value, bool):
            return {"true": True, "false": False}.get(self.value.lower())
        if isinstance(value, str):
            return self.value
        if isinstance(value, (int, float)):
            return self.number
        try:
            return type(value).fromisoformat(self.value) if isinstance(value, date) else None
        except ValueError:
            return None

    def holds(self, value: Any) -> bool | None:
        """Whether it is true of a value, `!=` read as `=`; None if the two do not compare. A list equals its members."""
        equality = self.sign in ("=", "!=")
        if isinstance(value, list):
            return any(self.holds(member) for member in value) if equality else None
        literal = self.literal(value)
        if literal is None or (isinstance(value, bool) and not equality):
            return None
        try:
            return bool(_TESTS["=" if equality else self.sign](value, literal))
        except TypeError:  # times with and without a zone
            return None


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
    columns: dict[str, list[Any]] = {ID: list(ids)}
    rows_of: dict[Owner, Sequence[Mapping[str, Any]]] = {"user": metadata, "stair": source}
    for owner, rows in rows_of.items():
        for n, row in enumerate(rows):
            for key, value in row.items():
                kind, stored = _stored(key, value, ids[n])
                if (name := f"{owner}:{kind}:{key}") not in columns:
                    columns[name] = [None] * len(ids)
                columns[name][n] = stored
    return pa.table([_array(name, values, ids) for name, values in columns.items()], names=list(columns))


def _stored(key: str, value: Any, name: str) -> tuple[str, Any]:
    """Type and stored form of a value."""
    value = value.item() if isinstance(value, np.generic) else value
    problem = None
    if not isinstance(key, str):
        problem = f"the key is a {type(key).__name__}, keys are strings"
    elif value is None or (isinstance(value, (float, datetime)) and value != value):
        return "none", None
    elif isinstance(value, bool):
        return "bool", value
    elif isinstance(value, str):
        return "text", value
    elif isinstance(value, int):
        return ("int", value) if value in _INT64 else ("json", str(value))
    elif isinstance(value, float) and math.isfinite(value):
        return "float", value
    elif isinstance(value, date):
        return ("datetime" if isinstance(value, datetime) else "date"), value.isoformat()
    elif isinstance(value, (dict, list)):
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            problem = str(error)
        else:
            if json.loads(text) == value:
                return "json", text
            problem = "it holds keys that are no strings, or tuples"
    raise SettingError(
        f"metadata {key!r} of {name!r}: {problem or f'the value is {value!r:.40}, a {type(value).__name__}'}. Give text, a "
        "finite number, true or false, a date, None, or lists and dictionaries of these",
        "metadata",
    )


def _array(name: str, values: Sequence[Any], ids: Sequence[str]) -> pa.Array:
    try:
        name.encode()
        return pa.array(values, _ARROW.get(name.split(":", 2)[1], pa.large_string()))
    except UnicodeEncodeError as error:
        wrong = next((n for n, value in enumerate(values) if isinstance(value, str) and not _is_unicode(value)), 0)
        what = "id" if name == ID else f"metadata {name.split(':', 2)[2]!r} of"
        raise SettingError(
            f"{what} {ids[wrong]!r} is not valid Unicode ({error.reason}); rename it",
            "ids" if name == ID else "metadata",
        ) from error


def _is_unicode(text: str) -> bool:
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

    def find(self, name: str) -> int | None:
        """The document of an id."""
        place = pc.index(self.ids, pa.scalar(name, pa.large_string())).as_py() if _is_unicode(name) else -1
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
            column = self._column(f"{condition.owner}:{kind}:{condition.key}")
            for true, compared in _compared(kind, column, condition):
                true_N |= pc.fill_null(true, False).to_numpy(zero_copy_only=False)
                compared_N |= compared.to_numpy(zero_copy_only=False)
        return ~true_N if condition.sign == "!=" else true_N, int(compared_N.sum())


def _compared(kind: str, column: pa.Array, condition: Condition) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Which values a condition is true of, `!=` read as `=`, and which compare with its value at all."""
    sign = "=" if condition.sign == "!=" else condition.sign
    if kind == "text" and condition.number is not None and not condition.quoted:
        for each, numbers in _numbers(column).items():
            yield from _compared(each, numbers, condition)
    elif kind == "text":
        yield _ARROW_TESTS[sign](column, pa.scalar(condition.value, pa.large_string())), column.is_valid()
    elif kind in ("int", "float") and condition.number is not None:
        yield _compare_numbers(kind, column, sign, condition.number), column.is_valid()
    elif kind not in ("int", "float", "none"):
        loads = _LOADS.get(kind, bool)
        distinct = column.dictionary_encode()
        holds = pa.array([condition.holds(loads(value)) for value in distinct.dictionary.to_pylist()], pa.bool_())
        true = holds.take(distinct.indices)
        yield true, true.is_valid()


def _compare_numbers(kind: str, column: pa.Array, sign: str, number: int | float) -> pa.Array:
    """Exactly: a number that the column's type does not have is replaced by the next larger one that it has."""
    least: int | float = _next_integer(number) if kind == "int" else _next_float(number)
    if least != number:
        sign = {"<=": "<", ">": ">="}.get(sign, sign)
    if kind == "int" and least not in _INT64:
        return pc.and_(column.is_valid(), (sign[0] == "<") == (least > 0) and sign != "=")
    if sign == "=" and least != number:
        return pc.and_(column.is_valid(), False)
    return _ARROW_TESTS[sign](column, pa.scalar(least, _ARROW[kind]))


def _next_integer(number: int | float) -> int:
    if isinstance(number, float) and math.isinf(number):
        return int(math.copysign(1 << 64, number))
    return math.ceil(number)


def _next_float(number: int | float) -> float:
    try:
        nearest = float(number)
    except OverflowError:
        nearest = math.inf if number > 0 else -math.inf
    return math.nextafter(nearest, math.inf) if nearest < number else nearest


def _numbers(texts: pa.Array) -> dict[str, pa.Array]:
    """Texts that are numbers, by type; the same rows, null where there is no such number."""
    trimmed = pc.utf8_trim_whitespace(texts)
    integer, long, real = (pc.match_substring_regex(trimmed, form) for form in (_INTEGER, _LONG, _NUMBER))
    long = pc.and_not(long, integer)
    real = pc.and_not(real, pc.or_(integer, long))
    unsigned, nothing = pc.replace_substring_regex(trimmed, r"^\+", ""), pa.scalar(None, texts.type)
    return {
        "int": pc.cast(pc.if_else(integer, unsigned, nothing), pa.int64()),
        "float": pc.cast(pc.if_else(real, unsigned, nothing), pa.float64()),
        "json": pc.if_else(long, unsigned, nothing),
    }


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
            nouns = " and ".join(sorted({_NOUNS.get(kind, "lists or objects") for kind in kinds}))
            raise SettingError(
                f"filter {str(condition)!r}: the column holds {nouns}, which {condition.value!r} does not compare with by "
                f"{condition.sign}",
                "where",
            )
        masks = [mask & result if len(mask) else result for mask, (result, _) in zip(masks, results, strict=True)]
        if condition.sign not in ("=", "!=") and (rest := sum(map(len, parts)) - compared):
            missing[str(condition)] = rest
    return masks, missing

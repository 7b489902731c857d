"""What is known of documents beside their words, in columns, so that a filter reads only what it asks for.

Text is kept once for each distinct value, numbers as float64 (exact for whole numbers up to 2^53), anything else as json.

N documents, D distinct values.
"""

import json
import math
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TESTS: dict[str, Callable[[Any, Any], Any]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_AND = re.compile(r'\s+and\s+(?=(?:[^"]*"[^"]*")*[^"]*$)')  # not between double quotes
_CONDITION = re.compile(r"\s*([^\s=<>!]+)\s*(!=|<=|>=|=|<|>)\s*(.*)", re.DOTALL)

#: how keys begin under which the columns hold what STAIR itself knows of a document
SOURCE = "stair:"


class Condition:
    """One condition of a filter, such as `split=test` or `year >= 2010`.

    Args:
        text: key, one of `= != < <= > >=`, value, which may stand between double quotes. A document without the key
            matches `!=` only; a list matches `=` if it holds the value.

    Raises:
        ValueError: if it is none.
    """

    def __init__(self, text: str) -> None:
        found = _CONDITION.fullmatch(text.strip())
        if not found:
            raise ValueError(f"filter {text!r} is not KEY=VALUE (or != < <= > >=)")
        self.key, self.sign, value = found.groups()
        self.value = value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value

    def holds(self, value: Any) -> bool:
        """Whether it is true of one value.

        Raises:
            ValueError: if a number is compared with something else.
        """
        if isinstance(value, bool):
            value = "true" if value else "false"
        if isinstance(value, list) and self.sign in ("=", "!="):
            return any(str(element) == self.value for element in value) == (self.sign == "=")
        if isinstance(value, (int, float)):
            return bool(_TESTS[self.sign](float(value), self.number()))
        return bool(_TESTS[self.sign](value if isinstance(value, str) else json.dumps(value), self.value))

    def number(self) -> float:
        """The value as a number.

        Raises:
            ValueError: if it is none.
        """
        try:
            return float(self.value)
        except ValueError as error:
            raise ValueError(f"filter on {self.key!r}: it holds numbers, {self.value!r} is none") from error


def conditions(where: str | Sequence[str]) -> list[Condition]:
    """The conditions of a filter: a text with ` and ` between them, or a list with one in each text.

    Raises:
        ValueError: as `Condition`.
    """
    texts = _AND.split(where) if isinstance(where, str) else where
    return [Condition(text) for text in texts if text.strip()]


def texts_to_arrays(name: str, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Strings as one run of bytes and where each begins."""
    encoded = [text.encode() for text in texts]
    start = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=start[1:])
    return {f"{name}_start": start, f"{name}_text": np.frombuffer(b"".join(encoded), np.uint8)}


class Texts(Sequence[str]):
    """Strings that stay on disk until asked for.

    Args:
        start: (N+1,).
        text: bytes.
    """

    def __init__(self, start: NDArray[Any], text: NDArray[Any]) -> None:
        self._start, self._text = start, text

    def __len__(self) -> int:
        return len(self._start) - 1

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self._text[self._start[place] : self._start[place + 1]].tobytes().decode()


def split_record(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The user's metadata and the source of a document."""
    metadata = {key: value for key, value in record.items() if not key.startswith(SOURCE)}
    return metadata, {key[len(SOURCE) :]: value for key, value in record.items() if key.startswith(SOURCE)}


def write_columns(metadata: Sequence[dict[str, Any]]) -> tuple[list[dict[str, str]], dict[str, NDArray[Any]]]:
    """Turns dictionaries into columns.

    Returns:
        For each column its `key`, its `kind` (`number` or `json`) and the `name` its arrays begin with; the arrays.

    Raises:
        ValueError: if a key is no text, a value is no plain value or a number does not fit. NaN is no value.
    """
    schema, arrays = [], {}
    for place, key in enumerate(dict.fromkeys(key for row in metadata for key in row)):
        if not isinstance(key, str):
            raise ValueError(f"metadata key {key!r} is of {type(key).__name__}; keys are texts")
        values, name = [_present(row.get(key)) for row in metadata], f"column{place}"
        number = all(
            value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values
        )
        schema.append({"key": key, "kind": "number" if number else "json", "name": name})
        arrays.update(_numbers(key, name, values) if number else _codes(key, name, values))
    return schema, arrays


def _present(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value  # tables write NaN where nothing is


def _numbers(key: str, name: str, values: Sequence[Any]) -> dict[str, NDArray[Any]]:
    if any(isinstance(value, int) and abs(value) > 1 << 53 for value in values):
        raise ValueError(f"metadata {key!r}: whole numbers above 2^53 lose digits; give them as text")
    if any(isinstance(value, float) and math.isinf(value) for value in values):
        raise ValueError(f"metadata {key!r}: a value is infinite, which json has no word for; leave it out")
    return {f"{name}_number": np.array([np.nan if value is None else value for value in values], np.float64)}


def _codes(key: str, name: str, values: Sequence[Any]) -> dict[str, NDArray[Any]]:
    try:
        texts = [None if value is None else json.dumps(value, ensure_ascii=False, allow_nan=False) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata {key!r}: {error}; give texts, numbers, true or false, or lists of these") from error
    distinct = sorted({text for text in texts if text is not None})
    place = {text: code for code, text in enumerate(distinct)}
    codes = np.array([-1 if text is None else place[text] for text in texts], np.int32)
    return {f"{name}_code": codes, **texts_to_arrays(name, distinct)}


class Columns:
    """The metadata of a segment.

    Args:
        schema: as `write_columns` returned it.
        arrays: the segment's, by name.
    """

    def __init__(self, schema: Sequence[dict[str, str]], arrays: dict[str, NDArray[Any]]) -> None:
        self._columns = {column["key"]: column for column in schema}
        self._arrays = arrays

    @property
    def keys(self) -> list[str]:
        """What documents may be asked for."""
        return list(self._columns)

    def row(self, document: int) -> dict[str, Any]:
        """What is known of one document."""
        values = {key: self._value(column, document) for key, column in self._columns.items()}
        return {key: value for key, value in values.items() if value is not None}

    def _value(self, column: dict[str, str], document: int) -> Any:
        if column["kind"] == "number":
            number = float(self._arrays[column["name"] + "_number"][document])
            return None if np.isnan(number) else int(number) if number.is_integer() else number
        code = int(self._arrays[column["name"] + "_code"][document])
        return None if code < 0 else json.loads(self._distinct(column)[code])

    def _distinct(self, column: dict[str, str]) -> Texts:
        return Texts(self._arrays[column["name"] + "_start"], self._arrays[column["name"] + "_text"])

    def matching(self, condition: Condition, documents: int) -> NDArray[np.bool_]:
        """Which documents a condition is true of: (N,) bool."""
        column = self._columns.get(condition.key)
        if column is None:
            return np.full(documents, condition.sign == "!=")
        if column["kind"] == "number":
            number_N = self._arrays[column["name"] + "_number"]
            return np.asarray(_TESTS[condition.sign](number_N, condition.number()), np.bool_)
        distinct = self._distinct(column)
        # one more for code -1, no value
        holds = np.zeros(len(distinct) + 1, np.bool_)
        holds[-1] = condition.sign == "!="
        for code in self._candidates(condition, distinct):
            holds[code] = condition.holds(json.loads(distinct[code]))
        return np.asarray(holds[self._arrays[column["name"] + "_code"]], np.bool_)

    @staticmethod
    def _candidates(condition: Condition, distinct: Texts) -> Sequence[int]:
        text, last = json.dumps(condition.value, ensure_ascii=False), len(distinct) - 1
        if condition.sign == "=" and distinct and distinct[0].startswith('"') and distinct[last].startswith('"'):
            # texts only, as they are sorted: the one that is equal is found by halving
            code = bisect_left(distinct, text)
            return [code] if code <= last and distinct[code] == text else []
        return range(len(distinct))

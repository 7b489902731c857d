"""Common to all exports: checks before the first document is written, targets that appear complete or not at all."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from stair.errors import EngineError, FileError, SettingError, StairError
from stair.files import new_file_mode, remove, removed_on_failure
from stair.index import SparseIndex


class Row(NamedTuple):
    """A document as an engine takes it."""

    id: str
    terms: list[int]  # ascending
    weights: list[float]
    fields: dict[str, dict[str, Any]]  # `metadata` and `source`, of values that JSON has: a date is ISO text


def rows(index: SparseIndex) -> Iterator[Row]:
    """All documents of an index."""
    places = ((part, n) for part in index.content() for n in range(len(part.ids)))
    for part, n in tqdm(places, total=len(index), desc="exporting", unit="document", disable=None):
        fields = {
            owner: {key: value.isoformat() if isinstance(value, date) else value for key, value in values.items()}
            for owner, values in (("metadata", part.metadata[n]), ("source", part.source[n]))
        }
        span = slice(*part.vectors.indptr[n : n + 2])
        yield Row(part.ids[n], part.vectors.indices[span].tolist(), part.vectors.data[span].tolist(), fields)


def batches(items: Iterable[Any], size: int = 256) -> Iterator[list[Any]]:
    """The items in lists of a size, the last one shorter."""
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def opened(folder: Path, engine: str, longest_id: int | None = None, int64: bool = False) -> SparseIndex:
    """Opens an index; SettingError if it is empty, or an engine cannot hold an id or a number.

    With `longest_id` (UTF-8 bytes), ids of no bytes are errors too. With `int64`, integers beyond 64 bits are errors.
    """
    index = SparseIndex.open(folder)
    if not len(index):
        raise SettingError(f"{folder} has no documents; add some before an export", "index")
    for name in index.ids:
        if longest_id and not 0 < len(name.encode()) <= longest_id:
            raise SettingError(f"id {name[:40]!r}... is too long or empty; {engine} takes {longest_id} bytes", "index")
    for row in rows(index) if int64 else ():
        try:
            json.loads(json.dumps(row.fields), parse_int=np.int64)
        except OverflowError as error:
            large = f"metadata of {row.id!r} has a whole number beyond 64 bits, which {engine} would change"
            raise SettingError(large, "index") from error
    return index


@contextmanager
def new_target(out: Path, folder: bool = False) -> Iterator[Path]:
    """Where to write a file (or folder, which is made) that appears as `out` when complete; FileError if `out` exists."""
    if out.is_symlink() or (out.exists() and not (folder and out.is_dir() and not any(out.iterdir()))):
        raise FileError(f"{out} exists; give a new name, or remove it", out)
    out.parent.mkdir(parents=True, exist_ok=True)
    name, dot, ending = out.name.partition(".")
    part = out.with_name(f".{name}.part{dot}{ending}")
    remove(part)  # of an export that was killed
    with removed_on_failure(out, part):
        if folder:
            part.mkdir()
        yield part
        mode = new_file_mode(part.with_name(f"{part.name}.mode"))  # SQLite makes files that a group cannot write
        for path in [part, *part.rglob("*")]:
            if path.is_file():
                path.chmod(mode)
        part.rename(out)
    print(f"{out} is written")


@contextmanager
def engine_errors(engine: str) -> Iterator[None]:
    """Turns errors of an engine, panics of its Rust code too, into an EngineError of one line."""
    try:
        yield
    except (StairError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(getattr(error, "message", None) or error).split())
        raise EngineError(engine, reason or type(error).__name__) from error

"""Captions in a table or in a Karpathy split file, images as files in a folder: inputs of `write_shards`.

Whatever is wrong with one line is that line's fault alone: it is refused with its place, the others are read.
"""

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from stair.data.prepare.shard import Raw, Refused, printable
from stair.data.prepare.shards import Source

IMAGE_COLUMNS = "image image_path filepath file_path file_name filename path file image_name".split()
CAPTION_COLUMNS = "captions caption text title sentences sentence comment".split()

# a line of a table: its place, and its cells by column, or what is wrong with it
Line = tuple[str, dict[str, Any] | str]


@dataclass(frozen=True)
class ImageFiles:
    """Reads references (paths to try, captions, further fields).

    Attributes:
        root: folder of the images, resolved; no path leaves it.
        given: how the user spells it, by which paths may begin too; results do not depend on it.
    """

    root: Path
    given: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise ValueError(f"no folder {self.root}; wanted the one in which the images are found")

    def __call__(self, reference: tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, Any], ...]]) -> Raw:
        """The input of a reference.

        Raises:
            ValueError: `image missing: ...` or `path outside: ...`.
        """
        names, captions, fields = reference
        for name in names:
            path = self.inside(name)
            if path.is_file():
                return Raw(path.read_bytes(), list(captions), {**dict(fields), "file": printable(name)})
        raise ValueError(f"image missing: no file {printable(' or '.join(names))} in {self.root}")

    def inside(self, name: str) -> Path:
        """The path of an image, which must lie in the folder: a table from elsewhere may name any file."""
        root = Path(os.path.normpath(self.root))
        path = Path(os.path.normpath(root / name))
        given = os.path.abspath(self.given or root)
        if not path.is_relative_to(root) and path.is_relative_to(given):
            path = root / path.relative_to(given)
        if "\0" in name or not path.is_relative_to(root):
            raise ValueError(f"path outside: {printable(name)!r} is not in {self.given or self.root}")
        return path


def table_source(
    table: Path, images: Path, split: str, image_column: str | None, caption_column: str | None, delimiter: str | None
) -> Source:
    """A table with a line for each caption, or for each image.

    Raises:
        ValueError: if it is no table of a known kind, or the columns cannot be told.
    """
    captions: dict[str, list[str]] = {}
    refused: list[Refused] = []
    columns: tuple[str, str] | None = None
    for place, cells in _lines(table, delimiter):
        if isinstance(cells, str):
            refused.append(Refused("line malformed", place, cells))
            continue
        if columns is None:
            image = _column(cells, IMAGE_COLUMNS, image_column, "image")
            columns = image, _column(cells, CAPTION_COLUMNS, caption_column, "caption")
        name, texts = cells.get(columns[0]), texts_of(cells.get(columns[1]))
        if not isinstance(name, str) or not name.strip():
            refused.append(Refused("image unnamed", place, f"no path in column {columns[0]!r}"))
        elif not texts or not all(text.strip() for text in texts):
            refused.append(Refused("caption empty", place, f"nothing in column {columns[1]!r}"))
        elif any(printable(text) != text for text in texts):
            refused.append(Refused("caption not UTF-8", place, printable(" ".join(texts))[:80]))
        else:
            captions.setdefault(name.strip(), []).extend(texts)
    references = [((name,), tuple(texts), ()) for name, texts in captions.items()]
    return Source(str(table), {split: references}, ImageFiles(images.resolve(), images), {split: refused})


def _column(cells: dict[str, Any], usual: list[str], given: str | None, what: str) -> str:
    found = [name for name in ([given] if given else usual) if name in cells]
    if not found:
        raise ValueError(
            f"the {what} column cannot be told: the table has {[printable(name) for name in list(cells)[:20]]}, looked for "
            f"{given or usual}; give --{what}_column, or a first line with the columns' names"
        )
    return found[0]


def texts_of(cell: Any) -> list[str]:
    """Captions of a cell: a string, an object with `raw` (COCO on the hub), or a list of these."""
    if isinstance(cell, dict):
        cell = cell.get("raw")
    if isinstance(cell, list):
        return [text for part in cell for text in texts_of(part)]
    return [cell] if isinstance(cell, str) else []


def _lines(table: Path, delimiter: str | None) -> Iterator[Line]:
    kind = table.suffix.lower()
    if kind == ".parquet":
        return _parquet(table)
    if kind in (".jsonl", ".ndjson"):
        return _jsonl(table)
    if kind in (".csv", ".tsv", ".txt"):
        return _csv(table, delimiter or ("\t" if kind == ".tsv" else ","))
    raise ValueError(f"{table} is no table of a known kind; wanted .csv, .tsv, .txt, .jsonl or .parquet")


def _csv(table: Path, delimiter: str) -> Iterator[Line]:
    csv.field_size_limit(10_000_000)  # of the process, so not where this file is imported
    # tab-separated files know no quotes: one that begins a caption would swallow the lines after it
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    with open(table, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, skipinitialspace=True, strict=True)
        header = [name.strip() for name in next(reader, [])]
        while True:
            before = reader.line_num
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # a quote that is not closed takes in the lines after it: all of them are lost
                yield from ((f"{table.name}:{line + 1}", str(error)) for line in range(before, reader.line_num))
                continue
            if len(row) == len(header):
                yield f"{table.name}:{reader.line_num}", dict(zip(header, row, strict=True))
            elif row:
                wrong = (
                    f"{len(row)} cells, the first line has {len(header)}: is a caption with {delimiter!r} not quoted?"
                )
                yield f"{table.name}:{reader.line_num}", wrong


def _jsonl(table: Path) -> Iterator[Line]:
    with open(table, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            try:
                cells = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:
                yield f"{table.name}:{number}", str(error)
                continue
            if cells is not None:
                yield f"{table.name}:{number}", cells if isinstance(cells, dict) else "no JSON object"


def _parquet(table: Path) -> Iterator[Line]:
    try:
        rows = parquet.ParquetFile(table).iter_batches()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{table} cannot be read: {error}") from error
    number = 0
    for batch in rows:
        for cells in batch.to_pylist():
            number += 1
            yield f"{table.name}:{number}", cells


def karpathy_source(captions: Path, images: Path) -> Source:
    """A split file as Karpathy made them for COCO, Flickr8k and Flickr30k; `restval` joins `train`, as is usual.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(captions.read_text(encoding="utf-8"))["images"]
        splits: dict[str, list[Any]] = {}
        for entry in found:
            folder, name = entry.get("filepath", ""), entry["filename"]
            names = (f"{folder}/{name}", name) if folder else (name,)
            texts = tuple(sentence["raw"] for sentence in entry["sentences"])
            facts = tuple((key, entry[key]) for key in ("cocoid", "imgid", "split") if key in entry)
            split = "train" if entry["split"] == "restval" else entry["split"]
            splits.setdefault(split, []).append((names, texts, facts))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{captions} is no Karpathy split file ({type(error).__name__}: {error}); wanted dataset_coco.json, "
            "dataset_flickr8k.json or dataset_flickr30k.json: an object with `images`, each with `filename`, `split` and "
            "`sentences`"
        ) from error
    return Source(str(captions), splits, ImageFiles(images.resolve(), images))

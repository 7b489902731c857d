"""Hugging Face data sets on disk, as `save_to_disk` or as parquet files: inputs of `write_shards`.

Read with pyarrow, so that the library `datasets` is not needed. Rows are read in their order: jumping about in a parquet
file decodes a whole row group for each row.
"""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from stair.data.prepare.jobs import read_json
from stair.data.prepare.shard import Raw
from stair.data.prepare.shards import Source
from stair.data.prepare.tables import CAPTION_COLUMNS, ImageFiles, texts_of

_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")


@dataclass(frozen=True)
class Rows:
    """Reads references (file, row number in it).

    Attributes:
        root: folder of the data set, for images that are named, not held.
        image: column of images: bytes, `{bytes, path}` or a path.
        captions: column of captions, or None.
        label: column of class numbers, or None.
        classes: names of classes.
        stamp: name, size and time of each file, so that other data are told from these.
    """

    root: Path
    image: str
    captions: str | None
    label: str | None
    classes: tuple[str, ...]
    stamp: tuple[tuple[str, int, int], ...]

    def __call__(self, reference: tuple[str, int]) -> Raw:
        """The input of a reference.

        Raises:
            ValueError: that begins with the cause.
        """
        file, number = reference
        columns = [name for name in (self.image, self.captions, self.label) if name]
        row = _row(self.root / file, number, tuple(columns))
        fields: dict[str, Any] = {"file": file, "row": number}
        if self.label:
            fields["label"] = row[self.label]
        if self.classes:
            if not isinstance(fields["label"], int) or not 0 <= fields["label"] < len(self.classes):
                raise ValueError(f"label unknown: {fields['label']!r} of {len(self.classes)} classes")
            fields["class"] = self.classes[fields["label"]]
        captions = texts_of(row[self.captions]) if self.captions else [fields["class"]]
        return Raw(self._image(row[self.image]), captions, fields)

    def _image(self, cell: Any) -> bytes:
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if isinstance(data, bytes):
            return data
        if isinstance(name, str):
            return ImageFiles(self.root)(((name,), (), ())).image
        raise ValueError("image missing: the cell is empty")


@functools.lru_cache(maxsize=2)
def _table(file: Path) -> Any:
    """The batches of an Arrow stream and the rows before each; mapped, so that nothing is read yet."""
    stream = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    return stream.read_all()


@functools.lru_cache(maxsize=2)
def _group(file: Path, group: int, columns: tuple[str, ...]) -> Any:
    return parquet.ParquetFile(file).read_row_group(group, columns=list(columns))


@functools.lru_cache(maxsize=64)
def _groups(file: Path) -> tuple[int, ...]:
    """Rows of each row group of a parquet file."""
    about = parquet.read_metadata(file)
    return tuple(about.row_group(i).num_rows for i in range(about.num_row_groups))


def _row(file: Path, number: int, columns: tuple[str, ...]) -> dict[str, Any]:
    if file.suffix == ".arrow":
        rows = _table(file).select(list(columns))
    else:
        group = 0
        while number >= _groups(file)[group]:
            number, group = number - _groups(file)[group], group + 1
        rows = _group(file, group, columns)
    return dict(rows.slice(number, 1).to_pylist()[0])


def arrow_source(root: Path, image_column: str | None, caption_column: str | None) -> Source:
    """A data set in a folder.

    Raises:
        ValueError: if there is none, or its columns cannot be told.
    """
    splits = _files(root)
    files = [file for found in splits.values() for file in found]
    if not files:
        raise ValueError(
            f"{root} holds no data set: wanted what `save_to_disk` writes (dataset_info.json or dataset_dict.json) or "
            "parquet files"
        )
    schema = _schema(files[0])
    if odd := [str(file) for file in files if _schema(file).names != schema.names]:
        raise ValueError(f"{odd[0]} has columns {_schema(Path(odd[0])).names}, {files[0]} has {schema.names}")
    features = _features(schema)
    image = image_column or _image_column(schema, features)
    known = [name for name in CAPTION_COLUMNS if name in schema.names]
    captions = caption_column or (known[0] if known else None)
    labels = [name for name, kind in features.items() if kind.get("_type") == "ClassLabel"]
    label = labels[0] if labels else None
    classes = tuple(features[label].get("names") or ()) if label else ()
    for name in (image, captions):
        if name and name not in schema.names:
            raise ValueError(f"no column {name!r} in {files[0]}; it has {schema.names}")
    if not captions and not classes:
        raise ValueError(f"the caption column cannot be told: columns are {schema.names}; give --caption_column")
    stamp = tuple((str(f.relative_to(root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return Source(
        str(root),
        {
            split: [(str(f.relative_to(root)), i) for f in found for i in range(_length(f))]
            for split, found in splits.items()
        },
        Rows(root, image, captions, label, classes, stamp),
        mixed=False,
        classnames=list(classes) or None,
    )


def _files(root: Path) -> dict[str, list[Path]]:
    splits = read_json(root / "dataset_dict.json").get("splits")
    if splits:
        return {str(split): _saved(root / str(split)) for split in splits}
    if (root / "state.json").is_file():
        name = read_json(root / "state.json").get("_split") or _split_of(root) or "train"
        return {str(name): _saved(root)}
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        found.setdefault(_split_of(path) or _split_of(path.parent) or "train", []).append(path)
    return found


def _split_of(path: Path) -> str:
    match = _SPLIT.match(path.name)
    return match[1] if match else ""


def _saved(folder: Path) -> list[Path]:
    state = read_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{folder} is a selection of rows that was saved unflattened: save `data.flatten_indices()`")
    files = ImageFiles(folder)  # holds names within the folder
    return [files.inside(str(entry["filename"])) for entry in state.get("_data_files", [])]


def _schema(file: Path) -> Any:
    try:
        return _table(file).schema if file.suffix == ".arrow" else parquet.read_schema(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _length(file: Path) -> int:
    return int(_table(file).num_rows) if file.suffix == ".arrow" else sum(_groups(file))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What the library `datasets` notes about columns, by name; those of compound kinds are left out."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted.get("info", {}).get("features") or {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _image_column(schema: Any, features: dict[str, dict[str, Any]]) -> str:
    from pyarrow import types

    found = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    for column in schema:
        held = types.is_struct(column.type) and {part.name for part in column.type} >= {"bytes", "path"}
        if held or types.is_binary(column.type) or types.is_large_binary(column.type):
            found.append(column.name)
    if not found:
        raise ValueError(f"the image column cannot be told: columns are {schema.names}; give --image_column")
    return str(found[0])

"""Sources of `stair prepare`: tables, Karpathy's split files, Hugging Face data sets, folders of classes.

A bad line or row is skipped with its place, and the others are read.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import types

from stair.data.folders import class_files, class_names
from stair.data.prepare.jobs import known_json
from stair.data.prepare.writer import Raw, Source, write_shards
from stair.data.samples import Skipped, check_caption, printable
from stair.data.tables import Table, arrow_schema, cell_text, open_table, read_group, rows_of_groups
from stair.errors import FileError, SettingError
from stair.files import read_json

IMAGE_COLUMNS = "image image_path filepath file_path file_name filename path file image_name".split()
CAPTION_COLUMNS = "captions caption text title sentences sentence comment".split()
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")


@dataclass(frozen=True)
class ImageFiles:
    """Reads references (paths to try, captions, further fields); errors are `image missing` and `path outside`."""

    root: Path  # folder of the images, resolved; no path leaves it
    given: Path | None = field(default=None, repr=False)  # as the user spells it, by which paths may begin too

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise FileError(f"no folder {self.root}; give the one in which the images are found", self.root)

    def __call__(self, reference: tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, Any], ...]]) -> Raw:
        """The input of a reference."""
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


def folder(
    captions: Path,
    images: Path,
    out: Path,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    delimiter: str | None = None,
    **settings: Any,
) -> None:
    """Images in a folder and a table of their captions.

    Args:
        captions: table with a line for each caption or each image: .csv, .tsv, .jsonl or .parquet.
        images: folder in which the table's paths are found; none may lead out of it.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        image_column: of paths; known by its name if not given.
        caption_column: of captions, or lists of them; known by its name if not given.
        delimiter: of cells; a comma in .csv and .txt, a tab in .tsv, if not given.
        settings: of the writer.
    """
    table = open_table(captions, delimiter)
    image = _column(table, IMAGE_COLUMNS, image_column, "image")
    caption = _column(table, CAPTION_COLUMNS, caption_column, "caption")
    texts_of_image: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for row in table.rows():
        try:
            if row.problem:
                raise ValueError(row.problem)
            name = cell_text(row, image, "image unnamed").strip()
            texts = texts_of(row.cells.get(caption)) or [cell_text(row, caption, "caption empty")]
            texts_of_image.setdefault(name, []).extend([check_caption(text) for text in texts])
        except ValueError as error:
            skipped.append(Skipped(row.place, str(error)))
    references = [((name,), tuple(texts), ()) for name, texts in texts_of_image.items() if texts]
    reader = ImageFiles(images.resolve(), images)
    write_shards(Source(str(captions), {split: references}, reader, {split: skipped}), out, **settings)


def _column(table: Table, usual: list[str], given: str | None, what: str) -> str:
    names = [name for name in ([given] if given else usual) if name in table.columns]
    if not names:
        raise SettingError(
            f"the {what} column is unknown: the table has {list(table.columns)[:20]}, looked for {given or usual}; "
            f"give --{what}_column, or a first line with the columns' names",
            f"{what}_column",
        )
    return names[0]


def texts_of(cell: Any) -> list[str]:
    """Captions of a cell: a string, an object with `raw` (COCO on the hub), or a list of these."""
    if isinstance(cell, dict):
        cell = cell.get("raw")
    if isinstance(cell, list):
        return [text for part in cell for text in texts_of(part)]
    return [cell] if isinstance(cell, str) else []


def karpathy(captions: Path, images: Path, out: Path, **settings: Any) -> None:
    """COCO, Flickr8k or Flickr30k with Karpathy's splits: train (with restval), val, test.

    Args:
        captions: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json.
        images: folder of the images; COCO's in train2014 and val2014 below it or all in it.
        out: folder of the shards.
        settings: of the writer.
    """
    splits: dict[str, list[Any]] = {}
    try:
        for entry in read_json(captions)["images"]:
            folder, name = entry.get("filepath", ""), entry["filename"]
            names = (f"{folder}/{name}", name) if folder else (name,)
            texts = tuple(sentence["raw"] for sentence in entry["sentences"])
            facts = tuple((key, entry[key]) for key in ("cocoid", "imgid", "split") if key in entry)
            split = "train" if entry["split"] == "restval" else entry["split"]
            splits.setdefault(split, []).append((names, texts, facts))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(
            f"{captions} is no Karpathy split file ({type(error).__name__}: {error}); wanted dataset_coco.json, "
            "dataset_flickr8k.json or dataset_flickr30k.json: an object with `images`, each with `filename`, `split` and "
            "`sentences`",
            captions,
        ) from error
    write_shards(Source(str(captions), splits, ImageFiles(images.resolve(), images)), out, **settings)


def classes(
    images: Path, out: Path, split: str = "test", names: Path | None = None, template: str = "{}", **settings: Any
) -> None:
    """A folder of images for each class, for zero-shot evaluation; writes classnames.json too.

    Args:
        images: folder of the classes' folders; a class's label is its place among the sorted folders.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        names: names of the classes: JSON or lines `folder name`. Without, the folders' names.
        template: of the caption, {} is the class's name.
        settings: of the writer.
    """
    try:
        if template.format("a") == template.format("b"):
            raise ValueError("all classes would have the same caption")
    except (ValueError, LookupError, AttributeError) as error:
        wanted = "text with {} for the name, as in 'a photo of a {}'"
        raise SettingError(f"{template=}: {error}; wanted {wanted}", "template") from error
    folders, files, skipped = class_files(images)
    if not folders:
        raise FileError(f"no folder of a class in {images}; wanted one for each class, with its images", images)
    spoken = class_names(folders, names)
    empty = set(range(len(folders))) - {label for _, label in files}
    skipped += [Skipped(printable(folders[n]), "class without images: nothing in its folder") for n in sorted(empty)]
    captions = [template.format(name) for name in spoken]
    references: list[Any] = [
        ((file.name,), (captions[label],), (("class", spoken[label]), ("label", label))) for file, label in files
    ]
    reader = ImageFiles(images.resolve(), images)
    write_shards(Source(str(images), {split: references}, reader, {split: skipped}, classnames=spoken), out, **settings)


@dataclass(frozen=True)
class Rows:
    """Reads references (file, row group, row in it) of a Hugging Face data set."""

    root: Path
    image: str  # column of bytes, `{bytes, path}` or paths in the folder
    captions: str | None  # column
    label: str | None  # column of class numbers
    classes: tuple[str, ...]
    stamp: tuple[tuple[str, int, int], ...]  # name, size and time of each file: other data make another repr

    def __call__(self, reference: tuple[str, int, int]) -> Raw:
        """The input of a reference."""
        file, group, number = reference
        columns = tuple(name for name in (self.image, self.captions, self.label) if name)
        row = read_group(self.root / file, group, columns).slice(number, 1).to_pylist()[0]
        fields: dict[str, Any] = {"file": file, "row": sum(rows_of_groups(self.root / file)[:group]) + number}
        if self.label:
            fields["label"] = row[self.label]
        if self.classes:
            if not isinstance(fields["label"], int) or not 0 <= fields["label"] < len(self.classes):
                raise ValueError(f"label unknown: {fields['label']!r} of {len(self.classes)} classes")
            fields["class"] = self.classes[fields["label"]]
        captions = texts_of(row[self.captions]) if self.captions else [fields["class"]]
        cell = row[self.image]
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, cell)
        if not isinstance(data, bytes):
            if not isinstance(name, str):
                raise ValueError("image missing: the cell is empty")
            data = ImageFiles(self.root)(((name,), (), ())).image
        return Raw(data, captions, fields)


def datasets(
    data: Path, out: Path, image_column: str | None = None, caption_column: str | None = None, **settings: Any
) -> None:
    """A Hugging Face data set on disk: what `save_to_disk` wrote, or parquet files. Its order is kept.

    Args:
        data: its folder.
        out: folder of the shards.
        image_column: of images; known by its type if not given.
        caption_column: of captions; known by its name if not given. Without one, names of classes are the captions.
        settings: of the writer.
    """
    splits = _arrow_files(data)
    files = [file for found in splits.values() for file in found]
    if not files:
        raise FileError(
            f"{data} holds no data set: wanted what `save_to_disk` writes (dataset_info.json or dataset_dict.json) or "
            "parquet files",
            data,
        )
    schema = arrow_schema(files[0])
    if other := [file for file in files if arrow_schema(file).names != schema.names]:
        raise FileError(f"{other[0]} has other columns than {files[0]}, which has {schema.names}", other[0])
    stated = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    noted = (stated.get("info") or {}).get("features") or {}
    features = {name: kind for name, kind in noted.items() if isinstance(kind, dict)}
    columns = Table(files[0], dict.fromkeys(schema.names, ""), lambda: iter(()))
    image = _column(columns, _image_columns(schema, features), image_column, "image")
    label = next((name for name, kind in features.items() if kind.get("_type") == "ClassLabel"), None)
    classnames = tuple(features[label].get("names") or ()) if label else ()
    captions = None
    if caption_column or not classnames or set(CAPTION_COLUMNS) & set(schema.names):
        captions = _column(columns, CAPTION_COLUMNS, caption_column, "caption")
    stamp = tuple((str(f.relative_to(data)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    references = {
        split: [
            (str(file.relative_to(data)), group, row)
            for file in found
            for group, rows in enumerate(rows_of_groups(file))
            for row in range(rows)
        ]
        for split, found in splits.items()
    }
    reader = Rows(data, image, captions, label, classnames, stamp)
    source = Source(str(data), references, reader, shuffled=False, classnames=list(classnames) or None)
    write_shards(source, out, **settings)


def _arrow_files(root: Path) -> dict[str, list[Path]]:
    if splits := known_json(root / "dataset_dict.json").get("splits"):
        return {str(split): _saved(root / str(split)) for split in splits}
    if (root / "state.json").is_file():
        name = known_json(root / "state.json").get("_split") or _split_of(root) or "train"
        return {str(name): _saved(root)}
    found: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        found.setdefault(_split_of(path) or _split_of(path.parent) or "train", []).append(path)
    return found


def _split_of(path: Path) -> str:
    match = _SPLIT.match(path.name)
    return match[1] if match else ""


def _saved(folder: Path) -> list[Path]:
    state = known_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise FileError(f"{folder} is a selection of rows, saved unflattened: save `data.flatten_indices()`", folder)
    files = ImageFiles(folder)  # holds names within the folder
    return [files.inside(str(entry["filename"])) for entry in state.get("_data_files", [])]


def _image_columns(schema: pyarrow.Schema, features: dict[str, dict[str, Any]]) -> list[str]:
    found = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    for column in schema:
        held = types.is_struct(column.type) and {part.name for part in column.type} >= {"bytes", "path"}
        if held or types.is_binary(column.type) or types.is_large_binary(column.type):
            found.append(column.name)
    return found

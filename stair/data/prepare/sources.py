"""Sources of `stair prepare`: tables, Karpathy's split files, Hugging Face data sets, folders of classes.

A bad line or row is skipped with its place, and the others are read.
"""

import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyarrow import types

from stair.data.folders import class_files, class_names
from stair.data.prepare.writer import DEFAULTS, Input, ShardSettings, Source, known_json, write_shards
from stair.data.samples import Skipped, check_caption, printable
from stair.data.tables import arrow_schema, cell_text, open_table, read_group, rows_of_groups
from stair.errors import FileError, SettingError
from stair.files import read_json

IMAGE_COLUMNS = "image image_path filepath file_path file_name filename path file image_name".split()
CAPTION_COLUMNS = "captions caption text title sentences sentence comment".split()
_SPLIT = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")


@dataclass(frozen=True)
class ImageFiles:
    """Reads the first file that exists of several paths in a folder. Errors are `image missing` and `path outside`."""

    root: Path  # of the images, resolved
    spelling: str = field(repr=False)  # of the folder in absolute paths, which may lead over links

    @classmethod
    def of(cls, folder: Path) -> "ImageFiles":
        """The images of a folder."""
        if not folder.is_dir():
            raise FileError(f"no folder {folder}; give the folder of the images", folder)
        return cls(folder.resolve(), os.path.abspath(folder))

    def __call__(self, names: tuple[str, ...]) -> bytes:
        """The bytes of an image."""
        for name in names:
            if (path := self.inside(name)).is_file():
                return path.read_bytes()
        raise ValueError(f"image missing: no file {printable(' or '.join(names))} in {self.spelling}")

    def inside(self, name: str) -> Path:
        """The path of an image, which must lie in the folder: a table from elsewhere may name any file."""
        path = Path(os.path.normpath(self.root / name))
        if "\0" in name or not (path.is_relative_to(self.root) or path.is_relative_to(self.spelling)):
            raise ValueError(f"path outside: {printable(name)!r} is not in {self.spelling}")
        return path


def _input(names: tuple[str, ...], captions: Iterable[str], **fields: Any) -> Input:
    return Input(" or ".join(names), names, tuple(captions), {**fields, "file": printable(names[0])})


def folder(
    captions: Path,
    images: Path,
    out: Path,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    delimiter: str | None = None,
    settings: ShardSettings = DEFAULTS,
) -> None:
    """Makes shards from images in a folder and a table of their captions.

    Args:
        captions: table with one row per caption or per image: .csv, .tsv, .jsonl or .parquet.
        images: folder that the table's paths are relative to; no path may lead outside it.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        image_column: column of paths; by default a common name, such as image, file_name or path.
        caption_column: column of captions or of lists of captions; by default a common name, such as caption, text or
            title.
        delimiter: separator of cells; by default a comma in .csv and .txt, a tab in .tsv.
        settings: how shards are written, as of `ShardSettings`.
    """
    table = open_table(captions, delimiter)
    image = _column(table.columns, IMAGE_COLUMNS, image_column, "image")
    caption = _column(table.columns, CAPTION_COLUMNS, caption_column, "caption")
    captions_of: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for row in table.rows():
        try:
            if row.problem:
                raise ValueError(row.problem)
            name = cell_text(row, image, "image unnamed").strip()
            texts = texts_of(row.cells.get(caption)) or [cell_text(row, caption, "caption empty")]
            captions_of.setdefault(name, []).extend([check_caption(text) for text in texts])
        except ValueError as error:
            skipped.append(Skipped(row.place, str(error)))
    inputs = [_input((name,), texts) for name, texts in captions_of.items() if texts]
    write_shards(Source(str(captions), {split: inputs}, ImageFiles.of(images), {split: skipped}), out, settings)


def _column(columns: Iterable[str], usual: list[str], given: str | None, what: str) -> str:
    names = [name for name in ([given] if given else usual) if name in columns]
    if not names:
        raise SettingError(
            f"the {what} column is unknown: the table has {list(columns)[:20]}, looked for {given or usual}; give "
            f"--{what}_column, or a first line with the columns' names", f"{what}_column",
        )  # fmt: skip
    return names[0]


def texts_of(cell: Any) -> list[str]:
    """Captions of a cell: a string, an object with `raw` (COCO on the hub), or a list of these."""
    if isinstance(cell, dict):
        cell = cell.get("raw")
    if isinstance(cell, list):
        return [text for part in cell for text in texts_of(part)]
    return [cell] if isinstance(cell, str) else []


def karpathy(captions: Path, images: Path, out: Path, settings: ShardSettings = DEFAULTS) -> None:
    """Makes shards from COCO, Flickr8k or Flickr30k with Karpathy's splits: train (with restval), val, test.

    Args:
        captions: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json.
        images: folder of the images; COCO's can be in its subfolders train2014 and val2014.
        out: folder of the shards.
        settings: how shards are written, as of `ShardSettings`.
    """
    splits: dict[str, list[Input]] = {}
    try:
        for entry in read_json(captions)["images"]:
            below, name = entry.get("filepath"), entry["filename"]
            names = (f"{below}/{name}", name) if below else (name,)
            facts = {key: entry[key] for key in ("cocoid", "imgid", "split") if key in entry}
            split = "train" if entry["split"] == "restval" else entry["split"]
            texts = [sentence["raw"] for sentence in entry["sentences"]]
            splits.setdefault(split, []).append(_input(names, texts, **facts))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        expected = "an object with `images`, each with `filename`, `split` and `sentences`, such as dataset_coco.json"
        reason = f"{type(error).__name__}: {error}"
        raise FileError(f"{captions} is not a Karpathy split file ({reason}); expected {expected}", captions) from error
    write_shards(Source(str(captions), splits, ImageFiles.of(images)), out, settings)


def classes(
    images: Path,
    out: Path,
    split: str = "test",
    names: Path | None = None,
    template: str = "{}",
    settings: ShardSettings = DEFAULTS,
) -> None:
    """Makes shards from one folder of images per class, for zero-shot evaluation. Also writes classnames.json.

    Args:
        images: folder with one folder per class; the label of a class is its position among the sorted folders.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        names: file with class names: JSON, or lines `folder name`; by default the names of the folders.
        template: caption of each image; {} is replaced by the class name.
        settings: how shards are written, as of `ShardSettings`.
    """
    try:
        if template.format("a") == template.format("b"):
            raise ValueError("all classes would have the same caption")
    except (ValueError, LookupError, AttributeError) as error:
        expected = "text with {} for the name, as in 'a photo of a {}'"
        raise SettingError(f"{template=}: {error}; expected {expected}", "template") from error
    folders, files, skipped = class_files(images)
    if not folders:
        raise FileError(f"no folder of a class in {images}; expected one for each class, with its images", images)
    called = class_names(folders, names)
    inputs = [
        _input((file.name,), [template.format(called[label])], **{"class": called[label], "label": label})
        for file, label in files
    ]
    for label in sorted({*range(len(folders))} - {label for _, label in files}):
        skipped.append(Skipped(printable(folders[label]), "class without images: nothing in its folder"))
    source = Source(str(images), {split: inputs}, ImageFiles.of(images), {split: skipped}, classnames=called)
    write_shards(source, out, settings)


@dataclass(frozen=True)
class ImageCells:
    """Reads cells (file, row group, row in it) of bytes, or of Hugging Face's `{bytes, path}`."""

    files: ImageFiles  # of the paths
    column: str
    stamp: tuple[tuple[str, int, int], ...]  # name, size and time of each file: other data make another repr

    def __call__(self, cell: tuple[str, int, int]) -> bytes:
        """The bytes of an image."""
        file, group, row = cell
        value = read_group(self.files.root / file, group, (self.column,))[self.column][row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return bytes(data)
        if path is None:
            raise ValueError("image missing: the cell is empty")
        return self.files((path,))


def datasets(
    data: Path,
    out: Path,
    image_column: str | None = None,
    caption_column: str | None = None,
    settings: ShardSettings = DEFAULTS,
) -> None:
    """Makes shards from a Hugging Face dataset on disk (`save_to_disk` or parquet files). Keeps the order of samples.

    Args:
        data: folder of the dataset.
        out: folder of the shards.
        image_column: column of images; by default the first image column.
        caption_column: column of captions; by default a common name, such as caption or text, else the class names.
        settings: how shards are written, as of `ShardSettings`.
    """
    images = ImageFiles.of(data)
    splits = _arrow_files(images.root)
    files = [file for files_of_split in splits.values() for file in files_of_split]
    if not files:
        expected = "what `save_to_disk` writes (dataset_info.json or dataset_dict.json) or parquet files"
        raise FileError(f"{data} contains no data set: expected {expected}", data)
    schema = arrow_schema(files[0])
    if other := [file for file in files if arrow_schema(file).names != schema.names]:
        raise FileError(f"{other[0]} has other columns than {files[0]}, which has {schema.names}", other[0])
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info") or {}
    features = {name: kind for name, kind in (info.get("features") or {}).items() if isinstance(kind, dict)}
    image_columns = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    image_columns += [column.name for column in schema if _holds_bytes(column.type)]
    image = _column(schema.names, image_columns, image_column, "image")
    label = next((name for name, kind in features.items() if kind.get("_type") == "ClassLabel"), "")
    classnames = list(features[label].get("names") or []) if label else []
    caption = ""
    if caption_column or not classnames or set(CAPTION_COLUMNS) & set(schema.names):
        caption = _column(schema.names, CAPTION_COLUMNS, caption_column, "caption")
    stamp = tuple((str(file.relative_to(images.root)), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    in_cells = _holds_bytes(schema.field(image).type)
    read = ImageCells(images, image, stamp) if in_cells else images
    source = Source(str(data), {}, read, shuffled=False, classnames=classnames or None)
    columns = tuple(filter(None, (caption, label, "" if in_cells else image)))
    for split, split_files in splits.items():
        inputs, skipped = source.splits.setdefault(split, []), source.skipped.setdefault(split, [])
        for place, cell, fields, values in _rows(images.root, split_files, columns):
            if label:
                fields["label"] = values[label]
            if classnames:
                if values[label] not in range(len(classnames)):
                    skipped.append(Skipped(place, f"label unknown: {values[label]!r} of {len(classnames)} classes"))
                    continue
                fields["class"] = classnames[values[label]]
            texts = texts_of(values[caption]) if caption else [fields["class"]]
            inputs.append(Input(place, cell if in_cells else (str(values[image] or ""),), tuple(texts), fields))
    write_shards(source, out, settings)


def _holds_bytes(kind: Any) -> bool:
    is_struct = types.is_struct(kind) and {part.name for part in kind} >= {"bytes", "path"}
    return is_struct or types.is_binary(kind) or types.is_large_binary(kind)


def _rows(root: Path, files: list[Path], columns: tuple[str, ...]) -> Iterator[tuple[str, Any, dict[str, Any], Any]]:
    """Place, cell (file, row group, row in it), JSON fields, and values by column, of each row."""
    for file in files:
        name, number = str(file.relative_to(root)), itertools.count()
        for group in range(len(rows_of_groups(file))):
            for row, values in enumerate(read_group(file, group, columns).to_pylist()):
                fields = {"file": name, "row": next(number)}
                yield f"{name}:{fields['row']}", (name, group, row), fields, values


def _arrow_files(root: Path) -> dict[str, list[Path]]:
    """The files of a data set by split."""
    if splits := known_json(root / "dataset_dict.json").get("splits"):
        return {str(split): _saved(root / str(split)) for split in splits}
    if (root / "state.json").is_file():
        return {str(known_json(root / "state.json").get("_split") or _split_of(root)): _saved(root)}
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.parquet")):
        files.setdefault(_split_of(path, path.parent), []).append(path)
    return files


def _split_of(*paths: Path) -> str:
    return next((match[1] for path in paths if (match := _SPLIT.match(path.name))), "train")


def _saved(folder: Path) -> list[Path]:
    state = known_json(folder / "state.json")
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise FileError(f"{folder} is a selection of rows, saved unflattened: save `data.flatten_indices()`", folder)
    return [ImageFiles.of(folder).inside(str(entry["filename"])) for entry in state.get("_data_files", [])]

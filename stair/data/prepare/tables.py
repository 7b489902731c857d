"""Captions in a table or in a Karpathy split file, images as files in a folder: inputs of `write_shards`.

Whatever is wrong with one line is that line's fault alone: it is refused with its place, the others are read.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stair.data.prepare.shard import Raw
from stair.data.prepare.shards import Source
from stair.data.samples import Skipped, check_caption, printable
from stair.data.tables import Table, cell_problem, open_table
from stair.errors import SettingError

IMAGE_COLUMNS = "image image_path filepath file_path file_name filename path file image_name".split()
CAPTION_COLUMNS = "captions caption text title sentences sentence comment".split()


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
    found = open_table(table, delimiter)
    image = _column(found, IMAGE_COLUMNS, image_column, "image")
    caption = _column(found, CAPTION_COLUMNS, caption_column, "caption")
    captions: dict[str, list[str]] = {}
    skipped: list[Skipped] = []
    for row in found.rows():
        name, texts = row.cells.get(image), texts_of(row.cells.get(caption))
        if problem := row.problem or _problem(name, texts, row.cells.get(caption), image, caption):
            skipped.append(Skipped(row.place, problem))
        else:
            captions.setdefault(str(name).strip(), []).extend(texts)
    references = [((name,), tuple(texts), ()) for name, texts in captions.items()]
    return Source(str(table), {split: references}, ImageFiles(images.resolve(), images), {split: skipped})


def _problem(name: Any, texts: list[str], cell: Any, image: str, caption: str) -> str:
    wrong = cell_problem(name, image, "image unnamed") or (
        "" if texts else cell_problem(cell, caption, "caption empty")
    )
    if wrong or not texts:
        return wrong or f"caption empty: nothing in column {caption!r}"
    try:
        for text in texts:
            check_caption(text)
    except ValueError as error:
        return str(error)
    return ""


def _column(table: Table, usual: list[str], given: str | None, what: str) -> str:
    names = [name for name in ([given] if given else usual) if name in table.columns]
    if not names:
        raise SettingError(
            f"the {what} column cannot be told: the table has {list(table.columns)[:20]}, looked for {given or usual}; "
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

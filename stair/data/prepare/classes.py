"""A folder of images for each class: inputs of `write_shards`, for zero-shot evaluation."""

import json
import re
from pathlib import Path
from typing import Any

from stair.data.folders import class_files
from stair.data.prepare.shards import Source
from stair.data.prepare.tables import ImageFiles
from stair.data.samples import Skipped, printable

_NUMBER = re.compile(r"^\d+[._-]\s*")  # 001.Black_footed_Albatross


def class_source(images: Path, split: str, names: Path | None, template: str) -> Source:
    """Images in `images/CLASS/`, at any depth below it; a class's label is its place among the sorted folders.

    Raises:
        ValueError: if there is no folder of a class, `names` does not name each, or the template has no place for a name.
    """
    try:
        if template.format("a") == template.format("b"):
            raise ValueError("all classes would have the same caption")
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{template=}: {error}; wanted text with {{}} for the name, as in 'a photo of a {{}}'"
        ) from error
    if not images.is_dir():
        raise ValueError(f"no folder {images}; wanted the one with a folder for each class")
    folders, files, skipped = class_files(images)
    if not folders:
        raise ValueError(f"{images} holds no folder; wanted one for each class, with its images")
    spoken = class_names(folders, names)
    empty = set(range(len(folders))) - {label for _, label in files}
    skipped += [Skipped(printable(folders[n]), "class without images: nothing in its folder") for n in sorted(empty)]
    captions = [template.format(name) for name in spoken]
    references: list[Any] = [
        ((file.name,), (captions[label],), (("class", spoken[label]), ("label", label))) for file, label in files
    ]
    return Source(
        str(images), {split: references}, ImageFiles(images.resolve(), images), {split: skipped}, classnames=spoken
    )


def class_names(folders: list[str], names: Path | None) -> list[str]:
    """What the classes of folders are called.

    Args:
        folders: sorted.
        names: a file of JSON, {folder: name}, [name, ...] or {"classes": [name, ...]}, or of lines `folder name` or
            `name`; None takes the folders' names, without numbers before them and underscores.

    Raises:
        ValueError: if it does not name each folder.
    """
    if names is None:
        return [printable(_NUMBER.sub("", name).replace("_", " ").strip()) for name in folders]
    text = names.read_text(encoding="utf-8")
    try:
        found: Any = json.loads(text) if names.suffix == ".json" else list(filter(str.strip, text.splitlines()))
    except ValueError as error:
        raise ValueError(f"{names} is no json: {error}") from error
    if names.suffix != ".json" and all(line.split(maxsplit=1)[0] in folders for line in found):
        # ImageNet's LOC_synset_mapping.txt gives synonyms, the first one is the usual name
        pairs = [line.strip().partition(" ") for line in found]
        found = {folder: name.partition(",")[0].strip() or folder for folder, _, name in pairs}
    if isinstance(found, dict) and isinstance(found.get("classes"), list):
        found = found["classes"]
    if isinstance(found, list) and len(found) == len(folders):
        found = dict(zip(folders, found, strict=True))
    if not isinstance(found, dict) or (missing := [folder for folder in folders if not found.get(folder)]):
        what = (
            f"{len(found)} names for {len(folders)} folders"
            if isinstance(found, list)
            else f"no name for {missing[:5]}"
        )
        raise ValueError(f"{names}: {what}; wanted a name for each folder, as {{folder: name}} or in sorted order")
    return [str(found[folder]) for folder in folders]

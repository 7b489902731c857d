"""The reader of folders of images: every entry is an image, or is named with the reason why it is not."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stair.data.samples import IMAGE_TYPES, Skipped, printable
from stair.errors import FileError

_NUMBER = re.compile(r"^\d+[._-]\s*")  # 001.Black_footed_Albatross
HIDDEN = (".", "__MACOSX")  # how names begin of what systems and tools keep beside the images


class ImageFile(NamedTuple):
    """An image by its name."""

    name: str  # path relative to the folder, with `/`, as the file system has it
    path: Path


def image_files(folder: Path) -> Iterator[ImageFile | Skipped]:
    """The images of a folder and of all folders below it, in a fixed order, and `Skipped` for everything else.

    Images are known by the suffix of their names in any case. Links are followed, hidden entries are left out.
    """
    yield from _walk(folder, "", frozenset())


def class_files(folder: Path) -> tuple[list[str], list[tuple[ImageFile, int]], list[Skipped]]:
    """Images of a folder per class: sorted names of the folders, images with the number of theirs, skipped entries."""
    places = os.scandir(folder) if folder.is_dir() else ()
    names = sorted(place.name for place in places if not place.name.startswith(HIDDEN) and os.path.isdir(place.path))
    labels, files, skipped = {name: label for label, name in enumerate(names)}, list[tuple[ImageFile, int]](), []
    for found in image_files(folder):
        if isinstance(found, Skipped):
            skipped.append(found)
        elif (label := labels.get(found.name.partition("/")[0])) is None:
            skipped.append(Skipped(printable(found.name), "no class: it lies in no folder of a class"))
        else:
            files.append((found, label))
    return names, files, skipped


def class_names(folders: list[str], names: Path | None = None, key: str = "classes") -> list[str]:
    """What the classes of sorted folders are called; FileError if `names`, a file as of `read_names`, does not name each.

    None takes the folders' names, without numbers before them and underscores.
    """
    if names is None:
        return [printable(_NUMBER.sub("", name).replace("_", " ").strip()) for name in folders]
    found = read_names(names, key)
    pairs = [line.split(maxsplit=1) for line in found] if names.suffix != ".json" else []
    if pairs and all(folder in folders for folder, *_ in pairs):
        # ImageNet's LOC_synset_mapping.txt gives synonyms, the first one is the usual name
        found = {folder: "".join(name).partition(",")[0].strip() or folder for folder, *name in pairs}
    count = len(found) if isinstance(found, (list, dict)) else 0
    if isinstance(found, list) and count == len(folders):
        found = dict(zip(folders, found, strict=True))
    missing = [folder for folder in folders if not isinstance(found, dict) or not found.get(folder)]
    if not isinstance(found, dict) or missing:
        what = f"{count} names for {len(folders)} folders, none for {missing[:5]}"
        raise FileError(f"{names}: {what}; give a name for each folder, as {{folder: name}} or in sorted order", names)
    return [str(found[folder]) for folder in folders]


def read_names(path: Path, key: str = "classes") -> Any:
    """Names of classes; FileError if the file is no JSON, or a line is blank.

    A `.json` file holds a list, an object with a list under `key`, or {folder: name}; a text file a name, or `folder name`,
    on every line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = json.loads(text) if path.suffix == ".json" else [line.strip() for line in text.rstrip().splitlines()]
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} contains no names of classes: {error}", path) from error
    if path.suffix != ".json" and not all(found):
        raise FileError(f"{path}: line {found.index('') + 1} is blank; give the name of a class on every line", path)
    return found[key] if isinstance(found, dict) and isinstance(found.get(key), list) else found


def find_file(folder: Path, name: str) -> Path:
    """The file of a name that `printable` has made, if there is one. It may lie outside of the folder."""
    path = folder / name
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), os.fsencode(name))
    return path if os.path.exists(path) else folder / os.fsdecode(raw)


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[ImageFile | Skipped]:
    try:
        here = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Skipped(printable(prefix or str(folder)), f"folder unreadable: {error.strerror}")
        return
    identity = here.st_dev, here.st_ino
    if identity in above:
        yield Skipped(printable(prefix), "link to a folder above it: not followed")
        return
    for entry in entries:
        name = prefix + entry.name
        if entry.name.startswith(HIDDEN):
            continue
        # a link may lead to itself: `entry.is_dir` raises then
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if _is_image(entry.name):
                yield Skipped(printable(name), "not a file: it is a folder with the name of an image")
            yield from _walk(Path(entry.path), f"{name}/", above | {identity})
        elif problem := _problem(entry):
            yield Skipped(printable(name), problem)
        else:
            yield ImageFile(name, Path(entry.path))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower()[1:] in IMAGE_TYPES


def _problem(entry: "os.DirEntry[str]") -> str:
    if entry.is_symlink() and not os.path.exists(entry.path):
        return f"link broken: it leads to {printable(os.readlink(entry.path))}"
    if not _is_image(entry.name):
        return f"not an image by its name: expected .{', .'.join(IMAGE_TYPES)}"
    if not entry.is_file():
        return "not a file: it is a pipe, a socket or a device"
    return "" if os.access(entry.path, os.R_OK) else "file unreadable: no permission"

"""The command `stair evaluate`: opens tars and folders as evaluation sets, measures a model, writes the results."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from stair.data import samples as fields
from stair.data.folders import class_files, class_names, read_names
from stair.data.pairs import entries, opened, whole_captions
from stair.data.tars import expand
from stair.errors import FileError, SettingError, require
from stair.evaluate import EvaluationSet, Sample, open_model, show, write
from stair.evaluate import evaluate as measure
from stair.images import decode_image
from stair.set_counts import repeats

SPLITS = ("test", "val", "train")
_CLASSNAMES = "classnames.json", "classnames.txt"


def evaluate(
    model: str,
    data: list[str],
    output: str | None = None,
    split: str | None = None,
    classnames: str | None = None,
    ks: list[int] = [1, 5, 10],  # noqa: B006 - read by the command line
    vocabulary: str | None = None,
    captions: int | None = None,
    limit: int | None = None,
    no_probe: bool = False,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Measures a model: retrieval, classification, sparsity, search cost and the meaning of its terms.

    Prints tables, and writes evaluation.json, report.html and model_card.md with the protocol of each result.

    DATA is one or more `PATH` or `NAME=PATH`: tars (a path, a glob, a brace pattern), a folder of tars, or a folder with
    one folder of images per class. Retrieval is measured in both directions on tars with captions, unless more than half
    of the images share their captions with others, for example if captions only name a class. Classification is measured
    if there are class names (`classnames.json` or `classnames.txt` next to the tars, or the names of the folders). A
    linear probe is trained if there are a train and a val part (`train-*.tar` and `val-*.tar`, or folders train/ and val/).

    Args:
        model: an exported model's folder, `open_clip:ARCHITECTURE:CHECKPOINT`, or `sentence_transformers:FOLDER`.
        data: sets to measure, separated by spaces: each PATH or NAME=PATH, such as mine='shards/val-*.tar'.
        output: folder for the results; by default `MODEL-evaluation` next to the model, or in the working directory.
        split: the part of a folder to measure; by default the first of test, val, train that exists, else all.
        classnames: file with class names for sets without their own: a JSON list, a JSON object with `classes`
            (`FILE:KEY` selects another key), or a `.txt` with one name per line.
        ks: values of K in recall@K.
        vocabulary: a BERT vocab.txt with the terms of the vocabulary probe, for models without a vocabulary.
        captions: use the first N captions of each image; by default all. The usual protocol of COCO-5k uses 5.
        limit: use the first N images of each set; by default all.
        no_probe: do not train the linear probe, which is slow for many classes.
        batch_size: number of images encoded at a time.

    Raises:
        FileNotFoundError: if the model or a set is missing.
        ValueError: if a set cannot be measured.
    """
    require(min(ks, default=0) >= 1, "ks", ks, "numbers of at least 1")
    for name, value in (("batch_size", batch_size), ("captions", captions), ("limit", limit)):
        require(value is None or value >= 1, name, value, "at least 1")
    sets = [open_set(place, split, classnames, captions) for place in data]
    for i, what in enumerate(sets):
        if limit and limit < len(what.samples):
            first: Any = Subset(what.samples, range(limit))  # type: ignore[arg-type]
            sets[i] = replace(what, samples=first, split=f"{what.split}, first {limit} images")
    if no_probe:
        sets = [replace(what, train=[], val=[]) for what in sets]
    evaluated = open_model(model, vocabulary)
    home = Path(model).resolve() if Path(model).exists() else Path.cwd() / re.sub(r"[^\w.-]+", "-", evaluated.name)
    folder = Path(output).resolve() if output else home.with_name(f"{home.name}-evaluation")
    folder.mkdir(parents=True, exist_ok=True)  # fails before hours of measuring
    result, embedded = measure(evaluated, sets, ks, batch_size, progress=lambda line: print(line, flush=True))
    show(result)
    write(folder, result, evaluated, sets, embedded)
    print(f"Written: {folder}/report.html, evaluation.json, model_card.md")
    return result


def open_set(
    place: str, split: str | None = None, classnames: str | None = None, captions: int | None = None
) -> EvaluationSet:
    """A set of the command line, `PATH` or `NAME=PATH`; other arguments and errors as of `evaluate`."""
    name, sign, path = place.partition("=")
    if not sign or "/" in name or Path(place).exists():  # an `=` of the path
        name, path = "", place
    folder = Path(path)
    if not folder.is_dir():
        what = _tars(path, Path(expand(path)[0]).parent, path, classnames, captions)
    elif any((parts := _parts(folder)).values()) or any(folder.glob("*.tar")):
        part = split or next((s for s in SPLITS if parts[s]), None)
        spec = parts.get(part or "") or str(folder / (f"{part}*.tar" if part else "*.tar"))
        what = _tars(spec, folder, part or "all", classnames, captions)
    else:
        what = _class_folders(folder, split, classnames)
    return replace(what, name=name or what.name)


class _TarSamples:
    """Samples of tars. A class is their `.cls`, their `label`, or their `class` looked up among the class names."""

    def __init__(self, spec: str, classes: Sequence[str], max_captions: int | None = None) -> None:
        self._entries = entries(spec, fields.CAPTION_TYPES + fields.CLASS_TYPES)
        self._count, self._max_captions = len(classes), max_captions
        self._labels: dict[str, list[int]] = {}
        for label, name in enumerate(classes):
            self._labels.setdefault(name, []).append(label)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Sample:
        entry = self._entries[index]
        with opened(entry) as sample:
            captions, label = self._annotation(sample.members, entry.lines)
            key = f"{fields.printable(Path(entry.shard).stem)}/{sample.key}"
            boxes = fields.json_fields(sample.members).get("boxes", ())
            return Sample(decode_image(fields.image_bytes(sample.members)), captions, label, key, boxes)

    def annotations(self) -> list[tuple[tuple[str, ...], int | None]]:
        """Captions and label of each sample."""
        annotations = []
        for entry in self._entries:
            with opened(entry) as sample:
                annotations.append(self._annotation(sample.members, entry.lines))
        return annotations

    def _annotation(self, members: dict[str, bytes], lines: bool) -> tuple[tuple[str, ...], int | None]:
        label = self._label(members) if self._labels else None
        try:
            return tuple(whole_captions(members, lines)[: self._max_captions]), label
        except fields.NoCaptionError:
            if label is None:
                raise
            return (), label

    def _label(self, members: dict[str, bytes]) -> int | None:
        if (number := fields.class_number(members)) is not None:
            return number
        annotation = fields.json_fields(members)
        name, label = annotation.get("class"), annotation.get("label")
        labels = self._labels.get(name, []) if isinstance(name, str) else []
        if isinstance(label, int) and (label in labels or (name is None and 0 <= label < self._count)):
            return label
        if len(labels) > 1:
            raise ValueError(f"two classes are named {name!r}; give the number of its class as .cls or `label`")
        return labels[0] if labels else None


def _tars(spec: str, home: Path, split: str, classnames: str | None, captions: int | None) -> EvaluationSet:
    name, classes = home.resolve().name, _class_names(home, classnames)
    samples = _TarSamples(spec, classes, captions)
    annotations = samples.annotations()
    if classes and all(label is None for _, label in annotations):  # the names are of other classes
        print(f"{name}: no image is of one of the {len(classes)} classes named, so none is classified")
        classes = []
    texts = [texts for texts, _ in annotations]
    if any(texts) and not all(texts):
        raise ValueError(
            f"{texts.count(())} of {len(texts)} images have a class and no caption, the others have captions. Give "
            "captions to all or none: an image without caption can be found by no text"
        )
    beside = {part: pattern for part, pattern in _parts(home).items() if part != "test"}
    # what is measured must not be trained on
    measured = {Path(path).resolve() for path in expand(spec)}
    may_probe = classes and not measured & {path.resolve() for pattern in beside.values() for path in _glob(pattern)}
    parts = {part: _TarSamples(pattern, classes) for part, pattern in beside.items() if may_probe and pattern}
    distinct = any(texts) and 2 * repeats(texts) <= len(texts)
    return EvaluationSet(name, samples, split, classes, **parts, retrieval=distinct)


def _parts(home: Path) -> dict[str, str]:
    """Pattern of the tars of each split of a folder, "" without any."""
    return {part: next(filter(_glob, (f"{home}/{part}*.tar", f"{home}/{part}/*.tar")), "") for part in SPLITS}


def _glob(pattern: str) -> list[Path]:
    return sorted(Path(pattern).parent.glob(Path(pattern).name)) if pattern else []


def _class_names(home: Path, given: str | None) -> list[str]:
    """Names from `FILE` or `FILE:KEY`, else from a file beside the tars; none if there is none."""
    if not given:
        beside = (read_names(home / file) for file in _CLASSNAMES if (home / file).is_file())
        return next((names for names in beside if names and _are_names(names)), [])
    path, key = _file_and_key(given)
    names = read_names(path, key)
    if not _are_names(names):
        keys = sorted(k for k, v in names.items() if isinstance(v, list)) if isinstance(names, dict) else []
        wrong = f"{path} has no list of names under {key!r}; it has {keys}"
        raise SettingError(f"{wrong}. Give --classnames FILE:KEY", "classnames")
    return list(names)


def _file_and_key(given: str) -> tuple[Path, str]:
    name, _, key = (given, "", "classes") if Path(given).is_file() else given.rpartition(":")
    if not Path(name or given).is_file():
        raise FileNotFoundError(f"--classnames {given}: no such file")
    return Path(name or given), key


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


class _FolderSamples:
    """Images in a folder for each class. Images that cannot be read stop the evaluation; other files are listed."""

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        names, files, skipped = class_files(folder)
        self.classes = names if classes is None else classes
        labels = {name: label for label, name in enumerate(self.classes)}
        other = [file for file, n in files if names[n] not in labels]
        skipped += [fields.Skipped(fields.printable(file.name), "no class: not among the classes") for file in other]
        self._files = [(file.path, labels[names[n]]) for file, n in files if names[n] in labels]
        for each in skipped:
            if each.cause not in ("not an image by its name", "no class"):
                raise FileError(f"{folder / each.place}: {each.reason}", folder / each.place)
        counts = f"{folder}: {len(self._files)} images, {len(skipped)} files skipped"
        print(*fields.skipped_lines(skipped), counts, sep="\n")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Sample:
        path, label = self._files[index]
        try:
            return Sample(decode_image(path.read_bytes()), label=label)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _class_folders(folder: Path, split: str | None, classnames: str | None) -> EvaluationSet:
    part = split or next((s for s in SPLITS if (folder / s).is_dir()), None)
    home = folder / part if part else folder
    samples = _FolderSamples(home)
    if not len(samples):
        wanted = "tars, a folder of them, or a folder with a folder of images for each class"
        raise FileError(f"{home} holds neither tars nor class folders with images. Give {wanted}", home)
    others = {
        other: _FolderSamples(folder / other, samples.classes)
        for other in ("train", "val")
        if part not in (None, other) and (folder / other).is_dir()
    }
    names = class_names(list(samples.classes), *(_file_and_key(classnames) if classnames else ()))
    return EvaluationSet(folder.resolve().name, samples, part or "all", names, **others, retrieval=False)

"""The command `stair evaluate`: opens shards and folders as evaluation sets, measures a model, writes what came out."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

from stair.data.folders import class_files, class_names, read_names
from stair.data.pairs import Entry, entries, opened, whole_captions
from stair.data.samples import (
    CAPTION_TYPES,
    CLASS_TYPES,
    NoCaptionError,
    Skipped,
    class_number,
    image_bytes,
    json_fields,
    printable,
    skipped_lines,
)
from stair.data.specs import require
from stair.data.tars import expand
from stair.errors import FileError, SettingError
from stair.evaluate import EvaluationSet, Sample, open_model, show, write
from stair.evaluate import evaluate as measure
from stair.evaluate.sets import images_told_alike
from stair.images import decode_image

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
) -> None:
    """Measures a model: retrieval, classification, sparsity, cost, and whether words mean what they say.

    Prints tables, and writes evaluation.json, report.html and model_card.md. Every figure stands beside its protocol.

    DATA is any number of `PLACE` or `name=PLACE`: tars (a path, a glob, a brace pattern), a folder of tars, or a folder
    with a folder of images for each class. Tars with captions are ranked in both directions, unless most of their images
    share their captions with others, as where captions only name a class. Where there are class names (`classnames.json`
    or `classnames.txt` beside the tars, or the folders' names) images are also classified; a linear probe follows where a
    train and a val part lie beside (`train-*.tar` and `val-*.tar`, or folders train/ and val/).

    Args:
        model: the folder of an exported model, or `open_clip:ARCHITECTURE:CHECKPOINT`,
            `sentence_transformers:FOLDER` (extra `openclip`).
        data: the sets.
        output: folder for the results; `MODEL-evaluation` if null, beside the model, or here for one of another project.
        split: which part of a folder is measured; the first of test, val, train that is there, else all of it.
        classnames: file of class names for sets that have none beside them: a JSON list, or an object with `classes`
            (`FILE:KEY` takes another key), or a `.txt` with a name on every line.
        ks: the K of recall@K.
        vocabulary: words for the vocabulary test of a model that has none (a BERT vocab.txt).
        captions: the first so many captions of each image, all if null. The usual protocol of COCO-5k takes 5; few of
            its images have more.
        limit: measure the first so many images of each set only.
        no_probe: train no linear probe, which takes long where classes are many.
        batch_size: images encoded at a time.

    Raises:
        FileNotFoundError: if the model or a set is not there.
        ValueError: if a set holds nothing that can be measured.
    """
    require(min(ks, default=0) >= 1, "ks", ks, "numbers of at least 1")
    for name, value in (("batch_size", batch_size), ("captions", captions), ("limit", limit)):
        require(value is None or value >= 1, name, value, "at least 1")
    sets = [_cut(open_set(word, split, classnames, captions), limit) for word in data]
    if no_probe:
        sets = [replace(what, train=[], val=[]) for what in sets]
    evaluated = open_model(model, vocabulary)
    folder = Path(output).resolve() if output else _beside(model)
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written is said before hours of measuring
    result, embedded = measure(evaluated, sets, ks, batch_size=batch_size, say=lambda text: print(text, flush=True))
    show(result)
    write(folder, result, evaluated, sets, embedded)
    print(f"Written: {folder}/report.html, evaluation.json, model_card.md")


def _beside(model: str) -> Path:
    """Where results go if nobody says: beside the model; for one of another project, here."""
    scheme, colon, rest = model.partition(":")
    if colon and not Path(model).exists():
        return Path.cwd() / "-".join([scheme, *rest.removesuffix("/").split("/")[-1].split(":"), "evaluation"])
    place = Path(model).resolve()
    return place.with_name(f"{place.name}-evaluation")


def open_set(
    word: str, split: str | None = None, classnames: str | None = None, captions: int | None = None
) -> EvaluationSet:
    """A set of the command line.

    Args:
        word: `PLACE` or `name=PLACE`; see `evaluate`.
        split: which part of a folder.
        classnames: class names for tars that have none beside them.
        captions: the first so many captions of each image; all if None.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if what is there is no set.
    """
    name, sign, place = word.partition("=")
    if not sign or "/" in name or Path(word).exists():  # an `=` of the path's
        name, place = "", word
    folder = Path(place)
    if folder.is_dir():
        parts = _parts(folder)
        part = split or next((s for s in SPLITS if parts[s]), None)
        if any(parts.values()) or any(folder.glob("*.tar")):
            spec = parts.get(part or "") or str(folder / (f"{part}*.tar" if part else "*.tar"))
            found = _tars(spec, folder, part or "all", classnames, captions)
        else:
            found = _class_folders(folder, split, classnames)
    else:
        found = _tars(place, Path(expand(place)[0]).parent, place, classnames, captions)
    return replace(found, name=name or found.name)


def _cut(what: EvaluationSet, limit: int | None) -> EvaluationSet:
    if limit is None or len(what.samples) <= limit:
        return what
    first: Any = Subset(what.samples, range(limit))  # type: ignore[arg-type]
    return replace(what, samples=first, split=f"{what.split}, first {limit} images")


class _TarSamples:
    """Samples of tars; a class is their `.cls`, their `label`, or the place of their `class` among the class names.

    Raises:
        ValueError: on reading a sample that states only a name which two classes share.
    """

    def __init__(self, spec: str, classes: Sequence[str], most: int | None = None) -> None:
        self._entries = entries(spec, CAPTION_TYPES + CLASS_TYPES)
        self._names = list(classes)
        self._classes = {name: place for place, name in enumerate(classes)}
        self._shared = {name for name, times in Counter(classes).items() if times > 1}
        self._most = most

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int, /) -> Sample:
        entry = self._entries[index]
        with opened(entry) as found:
            sample = found.members
            return Sample(decode_image(image_bytes(sample)), self._told(sample, entry), self._label(sample, entry))

    def _told(self, sample: dict[str, bytes], entry: Entry) -> list[str]:
        try:
            return whole_captions(sample, entry.lines)[: self._most]
        except NoCaptionError:
            if self._label(sample, entry) is None:
                raise
            return []  # a class is enough to be measured by

    def _each(self, what: Callable[[dict[str, bytes], Entry], Any]) -> Iterator[Any]:
        for entry in self._entries:
            with opened(entry) as sample:
                yield what(sample.members, entry)

    def _label(self, sample: dict[str, bytes], entry: Entry) -> int | None:
        if not self._classes:
            return None
        if (number := class_number(sample)) is not None:
            return number
        fields = json_fields(sample)
        name, label = fields.get("class"), fields.get("label")
        if isinstance(label, int) and 0 <= label < len(self._names) and name in (None, self._names[label]):
            return label  # two classes can have one name
        if isinstance(name, str) and name in self._shared:
            raise ValueError(
                f"its class is {name!r}, and two classes have that name; give its number as .cls or `label`"
            )
        return self._classes.get(name) if isinstance(name, str) else None

    def has_classes(self) -> bool:
        """Whether any image is of one of the classes."""
        return any(label is not None for label in self._each(self._label))

    def captions_tell_apart(self) -> bool:
        """Whether at least half of the images have captions that no other image has."""
        told = [tuple(captions_of) for captions_of in self._each(self._told)]
        if any(told) and not all(told):
            raise ValueError(
                f"{told.count(())} of {len(told)} images have a class and no caption, the others have: give captions to "
                "all or none, as those without could be found by no text"
            )
        return any(told) and 2 * images_told_alike(told) <= len(told)


def _tars(spec: str, home: Path, split: str, classnames: str | None, captions: int | None) -> EvaluationSet:
    classes = _class_names(home, classnames)
    samples = _TarSamples(spec, classes, captions)
    if classes and not samples.has_classes():  # names of other classes, as of those that training has seen
        print(f"{home.resolve().name}: no image is of one of the {len(classes)} classes named, so none is classified")
        classes = []
    beside = {part: spec for part, spec in _parts(home).items() if part != "test"}
    # what is measured must not be learned from
    measured = {Path(path).resolve() for path in expand(spec)}
    may_probe = classes and not measured & {path.resolve() for s in beside.values() for path in _glob(s)}
    parts = {part: _TarSamples(s, classes) for part, s in beside.items() if may_probe and s}
    return EvaluationSet(home.resolve().name, samples, split, classes, **parts, retrieval=samples.captions_tell_apart())


def _parts(home: Path) -> dict[str, str]:
    """Patterns of the tars of each split of a folder, "" where there are none."""
    return {part: next(filter(_glob, (str(home / f"{part}*.tar"), str(home / part / "*.tar"))), "") for part in SPLITS}


def _glob(spec: str) -> list[Path]:
    """The files of a pattern; none of "", the pattern of what is not there."""
    return sorted(Path(spec).parent.glob(Path(spec).name)) if spec else []


def _class_names(home: Path, given: str | None) -> list[str]:
    """Names from `FILE` or `FILE:KEY`, else from a file beside the tars; none if there is none."""
    if not given:
        beside = (read_names(home / file) for file in _CLASSNAMES if (home / file).is_file())
        # a file of another make that has the same name is passed over
        return next((names for names in beside if names and _are_names(names)), [])
    path, key = _file_and_key(given)
    found = read_names(path, key)
    if not _are_names(found):
        keys = sorted(k for k, v in found.items() if isinstance(v, list)) if isinstance(found, dict) else []
        raise SettingError(
            f"{path} has no list of names under {key!r}; it has {keys}. Give --classnames FILE:KEY", "classnames"
        )
    return list(found)


def _file_and_key(given: str) -> tuple[Path, str]:
    name, _, key = (given, "", "classes") if Path(given).is_file() else given.rpartition(":")
    path = Path(name or given)
    if not path.is_file():
        raise FileNotFoundError(f"--classnames {given}: no such file")
    return path, key


def _are_names(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


class _FolderSamples:
    """Images in a folder for each class."""

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        names, files, skipped = class_files(folder)
        self.classes = names if classes is None else classes
        known = {name: label for label, name in enumerate(self.classes)}
        skipped += [
            Skipped(printable(f.name), "no class: not one that is measured") for f, n in files if names[n] not in known
        ]
        self._files = [(file.path, known[names[n]]) for file, n in files if names[n] in known]
        self._report(folder, skipped)

    def _report(self, folder: Path, skipped: list[Skipped]) -> None:
        """Prints what of a folder is not measured. Images that cannot be read stop the evaluation."""
        if lost := [one for one in skipped if one.cause not in ("not an image by its name", "no class")]:
            raise FileError(f"{folder / lost[0].place}: {lost[0].reason}", folder / lost[0].place)
        for line in skipped_lines(skipped):
            print(line)
        print(f"{folder}: {len(self._files)} images taken, {len(skipped)} skipped")

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
    classes = list(samples.classes)
    if not len(samples):
        raise FileError(
            f"{home} holds neither tars nor class folders with images; give tars, a folder of them, or a folder with a "
            "folder of images for each class",
            home,
        )
    others = {
        other: _FolderSamples(folder / other, classes)
        for other in ("train", "val")
        if part not in (None, other) and (folder / other).is_dir()
    }
    names = class_names(classes, *_file_and_key(classnames)) if classnames else class_names(classes)
    return EvaluationSet(folder.resolve().name, samples, part or "all", names, **others, retrieval=False)

"""The rules of a sample: its members, image, captions and class, and what makes it bad. All commands apply them.

A sample is a run of members with one key (`KEY.jpg` with `KEY.json` and/or `KEY.txt`). Key and type are split as WebDataset
splits them: at the first dot of the file name. Nothing is ever unpickled.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from stair.data.remote import is_remote
from stair.plain import one_line

# if a sample has several images, the first of this order is its image
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff")
CAPTION_TYPES = ("json", "txt")
CLASS_TYPES = ("cls",)  # the number of a class, for evaluation
LONGEST_CAPTION = 10_000  # characters; longer text is a page that was stored as a caption by mistake

BLOCK = 512  # bytes; headers and members of a tar begin at multiples of it

_IMAGES = frozenset(IMAGE_TYPES)
_WANTED = frozenset(IMAGE_TYPES + CAPTION_TYPES + CLASS_TYPES)
_PICKLES = frozenset(("pyd", "pth", "pt", "pkl", "pickle", "ckpt"))
_SURROGATE = re.compile("[\ud800-\udfff]")
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members

Value = TypeVar("Value")


class Skipped(NamedTuple):
    """An input that is not used."""

    place: str  # file, line of a table or key of a sample
    reason: str  # begins with its cause and a colon

    @property
    def cause(self) -> str:
        """What it is counted under."""
        return self.reason.partition(":")[0]

    def facts(self) -> dict[str, str]:
        """For reports in JSON."""
        return {"cause": self.cause, **self._asdict()}


def count_causes(skipped: Iterable[Skipped]) -> dict[str, int]:
    """How many were skipped for each cause, the most frequent first."""
    return dict(Counter(one.cause for one in skipped).most_common())


def skipped_lines(skipped: Sequence[Skipped], shown: int = 10, word: str = "skipped") -> list[str]:
    """For a terminal: of each cause the first places with their reasons, and how many more there are."""
    lines = []
    for cause, count in count_causes(skipped).items():
        first = [one for one in skipped if one.cause == cause][:shown]
        lines += [f"{word} {one_line(one.place)}: {one_line(one.reason)}" for one in first]
        lines += [f"{word} {count - shown} more: {cause}"] if count > shown else []
    return lines


def printable(name: str) -> str:
    """A name as UTF-8: bytes that are none become backslash escapes such as `\\xe9`, and so do lone surrogates."""

    def escaped(match: "re.Match[str]") -> str:
        code = ord(match[0])
        return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"

    return name if name.isascii() else _SURROGATE.sub(escaped, name)


# ------------------------------------------------------------------ members


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str  # path in the archive
    start: int  # where its headers begin in the (uncompressed) archive, in bytes
    offset: int  # where its bytes begin
    size: int  # their number
    read: Callable[[], bytes]  # reads them; only before the next member is taken


@dataclass
class Grouped(Generic[Value]):
    """The members of one sample."""

    key: str  # name of the members up to the first dot of the file name
    members: dict[str, Value] = field(default_factory=dict)  # by type in lower case (`jpg`, `json`, ...)
    problems: list[str] = field(default_factory=list)  # reasons to skip the sample, each with its cause and a colon
    warnings: list[str] = field(default_factory=list)  # notes that are no reason to skip it
    start: int = 0  # where its first header begins, in bytes
    stop: int = 0  # where its last member ends, a multiple of 512
    dotted: dict[str, str] = field(default_factory=dict)  # problems by name up to the last dot, as of `1.5.png`

    def resolved(self) -> "Iterator[Grouped[Value]]":
        """The sample. If it has no image and dotted names, one bad sample for each name that was meant as a key."""
        if not self.dotted or self.members.keys() & _IMAGES:
            if self.members:
                yield self
        elif self.members.keys() & _WANTED:
            self.problems += self.dotted.values()
            yield self
        else:
            for i, (name, problem) in enumerate(self.dotted.items()):
                warnings = [] if i else self.warnings
                yield Grouped(name, {}, [*self.problems, problem], warnings, self.start, self.stop)


def content(member: Member) -> bytes:
    """The bytes of a member, none of one that belongs to no sample."""
    return member.read() if key_and_type(member.name)[1] in _WANTED else b""


def key_and_type(name: str) -> tuple[str, str]:
    """Key and type (in lower case) of a member; both empty for one of no sample, such as macOS's `folder/._a.png`."""
    from webdataset.tariterators import base_plus_ext  # here, as it imports torch

    key, kind = base_plus_ext(name)
    hidden = not key or key.endswith("/") or ("__" in name and _META.match(name))
    return ("", "") if hidden else (key, kind.lower())


def group(
    members: Iterable[Member], value: Callable[[Member], Value], everything: bool = False
) -> Iterator[Grouped[Value]]:
    """Groups members of an archive into samples; `value` computes what is kept of a member.

    If `members` raises, the sample at hand is not yielded. With `everything`, members are kept that no sample can use.
    """
    sample: Grouped[Value] = Grouped("")
    for member in members:
        key, kind = key_and_type(printable(member.name))
        last = kind.rpartition(".")[2]
        dotted = last != kind and last in _WANTED
        wanted, pickle = kind in _WANTED or (everything and bool(key)), last in _PICKLES
        if not (wanted or dotted or pickle):
            continue
        if key != sample.key:
            yield from sample.resolved()
            unsafe = key.startswith(("/", "\\")) or ".." in key.replace("\\", "/").split("/")
            problems = [f"unsafe name: {key!r} leads out of its folder"] if unsafe else []
            sample = Grouped(key, problems=problems, start=member.start)
        sample.stop = member.offset + -(-member.size // BLOCK) * BLOCK
        if dotted:
            problem = f"{member.name!r} belongs to key {key!r} as type {kind!r}; rename it: keys hold no dots"
            sample.dotted.setdefault(member.name.rpartition(".")[0], f"dotted key: {problem}")
        if pickle:
            sample.warnings.append(f"pickle ignored: {member.name!r} is never opened")
        if kind in sample.members and kind in _WANTED:
            problem = f"{member.name!r} occurs twice, or two samples that follow each other share a key"
            sample.problems.append(f"duplicate member: {problem}")
        elif wanted:
            sample.members[kind] = value(member)
    yield from sample.resolved()


def other_members(names: Iterable[str], keys: Iterable[str]) -> Iterator[Skipped]:
    """The members of an archive that belong to none of its samples, one for each key; hidden ones are left out."""
    known = set(keys)
    for key, kind in map(key_and_type, map(printable, names)):
        if key and key not in known and kind.rpartition(".")[2] not in _WANTED:
            known.add(key)
            yield Skipped(key, f"no image or caption: its first member has type {kind!r}, expected {sorted(_WANTED)}")


# ------------------------------------------------------------------ image, captions, class


def image_type(members: Mapping[str, Any]) -> str:
    """The type of the member that is a sample's image; ValueError `no image: ...` if it has none."""
    for kind in IMAGE_TYPES:
        if kind in members:
            return kind
    raise ValueError(f"no image: members are {list(members)}, expected one of {list(IMAGE_TYPES)}")


def image_bytes(sample: Mapping[str, bytes]) -> bytes:
    """The image member of a sample; ValueError `no image: ...` if it has none."""
    return sample[image_type(sample)]


class NoCaptionError(ValueError):
    """A sample without a caption."""


def captions(sample: Mapping[str, bytes], lines: bool = False) -> list[str]:
    """The captions of a sample: `captions` of its JSON, else `caption` of it, else its text.

    With `lines`, a .txt member holds a caption on each line. White space around captions is removed. Blank ones are kept as
    "", but one is not blank.

    Raises:
        NoCaptionError: `no caption: ...`.
        ValueError: `caption unreadable: ...` or `caption too long: ...`.
    """
    try:
        texts = _strings(_in_json(sample)[1] or _in_txt(sample, lines))
    except (ValueError, TypeError) as error:
        raise ValueError(f"caption unreadable: {error}") from error
    if not any(texts):
        raise NoCaptionError(
            f"no caption: members are {list(sample)}, expected KEY.txt, or KEY.json with "
            '{"captions": [...]} or {"caption": "..."}; members of a sample must follow each other in the tar'
        )
    _check_length(texts)
    return texts


def caption_choices(
    sample: Mapping[str, bytes], shares: Mapping[str, float], lines: bool = False
) -> list[tuple[float, list[str]]]:
    """Share and captions, none of them blank, of each field that the sample has, for training to draw from.

    `shares` are relative probabilities of fields of the JSON (strings, or lists of strings) or of `txt`; without any, the
    captions are those of `captions`. Errors are the same.
    """
    if not shares:
        return [(1.0, [text for text in captions(sample, lines) if text])]
    texts = {}
    try:
        fields = json_fields(sample)
        for name in sorted(shares, key=lambda name: name == "txt"):
            value = _in_txt(sample, lines) if name == "txt" and "txt" in sample else fields.get(name)
            texts[name] = _strings(value if isinstance(value, list) else [value] if value else [])
    except (ValueError, TypeError) as error:
        raise ValueError(f"caption unreadable: {error}") from error
    choices = [(shares[name], list(filter(None, each))) for name, each in texts.items() if any(each)]
    if not choices:
        raise NoCaptionError(f"no caption: none of the fields {list(shares)} is there; members are {list(sample)}")
    for _, each in choices:
        _check_length(each)
    return choices


def check_caption(text: str) -> str:
    """A caption that stands alone, such as a cell of a table, stripped; ValueError begins with the cause if it is none."""
    text = text.strip()
    if not text:
        raise ValueError("caption empty: nothing but white space")
    if printable(text) != text:
        raise ValueError(f"caption not UTF-8: {printable(text)[:80]!r}; save the file as UTF-8")
    _check_length([text])
    return text


def _check_length(texts: Iterable[str]) -> None:
    if (longest := max(map(len, texts))) > LONGEST_CAPTION:
        raise ValueError(f"caption too long: {longest} characters, the limit is {LONGEST_CAPTION}")


def caption_lines(shard: str) -> bool:
    """Whether the .txt members of a local shard hold a caption on each line.

    In the retrieval sets of CLIP_benchmark, `dataset_type.txt` in the shard's folder, or in the one above it, says so.
    """
    if is_remote(shard):
        return False
    folder = Path(shard).resolve().parent
    files = [path / "dataset_type.txt" for path in (folder, folder.parent)]
    return any(file.is_file() and file.read_bytes().strip() == b"retrieval" for file in files)


def _strings(values: list[Any]) -> list[str]:
    """Captions without white space around them; half a surrogate pair, which JSON can spell, is an error."""
    if wrong := [value for value in values if not isinstance(value, str)]:
        raise TypeError(f"a caption is {wrong[0]!r:.40}, expected a string")
    texts = [value.strip() for value in values]
    for text in texts:
        text.encode()
    return texts


def _in_txt(sample: Mapping[str, bytes], lines: bool) -> list[str]:
    text = sample.get("txt", b"").decode("utf-8-sig")
    return [line for line in text.split("\n") if line.strip()] if lines else [text]


def _in_json(sample: Mapping[str, bytes]) -> tuple[str, list[str]]:
    """The field of a sample's JSON with its captions, and these; both empty if null, "" or [] is all there is."""
    fields = json_fields(sample)
    for name in ("captions", "caption"):
        value = fields.get(name)
        if value is not None and value != "" and value != []:
            if name == "captions" and not isinstance(value, list):
                raise TypeError(f"captions is a {type(value).__name__}, expected a list of strings")
            return name, value if name == "captions" else [value]
    return "", []


def json_fields(sample: Mapping[str, bytes]) -> dict[str, Any]:
    """The fields of a sample's JSON, none if it has none; ValueError if it is no JSON object."""
    try:
        fields = json.loads(sample["json"].decode("utf-8-sig")) if "json" in sample else {}
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the JSON is a {type(fields).__name__}, expected an object")
    return fields


def caption_field(sample: Mapping[str, bytes]) -> str:
    """Where `captions` finds those of a sample that has some: `json: captions`, `json: caption` or `txt`."""
    name, _ = _in_json(sample)
    return f"json: {name}" if name else "txt"


def class_number(sample: Mapping[str, bytes]) -> int | None:
    """The number in KEY.cls, None if the sample has none; ValueError if it is not a number from 0 up."""
    text = next((sample[kind] for kind in CLASS_TYPES if kind in sample), None)
    if text is None:
        return None
    if not text.strip().isdigit():
        raise ValueError(f"its .cls is {text[:20]!r}, expected the number of a class, from 0")
    return int(text)

"""What a tar of image-text samples is: which files a spec names, what a sample's members are, what its captions are.

A sample is a run of members with one key (`KEY.jpg` with `KEY.json` and/or `KEY.txt`), keys and types parted as WebDataset
parts them. Counting, streaming and indexing go through one grouping, so they agree. Only these members are read, and
nothing is ever unpickled.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import braceexpand
from webdataset.tariterators import base_plus_ext

from stair.data.remote import Remote, is_remote, open_shard
from stair.data.tar_members import BrokenTarError, Member, Tar

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CAPTION_TYPES = ("json", "txt")
CLASS_TYPES = ("cls",)  # the number of a class, for evaluation
LONGEST_CAPTION = 10_000  # characters; what is longer is a page of text that went astray

_IMAGES = frozenset(IMAGE_TYPES)
_WANTED = frozenset(IMAGE_TYPES + CAPTION_TYPES + CLASS_TYPES)
_PICKLES = frozenset(("pyd", "pth", "pt", "pkl", "pickle", "ckpt"))
_OTHER_BACKSLASH = re.compile(r"\\(?![{},])")  # a command's own: only a brace's or comma's is for the pattern
_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members

_UNSAFE = "unsafe name: {!r} leads out of its folder"
_TWICE = "duplicate member: {!r} comes twice, or two samples that follow each other share a key"
_DOTTED = "dotted key: {!r} belongs to key {!r} as type {!r}; rename it: keys hold no dots"

Value = TypeVar("Value")


class NoCaptionError(ValueError):
    """A sample says nothing of its image."""


def expand(spec: str | list[str]) -> list[str]:
    """The shards a spec names, in a fixed order.

    Args:
        spec: a path, a glob (`a/*.tar`), a brace pattern (`a/{0000..0004}.tar`), a URL or `pipe:` command (braces
            allowed; `\\{`, `\\}` and `\\,` stand for themselves, any other backslash stays), or a list of these.

    Raises:
        FileNotFoundError: if a part of the spec matches no file.
        ValueError: if its braces do not pair, or a URL has a star or a password in it.
    """
    if not isinstance(spec, str):
        return [shard for part in spec for shard in expand(part)]
    try:
        patterns = list(braceexpand.braceexpand(_OTHER_BACKSLASH.sub(r"\\\\", spec)))
    except braceexpand.UnbalancedBracesError as error:
        raise ValueError(
            f"{spec!r} has a brace without its counterpart: wanted a pattern such as {{0000..0004}}"
        ) from error
    return [shard for pattern in patterns for shard in _matches(pattern, spec)]


def _matches(pattern: str, spec: str) -> list[str]:
    if pattern.startswith(("http://", "https://")) and "@" in (there := urlsplit(pattern)).netloc:
        raise ValueError(
            f"a shard on {there.hostname} has a name or password in its URL, which would stand in logs and checkpoints: "
            f"put `machine {there.hostname} login NAME password WORD` into ~/.netrc"
        )
    if "*" in pattern and is_remote(pattern) and not pattern.startswith("pipe:"):
        raise ValueError(
            f"{pattern!r}: nobody is asked which URLs there are; give a brace pattern such as {{0000..0004}}.tar"
        )
    if is_remote(pattern) or Path(pattern).is_file():
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        where = "" if pattern == spec else f" (of {spec!r})"
        if os.path.isdir(pattern):
            raise FileNotFoundError(
                f"{pattern!r}{where} is a folder, no shard: give {os.path.join(pattern, '*.tar')!r}"
            )
        raise FileNotFoundError(
            f"no shard matches {pattern!r}{where}, looked for from {Path.cwd()}; "
            "give a path, a glob such as data/*.tar or a brace pattern such as data/{0000..0004}.tar"
        )
    return found


def is_wanted(name: str) -> bool:
    """Whether a member can belong to a sample, by its name."""
    return _key_and_type(name)[1] in _WANTED


def _key_and_type(name: str) -> tuple[str, str]:
    key, kind = base_plus_ext(name)
    return (key, kind.lower()) if key and not _META.match(name) else ("", "")


@dataclass
class _Found(Generic[Value]):
    key: str
    values: dict[str, Value]  # by type
    wrong: list[str]  # reasons to leave the sample out
    odd: list[str]  # what is no such reason
    dotted: dict[str, str]  # reasons by name up to the last dot, of `1.5.png` beside no image of the key


def _samples(
    tar: Tar, value: Callable[[Member], Value], select: Callable[[str], bool] | None = is_wanted
) -> Iterator[_Found[Value]]:
    """Groups members by key. A sample that the archive breaks off in is not handed out: a part of it may be missing."""
    found: _Found[Value] = _Found("", {}, [], [], {})
    for member in tar:
        key, kind = _key_and_type(member.name)
        wanted = bool(key) and (select is None or select(member.name))
        dotted = _is_dotted(key, kind)
        if key != found.key and (wanted or dotted):
            yield from _judged(found)
            found = _Found(key, {}, [_UNSAFE.format(key)] if _leaves_its_folder(key) else [], [], {})
        if dotted:
            found.dotted.setdefault(member.name.rpartition(".")[0], _DOTTED.format(member.name, key, kind))
        if not wanted:
            if kind.rpartition(".")[2] in _PICKLES:
                found.odd.append(f"pickle ignored: {member.name!r} is never opened")
        elif kind in found.values:
            found.wrong.append(_TWICE.format(member.name))
        else:
            found.values[kind] = value(member)
    yield from _judged(found)


def _is_dotted(key: str, kind: str) -> bool:
    """Whether a type is a wanted one but for what stands before its last dot; `folder/._a.png` is macOS's, no sample."""
    _, dot, last = kind.rpartition(".")
    return bool(dot) and last in _WANTED and not key.endswith("/")


def _judged(found: _Found[Value]) -> Iterator[_Found[Value]]:
    """The sample; where a key has no image and what it has is dotted, one for each name that was meant as a key."""
    if not found.dotted or found.values.keys() & _IMAGES:
        if found.values:
            yield found
    elif found.values.keys() & _WANTED:
        found.wrong += found.dotted.values()
        yield found
    else:
        for i, (name, reason) in enumerate(found.dotted.items()):
            yield _Found(name, {}, [*found.wrong, reason], [] if i else found.odd, {})


def _leaves_its_folder(key: str) -> bool:
    return key.startswith(("/", "\\")) or ".." in key.replace("\\", "/").split("/")


def index(path: Path | str, mode: str = "r:") -> Iterator[tuple[str, dict[str, tuple[int, int]], str]]:
    """As `walk`, and with each sample what is wrong with its names, empty if nothing is."""
    try:
        with open(path, "rb") as file:
            for found in _samples(Tar(file, mode != "r:"), lambda member: (member.offset, member.size)):
                yield found.key, found.values, "; ".join(found.wrong[:1])
    except (BrokenTarError, OSError) as error:
        raise ValueError(f"{path} is cut short or no {'uncompressed ' * (mode == 'r:')}tar ({error})") from error


def walk(path: Path | str, mode: str = "r:") -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Walks the headers of a local tar, one sample at a time, without reading what the members hold.

    Args:
        path: the tar.
        mode: `r:` refuses compressed tars, in which offsets mean nothing, `r:*` takes them.

    Yields:
        A sample's key and, by type (`jpg`, `json`, ...), offset and length of its members in bytes.

    Raises:
        ValueError: where the file stops being a tar; every whole sample before has been yielded by then.
    """
    for key, places, _ in index(path, mode):
        yield key, places


def stream(
    shard: str,
    on_error: Callable[[Exception], Any],
    select: Callable[[str], bool] | None = is_wanted,
    remote: Remote | None = None,
) -> Iterator[dict[str, Any]]:
    """Reads the samples of one shard from front to end.

    Args:
        shard: path, URL or `pipe:` command.
        on_error: told of what breaks the shard, after which nothing more comes.
        select: which members are handed out, by name; None for all, those that belong to no sample as b"".
        remote: how shards that are not local files are read.

    Yields:
        `__key__`, `__wrong__` (a reason to leave the sample out, else empty), `__odd__` (a list of what is no such reason)
        and, by type in lower case, the bytes of each member.
    """
    try:
        with open_shard(shard, remote or Remote()) as file:
            tar = Tar(file)

            def read(member: Member) -> bytes:
                # the others are passed over at any size, as in training
                return tar.read(member.size) if select is not None or is_wanted(member.name) else b""

            for found in _samples(tar, read, select):
                wrong = found.wrong[0] if found.wrong else ""
                yield {"__key__": found.key, "__wrong__": wrong, "__odd__": found.odd, **found.values}
    except (BrokenTarError, OSError) as error:
        on_error(error)


def image_bytes(sample: Mapping[str, bytes]) -> bytes:
    """The image member of a sample.

    Raises:
        ValueError: `no image: ...` if it has none.
    """
    for kind in IMAGE_TYPES:
        if kind in sample:
            return sample[kind]
    raise ValueError(f"no image: members are {types_of(sample)}, wanted one of {list(IMAGE_TYPES)}")


def captions(sample: Mapping[str, bytes]) -> list[str]:
    """The captions of a sample: `captions` of its JSON, else `caption` of it, else its text.

    Returns:
        At least one string that is not blank; surrounding white space is removed, blank ones are kept as "".

    Raises:
        NoCaptionError: `no caption: ...`.
        ValueError: `caption unreadable: ...` or `caption too long: ...`.
    """
    try:
        found = _in_json(sample["json"].decode()) if "json" in sample else []
        if not found and "txt" in sample:
            found = [sample["txt"].decode()]
        found = [caption.strip() for caption in found]
        for caption in found:
            caption.encode()  # JSON can spell half a character, on which the tokenizer would stop the run
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"caption unreadable: {type(error).__name__}: {error}") from error
    if not any(found):
        raise NoCaptionError(
            f"no caption: members are {types_of(sample)}, wanted KEY.txt, or KEY.json with "
            '{"captions": [...]} or {"caption": "..."}; members of a sample must follow each other in the tar'
        )
    if (longest := max(map(len, found))) > LONGEST_CAPTION:
        raise ValueError(f"caption too long: {longest} characters, the limit is {LONGEST_CAPTION}")
    return found


def _in_json(text: str) -> list[str]:
    fields = json.loads(text)
    several, single = fields.get("captions"), fields.get("caption")
    if several and not isinstance(several, list):
        raise TypeError(f"captions is a {type(several).__name__}, wanted a list of strings")
    return list(several or ([single] if single else []))


def class_number(sample: Mapping[str, bytes]) -> int | None:
    """What KEY.cls says, None where there is none.

    Raises:
        ValueError: if it is no number from 0 up.
    """
    told = next((sample[kind] for kind in CLASS_TYPES if kind in sample), None)
    if told is None:
        return None
    if not told.strip().isdigit():
        raise ValueError(f"its .cls is {told[:20]!r}, wanted the number of a class, from 0")
    return int(told)


def caption_field(sample: Mapping[str, bytes]) -> str:
    """Where `captions` finds those of a sample that has some: `json: captions`, `json: caption` or `txt`."""
    fields = json.loads(sample.get("json", b"{}"))
    return next((f"json: {name}" for name in ("captions", "caption") if fields.get(name)), "txt")


def types_of(sample: Mapping[str, Any]) -> list[str]:
    """The types of a sample's members, fields that begin with two underscores left out."""
    return [kind for kind in sample if not kind.startswith("__")]

"""What a tar of image-text samples is: which files a spec names, what a sample's members are, what its captions are.

A sample is a run of members with one key (`KEY.jpg` with `KEY.json` and/or `KEY.txt`), grouped as WebDataset groups
them, so that counting, streaming and indexing agree. Only these members are read, and nothing is ever unpickled.
"""

import glob
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
CAPTION_TYPES = ("json", "txt")

_META = re.compile(r"__[^/]*__($|/)")  # WebDataset's own members


def is_remote(shard: str) -> bool:
    """Whether WebDataset opens this shard itself (a URL or a `pipe:` command); local paths are ours."""
    return "://" in shard or shard.startswith("pipe:")


def expand(spec: str | list[str]) -> list[str]:
    """The shards a spec names, in a fixed order.

    Args:
        spec: a path, a glob (`a/*.tar`), a brace pattern (`a/{0000..0004}.tar`), a URL or `pipe:` command (braces
            allowed), or a list of these.

    Raises:
        FileNotFoundError: if a part of the spec matches no file.
    """
    if not isinstance(spec, str):
        return [shard for part in spec for shard in expand(part)]
    return [shard for pattern in braceexpand.braceexpand(spec) for shard in _matches(pattern, spec)]


def _matches(pattern: str, spec: str) -> list[str]:
    if is_remote(pattern) or Path(pattern).is_file():
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        where = "" if pattern == spec else f" (of {spec!r})"
        raise FileNotFoundError(
            f"no shard matches {pattern!r}{where}, looked for from {Path.cwd()}; "
            "give a path, a glob such as data/*.tar or a brace pattern such as data/{0000..0004}.tar"
        )
    return found


def is_wanted(name: str) -> bool:
    """Whether a member can belong to a sample, by its name."""
    return _key_and_type(name)[1] in IMAGE_TYPES + CAPTION_TYPES


def _key_and_type(name: str) -> tuple[str, str]:
    key, kind = base_plus_ext(name)
    return (key, kind.lower()) if key and not _META.match(name) else ("", "")


def walk(path: Path | str, mode: str = "r:") -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Walks the headers of a local tar, one sample at a time, without reading what the members hold.

    Args:
        path: the tar.
        mode: of `tarfile.open`; `r:` refuses compressed tars, in which offsets mean nothing, `r:*` takes them.

    Yields:
        A sample's key and, by type (`jpg`, `json`, ...), offset and length of its members in bytes.

    Raises:
        ValueError: where the file stops being a tar; everything before has been yielded by then.
    """
    key, members = "", {}
    try:
        with tarfile.open(path, mode) as tar:
            for info in tar:
                if info.isreg() and is_wanted(info.name):
                    name, kind = _key_and_type(info.name)
                    if name != key and members:
                        yield key, members
                        members = {}
                    key = name
                    members.setdefault(kind, (info.offset_data, info.size))
            cut_short = not tar.fileobj.seekable() or not _ends(tar)
    except (tarfile.TarError, EOFError, OSError) as error:
        cut_short = error
    if members:
        yield key, members
    if cut_short:
        reason = "no end-of-archive mark" if cut_short is True else cut_short
        raise ValueError(f"{path} is cut short or no {'uncompressed ' * (mode == 'r:')}tar ({reason})")


def _ends(tar: tarfile.TarFile) -> bool:
    # tarfile takes any broken header but the first for the end
    tar.fileobj.seek(tar.offset)
    return not any(tar.fileobj.read(tarfile.BLOCKSIZE))


def count_samples(path: str) -> tuple[int, str]:
    """How many samples a local shard holds: img2dataset's `NNNNN_stats.json` if there is one, else a walk.

    Returns:
        The count, and what is wrong with the shard (empty if nothing is).
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(Path(path).with_name(f"{Path(path).stem}_stats.json").read_text())["successes"]), ""
    count = 0
    try:
        for _ in walk(path, "r:*"):
            count += 1
    except ValueError as error:
        return count, str(error)
    return count, "" if count else f"{path} holds no sample"


def stream(
    shard: str, on_error: Callable[[Exception], bool], select: Callable[[str], bool] | None = is_wanted
) -> Iterator[dict[str, Any]]:
    """Reads the samples of one shard from front to end.

    Args:
        shard: path, URL or `pipe:` command.
        on_error: told of everything that breaks the shard; returns True to go on with what can still be read.
        select: which members are read, by name; None for all.

    Yields:
        `__key__` and, by type in lower case, the bytes of each member.
    """
    try:
        source = gopen(shard)
    except Exception as error:  # each scheme has an opener of its own
        on_error(error)
        return
    try:
        files = tar_file_expander([{"url": shard, "stream": source}], handler=on_error, select_files=select)
        yield from group_by_keys(files, handler=on_error)
    finally:
        with suppress(OSError):  # a pipe that is closed before its end reports a failure
            source.close()


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
        ValueError: `no caption: ...` or `caption unreadable: ...`.
    """
    try:
        found = _in_json(sample["json"].decode()) if "json" in sample else []
        if not found and "txt" in sample:
            found = [sample["txt"].decode()]
        found = [caption.strip() for caption in found]
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"caption unreadable: {type(error).__name__}: {error}") from error
    if not any(found):
        raise ValueError(
            f"no caption: members are {types_of(sample)}, wanted KEY.txt, or KEY.json with "
            '{"captions": [...]} or {"caption": "..."}; members of a sample must follow each other in the tar'
        )
    return found


def _in_json(text: str) -> list[str]:
    fields = json.loads(text)
    single = fields.get("caption")
    return list(fields.get("captions") or ([single] if single else []))


def types_of(sample: Mapping[str, Any]) -> list[str]:
    """The types of a sample's members, WebDataset's own fields left out."""
    return [kind for kind in sample if not kind.startswith("__")]

"""How many samples a shard holds: said by an index, said by img2dataset, or counted once."""

import hashlib
import json
import logging
import os
import posixpath
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from stair.data.remote import Remote, is_remote, read_small
from stair.data.tars import walk
from stair.files import write_json

logger = logging.getLogger(__name__)

INDEX = "index.json"
FORMAT = 1

_THREADS = 16  # counting waits for disks and networks rather than computes
_WORTH_KEEPING = 2.0  # seconds of counting


class Size(NamedTuple):
    """What is known of a shard.

    Attributes:
        samples: how many it holds, None if only reading it all would tell.
        wrong: what is wrong with it, empty if nothing is known to be.
    """

    samples: int | None
    wrong: str = ""


def sizes(shards: list[str], remote: Remote) -> list[Size]:
    """The sizes of shards: by `index.json` beside them, else by img2dataset's `NNNNN_stats.json`, else counted if local.

    Args:
        shards: paths, URLs or commands.
        remote: how to go about URLs.

    Raises:
        ValueError: if an index is not one, or was made for other shards.
        OSError: if it cannot be told whether there is an index.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        folders = sorted({_folder(shard) for shard in shards if not shard.startswith("pipe:")})
        indexes = dict(zip(folders, pool.map(lambda folder: read_index(folder, remote), folders), strict=True))
        known = list(pool.map(lambda shard: _said(shard, indexes.get(_folder(shard), {}), remote), shards))
        unknown = [shard for shard, size in zip(shards, known, strict=True) if size is None and not is_remote(shard)]
        counted = dict(zip(unknown, _counted(unknown, pool), strict=True))
    return [size or counted.get(shard, Size(None)) for shard, size in zip(shards, known, strict=True)]


def told(shards: list[str]) -> list[int | None]:
    """What files beside local shards say they hold; None where there are none, or they were made for other shards."""

    def look(shard: str) -> int | None:
        with suppress(OSError, ValueError):
            size = _said(shard, indexes[_folder(shard)], Remote())
            return size.samples if size else None
        return None

    local = sorted({shard for shard in shards if not is_remote(shard)})
    indexes: dict[str, dict[str, tuple[int, int]]] = {folder: {} for folder in map(_folder, local)}
    for folder in indexes:
        with suppress(OSError, ValueError):
            indexes[folder] = read_index(folder, Remote())
    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(local, pool.map(look, local), strict=True))
    return [found.get(shard) for shard in shards]


def _folder(shard: str) -> str:
    return posixpath.dirname(shard.partition("?")[0]) if is_remote(shard) else str(Path(shard).parent)


def _beside(shard: str, name: str) -> str:
    return f"{_folder(shard)}/{name}"


def _small(place: str, remote: Remote) -> bytes | None:
    if is_remote(place):
        return read_small(place, remote)
    with suppress(FileNotFoundError):
        return Path(place).read_bytes()
    return None


def read_index(folder: str, remote: Remote) -> dict[str, tuple[int, int]]:
    """Samples and bytes of each shard, by its name, as `index.json` says; nothing if there is none of ours.

    Args:
        folder: a local one, or a URL.
        remote: how to go about the latter.

    Raises:
        ValueError: if it is damaged, or of another format.
    """
    place = f"{folder}/{INDEX}"
    text = _small(place, remote)
    if text is None:
        return {}
    try:
        said = json.loads(text)
        if "format" not in said:  # other tools call their own files so too
            return {}
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}, wanted {FORMAT}")
        return {name: (int(entry["samples"]), int(entry["bytes"])) for name, entry in said["shards"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{place} is no index of shards ({error}); remove it or make it again") from error


def _said(shard: str, index: dict[str, tuple[int, int]], remote: Remote) -> Size | None:
    if shard.startswith("pipe:"):
        return None
    name = posixpath.basename(shard.partition("?")[0])
    if name in index:
        samples, size = index[name]
        if not is_remote(shard) and (found := os.stat(shard).st_size) != size:
            raise ValueError(
                f"{shard} has {found} bytes, {_beside(shard, INDEX)} says {size}: the index was made for another file, or "
                "this one is not whole. Fetch the shard again, or remove the index or make it again"
            )
        return Size(samples)
    with suppress(OSError, ValueError, KeyError, TypeError):
        stats = _small(_beside(shard, f"{posixpath.splitext(name)[0]}_stats.json"), remote)
        return Size(int(json.loads(stats)["successes"])) if stats else None
    return None


def count_samples(path: str) -> tuple[int, str]:
    """Counts the samples of a local shard by its headers.

    Returns:
        The count, and what is wrong with the shard (empty if nothing is).
    """
    count = 0
    try:
        for _ in walk(path, "r:*"):
            count += 1
    except ValueError as error:
        return count, str(error)
    return count, "" if count else f"{path} holds no sample"


def _counted(shards: list[str], pool: ThreadPoolExecutor) -> Iterator[Size]:
    """Counts, and where that took long keeps what was found for the next run."""
    kept = {folder: _kept(folder) for folder in {_folder(shard) for shard in shards}}
    fresh = [shard for shard in shards if _mark(shard) not in kept[_folder(shard)]]
    start = time.monotonic()
    if len(fresh) > 10 * _THREADS:
        logger.info("counting the samples of %d shards", len(fresh))
    found = dict(zip(fresh, pool.map(count_samples, fresh), strict=True))
    for shard, (count, wrong) in found.items():
        if not wrong:
            kept[_folder(shard)][_mark(shard)] = count
    if time.monotonic() - start > _WORTH_KEEPING:
        for folder in {_folder(shard) for shard in fresh}:
            _keep(folder, kept[folder])
    for shard in shards:
        yield Size(*found[shard]) if shard in found else Size(kept[_folder(shard)][_mark(shard)])


def _mark(shard: str) -> str:
    """A name that changes with the file."""
    state = os.stat(shard)
    return f"{Path(shard).name}/{state.st_size}/{state.st_mtime_ns}"


def _notebook(folder: str) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "stair" / "counts" / f"{hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:32]}.json"


def _kept(folder: str) -> dict[str, int]:
    with suppress(OSError, ValueError):
        found = json.loads(_notebook(folder).read_text())
        if isinstance(found, dict) and all(isinstance(count, int) for count in found.values()):
            return found
    return {}


def _keep(folder: str, counts: dict[str, int]) -> None:
    place = _notebook(folder)
    with suppress(OSError):  # a home that cannot be written to costs the next run its time, no more
        write_json(place, counts)


def spread(total: int, shards: int) -> list[int]:
    """A total, taken to be spread evenly over shards."""
    even, rest = divmod(total, shards)
    return [even + (i < rest) for i in range(shards)]

"""What there is to train on: the sources of a mixture, their shards, how each is read, and how many samples it holds."""

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from datamodules.dataset import Skip, Source
from stair.data.remote import LastingError, Remote, is_remote, read_ranges
from stair.data.shard_index import SUFFIX, sizes
from stair.data.tars import COMPRESSED, Shards, expand
from stair.errors import FileError, SettingError, errors_name

logger = logging.getLogger(__name__)


def find(
    specs: dict[str, Shards], resample: bool, remote: Remote, rank: int, ranks: int
) -> tuple[list[Source], list[Skip]]:
    """Finds the shards of all sources and, where they are read by position, counts their samples.

    With `resample`, remote shards without an index can be read forwards. The ranks share the indexing. Returns the sources,
    without counts if any shard can only be read forwards; and a note for each broken shard.

    Raises:
        FileNotFoundError: if a shard spec matches nothing.
        FileError: if a shard and its index differ, or no shard holds a sample.
        SettingError: if ranks find different shards.
    """
    shards = _agreed(specs, ranks)
    sources = [Source(name, tuple(names), (), specs[name].weight) for name, names in shards.items()]
    everything = list(dict.fromkeys(shard for source in sources for shard in source.shards))
    if any(map(_reads_forwards_only, everything)) or (resample and not remote.cache and _lack_index(sources, remote)):
        return sources, []
    counts = _counted(everything, remote, rank, ranks)
    broken = {shard: problem for shard, (_, problem) in counts.items() if problem}
    for problem in broken.values():
        logger.warning("shard broken: %s", problem)
    if not any(count for count, _ in counts.values()):
        first = next(iter(broken.values()), everything[0])
        raise FileError(f"none of {len(everything)} training shards holds a sample, the first: {first}", everything[0])
    skips = []
    for i, source in enumerate(sources):
        sources[i] = source._replace(counts=tuple(counts[shard][0] for shard in source.shards))
        if source.weight is not None and not sum(sources[i].counts):
            raise FileError(f"source {source.name!r} contains no sample: remove it from data.train", source.shards[0])
        lost = [shard for shard in source.shards if shard in broken]
        skips += [Skip(f"shard broken: {broken[shard]}", source.name, shard, shard, 0) for shard in lost]
    return sources, skips


def _reads_forwards_only(shard: str) -> bool:
    """Whether positions in a shard mean nothing: a command's output, or a compressed tar."""
    if is_remote(shard):
        return shard.startswith("pipe:") or shard.partition("?")[0].endswith((".gz", ".bz2", ".xz", ".tgz"))
    if os.path.exists(shard + SUFFIX):  # a stat is cheaper than opening 100,000 absent files
        return False
    with open(shard, "rb") as file:
        return file.read(6).startswith(COMPRESSED)


def _lack_index(sources: list[Source], remote: Remote) -> bool:
    """Whether the first remote shard of some source has no index."""
    first = [next((shard for shard in source.shards if is_remote(shard)), None) for source in sources]
    beginnings = read_ranges([(shard + SUFFIX, 0, 1) for shard in first if shard], remote)
    return any(isinstance(each, LastingError) for each in beginnings)


def _agreed(specs: dict[str, Shards], ranks: int) -> dict[str, list[str]]:
    """The shards of each source, the same on all ranks."""
    shards = _attempt(lambda: {name: _expanded(name, source) for name, source in specs.items()})
    if isinstance(shards, Exception):
        result = f"stopped ({shards})"
    else:
        names = [(name, list(map(file_name, paths))) for name, paths in shards.items()]
        digest = hashlib.sha256(repr(names).encode(errors="surrogateescape")).hexdigest()[:8]
        result = f"found {sum(map(len, shards.values()))} shards (names {digest})"
    results = _gathered(result, ranks)
    if len(set(results)) > 1 and any(each.startswith("found") for each in results):
        listed = ", ".join(f"rank {results.index(each)} {each}" for each in dict.fromkeys(results))
        raise SettingError(
            f"the ranks do not find the same shards: {listed}. All ranks must read the same files: copy to each machine "
            "what it lacks, remove what the others do not have, or use a folder that all of them see", "data.train",
        )  # fmt: skip
    if isinstance(shards, Exception):
        raise shards
    return shards  # type: ignore[no-any-return]


def _expanded(name: str, source: Shards) -> list[str]:
    with errors_name(f"source {name!r} of data.train" if name else ""):
        return expand(source.shards)


def _counted(shards: list[str], remote: Remote, rank: int, ranks: int) -> dict[str, tuple[int, str]]:
    """Samples and problem of each shard, each counted by one rank."""
    together = ranks if ranks > 1 and dist.is_available() and dist.is_initialized() else 1
    processes = max((os.cpu_count() or 1) // together, 1)
    mine = shards[rank::together] if together > 1 else shards
    parts = _gathered(_attempt(lambda: list(sizes(mine, remote, processes).values())), ranks)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    # by number and not by path: a folder may be called otherwise on another machine
    return {shard: parts[i % len(parts)][i // len(parts)] for i, shard in enumerate(shards)}


def _attempt(work: Callable[[], Any]) -> Any:
    """A result, or the error: a rank that stopped alone would leave the others waiting."""
    try:
        return work()
    except (ValueError, OSError) as error:
        return error


def _gathered(value: Any, ranks: int) -> list[Any]:
    """The values of all ranks, or that of this one where there is no process group."""
    if ranks < 2 or not dist.is_available() or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * ranks
    dist.all_gather_object(values, value)
    return values


def file_name(shard: str) -> str:
    """A shard's name without folder, host and signature; a command is its own name."""
    if shard.startswith("pipe:"):
        return shard
    return PurePosixPath(urlsplit(shard).path if is_remote(shard) else shard).name

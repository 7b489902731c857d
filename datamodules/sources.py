"""What there is to train on: the sources of a mixture, their shards, how each is read, and how many samples it holds."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch.distributed as dist

from datamodules.dataset import Source
from datamodules.skipped import Skip
from stair.data.members import COMPRESSED
from stair.data.remote import LastingError, Remote, is_remote, read_ranges
from stair.data.shard_index import SUFFIX, sizes
from stair.data.specs import Shards
from stair.data.tars import expand
from stair.errors import FileError, SettingError, errors_name

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


def reads_forwards_only(shard: str) -> bool:
    """Whether positions in a shard mean nothing: a command's output, or a compressed tar."""
    if shard.startswith("pipe:"):
        return True
    if is_remote(shard):
        return shard.partition("?")[0].endswith((".gz", ".bz2", ".xz", ".tgz"))
    if os.path.exists(shard + SUFFIX):  # a stat is cheaper than opening 100,000 absent files
        return False
    with open(shard, "rb") as file:
        return file.read(6).startswith(COMPRESSED)


def find(
    given: dict[str, Shards], resample: bool, remote: Remote, rank: int, ranks: int
) -> tuple[list[Source], list[Skip]]:
    """Finds the shards of all sources and, where they are read by position, their samples.

    Args:
        given: sources by name.
        resample: whether shards are drawn with replacement, so that remote ones without an index can be read forwards.
        remote: how to read shards that are not local.
        rank: this process, from 0.
        ranks: processes in all, which share the indexing.

    Returns:
        The sources, without counts if any shard can only be read forwards; and a note for each broken shard.

    Raises:
        FileNotFoundError: if a shard spec matches nothing.
        FileError: if a shard and its index differ, or no shard holds a sample.
        SettingError: if ranks find different shards.
    """
    shards = _agreed(given, ranks)
    sources = [Source(name, tuple(found), (), given[name].weight) for name, found in shards.items()]
    everything = list(dict.fromkeys(shard for source in sources for shard in source.shards))
    if any(map(reads_forwards_only, everything)) or (resample and not remote.cache and _lack_index(sources, remote)):
        return sources, []
    together = ranks > 1 and dist.is_available() and dist.is_initialized()
    processes = max((os.cpu_count() or 1) // (ranks if together else 1), 1)
    found = _shared(lambda mine: sizes(mine, remote, processes), everything, rank, ranks, together)
    broken = {shard: problem for shard, (_, problem) in found.items() if problem}
    for problem in broken.values():
        logger.warning("shard broken: %s", problem)
    if not any(count for count, _ in found.values()):
        raise FileError(
            f"none of {len(everything)} training shards holds a sample, the first: "
            f"{next(iter(broken.values()), everything[0])}", everything[0],
        )  # fmt: skip
    notes = []
    for i, source in enumerate(sources):
        sources[i] = replace(source, counts=tuple(found[shard][0] for shard in source.shards))
        if source.weight is not None and not sum(sources[i].counts):
            raise FileError(f"source {source.name!r} holds no sample: remove it from data.train", source.shards[0])
        lost = [shard for shard in source.shards if shard in broken]
        notes += [Skip(f"shard broken: {broken[shard]}", source.name, shard, shard, 0) for shard in lost]
    return sources, notes


def _lack_index(sources: list[Source], remote: Remote) -> bool:
    """Whether the first remote shard of some source has no index."""
    first = [next((shard for shard in source.shards if is_remote(shard)), None) for source in sources]
    found = read_ranges([(shard + SUFFIX, 0, 1) for shard in first if shard], remote)
    return any(isinstance(each, LastingError) for each in found)


def _agreed(given: dict[str, Shards], ranks: int) -> dict[str, list[str]]:
    """The shards of each source, the same on all ranks: a rank that stops alone would leave the others waiting."""
    shards: dict[str, list[str]] = {}
    failed: Exception | None = None
    try:
        for name, source in given.items():
            with errors_name(f"source {name!r} of data.train" if name else ""):
                shards[name] = expand(source.shards)
    except (ValueError, OSError) as error:
        failed = error
    if ranks > 1 and dist.is_available() and dist.is_initialized():
        said: list[Any] = [None] * ranks
        names = {name: sorted(map(file_name, found)) for name, found in shards.items()}
        digest = hashlib.sha256(repr(names).encode(errors="surrogateescape")).hexdigest()[:8]
        number = sum(map(len, shards.values()))
        dist.all_gather_object(said, f"stopped ({failed})" if failed else f"found {number} shards (names {digest})")
        if len(set(said)) > 1 and any(what.startswith("found") for what in said):
            listed = ", ".join(f"rank {said.index(what)} {what}" for what in dict.fromkeys(said))
            raise SettingError(
                f"the ranks do not find the same shards: {listed}. All ranks must read the same files: copy to each "
                "machine what it lacks, remove what the others do not have, or use a folder that all of them see",
                "data.train",
            ) from failed  # fmt: skip
    if failed:
        raise failed
    return shards


def _shared(
    work: Callable[[list[str]], dict[str, Value]], shards: Sequence[str], rank: int, ranks: int, together: bool
) -> dict[str, Value]:
    """Work on shards, each done by one rank. A failure reaches all: ranks that wait for another would hang."""
    try:
        mine: Any = list(work(list(shards[rank::ranks] if together else shards)).values())
    except (ValueError, OSError) as error:
        mine = error
    parts: list[Any] = [mine]
    if together:
        parts = [None] * ranks
        dist.all_gather_object(parts, mine)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    # by place and not by path: a folder may be called otherwise on another machine
    return {shard: parts[i % len(parts)][i // len(parts)] for i, shard in enumerate(shards)}


def file_name(shard: str) -> str:
    """A shard's name without folder, host and signature; a command is its own name."""
    if shard.startswith("pipe:"):
        return shard
    return PurePosixPath(urlsplit(shard).path if is_remote(shard) else shard).name

"""What there is to train on: the sources of a mixture, their shards, and how many samples these hold."""

import hashlib
import itertools
import logging
from typing import Any

import torch.distributed as dist

from datamodules.plan import Source, file_name
from datamodules.tally import Skip
from stair.data.counts import Size, sizes, spread, told
from stair.data.remote import Remote, open_directly
from stair.data.specs import Shards
from stair.data.tars import expand
from stair.errors import errors_name

logger = logging.getLogger(__name__)

_NEAR = 0.03  # a number within this share of the truth moves hardly a sample


def find(
    given: dict[str, Shards], samples: int | None, resample: bool, remote: Remote, rank: int, ranks: int
) -> tuple[list[Source], list[Skip]]:
    """Finds the shards of all sources and how many samples they hold.

    Args:
        given: sources by name.
        samples: pairs in all shards together, where the user said so; of an epoch, if shards are resampled.
        resample: whether shards are drawn with replacement, which needs no sizes.
        remote: how to go about shards that are not local.
        rank: this process, from 0.
        ranks: processes in all, which share the counting.

    Returns:
        The sources, and the shards that hold no sample, which nobody will read.

    Raises:
        FileNotFoundError: if a shard spec matches nothing.
        ValueError: if sizes are wanted and cannot be had, no shard holds a sample, or ranks find other shards.
    """
    shards = _expanded(given, ranks)
    if rank == 0 and not resample:
        _doubt(given, shards, samples)
    if samples is not None and not resample:
        said = _shared_out(given, shards, samples)
        return [
            Source(name, tuple(found), tuple(said[name]), False, given[name].weight) for name, found in shards.items()
        ], []
    asked = [shard for name, found in shards.items() if given[name].samples is None for shard in found]
    sizes_by_shard = _sizes(asked, remote, rank, ranks)
    wrong = [size.wrong for size in sizes_by_shard.values() if size.wrong]
    if asked and len(wrong) == len(sizes_by_shard) and not any(size.samples for size in sizes_by_shard.values()):
        raise ValueError(f"none of {len(asked)} training shards holds a sample, the first: {wrong[0]}")
    for reason in wrong:
        logger.warning("shard broken: %s", reason)
    sources = [_source(name, given[name], found, sizes_by_shard) for name, found in shards.items()]
    unsized = [shard for shard, size in sizes_by_shard.items() if size.samples is None]
    if samples is None and unsized:
        _touch(unsized[0], remote)
        raise ValueError(
            f"{len(unsized)} of {len(sizes_by_shard)} shards are not local and in no index.json beside them, the first is "
            f"{unsized[0]!r}: only reading them all would count them. Give train_samples, the number of pairs in all "
            "training shards (or of an epoch, with resample=true), or put an index there that lists them"
        )
    lost = [
        (source.name, shard) for source in sources for shard in source.shards if _holds_nothing(sizes_by_shard, shard)
    ]
    return sources, [
        Skip(f"shard broken: {sizes_by_shard[shard].wrong}", name, shard, shard, 0) for name, shard in lost
    ]


def _shared_out(given: dict[str, Shards], shards: dict[str, list[str]], samples: int) -> dict[str, list[int]]:
    """What each shard is taken to hold: a source's own number is spread over its shards, what is left over the others'."""
    own = {name: source.samples for name, source in given.items() if source.samples is not None}
    rest, named = samples - sum(own.values()), ", ".join(f"{name} {number}" for name, number in own.items())
    others = [shard for name, found in shards.items() if name not in own for shard in found]
    if rest < 1 if others else rest:
        wanted = (
            f"more than {sum(own.values())}, as sources without `samples` hold pairs too"
            if others
            else f"{sum(own.values())}, their sum, or none"
        )
        raise ValueError(
            f"train_samples={samples} contradicts the `samples` of the sources ({named}): wanted {wanted}. It is the "
            "number of pairs in all training shards together; for shorter epochs set data.resample: true"
        )
    left = iter(spread(rest, len(others)) if others else [])
    return {
        name: spread(own[name], len(found)) if name in own else list(itertools.islice(left, len(found)))
        for name, found in shards.items()
    }


def _doubt(given: dict[str, Shards], shards: dict[str, list[str]], samples: int | None) -> None:
    """Warns of numbers that files beside the shards contradict: nobody would notice what is never read."""
    stated = [(f"samples of source {name!r}", source.samples, shards[name]) for name, source in given.items()]
    for what, number, there in [
        *stated,
        ("train_samples", samples, [shard for found in shards.values() for shard in found]),
    ]:
        if number is None:
            continue
        known = [count for count in told(there) if count is not None]
        found, whole = sum(known), len(known) == len(there)
        if found > number * (1 + _NEAR):
            follows = "what is further back in each shard would hardly be seen, in any epoch"
        elif whole and found < number * (1 - _NEAR):
            follows = "readers whose places are past a shard's end would repeat others"
        else:
            continue
        logger.warning(
            "%s=%d, but index.json or _stats.json beside the shards say %s%d: %s. Give the number they hold, or none where "
            "all are said; for shorter epochs set data.resample: true",
            what, number, "" if whole else "at least ", found, follows,
        )  # fmt: skip


def _touch(shard: str, remote: Remote) -> None:
    """Tells a shard whose size is not known from one that is not there.

    Raises:
        OSError: if not a byte of it can be read.
    """
    with open_directly(shard, remote) as file:
        file.read(1)


def _holds_nothing(found: dict[str, Size], shard: str) -> bool:
    return shard in found and bool(found[shard].wrong) and not found[shard].samples


def _source(name: str, given: Shards, shards: list[str], found: dict[str, Size]) -> Source:
    if given.samples is not None:
        return Source(name, tuple(shards), tuple(spread(given.samples, len(shards))), False, given.weight)
    counts = [found[shard].samples for shard in shards]
    whole = tuple(count for count in counts if count is not None)
    return Source(name, tuple(shards), whole if len(whole) == len(counts) else (), True, given.weight)


def _together(ranks: int) -> bool:
    return ranks > 1 and dist.is_available() and dist.is_initialized()


def _expanded(given: dict[str, Shards], ranks: int) -> dict[str, list[str]]:
    """The shards of each source, the same on all ranks. Each hears of the others: one that stops alone would leave them
    waiting, and ranks with other files would follow other plans."""
    shards: dict[str, list[str]] = {}
    failed: Exception | None = None
    try:
        for name, source in given.items():
            with errors_name(f"source {name!r} of data.train" if name else ""):
                shards[name] = expand(source.shards)
    except (ValueError, OSError) as error:
        failed = error
    if _together(ranks):
        found: list[Any] = [None] * ranks
        dist.all_gather_object(found, str(failed) if failed else {name: _mark(part) for name, part in shards.items()})
        if any(part != found[0] for part in found) and not all(isinstance(part, str) for part in found):
            raise ValueError(
                f"the ranks do not find the same shards: {_differences(found)}. All ranks must read the "
                "same files: copy to each machine what it lacks, remove what the others do not have, or put the shards "
                "where all of them see them"
            ) from failed
    if failed:
        raise failed
    return shards


def _mark(shards: list[str]) -> tuple[int, str]:
    """Number of shards and what tells their names from others; folders may differ between machines."""
    names = "\0".join(map(file_name, shards)).encode(errors="surrogateescape")
    return len(shards), hashlib.sha256(names).hexdigest()[:8]


def _differences(found: list[Any]) -> str:
    """Who finds what, ranks that find the same together."""
    failed = {rank: part for rank, part in enumerate(found) if isinstance(part, str)}
    others = {rank: part for rank, part in enumerate(found) if rank not in failed}
    said = [f"{_ranks(ranks)} stopped ({reason})" for reason, ranks in _grouped(failed)]
    for name in next(iter(others.values())):
        groups = _grouped({rank: part[name] for rank, part in others.items()})
        if len(groups) > 1 or failed:
            whose = f" of source {name!r}" if name else ""
            said += [
                f"{_ranks(ranks)} found {count} shards{whose} (names {digest})" for (count, digest), ranks in groups
            ]
    return ", ".join(said)


def _grouped(by_rank: dict[int, Any]) -> list[tuple[Any, list[int]]]:
    groups: dict[Any, list[int]] = {}
    for rank, what in by_rank.items():
        groups.setdefault(what, []).append(rank)
    return list(groups.items())


def _ranks(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {listed}" if len(ranks) == 1 else f"ranks {listed}"


def _sizes(shards: list[str], remote: Remote, rank: int, ranks: int) -> dict[str, Size]:
    """Sizes of shards, each found out by one rank. A failure is told to all: ranks that wait for another would hang."""
    together = _together(ranks)
    mine = shards[rank::ranks] if together else shards
    parts: list[Any] = [None]
    try:
        parts[0] = sizes(mine, remote)
    except (ValueError, OSError) as error:
        parts[0] = error
    if together:
        mine_found, parts = parts[0], [None] * ranks
        dist.all_gather_object(parts, mine_found)
    for part in parts:
        if isinstance(part, Exception):
            raise part
    # by place and not by path: a folder may be called otherwise on another machine
    return {shard: parts[i % len(parts)][i // len(parts)] for i, shard in enumerate(shards)}

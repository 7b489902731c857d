"""Samples that were skipped or converted: counted by cause, source and shard, and the limit on their share."""

from collections import Counter
from typing import NamedTuple

CONVERTED = "converted "  # how causes begin that skip nothing


class Skip(NamedTuple):
    """A sample that was skipped, or a warning about one that was not."""

    reason: str  # begins with its cause and a colon
    source: str
    shard: str  # path or URL
    place: str  # key and shard, for messages
    samples: int  # how many were skipped; 0 for a warning

    @property
    def cause(self) -> str:
        """What it is counted under."""
        return self.reason.partition(":")[0]


class SkipCounter:
    """Samples that a rank has read, skipped and converted.

    Args:
        limit: greatest share of skipped samples.
        enough: samples to read before the limit counts.
    """

    def __init__(self, limit: float, enough: int) -> None:
        self.limit, self.enough, self.seen = limit, enough, 0
        self.skipped: Counter[tuple[str, str, str]] = Counter()  # by cause, source and shard
        self.warnings: Counter[tuple[str, str, str]] = Counter()

    def add(self, seen: int, skips: list[Skip]) -> None:
        """Counts what a batch reports.

        Raises:
            RuntimeError: if too many samples were skipped; names causes and the worst shards.
        """
        self.seen += seen
        for skip in skips:
            counts = self.skipped if skip.samples else self.warnings
            counts[skip.cause, skip.source, skip.shard] += max(skip.samples, 1)
        total = self.skipped.total()
        if self.seen < self.enough or total <= self.limit * self.seen:
            return
        causes, shards = Counter[str](), Counter[str]()
        for (cause, _, shard), count in self.skipped.items():
            causes[cause] += count
            shards[shard] += count
        worst = ", ".join(f"{shard} with {count}" for shard, count in shards.most_common(3))
        raise RuntimeError(
            f"{total} of {self.seen} samples are bad, more than max_bad_share={self.limit}: {dict(causes)}; "
            f"worst shards: {worst}. Repair the shards or raise max_bad_share"
        )

    def by_cause(self, converted: bool = False) -> dict[str, int]:
        """Skipped samples and warnings, or converted images, by cause, and by `source/cause` if sources have names."""
        counts = Counter[str]()
        for (cause, source, _), count in (self.skipped + self.warnings).items():
            if cause.startswith(CONVERTED) == converted:
                name = cause.removeprefix(CONVERTED)
                counts[name] += count
                if source:
                    counts[f"{source}/{name}"] += count
        return dict(counts)

    def by_source(self, converted: bool = False) -> dict[str, int]:
        """Skipped samples, or converted images, by source."""
        counts = Counter[str]()
        for (cause, source, _), count in (self.warnings if converted else self.skipped).items():
            if cause.startswith(CONVERTED) == converted:
                counts[source] += count
        return dict(counts)

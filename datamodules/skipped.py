"""Samples that were skipped or converted: counted by cause, source and shard, and the limit on their share."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ENOUGH = 200  # among fewer samples the share of bad ones is too rough to stop a run for
_NAMED = 3  # worst shards in the message
CONVERTED = "converted "  # how causes begin that skip nothing
CAUSE, SOURCE, SHARD = range(3)  # what is counted by


class Skip(NamedTuple):
    """A sample that was skipped, or a warning about one that was not.

    Attributes:
        reason: begins with its cause and a colon.
        source: name of the source.
        shard: path or URL.
        place: key and shard, for messages.
        samples: how many were skipped; 0 for a warning.
    """

    reason: str
    source: str
    shard: str
    place: str
    samples: int

    @property
    def cause(self) -> str:
        """What it is counted under."""
        return self.reason.partition(":")[0]


@dataclass
class SkipCounter:
    """Samples that a rank has read and skipped.

    Attributes:
        limit: greatest share of skipped samples.
        enough: samples to read before the limit counts.
        seen: samples read.
        skipped: samples by cause, source and shard.
        warnings: notes by the same.
    """

    limit: float
    enough: int = ENOUGH
    seen: int = 0
    skipped: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    warnings: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, seen: int, skips: list[Skip]) -> None:
        """Counts what a batch reports.

        Raises:
            RuntimeError: if too many samples were skipped; names causes and the worst shards.
        """
        self.seen += seen
        for skip in skips:
            where = skip.cause, skip.source, skip.shard
            self.skipped[where] += skip.samples
            self.warnings[where] += not skip.samples
        total = self.skipped.total()
        if self.seen < self.enough or total <= self.limit * self.seen:
            return
        shards = _summed(self.skipped, SHARD).most_common(_NAMED)
        worst = ", ".join(f"{shard} with {count}" for shard, count in shards)
        raise RuntimeError(
            f"{total} of {self.seen} samples are bad, more than max_bad_share={self.limit}: "
            f"{dict(_summed(self.skipped, CAUSE))}; worst shard{'s' * (len(shards) > 1)} {worst}. "
            "Repair the shards or raise max_bad_share"
        )

    def by_cause(self, *places: int) -> Counter[str]:
        """Skipped samples and warnings, summed by some of `CAUSE`, `SOURCE`, `SHARD`, as `a/b`."""
        both = self.skipped + self.warnings
        return _summed({where: count for where, count in both.items() if not where[0].startswith(CONVERTED)}, *places)

    def conversions(self, *places: int) -> Counter[str]:
        """Images that were converted, as `by_cause`; the kind stands for the cause. An image of two kinds counts twice."""
        kinds = {
            (cause.removeprefix(CONVERTED), source, shard): count
            for (cause, source, shard), count in self.warnings.items()
            if cause.startswith(CONVERTED)
        }
        return _summed(kinds, *places)

    def by_source(self) -> Counter[str]:
        """Skipped samples by source."""
        return _summed(self.skipped, SOURCE)


def _summed(counts: Mapping[tuple[str, str, str], int], *places: int) -> Counter[str]:
    sums: Counter[str] = Counter()
    for where, count in counts.items():
        if count:
            sums["/".join(where[place] for place in places)] += count
    return sums

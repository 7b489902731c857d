"""What was read and what was left out: counted by cause, source and shard, in workers and over them, and judged."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

# the share of bad samples among fewer than these is too rough to stop a run for
ENOUGH = 200
_NAMED = 3  # worst shards in the message
CONVERTED = "converted "  # how causes begin that leave nothing out
CAUSE, SOURCE, SHARD = range(3)  # places of what is counted by


class Skip(NamedTuple):
    """Samples that were left out (or, with `samples` of 0, something odd that was not).

    Attributes:
        reason: begins with its cause and a colon.
        source: name of the source.
        shard: where.
        place: key and shard, for messages.
        samples: how many.
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


# from a worker since its last report: samples seen, and what happened to some of them
Report = tuple[int, list[Skip]]


@dataclass
class Tally:
    """Samples seen and skipped: by a worker, and over all workers of a rank.

    Attributes:
        limit: greatest share of bad samples.
        enough: samples to see before the limit counts.
        bad: samples left out by cause, source and shard.
        odd: what was met and is no reason to leave a sample out, by the same.
    """

    limit: float
    enough: int = ENOUGH
    seen: int = 0
    bad: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    odd: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _news: list[Skip] = field(default_factory=list)
    _told: int = 0

    def note(self, skip: Skip) -> None:
        """Counts samples that are left out, which must be among those seen, or an oddity."""
        self._news.append(skip)
        self._count(skip)

    def _count(self, skip: Skip) -> None:
        where = skip.cause, skip.source, skip.shard
        if skip.samples:
            self.bad[where] += skip.samples
        else:
            self.odd[where] += 1

    def report(self) -> Report:
        """What was seen and skipped since the last report."""
        seen, self._told = self.seen - self._told, self.seen
        news, self._news = self._news, []
        return seen, news

    def add(self, report: Report) -> None:
        """Takes in what a worker reports."""
        self.seen += report[0]
        for skip in report[1]:
            self._count(skip)

    def by_cause(self, *places: int) -> Counter[str]:
        """Bad samples of all shards, and what is ignored, summed by some of `CAUSE`, `SOURCE`, `SHARD`, as `a/b`."""
        counts = {where: count for where, count in (self.bad + self.odd).items() if not where[0].startswith(CONVERTED)}
        return self._summed(counts, *places)

    def conversions(self, *places: int) -> Counter[str]:
        """As `by_cause`, images that were converted, whose cause is its kind; one of two kinds is counted with each."""
        found = [(*where, count) for where, count in self.odd.items() if where[0].startswith(CONVERTED)]
        kinds = {(cause.removeprefix(CONVERTED), source, shard): count for cause, source, shard, count in found}
        return self._summed(kinds, *places)

    def by_source(self) -> Counter[str]:
        """Bad samples by source."""
        return self._summed(self.bad, SOURCE)

    @staticmethod
    def _summed(counts: Mapping[tuple[str, str, str], int], *places: int) -> Counter[str]:
        sums: Counter[str] = Counter()
        for where, count in counts.items():
            sums["/".join(where[place] for place in places)] += count
        return sums

    def judge(self) -> None:
        """Stops the run if the data are too bad.

        Raises:
            RuntimeError: naming the worst shards and the causes.
        """
        total = self.bad.total()
        if self.seen < self.enough or total <= self.limit * self.seen:
            return
        shards = self._summed(self.bad, SHARD).most_common(_NAMED)
        worst = ", ".join(f"{shard} with {count}" for shard, count in shards)
        raise RuntimeError(
            f"{total} of {self.seen} samples are bad, more than max_bad_share={self.limit}: "
            f"{dict(self._summed(self.bad, CAUSE))}; worst shard{'s' * (len(shards) > 1)} {worst}. "
            "Repair the shards or raise max_bad_share"
        )

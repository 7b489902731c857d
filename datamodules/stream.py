"""The training stream: which pair is seen when, as a function of (seed, epoch, rank, worker) and of nothing else.

`plan.py` gives each worker its part of an epoch. A batch takes the next b samples of that part, shuffled, bad ones
too; a bad one is replaced by one that is due in a later batch, which will then be seen twice. Batch j therefore always
begins at sample j·b, and a run is resumed by counting: no decoding, nothing to save but epoch and number of batches.
"""

import itertools
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from datamodules.pairs import CollatePairs, Pair
from datamodules.plan import Piece, Plan, seeded
from datamodules.tars import captions, image_bytes, stream
from datamodules.workers import begin
from stair.batch import Batch
from stair.images import box_pixels, decode_image, eval_pixels

logger = logging.getLogger(__name__)

# the share of bad samples among fewer than these is too rough to stop a run for
_ENOUGH = 200

# of bad samples: cause, shard, place, reason, how many there are
Skip = tuple[str, str, str, str, int]
# from a worker since its last report: samples seen, and which of them were bad
Report = tuple[int, list[Skip]]


@dataclass(frozen=True)
class Augment:
    """Random resized crop and flip, drawn from a generator of its own (torchvision's draw from the global one).

    Attributes:
        size: side S of the square, in pixels.
        scale: least and greatest share of the area that is kept; (1, 1) is the crop of evaluation.
        flip: mirror half of the images.
    """

    size: int
    scale: tuple[float, float]
    flip: bool

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """(3, S, S) uint8."""
        if self.scale[0] == 1:
            pixels = eval_pixels(image, self.size)
        else:
            pixels = box_pixels(image, _random_box(*image.size, self.scale, rng), self.size)
        return pixels.flip(-1) if self.flip and rng.random() < 0.5 else pixels


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: random.Random
) -> tuple[float, float, float, float]:
    """RandomResizedCrop: area uniform in `scale`, aspect ratio log-uniform in 3/4 to 4/3, ten tries to fit it."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


@dataclass
class Tally:
    """Samples seen and skipped: by a worker, and over all workers of a rank.

    Attributes:
        limit: greatest share of bad samples.
        enough: samples to see before the limit counts.
    """

    limit: float
    enough: int
    seen: int = 0
    bad: Counter[tuple[str, str]] = field(default_factory=Counter)
    news: list[Skip] = field(default_factory=list)
    told: int = 0

    def skip(self, shard: str, place: str, reason: str, samples: int = 1) -> None:
        """Counts bad samples among those seen; `reason` begins with its cause and a colon."""
        cause = reason.partition(":")[0]
        self.bad[cause, shard] += samples
        self.news.append((cause, shard, place, reason, samples))

    def report(self) -> Report:
        """What was seen and skipped since the last report."""
        seen, self.told = self.seen - self.told, self.seen
        news, self.news = self.news, []
        return seen, news

    def add(self, report: Report) -> None:
        """Takes in what a worker reports."""
        seen, news = report
        self.seen += seen
        for cause, shard, _, _, samples in news:
            self.bad[cause, shard] += samples

    def by_cause(self) -> Counter[str]:
        """Bad samples of all shards."""
        causes: Counter[str] = Counter()
        for (cause, _), count in self.bad.items():
            causes[cause] += count
        return causes

    def judge(self) -> None:
        """Stops the run if the data are too bad.

        Raises:
            RuntimeError: naming the worst shard and the causes.
        """
        total = self.bad.total()
        if self.seen < self.enough or total <= self.limit * self.seen:
            return
        shards: Counter[str] = Counter()
        for (_, shard), count in self.bad.items():
            shards[shard] += count
        worst, count = shards.most_common(1)[0]
        raise RuntimeError(
            f"{total} of {self.seen} samples are bad, more than max_bad_share={self.limit}: {dict(self.by_cause())}; "
            f"worst shard {worst} with {count}. Repair the shards or raise max_bad_share"
        )


@dataclass(eq=False)
class ShardStream(IterableDataset[tuple[Batch, Report]]):
    """What a worker runs: its batches of one epoch, each with a report of what was skipped.

    Attributes:
        plan: who sees what.
        rank: this process, from 0.
        augment: makes pixels of an image.
        collate: makes a batch of pairs.
        buffer: samples, as they lie in the tar, that are shuffled among each other.
        max_pixels: largest width × height that is decoded.
        max_bad_share: greatest share of bad samples.
        epoch: the epoch to make; to be set before workers start.
        handed: batches of that epoch to leave out; to be set before workers start.
    """

    plan: Plan
    rank: int
    augment: Augment
    collate: CollatePairs
    buffer: int
    max_pixels: int
    max_bad_share: float
    epoch: int = 0
    handed: int = 0

    def __iter__(self) -> Iterator[tuple[Batch, Report]]:
        info = get_worker_info()
        # the loader always asks its first process first, which after a resume must be the one whose turn it is
        worker = ((info.id if info else 0) + self.handed) % self.plan.workers
        turns = self.plan.turns(worker)
        if not turns:
            return
        part = self.plan.part(self.epoch, self.rank, worker)
        # alone, a worker judges only by a good number: its part may be small, and one bad sample a great share of it
        tally = Tally(self.max_bad_share, _ENOUGH)
        done = sum(turn < self.handed for turn in turns)
        drawn = itertools.islice(self._drawn(part, worker, tally), done * self.plan.batch_size, None)
        for pairs in self._filled(drawn, len(turns) - done, tally):
            yield self.collate(pairs), tally.report()

    def _filled(self, drawn: Iterator[dict[str, Any]], batches: int, tally: Tally) -> Iterator[list[Pair]]:
        ahead: deque[Pair | None] = deque()  # read before their turn; None is a bad one
        for _ in range(batches):
            due = [ahead.popleft() if ahead else self._read(next(drawn), tally) for _ in range(self.plan.batch_size)]
            pairs = [pair for pair in due if pair]
            for i in itertools.count():
                if len(pairs) == self.plan.batch_size:
                    break
                if i == len(ahead):
                    ahead.append(self._read(next(drawn), tally))
                if ahead[i]:
                    pairs.append(ahead[i])
            yield [Pair(pair.pixels, pair.captions, row, pair.key) for row, pair in enumerate(pairs)]

    def _drawn(self, part: list[Piece], worker: int, tally: Tally) -> Iterator[dict[str, Any]]:
        """The samples of a part, shuffled, over and over: bad files can leave fewer than the plan asks for."""
        for lap in itertools.count():
            rng = seeded(self.plan.seed, self.epoch, self.rank, worker, lap)
            rng.shuffle(part)
            samples = (sample for piece in part for sample in self._stream(piece, tally))
            empty = True
            for sample in shuffle(self.buffer, initial=self.buffer, rng=rng)(samples):
                empty = False
                yield sample
            if empty:
                names = [self.plan.shards[piece.shard] for piece in part]
                raise RuntimeError(
                    f"no sample could be read from {names[:3]} (of {len(names)}): {tally.news[:3]}; "
                    "check the files, and train_samples if it was given"
                )

    def _stream(self, piece: Piece, tally: Tally) -> Iterator[dict[str, Any]]:
        shard, errors, read = self.plan.shards[piece.shard], [], 0
        with closing(stream(shard, lambda error: errors.append(error) or True)) as samples:
            for sample in itertools.islice(samples, piece.start, piece.stop):
                read += 1
                yield {**sample, "__url__": shard}
        if errors:
            lost = max(piece.length - read, 1)
            tally.seen += lost
            tally.skip(shard, shard, f"shard broken: {errors[0]}", lost)
            tally.judge()

    def _read(self, sample: dict[str, Any], tally: Tally) -> Pair | None:
        tally.seen += 1
        try:
            return self._pair(sample)
        except ValueError as error:
            shard = sample["__url__"]
            tally.skip(shard, f"{sample['__key__']!r} in {shard}", str(error))
            return None
        finally:
            tally.judge()

    def _pair(self, sample: dict[str, Any]) -> Pair:
        texts = [text for text in captions(sample) if text]
        image = decode_image(image_bytes(sample), self.max_pixels)
        key = f"{Path(sample['__url__']).name.removesuffix('.tar')}/{sample['__key__']}"
        rng = seeded(self.plan.seed, self.epoch, key)
        return Pair(self.augment(image, rng), [rng.choice(texts)], 0, key)


def _as_is(made: tuple[Batch, Report]) -> tuple[Batch, Report]:
    return made


class ShardLoader:
    """Hands out the batches of one rank, epoch after epoch, and knows where it stands.

    The state is what has been handed out, not what workers have read ahead. Lightning finds `state_dict` and
    `load_state_dict` and stores the state in its checkpoints; the next iteration goes on where the state was taken.

    Args:
        stream: what the workers run.
        processes: reading processes; 0 reads in this one.
        epoch_batches: batches after which an epoch counts as complete, where a trainer stops earlier than `len`.
    """

    def __init__(self, stream: ShardStream, processes: int, epoch_batches: int) -> None:
        self.stream, self.epoch_batches = stream, epoch_batches
        self.epoch = self.handed = 0
        self._tally = Tally(stream.max_bad_share, min(_ENOUGH, epoch_batches * stream.plan.batch_size))
        self._moved = False
        self._loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=processes,
            collate_fn=_as_is,
            worker_init_fn=begin,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # the default one would draw from the global state
        )
        self._iterator: Iterator[Any] | None = None  # the name by which Lightning finds workers to shut down

    def __len__(self) -> int:
        return self.stream.plan.steps

    def __iter__(self) -> Iterator[Batch]:
        if self._moved:
            self.set_epoch(self.epoch + 1)
        self._iterator = None
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        self.stream.epoch, self.stream.handed = self.epoch, self.handed
        self._iterator = iter(self._loader)
        before = self.skipped
        for batch, report in self._iterator:
            self.handed += 1
            self._moved = True
            self._note(report)
            if self.handed == self.epoch_batches and (fresh := self.skipped - before):
                logger.warning("epoch %d: skipped %d samples: %s", self.epoch, fresh.total(), dict(fresh))
            yield batch

    def _note(self, report: Report) -> None:
        known = set(self.skipped)
        for cause, _, place, reason, _ in report[1]:
            if cause not in known:
                logger.warning("skipped %s: %s; more of this cause are only counted", place, reason)
                known.add(cause)
        self._tally.add(report)
        self._tally.judge()

    @property
    def skipped(self) -> Counter[str]:
        """Bad samples met so far on this rank, by cause."""
        return self._tally.by_cause()

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration begin this epoch, unless it is the one under way."""
        if epoch != self.epoch:
            self.epoch, self.handed, self._moved = epoch, 0, False

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches handed out in it (plain numbers), and what they mean something under."""
        complete = self.handed >= self.epoch_batches
        position = {"epoch": self.epoch + complete, "batches": 0 if complete else self.handed}
        return {**position, "fingerprint": self.stream.plan.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration go on where the state was taken.

        Raises:
            ValueError: if it was taken on other shards or under another split.
        """
        here, there = self.stream.plan.fingerprint(), state["fingerprint"]
        if here != there:
            differ = {name: (there.get(name), value) for name, value in here.items() if there.get(name) != value}
            raise ValueError(
                f"the checkpoint's place in the data cannot be found again: (checkpoint, this run) differ in {differ}; "
                "resume with the checkpoint's values, or start a new run from its weights"
            )
        self.epoch, self.handed, self._moved = state["epoch"], state["batches"], False

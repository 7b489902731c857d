"""What a few samples of a source are like, and what of it would stop, slow or mislead a run.

Used before every fit, on a few samples, and by `stair doctor`, on more.
"""

import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from stair.data.remote import Remote, is_remote
from stair.data.samples import CAPTION_TYPES, IMAGE_TYPES, caption_field, caption_lines, captions, image_type, types_of
from stair.data.tars import stream
from stair.images import MAX_PIXELS, decode_image, eval_pixels, image_format
from stair.vocabulary import Vocabulary

PROBED = 20  # samples of a source that are read before a fit
_PATIENCE = 20.0  # seconds, after which no further shard is tried
_TRIED = 3  # shards, before all samples of a source are taken to be bad
_CERTAIN = 200  # among fewer samples, a share of bad ones is too rough to stop for
_SIDE = re.compile(r"\b(left|right)(?:most|hand)?\b", re.IGNORECASE)

Severity = Literal["stops", "warns", "notes"]
Statement = tuple[Severity, str, str]  # severity, what, mend


class Diagnostic(NamedTuple):
    """A fact about a source that a user should know."""

    severity: Severity  # `stops` a run, `warns` of a worse or slower one, `notes` a fact
    source: str
    what: str
    mend: str  # the setting or the step that changes it


@dataclass(frozen=True)
class Requirements:
    """What a run requires of its data, by the names of the settings; without a vocabulary, captions are not measured."""

    vocabulary: Vocabulary | None
    max_tokens: int
    image_size: int
    max_pixels: int = MAX_PIXELS
    max_bad_share: float = 0.1
    flip: bool = False


@dataclass
class SampleStats:
    """What was read of a source."""

    samples: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # samples that training skips, by the first cause
    first: dict[str, str] = field(default_factory=dict)  # place and reason of the first sample of each cause
    members: list[str] = field(default_factory=list)  # names, of the first samples
    no_image: int = 0
    no_caption: int = 0
    formats: Counter[str] = field(default_factory=Counter)  # of images that decode, by content
    sides: list[tuple[int, int]] = field(default_factory=list)  # width and height of images, in pixels
    fields: Counter[str] = field(default_factory=Counter)  # samples by where their captions are
    texts: list[list[str]] = field(default_factory=list)  # captions, those of a sample together
    blank: int = 0  # samples with a blank caption among others
    tokens: list[int] = field(default_factory=list)  # length of each caption, [CLS] and [SEP] included
    unknown: float = 0.0  # share of tokens that the vocabulary does not have
    twins: int = 0  # samples whose image another sample has too, byte for byte
    decode_seconds: float = 0.0  # processor time of decoding and scaling all images


def first_samples(shard: str, count: int, remote: Remote) -> tuple[list[dict[str, Any]], str]:
    """The first samples of a shard, with the names of all members, and what broke it before there were so many."""
    errors: list[Exception] = []
    reader: Any = stream(shard, errors.append, select=None, remote=remote)
    with closing(reader) as samples:
        lines = caption_lines(shard)
        found = [{**sample, "__url__": shard, "__lines__": lines} for sample in itertools.islice(samples, count)]
    return found, str(errors[0]) if errors else ""


def inspect(samples: Iterable[dict[str, Any]], requirements: Requirements) -> SampleStats:
    """Reads and decodes samples as training does, and measures them."""
    stats, images = SampleStats(), Counter[bytes]()
    for sample in samples:
        stats.samples += 1
        causes: list[str] = []
        if len(stats.members) < 10:
            stats.members += [f"{sample['__key__']}.{kind}" for kind in types_of(sample)]
        with _noted(stats, sample, causes):
            if sample["__wrong__"]:
                raise ValueError(sample["__wrong__"])
        stats.no_caption += 1
        with _noted(stats, sample, causes):
            texts = captions(sample, sample["__lines__"])
            stats.no_caption -= 1
            stats.fields[caption_field(sample)] += 1
            stats.texts.append(list(filter(None, texts)))
            stats.blank += not all(texts)
        stats.no_image += 1
        with _noted(stats, sample, causes):
            kind = image_type(sample)
            stats.no_image -= 1
            _measure(stats, sample[kind], requirements)
            images[hashlib.sha256(sample[kind]).digest()] += 1
        stats.bad.update(causes[:1])
    stats.twins = sum(count for count in images.values() if count > 1)
    if requirements.vocabulary:
        _count_tokens(stats, requirements.vocabulary)
    return stats


@contextmanager
def _noted(stats: SampleStats, sample: dict[str, Any], causes: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        cause = str(error).partition(":")[0]
        causes.append(cause)
        stats.first.setdefault(cause, f"{sample['__key__']!r} in {sample['__url__']}: {str(error)[:200]}")


def _measure(stats: SampleStats, data: bytes, requirements: Requirements) -> None:
    start = time.thread_time()  # of a processor: the machine may be busy with other work
    image = decode_image(data, requirements.max_pixels)
    eval_pixels(image, requirements.image_size)
    stats.decode_seconds += time.thread_time() - start
    stats.sides.append(image.size)
    stats.formats[image_format(data) or "other"] += 1


def _count_tokens(stats: SampleStats, vocabulary: Vocabulary) -> None:
    texts, unknown = [text for group in stats.texts for text in group], 0
    for start in range(0, len(texts), 64):
        ids_BT, mask_BT = vocabulary.tokenize(texts[start : start + 64], 1_000_000)
        stats.tokens += mask_BT.sum(1).tolist()
        unknown += int((ids_BT == vocabulary.unknown_id).sum())
    stats.unknown = unknown / max(sum(stats.tokens) - 2 * len(texts), 1)


def probe(name: str, shards: Sequence[str], requirements: Requirements, remote: Remote) -> list[Diagnostic]:
    """The check before every fit: the first samples of the first shard that has any, or of a few if all those are bad."""
    seen: list[dict[str, Any]] = []
    reasons, tried, start = [], 0, time.monotonic()
    if is_remote(shards[0]):  # each may take as long as it takes to give up
        shards = list(dict.fromkeys([shards[0], shards[len(shards) // 2], shards[-1]]))
    for shard in shards:
        samples, reason = first_samples(shard, PROBED, remote)
        reasons.append(reason or f"{shard} is not a tar, or empty")
        if not samples and time.monotonic() - start > _PATIENCE:
            break
        if samples:
            seen, tried = seen + samples, tried + 1
            stats = inspect(seen, requirements)
            if stats.bad.total() < stats.samples or tried == _TRIED:
                break
    if seen:
        return diagnose(name, stats, requirements)
    return [unreadable(name, len(reasons), reasons[0])]


def unreadable(name: str, count: int, reason: str) -> Diagnostic:
    """The diagnostic of a source of which no sample could be read from `count` shards."""
    what = f"no sample could be read from {count} of its shards, the first: {reason}"
    return Diagnostic("stops", name, what, "check --data.train; `stair prepare` makes shards")


def diagnose(name: str, stats: SampleStats, requirements: Requirements) -> list[Diagnostic]:
    """What is wrong with at least one sample of a source."""
    statements = [
        *_samples(stats, requirements.max_bad_share),
        *_images(stats, requirements.image_size),
        *_tokens(stats, requirements.max_tokens),
        *_captions(stats, requirements.flip),
    ]
    return [Diagnostic(severity, name, what, mend) for severity, what, mend in statements]


def _samples(stats: SampleStats, max_bad_share: float) -> Iterator[Statement]:
    missing = [
        (wanted, stats.first.get("dotted key") or stats.first.get(cause) or next(iter(stats.first.values())))
        for lacking, wanted, cause in (
            (stats.no_image, IMAGE_TYPES, "no image"),
            (stats.no_caption, CAPTION_TYPES, "no caption"),
        )
        if lacking == stats.samples
    ]
    for wanted, reason in missing:
        yield (
            "stops",
            f"none of the first {stats.samples} samples has a usable member of {list(wanted)}: {reason}; members seen: "
            f"{stats.members}",
            "name members KEY.jpg with KEY.json or KEY.txt (those of a sample one after the other), or use `stair prepare`",
        )
    if (bad := stats.bad.total()) and not missing:
        causes = ", ".join(f"{count} {cause} (the first: {stats.first[cause]})" for cause, count in stats.bad.items())
        what = f"{bad} of {stats.samples} samples are bad: {causes}"
        if bad == stats.samples or (bad > max_bad_share * stats.samples and stats.samples >= _CERTAIN):
            yield "stops", what, "correct them, or raise --data.max_bad_share"
        else:
            yield "warns", what, "training skips and counts them, up to --data.max_bad_share; evaluation stops at them"


def _images(stats: SampleStats, image_size: int) -> Iterator[Statement]:
    if not stats.sides:
        return
    short = np.array([min(side) for side in stats.sides])
    median, small = float(np.median(short)), float((short < image_size).mean())
    if small > 0.5:
        yield (
            "warns",
            f"{small:.0%} of images have a short side below the model's {image_size} px (median {median:.0f}): they are "
            "enlarged, and cost what large ones cost",
            f"--model.init_args.stair.image.image_size {median:.0f} (rounded to the patch), or larger images",
        )
    if median > 4 * image_size:
        yield (
            "warns",
            f"the median image has a short side of {median:.0f} px, the model takes {image_size}: decoding costs more than "
            "training needs",
            f"`stair prepare ... --max_side {2 * image_size}`, or more --data.workers",
        )
    if stats.twins > 0.02 * stats.samples:
        yield (
            "warns",
            f"{stats.twins} of {stats.samples} samples have an image that another has too: each is a wrong answer to the "
            "other's caption",
            "write their captions into one sample, as `captions`",
        )


def _tokens(stats: SampleStats, max_tokens: int) -> Iterator[Statement]:
    if not stats.tokens:
        return
    cut, most = float((np.array(stats.tokens) > max_tokens).mean()), float(np.percentile(stats.tokens, 99))
    if cut > 0.02:
        yield (
            "warns",
            f"{cut:.1%} of captions are longer than {max_tokens} tokens and are cut; 99 % have at most {most:.0f}",
            f"--model.init_args.stair.text.max_tokens {int(np.ceil(most / 8) * 8)}, which is also data.max_tokens (BERT "
            "takes 512 at most)",
        )
    if stats.unknown > 0.05:
        yield (
            "warns",
            f"{stats.unknown:.1%} of tokens are not in the vocabulary: is this its language?",
            "--model.init_args.stair.vocabulary of the captions' language",
        )


def _captions(stats: SampleStats, flip: bool) -> Iterator[Statement]:
    common = Counter(text for texts in stats.texts for text in texts).most_common(1)
    most, often = common[0] if common else ("", 0)
    if stats.samples >= PROBED and often > max(0.05 * stats.samples, 2):
        yield (
            "warns",
            f"{often} of {stats.samples} samples have the caption {most[:80]!r}: a batch holds it several times, and each "
            "counts as a wrong answer to the others",
            "distinguish them by their captions, or evaluate by class (classnames.json)",
        )
    sided = sum(any(_SIDE.search(text) for text in texts) for texts in stats.texts)
    if flip and sided > max(0.02 * stats.samples, 2):
        what = f"{sided} of {stats.samples} samples speak of left or right, and data.flip mirrors"
        yield "warns", what, "--data.flip false"
    if stats.blank:
        what = f"{stats.blank} of {stats.samples} samples have a blank caption among others: evaluation stops at them"
        yield "warns", what, "remove the blank ones"

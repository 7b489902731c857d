"""What is wrong with samples of a source: read before every fit, a few of them, and by `stair doctor`, more."""

import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from stair.data import samples as fields
from stair.data.remote import Remote, is_remote
from stair.data.tars import read_samples
from stair.errors import FileError
from stair.images import MAX_PIXELS, decode_image, eval_pixels, image_format
from stair.vocabulary import Vocabulary

PROBED = 20  # samples of a source that are read before a fit
_PATIENCE = 20.0  # seconds, after which no further shard is tried
_TRIED = 3  # shards, before all samples of a source are taken to be bad
_CERTAIN = 200  # among fewer samples, a share of bad ones is too rough to stop for
_SIDE = re.compile(r"\b(left|right)(?:most|hand)?\b", re.IGNORECASE)

_TEXTS = yaml.safe_load(Path(__file__).with_name("diagnostics.yaml").read_text(encoding="utf-8"))

Values = tuple[str, dict[str, Any]]  # name in diagnostics.yaml, and the values of its text


class Diagnostic(NamedTuple):
    """A fact about a source that a user should know."""

    severity: str  # `stops` a run, `warns` of a worse or slower one, `notes` a fact
    source: str
    what: str
    mend: str  # the setting or the step that changes it
    name: str


def worded(source: str, findings: Iterable[Values]) -> list[Diagnostic]:
    """The findings of a source in words."""
    texts = [(name, {key: text.format(**values) for key, text in _TEXTS[name].items()}) for name, values in findings]
    return [Diagnostic(source=source, name=name, **text) for name, text in texts]


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
class SampleFacts:
    """A sample as training reads it."""

    place: str  # its key and shard
    members: list[str]  # names
    problems: list[str] = field(default_factory=list)  # reasons to skip it, each with its cause and a colon
    has_image: bool = False
    size: tuple[int, int] | None = None  # width and height of an image that decodes, in pixels
    format: str = ""  # of the image, by content
    digest: bytes = b""  # of the image's bytes
    seconds: float = 0.0  # processor time of decoding and scaling the image
    captions: list[str] = field(default_factory=list)
    caption_field: str = ""  # where the captions are
    lengths: list[int] = field(default_factory=list)  # tokens of each caption, [CLS] and [SEP] included
    unknown: int = 0  # tokens that the vocabulary does not have


def first_samples(shard: str, count: int, remote: Remote) -> tuple[list[fields.Grouped[bytes]], str]:
    """The first samples of a shard, with the names of all members, and what broke it before there were so many."""
    samples = list[fields.Grouped[bytes]]()
    try:
        samples.extend(itertools.islice(read_samples(shard, remote, everything=True), count))
    except FileError as error:
        return samples, str(error)
    return samples, ""


def inspect(shard: str, sample: fields.Grouped[bytes], needs: Requirements) -> SampleFacts:
    """Reads and decodes a sample of `first_samples` as training does."""
    names = [f"{sample.key}.{kind}" for kind in sample.members]
    facts = SampleFacts(f"{sample.key!r} in {shard}", names, sample.problems[:1])
    try:
        facts.captions = fields.captions(sample.members, fields.caption_lines(shard))
        facts.caption_field = fields.caption_field(sample.members)
    except ValueError as error:
        facts.problems.append(str(error))
    if vocabulary := needs.vocabulary:
        encoded = vocabulary.encode([text for text in facts.captions if text])
        facts.lengths = [len(ids) for ids in encoded]
        facts.unknown = sum(ids.count(vocabulary.unknown_id) for ids in encoded)
    try:
        data = fields.image_bytes(sample.members)
        facts.has_image, facts.digest = True, hashlib.sha256(data).digest()
        start = time.thread_time()  # of a processor: the machine may be busy with other work
        image = decode_image(data, needs.max_pixels)
        eval_pixels(image, needs.image_size)
        facts.seconds, facts.size = time.thread_time() - start, image.size
        facts.format = image_format(data) or "other"
    except ValueError as error:
        facts.problems.append(str(error))
    return facts


def probe(name: str, shards: Sequence[str], requirements: Requirements, remote: Remote) -> list[Diagnostic]:
    """The check before every fit: the first samples of the first shard that has any, or of a few if all those are bad."""
    facts, reasons, tried, start = list[SampleFacts](), list[str](), 0, time.monotonic()
    if is_remote(shards[0]):  # each may take as long as it takes to give up
        shards = list(dict.fromkeys([shards[0], shards[len(shards) // 2], shards[-1]]))
    for shard in shards:
        samples, reason = first_samples(shard, PROBED, remote)
        reasons.append(reason or f"{shard} is not a tar, or empty")
        facts += [inspect(shard, sample, requirements) for sample in samples]
        tried += bool(samples)
        if not all(one.problems for one in facts) or tried == _TRIED:
            break
        if not samples and time.monotonic() - start > _PATIENCE:
            break
    return diagnose(name, facts, requirements, reasons)


def causes_of(samples: Iterable[SampleFacts]) -> Counter[str]:
    """Samples that training skips, by the first cause."""
    return Counter(sample.problems[0].partition(":")[0] for sample in samples if sample.problems)


def diagnose(
    source: str, samples: Sequence[SampleFacts], requirements: Requirements, reasons: Sequence[str]
) -> list[Diagnostic]:
    """What is wrong with the samples of a source; `reasons` say of each shard why no more were read."""
    if not samples:
        return worded(source, [("no samples", {"count": len(reasons), "reason": reasons[0]})])
    findings = [*_bad(samples, requirements), *_images(samples, requirements), *_captions(samples, requirements)]
    return worded(source, [(name, {"total": len(samples), **values}) for name, values in findings])


def _bad(samples: Sequence[SampleFacts], requirements: Requirements) -> Iterator[Values]:
    total, causes, first = len(samples), causes_of(samples), dict[str, str]()  # the first of each cause
    for sample in samples:
        for problem in sample.problems:
            first.setdefault(problem.partition(":")[0], f"{sample.place}: {problem[:200]}")
    missing: dict[str, list[str]] = {}
    if not any(sample.has_image for sample in samples):
        missing["no image"] = [*fields.IMAGE_TYPES]
    if not any(sample.captions for sample in samples):
        missing["no caption"] = [*fields.CAPTION_TYPES]
    for cause, expected in missing.items():
        reason = first.get("dotted key") or first.get(cause) or next(iter(first.values()))
        members = [name for sample in samples for name in sample.members][:10]
        yield "no usable member", {"expected": expected, "reason": reason, "members": members}
    if (bad := causes.total()) and not missing:
        listed = ", ".join(f"{count} {cause} (the first: {first[cause]})" for cause, count in causes.items())
        stops = bad == total or (bad > requirements.max_bad_share * total and total >= _CERTAIN)
        yield "many bad samples" if stops else "bad samples", {"bad": bad, "causes": listed}


def _images(samples: Sequence[SampleFacts], requirements: Requirements) -> Iterator[Values]:
    sides, size = [min(sample.size) for sample in samples if sample.size], requirements.image_size
    if not sides:
        return
    median, small = float(np.median(sides)), float(np.mean(np.array(sides) < size))
    if small > 0.5:
        yield "small images", {"share": small, "size": size, "median": median}
    if median > 4 * size:
        yield "large images", {"size": size, "median": median, "side": 2 * size}
    copies = Counter(sample.digest for sample in samples if sample.size)
    if (count := sum(copies for copies in copies.values() if copies > 1)) > 0.02 * len(samples):
        yield "same images", {"count": count}


def _captions(samples: Sequence[SampleFacts], requirements: Requirements) -> Iterator[Values]:
    total, limit = len(samples), requirements.max_tokens
    if lengths := [length for sample in samples for length in sample.lengths]:
        cut, longest = float(np.mean(np.array(lengths) > limit)), float(np.percentile(lengths, 99))
        if cut > 0.02:
            needed = int(np.ceil(longest / 8) * 8)
            yield "long captions", {"share": cut, "limit": limit, "longest": longest, "needed": needed}
        unknown = sum(sample.unknown for sample in samples) / max(sum(lengths) - 2 * len(lengths), 1)
        if unknown > 0.05:
            yield "unknown tokens", {"share": unknown}
    common = Counter(text for sample in samples for text in sample.captions if text).most_common(1)
    if common and total >= PROBED and common[0][1] > max(0.05 * total, 2):
        yield "same captions", {"count": common[0][1], "text": common[0][0][:80]}
    sided = sum(any(_SIDE.search(text) for text in sample.captions) for sample in samples)
    if requirements.flip and sided > max(0.02 * total, 2):
        yield "sided captions", {"count": sided}
    if blank := sum(not all(sample.captions) for sample in samples):
        yield "blank captions", {"count": blank}

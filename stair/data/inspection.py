"""What a few samples of a source are like, and what of it would stop, slow or mislead a run.

Used before every fit, on a few samples, and by `stair doctor`, on more. A finding names the setting that mends it.
"""

import hashlib
import itertools
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from stair.data.remote import Remote, is_remote
from stair.data.samples import CAPTION_TYPES, IMAGE_TYPES, caption_field, caption_lines, captions, image_bytes, types_of
from stair.data.tars import stream
from stair.images import MAX_PIXELS, decode_image, eval_pixels, image_format
from stair.vocabulary import Vocabulary

PROBED = 20  # samples of a source that are looked at before a fit
_PATIENCE = 20.0  # seconds, after which no further shard is tried
_TRIED = 3  # shards, before all samples of a source are taken to be bad
_CERTAIN = 200  # among fewer samples, a share of bad ones is too rough to stop for

_SIDE = re.compile(r"\b(left|right)(?:most|hand)?\b", re.IGNORECASE)


Severity = Literal["stops", "warns", "notes"]


class Finding(NamedTuple):
    """Something about a source that a user should know.

    Attributes:
        severity: `stops` a run, `warns` of a worse or slower one, `notes` a fact.
        source: its name.
        what: is so.
        mend: the setting or the step that changes it.
    """

    severity: Severity
    source: str
    what: str
    mend: str


@dataclass(frozen=True)
class Needs:
    """What a run wants of its data, by the names of the settings.

    Attributes:
        vocabulary: makes tokens; None leaves captions unmeasured.
        max_tokens: longest caption kept.
        image_size: side of the square the model takes, in pixels.
        max_pixels: largest width × height that is decoded.
        max_bad_share: greatest share of bad samples.
        flip: whether training mirrors images.
    """

    vocabulary: Vocabulary | None
    max_tokens: int
    image_size: int
    max_pixels: int = MAX_PIXELS
    max_bad_share: float = 0.1
    flip: bool = False


@dataclass
class Sight:
    """What was seen of a source.

    Attributes:
        samples: looked at.
        left_out: of these, samples that training leaves out.
        bad: samples that training leaves out, by the cause that it states: the first, if there are several.
        first: of each cause, where and in detail.
        members: names seen, of the first samples.
        no_image: samples without an image member.
        no_caption: samples without a caption that can be read.
        formats: of images that decode, by content.
        misnamed: images whose name says another format.
        sides: width and height of images, in pixels.
        fields: samples by where their captions stand.
        texts: captions, those of a sample together.
        blank: samples with a blank caption among others.
        tokens: length of each caption, [CLS] and [SEP] included; empty without a vocabulary.
        unknown: share of word pieces that the vocabulary does not have.
        twins: samples whose image another sample has too, byte for byte.
        decode_seconds: decoding and scaling all images.
    """

    samples: int = 0
    left_out: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    members: list[str] = field(default_factory=list)
    no_image: int = 0
    no_caption: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    misnamed: int = 0
    sides: list[tuple[int, int]] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)
    texts: list[list[str]] = field(default_factory=list)
    blank: int = 0
    tokens: list[int] = field(default_factory=list)
    unknown: float = 0.0
    twins: int = 0
    decode_seconds: float = 0.0


def first_samples(shard: str, count: int, remote: Remote) -> tuple[list[dict[str, Any]], str]:
    """The first samples of a shard, with the names of all members, and what broke it before there were so many."""
    errors: list[Exception] = []
    reader: Any = stream(shard, errors.append, select=None, remote=remote)
    with closing(reader) as samples:
        lines = caption_lines(shard)
        found = [{**sample, "__url__": shard, "__lines__": lines} for sample in itertools.islice(samples, count)]
    return found, str(errors[0]) if errors else ""


def look(samples: Iterable[dict[str, Any]], needs: Needs) -> Sight:
    """Reads and decodes samples as training does, and measures them."""
    sight = Sight()
    images: Counter[bytes] = Counter()
    for sample in samples:
        sight.samples += 1
        reasons: list[str] = []
        if len(sight.members) < 10:
            sight.members += [f"{sample['__key__']}.{kind}" for kind in types_of(sample)]
        _tried(sight, sample, reasons, _well_named)
        texts = _tried(sight, sample, reasons, _texts)
        data = _tried(sight, sample, reasons, image_bytes)
        sight.no_caption += texts is None
        sight.no_image += data is None
        if texts is not None:
            sight.fields[caption_field(sample)] += 1
            sight.texts.append([text for text in texts if text])
            sight.blank += not all(texts)
        if data is not None:
            decoded = _tried(sight, sample, reasons, partial(_measure, sight, data=data, needs=needs))
            images[hashlib.sha256(data).digest()] += decoded is not None
        sight.left_out += bool(reasons)
        sight.bad.update(reasons[:1])
    sight.twins = sum(count for count in images.values() if count > 1)
    if needs.vocabulary:
        _count_tokens(sight, needs.vocabulary)
    return sight


def _texts(sample: dict[str, Any]) -> list[str]:
    return captions(sample, sample["__lines__"])


def _well_named(sample: dict[str, Any]) -> None:
    if sample.get("__wrong__"):
        raise ValueError(sample["__wrong__"])


def _tried(sight: Sight, sample: dict[str, Any], reasons: list[str], read: Callable[[dict[str, Any]], Any]) -> Any:
    try:
        return read(sample)
    except ValueError as error:
        cause = str(error).partition(":")[0]
        reasons.append(cause)
        sight.first.setdefault(cause, f"{sample['__key__']!r} in {sample['__url__']}: {str(error)[:200]}")
        return None


def _measure(sight: Sight, sample: dict[str, Any], data: bytes, needs: Needs) -> tuple[int, int]:
    start = time.thread_time()  # of a processor: the machine may be busy with other work
    image = decode_image(data, needs.max_pixels)
    eval_pixels(image, needs.image_size)
    sight.decode_seconds += time.thread_time() - start
    sight.sides.append(image.size)
    held = image_format(data) or "other"
    sight.formats[held] += 1
    named = next(kind for kind in IMAGE_TYPES if kind in sample).replace("jpeg", "jpg")
    sight.misnamed += held != named
    return image.size


def _count_tokens(sight: Sight, vocabulary: Vocabulary) -> None:
    texts = [text for group in sight.texts for text in group]
    unknown, pieces = vocabulary.tokens.index("[UNK]"), 0
    found = 0
    for start in range(0, len(texts), 64):
        ids_BT, mask_BT = vocabulary.tokenize(texts[start : start + 64], 1_000_000)
        sight.tokens += mask_BT.sum(1).tolist()
        found += int((ids_BT == unknown).sum())
        pieces += int(mask_BT.sum()) - 2 * len(mask_BT)
    sight.unknown = found / max(pieces, 1)


def probe(name: str, shards: Sequence[str], needs: Needs, remote: Remote) -> list[Finding]:
    """The check before every fit: the first samples of the first shard that has any, or of a few if all those are bad.

    Args:
        name: of the source.
        shards: its shards.
        needs: of the run.
        remote: how to go about shards that are not local.
    """
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
            sight = look(seen, needs)
            if sight.left_out < sight.samples or tried == _TRIED:
                break
    if seen:
        return judge(name, sight, needs)
    what = f"no sample could be read from {len(reasons)} of its shards, the first: {reasons[0]}"
    return [Finding("stops", name, what, "check --data.train; `stair prepare` makes shards")]


def judge(name: str, sight: Sight, needs: Needs) -> list[Finding]:
    """What is to be said of a source after a look at it.

    Args:
        name: of the source.
        sight: at least one sample.
        needs: of the run.
    """
    said = [*_members(sight), *_badness(sight, needs), *_pictures(sight, needs), *_captions(sight, needs)]
    return [Finding(severity, name, what, mend) for severity, what, mend in said]


# severity, what, mend
Said = tuple[Severity, str, str]


def _members(sight: Sight) -> Iterator[Said]:
    for lacking, wanted, cause in (
        (sight.no_image, IMAGE_TYPES, "no image"),
        (sight.no_caption, CAPTION_TYPES, "no caption"),
    ):
        if lacking == sight.samples:
            reason = sight.first.get("dotted key") or sight.first.get(cause) or next(iter(sight.first.values()))
            yield (
                "stops",
                f"none of the first {sight.samples} samples has a usable member of {list(wanted)}: {reason}; members seen: "
                f"{sight.members}",
                "name members KEY.jpg with KEY.json or KEY.txt (those of a sample one after the other), or make shards "
                "with `stair prepare`",
            )


def _badness(sight: Sight, needs: Needs) -> Iterator[Said]:
    if sight.no_image == sight.samples or sight.no_caption == sight.samples or not sight.left_out:
        return
    causes = ", ".join(f"{count} {cause} (the first: {sight.first[cause]})" for cause, count in sight.bad.items())
    many = sight.left_out > needs.max_bad_share * sight.samples
    what = f"{sight.left_out} of {sight.samples} samples are bad: {causes}"
    if sight.left_out == sight.samples or (many and sight.samples >= _CERTAIN):
        yield "stops", what, "mend them, or raise --data.max_bad_share"
    else:
        yield "warns", what, "training skips and counts them, up to --data.max_bad_share; evaluation stops at them"


def _pictures(sight: Sight, needs: Needs) -> Iterator[Said]:
    if not sight.sides:
        return
    short = np.array([min(side) for side in sight.sides])
    small = float((short < needs.image_size).mean())
    if small > 0.5:
        yield (
            "warns",
            f"{small:.0%} of images have a short side below the model's {needs.image_size} px (median "
            f"{np.median(short):.0f}): they are blown up, and cost what large ones cost",
            f"--model.init_args.stair.image.image_size {int(np.median(short))} (rounded to the patch), or larger images",
        )
    if np.median(short) > 4 * needs.image_size:
        yield (
            "warns",
            f"the median image has a short side of {np.median(short):.0f} px, the model takes {needs.image_size}: decoding "
            "them costs more than training needs",
            f"`stair prepare ... --max_side {2 * needs.image_size}`, or more --data.workers",
        )
    if sight.twins > 0.02 * sight.samples:
        yield (
            "warns",
            f"{sight.twins} of {sight.samples} samples have an image that another has too: each is a wrong answer to the "
            "other's caption",
            "put their captions into one sample, as `captions`",
        )
    if sight.misnamed:
        yield "notes", f"{sight.misnamed} images are of another format than their name says", "nothing: content decides"


def _captions(sight: Sight, needs: Needs) -> Iterator[Said]:
    if sight.tokens:
        lengths = np.array(sight.tokens)
        cut = float((lengths > needs.max_tokens).mean())
        if cut > 0.02:
            wanted = int(np.ceil(np.percentile(lengths, 99) / 8) * 8)
            yield (
                "warns",
                f"{cut:.1%} of captions are longer than {needs.max_tokens} tokens and are cut; 99 % have at most "
                f"{np.percentile(lengths, 99):.0f}",
                f"--model.init_args.stair.text.max_tokens {wanted}, which is also data.max_tokens (BERT takes 512 at most)",
            )
        if sight.unknown > 0.05:
            yield (
                "warns",
                f"{sight.unknown:.1%} of word pieces are not in the vocabulary: is this its language?",
                "--model.init_args.stair.vocabulary of the captions' language",
            )
    flat = [text for texts in sight.texts for text in texts]
    most, often = Counter(flat).most_common(1)[0] if flat else ("", 0)
    if sight.samples >= PROBED and often > max(0.05 * sight.samples, 2):
        yield (
            "warns",
            f"{often} of {sight.samples} samples have the caption {most[:80]!r}: a batch holds it several times, and each "
            "counts as a wrong answer to the others",
            "tell them apart in the captions, or evaluate by class (classnames.json)",
        )
    sided = sum(any(_SIDE.search(text) for text in texts) for texts in sight.texts)
    if needs.flip and sided > max(0.02 * sight.samples, 2):
        yield (
            "warns",
            f"{sided} of {sight.samples} samples speak of left or right, and data.flip mirrors",
            "--data.flip false",
        )
    if sight.blank:
        yield (
            "warns",
            f"{sight.blank} of {sight.samples} samples have a blank caption among others: evaluation stops at them",
            "remove the blank ones",
        )

"""Writes the samples of a source as shards, with an index and a report.

A sample is KEY.jpg|png|webp, KEY.json with `captions`, KEY.txt with the first of them. The bytes of a shard follow from the
inputs and the settings alone: a command that was killed and run again writes the same bytes.
"""

import hashlib
import io
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from webdataset.writer import TarWriter

from stair.data.prepare.jobs import index_entries, known_json, listed, preparing, run, summary, write_index
from stair.data.samples import Skipped, check_caption, count_causes, printable, skipped_lines
from stair.data.shard_index import index_shard
from stair.data.specs import require
from stair.errors import FileError, StairError
from stair.files import atomic_write, sha256, write_json
from stair.images import MAX_PIXELS, decode_image, image_format

REPORT, CLASSNAMES = "prepare.json", "classnames.json"
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Raw(NamedTuple):
    """An input as a source gives it: bytes of an image file, captions, and what else goes into the JSON."""

    image: bytes
    captions: list[str]
    fields: dict[str, Any]


@dataclass
class Source:
    """Where samples come from.

    `read` gives the input of a reference, or raises ValueError that begins with the cause and a colon. It is sent to other
    processes, and its repr states all that its results depend on.
    """

    name: str  # for the report
    splits: dict[str, list[Any]]  # references of the inputs: small tuples whose repr states all of them
    read: Callable[[Any], Raw]
    skipped: dict[str, list[Skipped]] = field(default_factory=dict)  # by split, inputs without a reference
    shuffled: bool = True  # not where reading inputs out of order is slow
    classnames: list[str] | None = None  # in the order of `label`, for zero-shot evaluation


class Limits(NamedTuple):
    """Images of at most `max_side` pixels (0: any) keep their bytes; those of more than `max_pixels` are skipped."""

    max_side: int
    max_pixels: int


def write_shards(
    source: Source,
    out: Path,
    *,
    shard_samples: int = 1000,
    seed: int | None = 0,
    max_side: int = 0,
    max_pixels: int = MAX_PIXELS,
    max_bad_share: float = 0.05,
    workers: int = 0,
) -> None:
    """Writes shards, their index and a report; continues where a killed command stopped.

    Args:
        source: what is to be written.
        out: folder of the shards, created where missing. It can hold several splits, also of several commands.
        shard_samples: most samples a shard.
        seed: of the order of samples, which are shuffled over all shards; null keeps the order of the source.
        max_side: images whose longer side has more pixels are scaled down to it and written anew; 0 keeps every size.
        max_pixels: largest width × height that is decoded; larger images are left out.
        max_bad_share: greatest share of inputs that are left out; beyond it nothing more is written.
        workers: processes; 0 is one for each core.

    Raises:
        StairError: if a setting is out of its range, too many inputs are bad, or `out` holds the split of something else.
    """
    require(shard_samples >= 1, "shard_samples", shard_samples, "at least 1")
    require(max_side >= 0, "max_side", max_side, "0 or more")
    require(max_pixels >= 1, "max_pixels", max_pixels, "at least 1")
    require(0 <= max_bad_share < 1, "max_bad_share", max_bad_share, "0 or more and less than 1")
    require(workers >= 0, "workers", workers, "0 or more")
    for split in source.splits:
        require(_SPLIT.fullmatch(split) is not None, "split", split, "letters, digits, - and _: shards have its name")
    inputs = {split: len(found) + len(source.skipped.get(split, [])) for split, found in source.splits.items()}
    if not any(inputs.values()):
        raise StairError(f"{source.name} holds no input")
    with preparing(out) as state:
        _write_classnames(out, source)
        for split in filter(inputs.__getitem__, inputs):
            order = seed if source.shuffled else None
            plan = _Plan(source, out, split, order, shard_samples, Limits(max_side, max_pixels))
            plan.write(state, max_bad_share, workers)


@dataclass(frozen=True)
class _Plan:
    """How the inputs of a split become shards."""

    source: Source
    out: Path
    split: str
    seed: int | None
    shard_samples: int
    limits: Limits

    def fingerprint(self) -> str:
        """Of all that the bytes of the shards depend on."""
        settings = (self.split, self.seed, self.shard_samples, self.limits, self.source.read)
        digest = hashlib.sha256(repr(settings).encode("utf-8", "surrogateescape"))
        for reference in self.source.splits[self.split]:
            digest.update(repr(reference).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def jobs(self, fingerprint: str) -> dict[str, tuple[Any, ...]]:
        """One for each shard, all of nearly the same size."""
        references = self.source.splits[self.split]
        keyed = [(f"{self.split}-{place:08d}", reference) for place, reference in enumerate(references)]
        if self.seed is not None:
            random.Random(self.seed).shuffle(keyed)
        shards = math.ceil(len(keyed) / self.shard_samples)
        cuts = [len(keyed) * i // max(shards, 1) for i in range(shards + 1)]
        jobs = {}
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            path = self.out / f"{self.split}-{i:05d}.tar"
            jobs[path.name] = (path, keyed[start:stop], self.source.read, self.limits, fingerprint)
        return jobs

    def has(self, name: str) -> bool:
        """Whether a shard of that name is of this split."""
        return re.fullmatch(rf"{re.escape(self.split)}-\d{{5,}}\.tar", name) is not None

    def write(self, state: Path, max_bad_share: float, workers: int) -> None:
        """Writes the split."""
        fingerprint, plan = self.fingerprint(), state / f"{self.split}.plan"
        known = known_json(self.out / REPORT).get("splits", {})
        sizes = {path.name: path.stat().st_size for path in self.out.glob("*.tar") if self.has(path.name)}
        made_of = known_json(plan).get("fingerprint") or known.get(self.split, {}).get("fingerprint")
        if sizes and made_of != fingerprint:
            raise FileError(
                f"{self.out} holds split {self.split!r} made of other inputs or with other settings "
                f"({', '.join(sorted(sizes)[:3])}): give another folder or split, or remove {self.split}-*.tar there",
                self.out,
            )
        if sizes and not plan.exists() and sizes == self._stated_sizes():
            print(f"{self.out}: split {self.split!r} is there already, of the same inputs and settings; nothing done")
            return
        write_json(plan, {"fingerprint": fingerprint})
        for part in (*state.glob(".*.part"), *self.out.glob(".*.part")):  # of a killed process: the lock is held
            part.unlink()

        def is_current(name: str, record: dict[str, Any]) -> bool:
            is_whole = not record["samples"] or sizes.get(name) == record["bytes"]
            return record.get("fingerprint") == fingerprint and is_whole

        skipped = self.source.skipped.get(self.split, [])
        records, bad = run(self.jobs(fingerprint), make_shard, state, is_current, workers, max_bad_share, skipped)
        report = self._report(fingerprint, list(records.values()), bad)
        if not report["samples"]:
            raise StairError(
                f"{self.source.name}: split {self.split!r} holds no input that can be used: {summary(bad)}"
            )
        write_index(self.out, {name: record for name, record in records.items() if record["samples"]}, self.has)
        write_json(self.out / REPORT, {"format": 1, "splits": {**known, self.split: report}})
        for name in (*(f"{name}.json" for name in records), "left_out.json", plan.name):
            (state / name).unlink(missing_ok=True)
        print("\n".join([*skipped_lines(bad), *self._lines(report)]))

    def _stated_sizes(self) -> dict[str, int]:
        try:
            return {name: entry["bytes"] for name, entry in index_entries(self.out).items() if self.has(name)}
        except FileError:
            return {}

    def _report(self, fingerprint: str, records: list[dict[str, Any]], bad: list[Skipped]) -> dict[str, Any]:
        written_anew = sum((Counter(record["written_anew"]) for record in records), Counter())
        return {
            "source": self.source.name,
            "fingerprint": fingerprint,
            "settings": {"seed": self.seed, "shard_samples": self.shard_samples, "max_side": self.limits.max_side},
            "inputs": len(self.source.splits[self.split]) + len(self.source.skipped.get(self.split, [])),
            "samples": sum(record["samples"] for record in records),
            "captions": sum(record["captions"] for record in records),
            "written_anew": dict(written_anew),
            "left_out": count_causes(bad),
            "left_out_inputs": [one.facts() for one in bad],
        }

    def _lines(self, report: dict[str, Any]) -> list[str]:
        lines = [f"{self.out}: {self.split}: {report['samples']} samples with {report['captions']} captions"]
        if anew := report["written_anew"]:
            lines.append(f"  images written anew: {listed(anew)}; all others are the original bytes")
        if causes := report["left_out"]:
            count = f"{sum(causes.values())} of {report['inputs']} inputs"
            lines.append(f"  left out {count}: {listed(causes)}; which ones: {REPORT}")
        return lines


def make_shard(
    path: Path, keyed: list[tuple[str, Any]], read: Callable[[Any], Raw], limits: Limits, fingerprint: str
) -> dict[str, Any]:
    """Writes one shard and its index, and returns its record. Without a sample, there is no tar.

    `keyed` are key and reference of each input, `read` is that of the source.
    """
    left_out: list[Skipped] = []
    anew: Counter[str] = Counter()
    captions = 0
    with atomic_write(path) as part, part.open("wb") as file, open_tar(file) as tar:
        for key, reference in keyed:
            try:
                raw = read(reference)
                texts = [check_caption(text) for text in raw.captions]
                if not texts:
                    raise ValueError("caption empty: the input has no caption")
                kind, image, why = stored(raw.image, limits)
            except ValueError as error:
                left_out.append(Skipped(_place(reference), printable(str(error))[:300]))
                continue
            facts = json.dumps({**raw.fields, "captions": texts}, ensure_ascii=False, sort_keys=True)
            tar.write({"__key__": key, kind: image, "json": facts.encode(), "txt": texts[0].encode()})
            anew[why] += 1
            captions += len(texts)
    about = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    counts = {"inputs": len(keyed), "samples": anew.total(), "captions": captions}
    if anew:
        index_shard(path)
    else:
        path.unlink()
    anew.pop("", None)
    return {**counts, **about, "written_anew": dict(anew), "left_out": left_out, "fingerprint": fingerprint}


def open_tar(file: BinaryIO) -> TarWriter:
    """A tar whose headers do not change from one run to the next."""
    return TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False)


def _place(reference: Any) -> str:
    """What a user knows an input by: the names of its file, or a file and a row of it."""
    names, sign = (reference[0], " or ") if isinstance(reference[0], tuple) else (reference, ":")
    return printable(sign.join(map(str, names)))[:300]


def stored(data: bytes, limits: Limits) -> tuple[str, bytes, str]:
    """How an image goes into a shard: as it is where it is a JPEG, PNG or WebP within the limits.

    Returns its type, its bytes, and why they are not the original ones (empty if they are). Errors are those of
    `decode_image`, by which training reads it.
    """
    image = decode_image(data, limits.max_pixels)
    kind = image_format(data)
    if limits.max_side and max(image.size) > limits.max_side:
        image.thumbnail((limits.max_side, limits.max_side), Image.Resampling.LANCZOS)
        why = f"with more than {limits.max_side} pixels a side"
    elif kind:
        return kind, data, ""
    else:
        why = "of another format than JPEG, PNG, WebP"
    buffer = io.BytesIO()
    if kind in ("jpg", "webp"):  # lossy already
        image.save(buffer, "JPEG", quality=95)
        return "jpg", buffer.getvalue(), why
    image.save(buffer, "PNG")
    return "png", buffer.getvalue(), why


def _write_classnames(out: Path, source: Source) -> None:
    if source.classnames is None:
        return
    known = known_json(out / CLASSNAMES)
    if known and known.get("classes") != source.classnames:
        raise FileError(
            f"{out / CLASSNAMES} lists other classes than {source.name}: labels are places in that list; give another "
            "folder",
            out / CLASSNAMES,
        )
    write_json(out / CLASSNAMES, {**known, "classes": source.classnames})

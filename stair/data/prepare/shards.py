"""Writes the samples of a source as shards, in parallel, with an index and a report.

What a shard holds follows from the list of inputs and the settings alone, never from which process wrote it when. So a
run that was killed and run again leaves the same bytes as one that was not.
"""

import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stair.data.prepare.jobs import Job, alone_in, cores, read_json, run
from stair.data.prepare.shard import Limits, Raw, make_shard
from stair.data.remote import Remote
from stair.data.samples import Skipped, skipped_lines
from stair.data.shard_index import MANIFEST, MANIFEST_FORMAT, read_manifest
from stair.files import write_json
from stair.images import MAX_PIXELS

REPORT, CLASSNAMES = "prepare.json", "classnames.json"
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_JUDGED = 200  # inputs; among fewer, a share of bad ones is judged only at the end


@dataclass
class Source:
    """Where samples come from.

    Attributes:
        name: what was read, for the report.
        splits: name of a split to references of its inputs: small values with a repr that says all of them.
        read: gives the input of a reference; raises ValueError that begins with the cause and a colon, or OSError.
            Sent to other processes; its repr tells all that its results depend on.
        refused: by split, inputs without a reference.
        mixed: whether inputs may be shuffled; not where reading them out of order is slow.
        classnames: names of classes in the order of `label`, for zero-shot evaluation.
    """

    name: str
    splits: dict[str, list[Any]]
    read: Callable[[Any], Raw]
    refused: dict[str, list[Skipped]] = field(default_factory=dict)
    mixed: bool = True
    classnames: list[str] | None = None


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
    """Writes shards, their index and a report; goes on where a killed run stopped.

    Args:
        source: what is to be written.
        out: folder of the shards, created where missing. Several splits may lie in it, also by several runs.
        shard_samples: most samples a shard.
        seed: of the order of samples, which are shuffled over all shards; null keeps the order of the source.
        max_side: images whose longer side has more pixels are scaled down to it and written anew; 0 keeps every size.
        max_pixels: largest width × height that is decoded; larger images are left out.
        max_bad_share: greatest share of inputs that are left out; beyond it nothing more is written.
        workers: processes; 0 is one for each core.

    Raises:
        ValueError: if a setting is out of its range, too many inputs are bad, or `out` holds the split of something else.
    """
    if shard_samples < 1 or max_side < 0 or max_pixels < 1 or workers < 0 or not 0 <= max_bad_share < 1:
        raise ValueError(
            f"{shard_samples=}, {max_side=}, {max_pixels=}, {workers=}, {max_bad_share=}: wanted shard_samples and "
            "max_pixels of at least 1, max_side and workers of at least 0, max_bad_share of 0 or more and less than 1"
        )
    if bad := [name for name in source.splits if not _SPLIT.fullmatch(name)]:
        raise ValueError(f"splits are named {bad}; wanted letters, digits, - and _, as the shards are named after them")
    if not any(source.splits.values()) and not any(source.refused.values()):
        raise ValueError(f"{source.name} holds no input")
    refuse_foreign_index(out)
    with alone_in(out) as state:
        _write_classnames(out, source)
        for split, references in source.splits.items():
            if not references and not source.refused.get(split):
                continue
            plan = Plan(out, split, seed if source.mixed else None, shard_samples, Limits(max_side, max_pixels))
            _write_split(plan, source, references, state, max_bad_share, workers or cores())


@dataclass(frozen=True)
class Plan:
    """How the inputs of a split become shards."""

    out: Path
    split: str
    seed: int | None
    shard_samples: int
    limits: Limits

    def fingerprint(self, source: Source, references: Sequence[Any]) -> str:
        """Of all that the bytes of the shards depend on."""
        digest = hashlib.sha256(
            f"1 {self.split} {self.seed} {self.shard_samples} {self.limits} {source.read!r}".encode()
        )
        for reference in references:
            digest.update(repr(reference).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def jobs(self, read: Callable[[Any], Raw], references: Sequence[Any]) -> list[Job]:
        """One for each shard, all of nearly the same size."""
        order = list(range(len(references)))
        if self.seed is not None:
            random.Random(self.seed).shuffle(order)
        shards = math.ceil(len(order) / self.shard_samples)
        cuts = [len(order) * i // shards for i in range(shards + 1)] if shards else [0]
        jobs = []
        for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
            keyed = [(f"{self.split}-{place:08d}", references[place]) for place in order[start:stop]]
            path = self.out / f"{self.split}-{i:05d}.tar"
            jobs.append(Job(path.name, stop - start, (path, keyed, read, self.limits)))
        return jobs


def _write_split(
    plan: Plan, source: Source, references: list[Any], state: Path, max_bad_share: float, workers: int
) -> None:
    fingerprint = plan.fingerprint(source, references)
    if _is_complete(plan, fingerprint):
        print(f"{plan.out}: split {plan.split!r} is there already, of the same inputs and settings; nothing done")
        return
    _claim(plan, fingerprint, state)
    refused = source.refused.get(plan.split, [])
    tally = Tally(max_bad_share, len(references) + len(refused), state / f"{plan.split}.left_out.json")
    tally.add({"inputs": len(refused), "left_out": refused})
    records = run(plan.jobs(source.read, references), make_shard, state, workers, plan.split, tally.add)
    tally.judge(len(references) + len(refused))
    made = list(records.values())
    if not any(record["samples"] for record in made):
        raise ValueError(f"{source.name}: split {plan.split!r} holds no input that can be used: {tally.text()}")
    _write_index(plan, records)
    report = {
        "source": source.name,
        "fingerprint": fingerprint,
        "settings": {"seed": plan.seed, "shard_samples": plan.shard_samples, "max_side": plan.limits.max_side},
        "inputs": tally.inputs,
        "samples": sum(record["samples"] for record in made),
        "captions": sum(record["captions"] for record in made),
        "written_anew": dict(sum((Counter(record["written_anew"]) for record in made), Counter())),
        "left_out": dict(tally.causes),
        "left_out_inputs": [bad.facts() for bad in tally.left_out],
    }
    whole = read_json(plan.out / REPORT)
    write_json(plan.out / REPORT, {"format": 1, "splits": {**whole.get("splits", {}), plan.split: report}})
    for name in (*(f"{name}.json" for name in records), f"{plan.split}.left_out.json", f"{plan.split}.plan"):
        (state / name).unlink(missing_ok=True)
    print("\n".join([*skipped_lines(tally.left_out), _said(plan, report)]))


def _said(plan: Plan, report: dict[str, Any]) -> str:
    lines = [f"{plan.out}: {plan.split}: {report['samples']} samples with {report['captions']} captions"]
    if anew := report["written_anew"]:
        lines.append(f"  images written anew: {listed(anew)}; all others are the original bytes")
    if causes := report["left_out"]:
        lines.append(
            f"  left out {sum(causes.values())} of {report['inputs']} inputs: {listed(causes)}; which ones: {REPORT}"
        )
    return "\n".join(lines)


def listed(counts: dict[str, int]) -> str:
    """Counts in words, the largest first."""
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items(), key=lambda pair: -pair[1]))


class Tally:
    """What was left out so far: at most the share `limit`, listed in a file beyond it."""

    def __init__(self, limit: float, inputs: int, listing: Path) -> None:
        self.limit, self.inputs, self.listing = limit, inputs, listing
        self.seen, self.left_out, self.causes = 0, list[Skipped](), Counter[str]()

    def add(self, record: dict[str, Any]) -> None:
        """Takes in what a job left out."""
        self.seen += record["inputs"]
        self.left_out += [Skipped(*bad) for bad in record["left_out"]]
        self.causes.update(Skipped(*bad).cause for bad in record["left_out"])
        self.judge(min(_JUDGED, self.inputs))

    def judge(self, enough: int) -> None:
        """Stops the run if too much of at least `enough` inputs was left out."""
        if self.seen >= enough and len(self.left_out) > self.limit * self.seen:
            write_json(self.listing, [bad.facts() for bad in self.left_out])
            raise ValueError(
                f"{len(self.left_out)} of {self.seen} inputs cannot be used, more than max_bad_share={self.limit}: "
                f"{self.text()}. All of them: {self.listing}. Mend the source, or run again with a higher --max_bad_share: "
                "what is finished is kept"
            )

    def text(self) -> str:
        """What was left out, in a few words."""
        first = "; ".join(f"{bad.place}: {bad.reason}" for bad in self.left_out[:3])
        return f"{listed(self.causes)}. The first: {first}"


def _claim(plan: Plan, fingerprint: str, state: Path) -> None:
    """Takes the split's names in the folder for these inputs, or goes on with what was made of them."""
    path = state / f"{plan.split}.plan"
    known = read_json(path).get("fingerprint") or _reported(plan).get("fingerprint")
    shards = _shards(plan)
    if shards and known != fingerprint:
        raise ValueError(
            f"{plan.out} holds split {plan.split!r} made of other inputs or with other settings "
            f"({', '.join(shard.name for shard in shards[:3])}): give another folder or split, or remove "
            f"{plan.split}-*.tar there"
        )
    write_json(path, {"fingerprint": fingerprint})
    for part in (*state.glob("*.part"), *plan.out.glob(".*.part")):  # of a run that was killed
        part.unlink()
    for record in state.glob(f"{plan.split}-*.tar.json"):
        shard = plan.out / record.name.removesuffix(".json")
        made = read_json(record)
        whole = shard.is_file() and shard.stat().st_size == made.get("bytes")
        if _belongs(shard.name, plan.split) and (known != fingerprint or (made.get("samples") and not whole)):
            record.unlink()


def _reported(plan: Plan) -> dict[str, Any]:
    return dict(read_json(plan.out / REPORT).get("splits", {}).get(plan.split, {}))


def _shards(plan: Plan) -> list[Path]:
    return sorted(path for path in plan.out.glob("*.tar") if _belongs(path.name, plan.split))


def _belongs(name: str, split: str) -> bool:
    return re.fullmatch(rf"{re.escape(split)}-\d{{5,}}\.tar", name) is not None


def _is_complete(plan: Plan, fingerprint: str) -> bool:
    if _reported(plan).get("fingerprint") != fingerprint:
        return False
    index = {n: entry for n, entry in kept_entries(plan.out).items() if _belongs(n, plan.split)}
    there = {path.name: path.stat().st_size for path in _shards(plan)}
    return bool(index) and there == {name: entry["bytes"] for name, entry in index.items()}


def _write_index(plan: Plan, records: dict[str, dict[str, Any]]) -> None:
    kept = {name: entry for name, entry in kept_entries(plan.out).items() if not _belongs(name, plan.split)}
    made = {n: {key: r[key] for key in ("samples", "bytes", "sha256")} for n, r in records.items() if r["samples"]}
    write_index(plan.out, {**kept, **made})


def write_index(folder: Path, shards: dict[str, dict[str, Any]]) -> None:
    """Writes `index.json`: for each shard of a folder `samples`, `bytes` and `sha256`.

    Raises:
        ValueError: if another tool's file lies there.
    """
    refuse_foreign_index(folder)
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "shards": shards})


def index_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """What `index.json` says of each shard, nothing if there is none of ours: by the rule of the fit.

    Raises:
        ValueError: if it is damaged, or of another format.
    """
    known = read_manifest(str(folder), Remote())
    said = read_json(folder / MANIFEST).get("shards", {}) if known else {}
    return {name: {**said[name], "samples": samples, "bytes": size} for name, (samples, size) in known.items()}


def kept_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """As `index_entries`, for an index that is to be written anew: of a damaged one nothing."""
    try:
        return index_entries(folder)
    except ValueError:
        return {}


def refuse_foreign_index(folder: Path) -> None:
    """Before the work: other tools call files of their own so too.

    Raises:
        ValueError: if an index of another tool lies there.
    """
    try:
        said = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(said, dict) or "format" not in said:
        raise ValueError(
            f"{folder / MANIFEST} is another tool's (it names no `format`), and ours would take its place: move it away, "
            "or the tars to a folder of their own"
        )


def _write_classnames(out: Path, source: Source) -> None:
    if source.classnames is None:
        return
    known = read_json(out / CLASSNAMES)
    if known and known.get("classes") != source.classnames:
        raise ValueError(
            f"{out / CLASSNAMES} lists other classes than {source.name}: labels are places in that list; "
            "give another folder"
        )
    write_json(out / CLASSNAMES, {**known, "classes": source.classnames})

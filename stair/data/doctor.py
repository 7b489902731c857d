"""`stair doctor`: what is wrong with shards, and the setting that changes it, in seconds and before a run is started.

Counts come from index files or from headers, as far as the time given reaches. Samples of shards all over a source are read
and decoded (`diagnostics.py`, which also runs before every fit).
"""

import json as json_format
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stair.data.diagnostics import (
    Diagnostic,
    Requirements,
    SampleStats,
    Severity,
    Statement,
    diagnose,
    first_samples,
    inspect,
    unreadable,
)
from stair.data.prepare.jobs import check_index, index_entries, known_json, preparing, run, write_index
from stair.data.remote import LastingError, Remote, is_remote
from stair.data.samples import CAPTION_TYPES, IMAGE_TYPES
from stair.data.shard_index import MANIFEST, index_shard, sizes
from stair.data.specs import Shards, mixture
from stair.data.tars import expand, walk
from stair.errors import FileError, SettingError
from stair.files import sha256
from stair.plain import one_line
from stair.vocabulary import Vocabulary

_SHARDS, _REMOTE_SHARDS = 8, 2  # of a source, from which samples are read
_HASHED_SHARDS, _HASHED_BYTES = 8, 1 << 29  # whose checksums are compared
# what ImageTextShards and the towers take by default
_DEFAULTS: dict[str, Any] = {
    "vocabulary": None,
    "max_tokens": 77,
    "image_size": 224,
    "global_batch_size": 256,
    "workers": 4,
    "max_pixels": Requirements.max_pixels,
    "max_bad_share": Requirements.max_bad_share,
    "flip": False,
    "train_samples": None,
    "remote": {},
}
_MODEL = {"vocabulary": "vocabulary", "max_tokens": "text.max_tokens", "image_size": "image.image_size"}


def doctor(
    data: list[str],
    configs: str | list[str] | None = None,
    vocabulary: str | None = None,
    max_tokens: int | None = None,
    image_size: int | None = None,
    global_batch_size: int | None = None,
    workers: int | None = None,
    train_samples: int | None = None,
    ranks: int = 1,
    samples: int = 256,
    seconds: float = 10.0,
    json: bool = False,
    write_index: bool = False,
) -> None:
    """Prints what is wrong with shards and which setting changes it.

    Args:
        data: shards as --data.train takes them: paths, globs, brace patterns, URLs, or '{name: spec, ...}'.
        configs: the run's files, from which its settings are read: '[configs/stage1.yaml, configs/data/flickr8k.yaml]'.
        vocabulary: a vocab.txt, a folder with one, or a name on the hub, to measure captions with.
        max_tokens: longest caption that the run keeps.
        image_size: side of the images that the model takes, in pixels.
        global_batch_size: pairs a step of the run.
        workers: reading processes a rank of the run.
        train_samples: pairs in all shards together, where they cannot be counted.
        ranks: processes that train.
        samples: of a source, that are read and decoded.
        seconds: for reading headers, where no index says how many samples there are.
        json: print everything as JSON.
        write_index: read all of the local shards and write index.json beside them.

    Raises:
        SystemExit: with status 1 if something would stop a run.
    """
    given = {"vocabulary": vocabulary, "max_tokens": max_tokens, "image_size": image_size, "workers": workers}
    given |= {"global_batch_size": global_batch_size, "train_samples": train_samples}
    settings = _settings([configs] if isinstance(configs, str) else configs or [])
    settings |= {name: value for name, value in given.items() if value is not None}
    names = ("max_tokens", "image_size", "max_pixels", "max_bad_share", "flip")
    words = Vocabulary(settings["vocabulary"]) if settings["vocabulary"] else None
    requirements = Requirements(words, **{name: settings[name] for name in names})
    sources = _sources(data)
    if write_index:
        write_indices([shard for spec in sources.values() for shard in expand(spec.shards) if not is_remote(shard)])
    reports, findings = {}, []
    for name, source in sources.items():
        reports[name], found = _examine(name, source, requirements, settings, samples, seconds / len(sources))
        findings += sorted(found, key=lambda one: ("stops", "warns", "notes").index(one.severity))
    findings += [Diagnostic(level, "the run", *rest) for level, *rest in _of_run(reports, settings, ranks)]
    if json:
        print(json_format.dumps({"sources": reports, "findings": [one._asdict() for one in findings]}, indent=1))
    else:
        _print(reports, findings)
    if any(one.severity == "stops" for one in findings):
        raise SystemExit(1)


def _settings(files: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    base = Path(__file__).parents[2] / "configs" / "base.yaml"
    merged = OmegaConf.merge(*(OmegaConf.load(str(path)) for path in ([base, *files] if files else [])), {})
    places = [(name, f"data.{name}") for name in _DEFAULTS]
    places += [(name, f"model.init_args.stair.{place}") for name, place in _MODEL.items()]
    found = dict(_DEFAULTS)
    for name, place in places:
        if (value := OmegaConf.select(merged, place)) is not None:
            found[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return found


def _sources(data: list[str]) -> dict[str, Shards]:
    """Sources by name; files that a shell has made of a glob are one source again."""
    files = [spec for spec in data if Path(spec).is_file()]
    sources: dict[str, Shards] = {}
    if files:
        sources[files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"] = Shards(files)
    for spec in data:
        if spec.lstrip().startswith("{") and ":" in spec:
            sources |= _named(spec)
        elif spec not in files:
            sources[spec] = Shards(spec)
    return sources


def _named(spec: str) -> dict[str, Shards]:
    try:
        named = yaml.safe_load(spec)
        return mixture({str(name): Shards(**one) if isinstance(one, dict) else one for name, one in named.items()})
    except (TypeError, yaml.YAMLError) as error:
        wanted = "'{name: spec, ...}' or '{name: {shards: spec, weight: 1.0}, ...}'"
        reason = getattr(error, "problem", None) or error
        raise SettingError(f"{spec!r} is no mapping of sources ({reason}); wanted {wanted}", "data") from error


def _examine(
    name: str, source: Shards, requirements: Requirements, settings: dict[str, Any], samples: int, seconds: float
) -> tuple[dict[str, Any], list[Diagnostic]]:
    remote, stated = Remote(**settings["remote"]).at_first(), settings["train_samples"]
    try:
        shards = expand(source.shards)
        counted = count(shards, seconds, remote)
    except (ValueError, OSError) as error:
        return {"shards": 0, "samples": 0}, [Diagnostic("stops", name, str(error), "the spec in --data.train")]
    chosen = _spread(shards, _REMOTE_SHARDS if is_remote(shards[0]) else _SHARDS)
    seen = [first_samples(shard, -(-samples // len(chosen)), remote) for shard in chosen]
    stats = inspect((sample for found, _ in seen for sample in found), requirements)
    findings = [Diagnostic(level, name, *rest) for level, *rest in _of_shards(counted, bool(stated))]
    if stats.samples:
        findings += diagnose(name, stats, requirements)
    else:
        reason = next((reason for _, reason in seen if reason), "not a tar, or empty")
        findings.append(unreadable(name, len(chosen), reason))
    if not requirements.vocabulary:
        findings.append(Diagnostic("notes", name, "captions were not measured in tokens", "--vocabulary or --configs"))
    return _report(counted, stats, requirements.max_tokens, stated), findings


@dataclass
class _Count:
    """What headers and index files state of a source: numbers and problems of shards, by path."""

    shards: list[str]
    samples: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    repeated: Counter[str] = field(default_factory=Counter)  # keys that come twice in the shard
    copies: Counter[str] = field(default_factory=Counter)  # samples of earlier shards, by key and sizes of members
    incomplete: int = 0  # samples without image or caption member
    walked: list[str] = field(default_factory=list)
    stale: dict[str, str] = field(default_factory=dict)  # another size than the index states; a run stops at these
    doubtful: dict[str, str] = field(default_factory=dict)  # another number of samples or checksum
    _samples: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        """Samples in all shards, those not counted taken to be like the others."""
        return round(sum(self.samples.values()) * len(self.shards) / max(len(self.samples), 1))

    def walk(self, shard: str) -> None:
        """Reads the headers of a shard."""
        keys, sized, samples = set[int](), set[int](), 0
        self.walked.append(shard)
        try:
            for sample in walk(shard, compressed=True):
                key, members = sample.key, sample.members
                samples += 1
                self.repeated[shard] += hash(key) in keys
                keys.add(hash(key))
                sized.add(hash((key, *sorted((kind, size) for kind, (_, size) in members.items()))))
                self.incomplete += not (members.keys() & set(IMAGE_TYPES) and members.keys() & set(CAPTION_TYPES))
        except FileError as error:
            self.broken[shard] = str(error)
        if copies := len(sized & self._samples):
            self.copies[shard] = copies
        self._samples |= sized
        if self.samples.get(shard, samples) != samples and shard not in self.stale:
            self.doubtful[shard] = f"{self.samples[shard]} samples by its index or statistics, {samples} in the tar"
        self.samples[shard] = samples


def _spread(shards: list[str], count: int) -> list[str]:
    """So many of the shards, from all over the source."""
    return [shards[round(i)] for i in np.linspace(0, len(shards) - 1, min(count, len(shards)))]


def count(shards: list[str], seconds: float, remote: Remote) -> _Count:
    """Counts a source by index files, by `NNNNN_stats.json` of img2dataset, and by headers as far as the seconds reach.

    Shards that are not local are counted only where an index is beside them. FileError if an index is damaged, at which a
    run would stop.
    """
    found = _Count(shards)
    with suppress(FileError, LastingError):  # no index: their number stays unknown
        far = sizes([shard for shard in shards if is_remote(shard)], remote, 1)
        found.samples |= {shard: samples for shard, (samples, _) in far.items()}
    local = [shard for shard in shards if not is_remote(shard)]
    indices = {folder: index_entries(folder) for folder in {Path(shard).parent for shard in local}}
    entries = {shard: indices[Path(shard).parent].get(Path(shard).name, {}) for shard in local}
    for shard, entry in entries.items():
        path = Path(shard)
        size = found.sizes[shard] = path.stat().st_size
        stated = entry.get("samples", known_json(path.with_name(f"{path.stem}_stats.json")).get("successes"))
        if isinstance(stated, int):
            found.samples[shard] = stated
        if entry.get("bytes", size) != size:
            found.stale[shard] = f"{entry['bytes']} bytes in {MANIFEST}, {size} on disk"
    unhashed = _HASHED_BYTES
    for shard in _spread(local, _HASHED_SHARDS) if local else []:
        unhashed -= found.sizes[shard]
        stated = entries[shard].get("sha256")
        if stated and unhashed > 0 and shard not in found.stale and stated != sha256(Path(shard)):
            found.doubtful[shard] = f"other content than {MANIFEST} says (sha256)"
    start = time.monotonic()
    # those without a number first; of the others a few, to see whether it is true
    for shard in sorted(_spread(local, len(local)), key=lambda shard: shard in found.samples):
        if found.walked and time.monotonic() - start > seconds * (0.3 if shard in found.samples else 1):
            break
        found.walk(shard)
    return found


def _of_shards(counted: _Count, is_stated: bool) -> Iterator[Statement]:
    unknown = [shard for shard in counted.shards if is_remote(shard) and shard not in counted.samples]
    if unknown and not is_stated:
        yield (
            "stops",
            f"{len(unknown)} shards are not local, with no index.json: only reading them all would count them",
            "--write_index where they are local, and copy *.idx too; or data.resample, data.train_samples",
        )
    for shard, reason in list(counted.broken.items())[:1]:
        what = f"{len(counted.broken)} of {len(counted.walked)} shards that were walked are broken, the first: {reason}"
        yield "warns", what, f"get {shard} again; training skips what is lost, evaluation stops at it"
    if repeated := counted.repeated.total():
        yield (
            "stops" if counted.incomplete else "warns",
            f"{repeated} keys come again later in the same shard, most in {counted.repeated.most_common(1)[0][0]}: members "
            "of a sample are torn apart",
            "write the tar anew with the members of a sample together (--sort=name)",
        )
    elif counted.incomplete:
        what = f"{counted.incomplete} samples have no image or no caption member"
        yield "warns", what, "training skips and counts them, up to --data.max_bad_share; evaluation stops at them"
    for shard, most in counted.copies.most_common(1):
        yield (
            "warns",
            f"{counted.copies.total()} samples are in an earlier shard too, by key and size of all members: {most} of them "
            f"in {shard}",
            "leave one of the copies out of --data.train: they come twice an epoch, and against each other",
        )
    levels: list[tuple[Severity, dict[str, str]]] = [("stops", counted.stale), ("warns", counted.doubtful)]
    for severity, shards in levels:
        for shard, reason in list(shards.items())[:1]:
            what = f"{len(shards)} shards are not what their index says, the first is {shard}: {reason}"
            yield severity, what, "get them again; or --write_index, if they are as they should be"
    if 0 < len(counted.samples) < len(counted.shards) and not is_stated:
        known = f"{len(counted.samples)} of {len(counted.shards)} shards"
        what = f"{known} were counted in the time given, the others estimated"
        yield "notes", what, "--write_index counts all of them, once; or more --seconds"


def _of_run(reports: dict[str, dict[str, Any]], settings: dict[str, Any], ranks: int) -> Iterator[Statement]:
    samples = settings["train_samples"] or sum(report["samples"] for report in reports.values())
    shards = sum(report["shards"] for report in reports.values())
    batch, workers = settings["global_batch_size"], max(settings["workers"], 1)
    steps = samples // batch
    if batch % ranks:
        what = f"global_batch_size={batch} cannot be shared by {ranks} ranks"
        yield "stops", what, "--data.global_batch_size, a multiple"
    if 0 < samples < batch:
        what = f"there are {samples} pairs, fewer than global_batch_size={batch}: an epoch would have no step"
        yield "stops", what, "a smaller --data.global_batch_size, or more data"
    if 0 < steps < workers:
        what = f"an epoch has {steps} steps: only as many of {workers} workers have one to make"
        yield "warns", what, f"--data.workers {steps}"
    elif 0 < shards < ranks * workers:
        what = f"{shards} shards for {ranks} x {workers} readers: some read a part of one, past the rest"
        yield "notes", what, f"--data.workers {max(shards // ranks, 1)}, or shards with fewer samples"


def _report(counted: _Count, stats: SampleStats, max_tokens: int, stated: int | None) -> dict[str, Any]:
    known = "counted" if len(counted.samples) == len(counted.shards) else "estimated" if counted.samples else "unknown"
    report: dict[str, Any] = {
        "shards": len(counted.shards),
        "samples": stated or counted.total,
        "samples_are": "stated" if stated else known,
        "bytes": sum(counted.sizes.values()),
        "looked_at": stats.samples,
        "taken": stats.samples - stats.bad.total(),
        "bad": dict(stats.bad),
        "formats": dict(stats.formats),
    }
    if stats.sides:
        report["short_side"] = _quantiles([min(side) for side in stats.sides])
        report["images_a_second"] = round(len(stats.sides) / max(stats.decode_seconds, 1e-9))
    if stats.texts:
        report["caption_fields"] = dict(stats.fields)
        report["captions_an_image"] = _quantiles([len(texts) for texts in stats.texts])
    if stats.tokens:
        report["tokens"] = _quantiles(stats.tokens)
        report["share_cut"] = round(float(np.mean(np.array(stats.tokens) > max_tokens)), 4)
    return report


def _quantiles(values: list[int]) -> dict[str, int]:
    return {name: int(np.percentile(values, q)) for name, q in (("p50", 50), ("p95", 95), ("most", 100))}


def _print(reports: dict[str, dict[str, Any]], findings: list[Diagnostic]) -> None:
    for name in dict.fromkeys([*reports, *(one.source for one in findings)]):
        report = yaml.safe_dump(reports.get(name, {}), sort_keys=False, default_flow_style=None, width=120)
        print(one_line(name), *(f"  {line}" for line in report.splitlines() if line != "{}"), sep="\n")
        for one in findings:
            if one.source == name:
                print(f"  {one.severity.upper():5}  {one_line(one.what)}\n         -> {one.mend}")
    severities = Counter(one.severity for one in findings)
    print(", ".join(f"{count} {name}" for name, count in severities.items()) or "nothing found")


def write_indices(shards: list[str]) -> None:
    """Reads local shards from front to end and writes `index.json` into each of their folders.

    Raises:
        FileError: if one cannot be read to its end: an index would make its loss official. Or if another tool's index is
            there, or a `stair prepare` that is not finished.
    """
    folders: dict[Path, list[Path]] = {}
    for shard in map(Path, dict.fromkeys(shards)):
        folders.setdefault(shard.parent, []).append(shard)
    for folder in folders:
        check_index(folder)
    for folder, paths in folders.items():
        with preparing(folder) as state:
            if plans := sorted(state.glob("*.plan")):
                raise FileError(
                    f"{folder} is being prepared ({plans[0].relative_to(folder)}): finish `stair prepare` first, with the "
                    "same command; it writes the index itself",
                    folder,
                )
            jobs = {path.name: (path,) for path in paths}
            times = {path.name: path.stat().st_mtime_ns for path in paths}
            records, _ = run(jobs, _index_entry, state, partial(_is_current, times), 0)
            write_index(folder, records)
            for name in jobs:
                (state / f"{name}.json").unlink()


def _is_current(times: dict[str, int], name: str, record: dict[str, Any]) -> bool:
    return record.get("mtime") == times[name]


def _index_entry(shard: Path) -> dict[str, Any]:
    """Writes the index of a shard, and returns its record."""
    record = {"inputs": 1, "left_out": [], "samples": index_shard(shard)}
    return {**record, "bytes": shard.stat().st_size, "sha256": sha256(shard), "mtime": shard.stat().st_mtime_ns}

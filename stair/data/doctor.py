"""`stair doctor`: what is wrong with shards, and the setting that changes it, in seconds and before a run is started.

Shards are counted by index files, or by headers as far as the time given reaches. Samples of shards all over a source are
read and decoded (`diagnostics.py`, which also runs before every fit).
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from stair.data import diagnostics
from stair.data.diagnostics import Diagnostic, Requirements, SampleFacts, Values
from stair.data.prepare.writer import Record, finish, known_json, preparing, run
from stair.data.remote import LastingError, Remote, is_remote
from stair.data.samples import CAPTION_TYPES, IMAGE_TYPES
from stair.data.shard_index import MANIFEST, index_shard, read_manifest, sizes
from stair.data.tars import Shards, expand, mixture, walk
from stair.errors import FileError, SettingError
from stair.files import keys_as_text, sha256
from stair.images import MAX_PIXELS
from stair.plain import one_line
from stair.vocabulary import Vocabulary

_SHARDS, _REMOTE_SHARDS = 8, 2  # of a source, from which samples are read
_HASHED_SHARDS, _HASHED_BYTES = 8, 1 << 29  # whose checksums are compared
# defaults of ImageTextShards and the towers, and where a run's files set them
_DEFAULTS: dict[str, Any] = {"vocabulary": None, "max_tokens": 77, "image_size": 224, "global_batch_size": 256}
_DEFAULTS |= {"workers": 4, "max_pixels": MAX_PIXELS, "max_bad_share": 0.1, "flip": False, "train_samples": None}
_DEFAULTS |= {"remote": {}}
_OF_MODEL = {"vocabulary": "vocabulary", "max_tokens": "text.max_tokens", "image_size": "image.image_size"}


def doctor(
    data: list[str],
    configs: list[str] | None = None,
    vocabulary: str | None = None,
    max_tokens: int | None = None,
    image_size: int | None = None,
    global_batch_size: int | None = None,
    workers: int | None = None,
    train_samples: int | None = None,
    ranks: int = 1,
    samples: int = 256,
    seconds: float = 10.0,
    write_index: bool = False,
) -> dict[str, Any]:
    """Prints problems of shards and the setting that corrects each.

    Args:
        data: shards in the form of --data.train: paths, globs, brace patterns, URLs, or '{name: spec, ...}'.
        configs: config files of the run, whose settings are used, separated by spaces.
        vocabulary: a vocab.txt, a folder with one, or a name on the hub, to tokenize captions.
        max_tokens: maximum length of a caption in tokens; longer captions are truncated.
        image_size: side of the model's input images, in pixels.
        global_batch_size: pairs per step of the run.
        workers: data-loading processes per rank of the run.
        train_samples: total number of pairs in the shards, if they cannot be counted.
        ranks: number of training processes.
        samples: number of samples that are read and decoded from each source.
        seconds: time limit for counting samples of shards without an index.
        write_index: read all local shards, and write NAME.tar.idx and index.json next to them.

    Returns:
        The facts about each source, the findings, and `stops`: whether a finding would stop a run (exit status 1).
    """
    given = {"vocabulary": vocabulary, "max_tokens": max_tokens, "image_size": image_size, "workers": workers}
    given |= {"global_batch_size": global_batch_size, "train_samples": train_samples}
    settings = _settings(configs or [])
    settings |= {name: value for name, value in given.items() if value is not None}
    names = ("max_tokens", "image_size", "max_pixels", "max_bad_share", "flip")
    terms = Vocabulary(settings["vocabulary"]) if settings["vocabulary"] else None
    needs = Requirements(terms, **{name: settings[name] for name in names})
    sources = _sources(data)
    if write_index:
        write_indices([shard for spec in sources.values() for shard in expand(spec.shards) if not is_remote(shard)])
    reports, findings = {}, list[Diagnostic]()
    for name, source in sources.items():
        reports[name], of_source = _examine(name, source, needs, settings, samples, seconds / len(sources))
        findings += of_source
    findings += diagnostics.worded("the run", _of_run(reports, settings, ranks))
    _print(reports, findings)
    stops = any(one.severity == "stops" for one in findings)
    return {"sources": reports, "findings": [one._asdict() for one in findings], "stops": stops}


def _settings(files: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    base = Path(__file__).parents[2] / "configs" / "base.yaml"
    merged = OmegaConf.merge(*(OmegaConf.load(str(path)) for path in ([base, *files] if files else [])), {})
    settings = dict(_DEFAULTS)
    for name in settings:
        for key in (f"data.{name}", f"model.init_args.stair.{_OF_MODEL.get(name)}"):
            if (value := OmegaConf.select(merged, key)) is not None:
                settings[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    return settings


def _sources(data: list[str]) -> dict[str, Shards]:
    """Sources by name; files that a shell has made of a glob are one source again."""
    files = [spec for spec in data if Path(spec).is_file()]
    sources = {files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}": Shards(files)} if files else {}
    for spec in data:
        if spec.lstrip().startswith("{") and ":" in spec:
            try:
                named = yaml.safe_load(keys_as_text(spec)).items()
                sources |= mixture({name: Shards(**one) if isinstance(one, dict) else one for name, one in named})
            except (TypeError, AttributeError, yaml.YAMLError) as error:
                reason = getattr(error, "problem", None) or error
                allowed = "'{name: spec, ...}' or '{name: {shards: spec, weight: 1.0}, ...}'"
                raise SettingError(f"{spec!r} is not a mapping ({reason}); expected {allowed}", "data") from error
        elif spec not in files:
            sources[spec] = Shards(spec)
    return sources


def _examine(
    name: str, source: Shards, needs: Requirements, settings: dict[str, Any], samples: int, seconds: float
) -> tuple[dict[str, Any], list[Diagnostic]]:
    """The report on a source, and what is wrong with it."""
    remote, stated = Remote(**settings["remote"]).at_first(), settings["train_samples"]
    try:
        shards = inspect_shards(expand(source.shards), seconds, remote)
    except (ValueError, OSError) as error:
        return {"shards": 0, "samples": 0}, diagnostics.worded(name, [("unreadable spec", {"reason": error})])
    chosen = _spread(shards, _REMOTE_SHARDS if is_remote(shards[0].path) else _SHARDS)
    facts, reasons = list[SampleFacts](), list[str]()
    for shard in tqdm(chosen, name, unit="shard", disable=None):
        read, reason = diagnostics.first_samples(shard.path, -(-samples // len(chosen)), remote)
        facts += [diagnostics.inspect(shard.path, sample, needs) for sample in read]
        reasons.append(reason or "not a tar, or empty")
    findings = list(_of_shards(shards, bool(stated))) + [("unknown vocabulary", {})] * (not needs.vocabulary)
    worded = [*diagnostics.worded(name, findings), *diagnostics.diagnose(name, facts, needs, reasons)]
    worded.sort(key=lambda one: ("stops", "warns", "notes").index(one.severity))
    return _report(shards, facts, needs.max_tokens, stated), worded


@dataclass
class ShardFacts:
    """What headers and index files state of a shard."""

    path: str
    size: int = 0  # in bytes, of a local one
    samples: int | None = None
    walked: bool = False  # whether headers were read
    broken: str = ""  # where they stop being headers
    repeated: int = 0  # keys that come twice
    copies: int = 0  # samples that an earlier shard has too, by key and sizes of members
    incomplete: int = 0  # samples without image or caption member
    stale: str = ""  # another size than the index states; a run stops at these
    doubtful: str = ""  # another number of samples or checksum


def inspect_shards(paths: Sequence[str], seconds: float, remote: Remote) -> list[ShardFacts]:
    """Counts samples by index files, by `NNNNN_stats.json` of img2dataset, and by headers as far as the seconds reach.

    Remote shards are counted only by an index beside them. FileError if an index is damaged, at which a run would stop.
    """
    shards = {path: ShardFacts(path) for path in paths}
    with suppress(FileError, LastingError):  # no index: their number stays unknown
        for path, (count, _) in sizes([path for path in shards if is_remote(path)], remote, 1).items():
            shards[path].samples = count
    local = [shard for path, shard in shards.items() if not is_remote(path)]
    indices = {folder: read_manifest(str(folder)) for folder in {Path(shard.path).parent for shard in local}}
    hashed, bytes_left = {shard.path for shard in _spread(local, _HASHED_SHARDS)}, _HASHED_BYTES
    for shard in local:
        file = Path(shard.path)
        entry, shard.size = indices[file.parent].get(file.name, {}), file.stat().st_size
        stated = entry.get("samples", known_json(file.with_name(f"{file.stem}_stats.json")).get("successes"))
        shard.samples = stated if isinstance(stated, int) else None
        if entry and entry["bytes"] != shard.size:
            shard.stale = f"{entry['bytes']} bytes in {MANIFEST}, {shard.size} on disk"
        elif shard.path in hashed and entry.get("sha256"):
            bytes_left -= shard.size
            if bytes_left > 0 and entry["sha256"] != sha256(file):
                shard.doubtful = f"other content than {MANIFEST} says (sha256)"
    start, earlier = time.monotonic(), set[int]()
    # those without a number first; of the others a few, to see whether it is true
    for n, shard in enumerate(sorted(_spread(local, len(local)), key=lambda shard: shard.samples is not None)):
        if n and time.monotonic() - start > seconds * (1 if shard.samples is None else 0.3):
            break
        _walk(shard, earlier)
    return list(shards.values())


def _spread(shards: Sequence[ShardFacts], count: int) -> list[ShardFacts]:
    """So many of the shards, from all over the source."""
    return [shards[round(i)] for i in np.linspace(0, len(shards) - 1, min(count, len(shards)))]


def _walk(shard: ShardFacts, earlier: set[int]) -> None:
    """Reads the headers of a shard; `earlier` are the samples of those before, which its own join."""
    keys, samples = list[str](), set[int]()
    try:
        for sample in walk(shard.path, compressed=True):
            keys.append(sample.key)
            samples.add(hash((sample.key, *sorted((kind, size) for kind, (_, size) in sample.members.items()))))
            kinds = sample.members.keys()
            shard.incomplete += not (kinds & set(IMAGE_TYPES) and kinds & set(CAPTION_TYPES))
    except FileError as error:
        shard.broken = str(error)
    shard.repeated, shard.copies = len(keys) - len({*keys}), len(samples & earlier)
    earlier |= samples
    if shard.samples not in (None, len(keys)) and not shard.stale:
        shard.doubtful = f"{shard.samples} samples by its index or statistics, {len(keys)} in the tar"
    shard.walked, shard.samples = True, len(keys)


def _of_shards(shards: list[ShardFacts], is_stated: bool) -> Iterator[Values]:
    walked = [shard for shard in shards if shard.walked]
    unknown = [shard for shard in shards if shard.samples is None]
    if not is_stated and (uncounted := sum(is_remote(shard.path) for shard in unknown)):
        yield "uncounted shards", {"count": uncounted}
    if broken := [shard for shard in walked if shard.broken]:
        values = {"walked": len(walked), "reason": broken[0].broken, "shard": broken[0].path}
        yield "broken shards", {"count": len(broken), **values}
    incomplete, repeated, copies = np.sum([(s.incomplete, s.repeated, s.copies) for s in shards], axis=0).tolist()
    if repeated:
        worst = max(shards, key=lambda shard: shard.repeated)
        yield "torn samples" if incomplete else "repeated keys", {"count": repeated, "shard": worst.path}
    elif incomplete:
        yield "incomplete samples", {"count": incomplete}
    if copies:
        worst = max(shards, key=lambda shard: shard.copies)
        yield "copied samples", {"count": copies, "most": worst.copies, "shard": worst.path}
    for name in ("stale", "doubtful"):
        if reasons := [(shard.path, getattr(shard, name)) for shard in shards if getattr(shard, name)]:
            yield f"{name} index", {"count": len(reasons), "shard": reasons[0][0], "reason": reasons[0][1]}
    if 0 < len(unknown) < len(shards) and not is_stated:
        yield "estimated shards", {"count": len(shards) - len(unknown), "total": len(shards)}


def _of_run(reports: dict[str, dict[str, Any]], settings: dict[str, Any], ranks: int) -> Iterator[Values]:
    samples = settings["train_samples"] or sum(report["samples"] for report in reports.values())
    batch, workers = settings["global_batch_size"], max(settings["workers"], 1)
    if batch % ranks:
        yield "unequal ranks", {"batch": batch, "ranks": ranks}
    if 0 < samples < batch:
        yield "too few pairs", {"samples": samples, "batch": batch}
    if 0 < samples // batch < workers:
        yield "idle workers", {"steps": samples // batch, "workers": workers}


def _report(
    shards: list[ShardFacts], samples: list[SampleFacts], max_tokens: int, stated: int | None
) -> dict[str, Any]:
    counts = [shard.samples for shard in shards if shard.samples is not None]
    known = "counted" if len(counts) == len(shards) else "estimated" if counts else "unknown"
    causes = diagnostics.causes_of(samples)
    report: dict[str, Any] = {
        "shards": len(shards),
        "samples": stated or round(sum(counts) * len(shards) / max(len(counts), 1)),
        "samples_are": "stated" if stated else known,
        "bytes": sum(shard.size for shard in shards),
        "read": len(samples),
        "usable": len(samples) - causes.total(),
        "bad": dict(causes),
        "formats": dict(Counter(sample.format for sample in samples if sample.format)),
    }
    if sides := [min(sample.size) for sample in samples if sample.size]:
        report["short_side"] = _quantiles(sides)
        report["images_per_second"] = round(len(sides) / max(sum(sample.seconds for sample in samples), 1e-9))
    if captioned := [sample for sample in samples if sample.captions]:
        report["caption_fields"] = dict(Counter(sample.caption_field for sample in captioned))
        report["captions_per_image"] = _quantiles([sum(map(bool, sample.captions)) for sample in captioned])
    if lengths := [length for sample in samples for length in sample.lengths]:
        report["tokens"] = _quantiles(lengths)
        report["truncated_share"] = round(float(np.mean(np.array(lengths) > max_tokens)), 4)
    return report


def _quantiles(values: list[int]) -> dict[str, int]:
    return {name: int(np.percentile(values, q)) for name, q in (("p50", 50), ("p95", 95), ("max", 100))}


def _print(reports: dict[str, dict[str, Any]], findings: list[Diagnostic]) -> None:
    for name in dict.fromkeys([*reports, *(one.source for one in findings)]):
        report = yaml.safe_dump(reports.get(name, {}), sort_keys=False, default_flow_style=None, width=120)
        print(one_line(name), *(f"  {line}" for line in report.splitlines() if line != "{}"), sep="\n")
        for one in findings:
            if one.source == name:
                print(f"  {one.severity.upper():5}  {one_line(one.what)}\n         -> {one.mend}")
    severities = Counter(one.severity for one in findings)
    names = {"stops": "errors (a run would stop)", "warns": "warnings", "notes": "notes"}
    counts = [f"{name}: {severities[kind]}" for kind, name in names.items() if severities[kind]]
    print(", ".join(counts) or "no problems: a run with these settings would start")


def write_indices(shards: list[str]) -> None:
    """Reads local shards sequentially and writes their indexes.

    Raises:
        FileError: if one cannot be read to its end, `stair prepare` is not finished, or another tool's index is there.
    """
    folders: dict[Path, list[Path]] = {}
    for shard in map(Path, dict.fromkeys(shards)):
        folders.setdefault(shard.parent, []).append(shard)
    for folder, paths in folders.items():
        with preparing(folder) as state:
            if plans := sorted(state.glob("*.plan")):
                what = f"{folder} is being prepared ({plans[0].relative_to(folder)})"
                raise FileError(f"{what}: finish `stair prepare` first, with the same command", folder)
            records, _ = run({path: () for path in paths}, _count, state, "index", workers=0)
            finish(folder, state, records)


def _count(shard: Path) -> Record:
    return {"inputs": 1, "skipped": [], "samples": index_shard(shard)}

"""`stair doctor`: what is wrong with shards, and the setting that mends it, in seconds and before a run is started.

Counts come from index files or from headers, as far as the time given reaches; some samples of shards all over a source
are read and decoded (`inspection.py`, which is also what runs before every fit).
"""

import json as json_format
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stair.data.headers import Count, count, spread, write_indices
from stair.data.inspection import Finding, Needs, Said, Severity, Sight, first_samples, judge, look
from stair.data.remote import Remote, is_remote
from stair.data.specs import Shards, mixture
from stair.data.tars import expand
from stair.plain import one_line
from stair.vocabulary import Vocabulary

_RUN = "the run"  # the name under which stands what concerns all sources together
_SHARDS, _REMOTE_SHARDS = 8, 2  # of a source, from which samples are read


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
    """Says what is wrong with shards and which setting mends it.

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
    asked = {"vocabulary": vocabulary, "max_tokens": max_tokens, "image_size": image_size}
    asked |= {"global_batch_size": global_batch_size, "workers": workers, "train_samples": train_samples}
    files = [configs] if isinstance(configs, str) else configs or []
    settings = _settings(files) | {name: value for name, value in asked.items() if value is not None}
    needs = Needs(
        Vocabulary(settings["vocabulary"]) if settings.get("vocabulary") else None,
        **{name: settings[name] for name in ("max_tokens", "image_size", "max_pixels", "max_bad_share", "flip")},
    )
    sources = _sources(data)
    if write_index:
        write_indices([shard for spec in sources.values() for shard in expand(spec.shards) if not is_remote(shard)])
    reports, findings = {}, []
    for name, given in sources.items():
        report, found = _examine(name, given, needs, settings, samples, seconds / len(sources))
        reports[name] = report
        findings += sorted(found, key=lambda finding: ("stops", "warns", "notes").index(finding.severity))
    findings += [Finding(level, _RUN, what, mend) for level, what, mend in _of_run(reports, settings, ranks)]
    _print(reports, findings, json)
    if any(finding.severity == "stops" for finding in findings):
        raise SystemExit(1)


# what ImageTextShards and the towers take where nothing is said
_DEFAULTS: dict[str, Any] = {
    "max_tokens": 77,
    "image_size": 224,
    "global_batch_size": 256,
    "workers": 4,
    "max_pixels": Needs.max_pixels,
    "max_bad_share": Needs.max_bad_share,
    "flip": False,
    "train_samples": None,
    "remote": {},
}
_MODEL = {"vocabulary": "vocabulary", "max_tokens": "text.max_tokens", "image_size": "image.image_size"}


def _settings(files: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    base = Path(__file__).parents[2] / "configs" / "base.yaml"
    merged = OmegaConf.merge(*(OmegaConf.load(str(path)) for path in ([base, *files] if files else [])), {})
    found = dict(_DEFAULTS)
    for name in _DEFAULTS:
        if (value := OmegaConf.select(merged, f"data.{name}")) is not None:
            found[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
    for name, place in _MODEL.items():
        if (value := OmegaConf.select(merged, f"model.init_args.stair.{place}")) is not None:
            found[name] = value
    return found


def _sources(data: list[str]) -> dict[str, Shards]:
    """Sources by name; files that a shell has made of a glob are one source again."""
    files = [word for word in data if Path(word).is_file()]
    sources: dict[str, Shards] = {}
    if files:
        sources[files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"] = Shards(files)
    for word in data:
        if word in files:
            continue
        if word.lstrip().startswith("{") and ":" in word:
            sources |= _named(word)
        else:
            sources[word] = Shards(word)
    return sources


def _named(word: str) -> dict[str, Shards]:
    try:
        named = yaml.safe_load(word)
        return mixture({str(n): Shards(**spec) if isinstance(spec, dict) else spec for n, spec in named.items()})
    except (TypeError, yaml.YAMLError) as error:
        wanted = "'{name: spec, ...}' or '{name: {shards: spec, weight: 1.0}, ...}'"
        raise ValueError(f"{word!r} is no mapping of sources ({error}); wanted {wanted}") from error


def _examine(
    name: str, given: Shards, needs: Needs, settings: dict[str, Any], samples: int, seconds: float
) -> tuple[dict[str, Any], list[Finding]]:
    remote = Remote(**settings["remote"]).at_first()
    try:
        shards = expand(given.shards)
        counted = count(shards, seconds, remote)
    except (ValueError, OSError) as error:
        return {"shards": 0, "samples": 0}, [Finding("stops", name, str(error), "the spec in --data.train")]
    chosen = spread(shards, _REMOTE_SHARDS if is_remote(shards[0]) else _SHARDS)
    seen = [first_samples(shard, -(-samples // len(chosen)), remote) for shard in chosen]
    sight = look((sample for found, _ in seen for sample in found), needs)
    findings = [
        Finding(level, name, what, mend) for level, what, mend in _of_shards(counted, bool(settings["train_samples"]))
    ]
    if sight.samples:
        findings += judge(name, sight, needs)
    else:
        reason = next((reason for _, reason in seen if reason), "not a tar, or empty")
        what = f"no sample could be read from {len(chosen)} shards, the first: {reason}"
        findings.append(Finding("stops", name, what, "check --data.train; `stair prepare` makes shards"))
    if not needs.vocabulary:
        findings.append(Finding("notes", name, "captions were not measured in tokens", "--vocabulary or --configs"))
    return _report(counted, sight, settings, settings["train_samples"]), findings


def _of_shards(counted: Count, stated: bool) -> Iterator[Said]:
    shards = counted.shards
    unknown = [shard for shard in shards if is_remote(shard) and shard not in counted.samples]
    if unknown and not stated:
        what = f"{len(unknown)} shards are not local, with no index.json: only reading them all would count them"
        yield (
            "stops",
            what,
            "--write_index where they are local, and copy *.idx too; or data.resample, data.train_samples",
        )
    if counted.broken:
        shard, reason = next(iter(counted.broken.items()))
        what = f"{len(counted.broken)} of {len(counted.walked)} shards that were walked are broken, the first: {reason}"
        yield "warns", what, f"get {shard} again; training skips what is lost, evaluation refuses it"
    if repeated := counted.repeated.total():
        shard = counted.repeated.most_common(1)[0][0]
        what = (
            f"{repeated} keys come again later in the same shard, most in {shard}: members of a sample are torn apart"
        )
        yield (
            "stops" if counted.incomplete else "warns",
            what,
            "write the tar anew with the members of a sample together (--sort=name)",
        )
    elif counted.incomplete:
        what = f"{counted.incomplete} samples have no image or no caption member"
        yield "warns", what, "training skips and counts them, up to --data.max_bad_share; evaluation refuses them"
    if copies := counted.copies.total():
        shard, most = counted.copies.most_common(1)[0]
        what = (
            f"{copies} samples are in an earlier shard too, by key and size of all members: {most} of them in {shard}"
        )
        yield (
            "warns",
            what,
            "leave one of the copies out of --data.train: they come twice an epoch, and against each other",
        )
    if counted.namesakes:
        what = f"{counted.namesakes} keys come in several shards, with other content"
        yield "notes", what, "nothing: a sample is told by its shard and key"
    levels: list[tuple[Severity, dict[str, str]]] = [("stops", counted.stale), ("warns", counted.doubtful)]
    for severity, found in levels:
        for shard, reason in list(found.items())[:1]:
            what = f"{len(found)} shards are not what their index says, the first is {shard}: {reason}"
            yield severity, what, "get them again; or --write_index, if they are as they should be"
    if len(counted.samples) < len(shards) and counted.samples and not stated:
        what = f"{len(counted.samples)} of {len(shards)} shards were counted in the time given, the others estimated"
        yield "notes", what, "--write_index counts all of them, once; or more --seconds"


def _of_run(reports: dict[str, dict[str, Any]], settings: dict[str, Any], ranks: int) -> Iterator[Said]:
    samples, shards = (sum(report[what] for report in reports.values()) for what in ("samples", "shards"))
    samples = settings["train_samples"] or samples
    batch, workers = settings["global_batch_size"], max(settings["workers"], 1)
    steps = samples // batch
    if batch % ranks:
        yield (
            "stops",
            f"global_batch_size={batch} cannot be shared by {ranks} ranks",
            "--data.global_batch_size, a multiple",
        )
    if 0 < samples < batch:
        what = f"there are {samples} pairs, fewer than global_batch_size={batch}: an epoch would have no step"
        yield "stops", what, "a smaller --data.global_batch_size, or more data"
    if 0 < steps < workers:
        what = f"an epoch has {steps} steps: only as many of {workers} workers have one to make"
        yield "warns", what, f"--data.workers {steps}"
    elif 0 < shards < ranks * workers:
        what = f"{shards} shards for {ranks} x {workers} readers: some read a part of one, past the rest"
        yield "notes", what, f"--data.workers {max(shards // ranks, 1)}, or shards with fewer samples"


def _report(counted: Count, sight: Sight, settings: dict[str, Any], stated: int | None) -> dict[str, Any]:
    known = "counted" if len(counted.samples) == len(counted.shards) else "estimated" if counted.samples else "unknown"
    samples = stated or counted.total
    report: dict[str, Any] = {
        "shards": len(counted.shards),
        "samples": samples,
        "samples_are": "stated" if stated else known,
        "bytes": sum(counted.sizes.values()),
        "looked_at": sight.samples,
        "taken": sight.samples - sight.left_out,
        "bad": dict(sight.bad),
        "formats": dict(sight.formats),
    }
    if sight.sides:
        report["short_side"] = _quantiles([min(side) for side in sight.sides])
        report["images_a_second"] = round(len(sight.sides) / max(sight.decode_seconds, 1e-9))
    if sight.texts:
        report["caption_fields"] = dict(sight.fields)
        report["captions_an_image"] = _quantiles([len(texts) for texts in sight.texts])
    if sight.tokens:
        report["tokens"] = _quantiles(sight.tokens)
        report["share_cut"] = round(float(np.mean(np.array(sight.tokens) > settings["max_tokens"])), 4)
    return report


def _quantiles(values: list[int]) -> dict[str, int]:
    return {name: int(np.percentile(values, q)) for name, q in (("p50", 50), ("p95", 95), ("most", 100))}


def _print(reports: dict[str, dict[str, Any]], findings: list[Finding], as_json: bool) -> None:
    if as_json:
        print(
            json_format.dumps({"sources": reports, "findings": [finding._asdict() for finding in findings]}, indent=1)
        )
        return
    for name, report in reports.items():
        print(name)
        for line in _lines(report):
            print(f"  {one_line(line)}")
        for finding in findings:
            if finding.source == name:
                print(f"  {finding.severity.upper():5}  {one_line(finding.what)}\n         -> {finding.mend}")
    for finding in findings:
        if finding.source not in reports:
            print(f"{finding.severity.upper()}  {one_line(finding.what)}\n         -> {finding.mend}")
    severities = Counter(finding.severity for finding in findings)
    print(", ".join(f"{count} {name}" for name, count in severities.items()) or "nothing to mend")


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if not report["shards"]:
        return
    yield (
        f"{report['shards']} shards, {report['samples']} samples ({report['samples_are']}), "
        f"{report['bytes'] / 2**20:.1f} MiB; "
        f"looked at {report['looked_at']} samples: {report['taken']} taken, {sum(report['bad'].values())} skipped"
    )
    if "short_side" in report:
        formats = ", ".join(f"{count} {kind}" for kind, count in report["formats"].items())
        pace = f"{report['images_a_second']} decoded a second and core"
        yield f"images: {formats}; short side {_said(report['short_side'])} px; {pace}"
    if "captions_an_image" in report:
        tokens = f"; tokens {_said(report['tokens'])}, {report['share_cut']:.1%} cut" if "tokens" in report else ""
        fields = ", ".join(f"{count} in {field}" for field, count in report["caption_fields"].items())
        yield f"captions: {fields}; {_said(report['captions_an_image'])} an image{tokens}"


def _said(quantiles: dict[str, int]) -> str:
    return "{p50} (p95 {p95}, most {most})".format(**quantiles)

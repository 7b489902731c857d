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

from datamodules.headers import Count, count, spread, write_indices
from datamodules.inspection import Finding, Needs, Said, Sight, first_samples, judge, look
from datamodules.tars import expand, is_remote
from stair.vocabulary import Vocabulary

_SHARDS, _REMOTE_SHARDS = 8, 2  # of a source, from which samples are read


def doctor(
    data: list[str],
    configs: str | list[str] | None = None,
    vocabulary: str | None = None,
    max_tokens: int | None = None,
    image_size: int | None = None,
    global_batch_size: int | None = None,
    workers: int | None = None,
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
        ranks: processes that train.
        samples: of a source, that are read and decoded.
        seconds: for reading headers, where no index says how many samples there are.
        json: print everything as JSON.
        write_index: read all of the local shards and write index.json beside them.

    Raises:
        SystemExit: with status 1 if something would stop a run.
    """
    given = {"vocabulary": vocabulary, "max_tokens": max_tokens, "image_size": image_size}
    given |= {"global_batch_size": global_batch_size, "workers": workers}
    files = [configs] if isinstance(configs, str) else configs or []
    settings = _settings(files) | {name: value for name, value in given.items() if value is not None}
    needs = Needs(
        Vocabulary(settings["vocabulary"]) if settings.get("vocabulary") else None,
        **{name: settings[name] for name in ("max_tokens", "image_size", "max_pixels", "max_bad_share", "flip")},
    )
    sources = _sources(data)
    if write_index:
        write_indices([shard for spec in sources.values() for shard in expand(spec) if not is_remote(shard)])
    reports, findings = {}, []
    for name, spec in sources.items():
        report, found = _examine(name, spec, needs, settings, ranks, samples, seconds / len(sources))
        reports[name] = report
        findings += sorted(found, key=lambda finding: ("stops", "warns", "notes").index(finding.severity))
    if sum(report.get("samples", 0) for report in reports.values()) < settings["global_batch_size"]:
        what = f"all sources together hold fewer pairs than global_batch_size={settings['global_batch_size']}: no step"
        findings.append(Finding("stops", "all", what, "a smaller --data.global_batch_size, or more data"))
    _print(reports, findings, json)
    if any(finding.severity == "stops" for finding in findings):
        raise SystemExit(1)


# what ImageTextShards and the towers take where nothing is said
_DEFAULTS = {
    "max_tokens": 77,
    "image_size": 224,
    "global_batch_size": 256,
    "workers": 4,
    "max_pixels": Needs.max_pixels,
    "max_bad_share": Needs.max_bad_share,
    "flip": False,
    "train_samples": None,
}
_MODEL = {"vocabulary": "vocabulary", "max_tokens": "text.max_tokens", "image_size": "image.image_size"}


def _settings(files: list[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf

    base = Path(__file__).parents[1] / "configs" / "base.yaml"
    merged = OmegaConf.merge(*(OmegaConf.load(path) for path in ([base, *files] if files else [])), {})
    found = dict(_DEFAULTS)
    for name in _DEFAULTS:
        if (value := OmegaConf.select(merged, f"data.{name}")) is not None:
            found[name] = value
    for name, place in _MODEL.items():
        if (value := OmegaConf.select(merged, f"model.init_args.stair.{place}")) is not None:
            found[name] = value
    return found


def _sources(data: list[str]) -> dict[str, list[str]]:
    """Specs by name; files that a shell has made of a glob are one source again."""
    files = [word for word in data if Path(word).is_file()]
    sources: dict[str, list[str]] = {}
    if files:
        sources[files[0] if len(files) == 1 else f"{files[0]} to {files[-1]}"] = files
    for word in data:
        if word in files:
            continue
        named = yaml.safe_load(word) if word.lstrip().startswith("{") and ":" in word else None
        if isinstance(named, dict):
            sources |= {str(name): [spec] if isinstance(spec, str) else list(spec) for name, spec in named.items()}
        else:
            sources[word] = [word]
    return sources


def _examine(
    name: str, spec: list[str], needs: Needs, settings: dict[str, Any], ranks: int, samples: int, seconds: float
) -> tuple[dict[str, Any], list[Finding]]:
    try:
        shards = expand(spec)
    except FileNotFoundError as error:
        return {"samples": 0}, [Finding("stops", name, str(error), "--data.train")]
    counted = count(shards, seconds)
    chosen = spread(shards, _REMOTE_SHARDS if is_remote(shards[0]) else _SHARDS)
    each = -(-samples // len(chosen))
    sight = look((sample for shard in chosen for sample in first_samples(shard, each)), needs)
    findings = [Finding(level, name, what, mend) for level, what, mend in _of_shards(counted, settings, ranks)]
    if sight.samples:
        findings += judge(name, sight, needs)
    else:
        reason = next(iter(counted.broken.values()), "not a tar, or empty")
        what = f"no sample could be read from {len(chosen)} shards, the first: {reason}"
        findings.append(Finding("stops", name, what, "check the spec; `stair prepare` makes shards"))
    if not needs.vocabulary:
        findings.append(Finding("notes", name, "captions were not measured in tokens", "--vocabulary or --configs"))
    return _report(counted, sight, settings, ranks), findings


def _of_shards(counted: Count, settings: dict[str, Any], ranks: int) -> Iterator[Said]:
    shards, batch, workers = counted.shards, settings["global_batch_size"], max(settings["workers"], 1)
    remote = [shard for shard in shards if is_remote(shard)]
    if batch % ranks:
        yield (
            "stops",
            f"global_batch_size={batch} cannot be shared by {ranks} ranks",
            "a multiple, --data.global_batch_size",
        )
    if remote and not settings["train_samples"]:
        what = f"{len(remote)} shards are remote and cannot be counted without reading them all"
        yield "stops", what, "--data.train_samples, or an index.json beside them (--write_index where they are local)"
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
    if counted.stale:
        shard, reason = next(iter(counted.stale.items()))
        yield (
            "warns",
            f"{len(counted.stale)} shards are not what their index says, {shard}: {reason}",
            "get them again, or --write_index",
        )
    if len(counted.samples) < len(shards) and counted.samples:
        what = f"{len(counted.samples)} of {len(shards)} shards were counted in the time given, the others estimated"
        yield "notes", what, "--write_index counts all of them, once; or more --seconds"
    yield from _readers(counted, batch, workers, ranks)


def _readers(counted: Count, batch: int, workers: int, ranks: int) -> Iterator[Said]:
    steps = counted.total // batch
    if 0 < steps < workers:
        yield (
            "warns",
            f"an epoch has {steps} steps, so only {steps} of {workers} workers have one to make",
            f"--data.workers {steps}",
        )
    if len(counted.shards) < ranks * workers:
        what = f"{len(counted.shards)} shards for {ranks} x {workers} readers: some read a part of one, past the rest"
        yield "notes", what, f"--data.workers {max(len(counted.shards) // ranks, 1)}, or shards with fewer samples"


def _report(counted: Count, sight: Sight, settings: dict[str, Any], ranks: int) -> dict[str, Any]:
    known = len(counted.samples) == len(counted.shards)
    report: dict[str, Any] = {
        "shards": len(counted.shards),
        "samples": counted.total,
        "samples_are": "counted" if known else "estimated",
        "bytes": sum(counted.sizes.values()),
        "steps_an_epoch": counted.total // settings["global_batch_size"],
        "looked_at": sight.samples,
        "bad": dict(sight.bad),
        "formats": dict(sight.formats),
    }
    if sight.sides:
        report["short_side"] = _quantiles([min(side) for side in sight.sides])
        report["images_a_second"] = round(len(sight.sides) / max(sight.decode_seconds, 1e-9))
    if sight.texts:
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
            print(f"  {line}")
        for finding in findings:
            if finding.source == name:
                print(f"  {finding.severity.upper():5}  {finding.what}\n         -> {finding.mend}")
    for finding in findings:
        if finding.source not in reports:
            print(f"{finding.severity.upper()}  {finding.what}\n         -> {finding.mend}")
    severities = Counter(finding.severity for finding in findings)
    print(", ".join(f"{count} {name}" for name, count in severities.items()) or "nothing to mend")


def _lines(report: dict[str, Any]) -> Iterator[str]:
    if "shards" not in report:
        return
    yield (
        f"{report['shards']} shards, {report['samples']} samples ({report['samples_are']}), "
        f"{report['bytes'] / 2**20:.1f} MiB, {report['steps_an_epoch']} steps an epoch; "
        f"looked at {report['looked_at']} samples"
    )
    if "short_side" in report:
        formats = ", ".join(f"{count} {kind}" for kind, count in report["formats"].items())
        pace = f"{report['images_a_second']} decoded a second and core"
        yield f"images: {formats}; short side {_said(report['short_side'])} px; {pace}"
    if "captions_an_image" in report:
        tokens = f"; tokens {_said(report['tokens'])}, {report['share_cut']:.1%} cut" if "tokens" in report else ""
        yield f"captions: {_said(report['captions_an_image'])} an image{tokens}"


def _said(quantiles: dict[str, int]) -> str:
    return "{p50} (p95 {p95}, most {most})".format(**quantiles)

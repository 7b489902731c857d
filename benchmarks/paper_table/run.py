"""Trains and measures every run of a plan, then writes the table: one command, taken up again where it stopped.

    python benchmarks/paper_table/run.py benchmarks/paper_table/plans/emoji.yaml runs/paper_table/emoji [--jobs 2]

Further arguments (`--trainer.accelerator gpu --data.workers 1`) go to every stage: where it runs, and not what is trained.

A plan (`plans/*.yaml`) names data, seeds, stages and variants; a variant is a chain of stages, or a base and what differs.
Every stage runs through `main.py fit`, every measurement through `stair evaluate`. Finished stages and measurements are
not repeated, and variants share the stages that they have in common. A failed run is reported; the next call tries it
again. Validation sets choose, test sets are only reported.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

HOME = Path(__file__).parents[2]
_LOCKS: dict[Path, threading.Lock] = {}


def main(
    plan_path: Path, out: Path, jobs: int, only: list[str], seeds: list[int] | None, further: Sequence[str] = ()
) -> int:
    """Runs what is missing. Returns the number of runs that failed."""
    plan = read_plan(plan_path)
    if unknown := sorted(set(only) - plan["variants"].keys()):
        sys.exit(f"{plan_path} has no variant {unknown}; it has {list(plan['variants'])}")
    out.mkdir(parents=True, exist_ok=True)
    if plan.get("tokens") == "train":
        _write_vocabulary(plan, out / "vocab.txt")
    expected = [
        (name, seed)
        for seed in (seeds if seeds is not None else plan["seeds"])  # a whole table of one seed first
        for name in plan["variants"]
        if not only or name in only
    ]
    print(f"{len(expected)} runs of {plan['steps']} steps, {jobs} at a time, in {out}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        failed = [reason for reason in pool.map(lambda run: _run(plan, out, *run, further), expected) if reason]
    for reason in failed:
        print(f"failed: {reason}")
    from table import write_table

    write_table(plan, out)
    return len(failed)


def read_plan(path: Path) -> dict[str, Any]:
    """A plan with the stages of every variant, and `${STAIR_SHARED_DATA}` filled in (`../shared/data` if it is not set).

    `base: FILE` of a plan takes the keys that the plan lacks from another plan, and merges `stages` setting by setting.

    Raises:
        SystemExit: if a variant names no known setting, or the variants do not see equally many samples.
    """
    plan = _read(path)
    for name, variant in plan["variants"].items():
        stages = _stages(plan, name, path)
        variant["stages"] = [_nested(config, settings) for config, settings in stages.items()]
        steps = sum(stage["steps"] for stage in variant["stages"])
        if steps != plan["steps"]:
            sys.exit(f"{path}: variant {name} takes {steps} steps, the plan {plan['steps']}: give all the same number")
    return plan


def _read(path: Path) -> dict[str, Any]:
    data = os.environ.get("STAIR_SHARED_DATA", "../shared/data")
    plan: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8").replace("${STAIR_SHARED_DATA}", data))
    if "base" not in plan:
        return plan
    base = _read(path.parent / plan.pop("base"))
    own = plan.get("stages", {})
    stages = {config: settings | own.get(config, {}) for config, settings in base["stages"].items()}
    return base | plan | {"stages": stages}


def _stages(plan: dict[str, Any], name: str, path: Path) -> dict[str, dict[str, Any]]:
    """Settings of a variant by stage: those of its base or of the plan's `stages`, with what the variant changes.

    A setting of the variant replaces the value in each of its stages that has the setting, or in all if none has it;
    settings under a stage's name are of that stage. The last part of a known setting's name is enough.
    """
    change = dict(plan["variants"][name])
    base, chain, _, _ = (change.pop(key, None) for key in ("base", "chain", "title", "stages"))
    stages = _stages(plan, base, path) if base else {config: plan["stages"][config] for config in chain}
    names = {key.rsplit(".", 1)[-1]: key for settings in plan["stages"].values() for key in settings}

    def full(settings: dict[str, Any]) -> dict[str, Any]:
        if unknown := [key for key in settings if key not in names and "." not in key]:
            sys.exit(f"{path}: variant {name}: {unknown} is no stage of it and no setting of `stages`")
        return {names.get(key, key): value for key, value in settings.items()}

    own = {config: full(change.pop(config, {})) for config in stages}
    shared = full(change)
    new = shared.keys() - {key for settings in stages.values() for key in settings}
    return {
        config: settings | {key: shared[key] for key in shared if key in settings or key in new} | own[config]
        for config, settings in stages.items()
    }


def _nested(config: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A stage for `main.py fit`: `objective.flops_text` becomes a key of `model.init_args`."""
    stage: dict[str, Any] = {"config": config, "steps": settings["steps"]}
    for name, value in settings.items():
        if name != "steps":
            *path, last = name.split(".")
            folder = stage.setdefault("settings", {})
            for part in path if path[0] == "transition" else ["model", "init_args", *path]:
                folder = folder.setdefault(part, {})
            folder[last] = value
    return stage


def _write_vocabulary(plan: dict[str, Any], path: Path) -> None:
    """A vocabulary of the tokens that occur in training captions."""
    if path.is_file():
        return
    sys.path.insert(0, str(HOME))
    from stair.data.pairs import entries, read_entry
    from stair.data.samples import CAPTION_TYPES, captions
    from stair.vocabulary import Vocabulary

    whole = Vocabulary(plan["vocabulary"])
    samples = entries(plan["train"], CAPTION_TYPES)
    used = {i for entry in samples for text in captions(read_entry(entry).members) for i in whole.token_ids(text)}
    special = [token for token in whole.tokens if token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    path.write_text("\n".join([*special, *whole.tokens_of(sorted(used))]) + "\n", encoding="utf-8")


def _run(plan: dict[str, Any], out: Path, name: str, seed: int, further: Sequence[str]) -> str:
    """Trains and measures one variant with one seed. Returns why it failed, or nothing."""
    folder = out / name / f"seed{seed}"
    chain: list[Any] = [plan["files"], plan.get("settings"), seed]
    homes = []
    for stage in plan["variants"][name]["stages"]:
        chain.append(stage)
        # variants that begin alike share what they have in common
        homes.append(out / "trained" / hashlib.sha256(json.dumps(chain, sort_keys=True).encode()).hexdigest()[:16])
    sets = plan["val"] | plan.get("test", {})
    if (done := folder / "evaluation" / "evaluation.json").is_file():
        known = json.loads((folder / "record.json").read_text())
        other = [each["at"] for each in known.values()] != [home.name for home in homes]
        if not other and json.loads(done.read_text())["sets"].keys() == sets.keys():
            return ""
        print(f"again: {name}, seed {seed}: the plan says other {'settings' if other else 'sets'} than it was run with")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model: Path | None = None
    trained: dict[str, Any] = {}
    for stage, home in zip(plan["variants"][name]["stages"], homes, strict=True):
        with _LOCKS.setdefault(home, threading.Lock()):
            model = _train(plan, out, stage, seed, home, model, further)
        if model is None:
            return f"{name}, seed {seed}: {home / 'train.log'} has the reason"
        trained[stage["config"]] = {"at": home.name, **json.loads((home / "record.json").read_text())}
    (folder / "record.json").write_text(json.dumps(trained, indent=2) + "\n")
    command = [
        sys.executable,
        "-m",
        "stair.cli",
        "evaluate",
        str(model),
        *(f"{k}={place}" for k, place in sets.items()),
    ]
    command += ["--output", str(folder / "evaluation"), "--no_probe"]
    if plan.get("classnames"):
        command += ["--classnames", plan["classnames"]]
    if not _call(command, folder / "evaluation.log"):
        return f"{name}, seed {seed}: {folder}/evaluation.log has the reason"
    print(f"done: {name}, seed {seed}", flush=True)
    return ""


def _train(
    plan: dict[str, Any],
    out: Path,
    stage: dict[str, Any],
    seed: int,
    home: Path,
    before: Path | None,
    further: Sequence[str],
) -> Path | None:
    """Trains one stage in a folder of its own, unless it has been. Returns its export, None if it failed."""
    config, steps = stage["config"], str(stage["steps"])
    model = home / config / ("clip" if config == "clip" else "stair")
    if model.is_dir() and (home / "record.json").is_file():  # else this script was killed before it had written it
        return model
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "main.py", "fit", "--config", f"configs/{config}.yaml"]
    for file in plan["files"]:
        command += ["--config", f"configs/{file}.yaml"]
    for name, settings in (("plan", plan.get("settings")), ("stage", stage.get("settings"))):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(settings or {}))
        command += ["--config", str(home / f"{name}.yaml")]
    vocabulary = out / "vocab.txt" if plan.get("tokens") == "train" else plan["vocabulary"]
    command += ["--run", str(home), "--ckpt_path", "last", "--trainer.max_steps", steps]
    command += ["--trainer.val_check_interval", steps, "--trainer.enable_progress_bar", "false"]
    command += ["--seed_everything", str(seed), "--data.seed", str(seed), "--data.train", plan["train"]]
    command += ["--data.val", json.dumps(plan["val"]), "--model.init_args.stair.vocabulary", str(vocabulary)]
    if before is not None:
        command += ["--transition.init_from", str(before)]
    command += further
    started = time.perf_counter()
    if not _call(command, home / "train.log"):
        return None
    facts = {"steps": stage["steps"], "seconds": round(time.perf_counter() - started, 1), "seed": seed}
    (home / "record.json").write_text(json.dumps(facts, indent=2) + "\n")
    return model


def _call(command: list[str], log: Path) -> bool:
    # glibc gives blocks above 32 MB back at once, and a B × V embedding has more at the whole vocabulary
    quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    with log.open("w") as file:
        done = subprocess.run(command, cwd=HOME, stdout=file, stderr=subprocess.STDOUT, env={**quiet, **os.environ})
    return done.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--only", nargs="*", default=[], help="names of variants; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, help="seeds; those of the plan by default")
    arguments, further = parser.parse_known_args()
    failed = main(arguments.plan, arguments.out.resolve(), arguments.jobs, arguments.only, arguments.seeds, further)
    sys.exit(failed > 0)

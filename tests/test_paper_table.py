"""The plans of benchmarks/paper_table can be compared, their table adds up, and a small one runs from end to end."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import main
from datamodules.synthetic import write_scenes
from lightning_modules.stage import Objective, TextObjective

HOME = Path(__file__).parents[1] / "benchmarks" / "paper_table"
PLANS = sorted((HOME / "plans").glob("*.yaml"))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(HOME))
    import run
    import table

    yield run, table
    for name in ("run", "table"):
        sys.modules.pop(name)


def record(kind: str, t2i: float, test: float) -> dict:
    def figures(recall):
        return {"retrieval": {"t2i/recall@1": recall, "i2t/recall@1": recall, "t2i/recall@10": 1, "i2t/recall@10": 1}}

    terms = {"terms": {"sparsity/image/active_terms": 20.0}} if kind == "sparse" else {}
    if kind == "sparse":
        at_64 = round(t2i - 0.1, 3) if t2i == 0.40 else t2i
        cuts = [("all", "both", t2i), ("top 64", "both", at_64), ("top 64", "images", (t2i + at_64) / 2)]
        cuts.append(("top 128", "both", t2i + 0.05))  # better than all terms
        terms["pruned"] = [{"kept": kept, "side": side, "t2i": r, "i2t": r} for kept, side, r in cuts]
    naming = {"vocabulary_probe": {"captions": {"top1": t2i, "frequency_baseline/top1": 0.324}}}
    return {"model": {"kind": kind}, "sets": {"v": figures(t2i) | terms | naming, "t": figures(test) | terms}}


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_variant_of_a_plan_sees_as_many_samples(scripts, path):
    plan = scripts[0].read_plan(path)
    for variant in plan["variants"].values():
        assert sum(stage["steps"] for stage in variant["stages"]) == plan["steps"]
        assert all((HOME.parents[1] / "configs" / f"{stage['config']}.yaml").is_file() for stage in variant["stages"])


@pytest.mark.slow
@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_stage_of_a_plan_has_settings_that_exist(scripts, path, tmp_path, capsys):
    plan = scripts[0].read_plan(path)
    stages = {json.dumps(s) for variant in plan["variants"].values() for s in variant["stages"]}
    for stage in map(json.loads, stages):
        files = [str(HOME.parents[1] / "configs" / f"{name}.yaml") for name in (stage["config"], *plan["files"])]
        for name, settings in (("plan", plan.get("settings")), ("stage", stage.get("settings"))):
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings or {}))
            files.append(str(tmp_path / f"{name}.yaml"))
        with pytest.raises(SystemExit) as end:
            args = [word for file in files for word in ("--config", file)]
            main.main(["fit", *args, "--model.init_args.stair.vocabulary=v", "--print_config"])
        printed = capsys.readouterr()
        assert end.value.code == 0, (stage, printed.err)
        model = yaml.safe_load(printed.out)["model"]
        if "objective" in model["init_args"]:  # checks the values, and which go together
            objective = TextObjective if model["class_path"].endswith("Stage2") else Objective
            objective(**model["init_args"]["objective"])


SMALL = {
    "title": "t",
    "steps": 5,
    "stages": {
        "stage1": {"steps": 2, "objective.flops_text": 1, "objective.flops_image": 1},
        "stage2": {"steps": 3, "objective.flops_text": 1},
    },
    "variants": {"stages": {"title": "s", "chain": ["stage1", "stage2"]}},
}


def read(scripts, folder, **changes):
    (folder / "plan.yaml").write_text(yaml.safe_dump({**SMALL, **changes}))
    return scripts[0].read_plan(folder / "plan.yaml")


def test_a_plan_of_unequal_runs_is_refused(scripts, tmp_path):
    with pytest.raises(SystemExit, match="variant stages takes 5 steps, the plan 6"):
        read(scripts, tmp_path, steps=6)


def test_a_variant_is_its_base_and_what_differs(scripts, tmp_path):
    changes = {"base": "stages", "flops_text": 7, "flops_image": 8, "stair.x": 9, "stage2": {"optimizer.lr": 4}}
    plan = read(scripts, tmp_path, variants={**SMALL["variants"], "other": {"title": "o", **changes}})
    first, second = plan["variants"]["other"]["stages"]
    objective = {"flops_text": 7, "flops_image": 8}
    assert first == {"config": "stage1", "steps": 2, "settings": given(objective, stair={"x": 9})}
    # stage 2 has no flops_image, and gets none; a setting that no stage has goes to all
    assert second["settings"] == given({"flops_text": 7}, stair={"x": 9}, optimizer={"lr": 4})


def given(objective, **others):
    return {"model": {"init_args": {"objective": objective, **others}}}


def test_a_plan_takes_from_its_base_what_it_does_not_say(scripts, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**SMALL, "seeds": [3]}))
    changes = {"base": "base.yaml", "stages": {"stage2": {"objective.flops_text": 5}}, "variants": SMALL["variants"]}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(changes))
    plan = scripts[0].read_plan(tmp_path / "plan.yaml")
    assert plan["seeds"] == [3] and plan["variants"]["stages"]["stages"][1]["settings"] == given({"flops_text": 5})


def test_a_setting_that_no_stage_has_needs_its_whole_name(scripts, tmp_path):
    variants = {**SMALL["variants"], "other": {"base": "stages", "flops_imagine": 1}}
    with pytest.raises(SystemExit, match=r"variant other: \['flops_imagine'\]"):
        read(scripts, tmp_path, variants=variants)


def test_the_table_means_over_seeds_and_chooses_on_validation(scripts, tmp_path):
    runs = {
        "dense": [("dense", 0.30, 0.4), ("dense", 0.34, 0.4)],
        "weaker": [("dense", 0.20, 0.9), ("dense", 0.20, 0.9)],  # the best dense run is what is compared with
        "other": [("dense", 0.99, 0.9)],  # dense too: never the sparse choice
        "a": [("sparse", 0.40, 0.1), ("sparse", 0.50, 0.1)],
        "b": [("sparse", 0.35, 0.9), ("sparse", 0.45, 0.9)],  # better on test, which must not matter
        "lucky": [("sparse", 0.60, 0.9)],  # a single seed is not chosen
    }
    for name, seeds in runs.items():
        for seed, values in enumerate(seeds):
            place = tmp_path / name / f"seed{seed}" / "evaluation"
            place.mkdir(parents=True)
            (place / "evaluation.json").write_text(json.dumps(record(*values)))
    plan = {"title": "T", "steps": 1, "val": {"v": ""}, "test": {"t": ""}, "variants": {n: {"title": n} for n in runs}}
    scripts[1].write_table(plan, tmp_path)
    text = (tmp_path / "table.md").read_text()
    spread = 100 * statistics.stdev([0.4, 0.5])
    assert f"| a ← (2) | 45.0 ± {spread:.1f} |" in text and "b ←" not in text
    assert f"v, t→i R@1: {0.45 / 0.32:.2f} × dense, wanted 1.13: met" in text
    assert f"t, i→t R@1: {0.1 / 0.4:.2f} × dense, wanted 1.08: not met" in text
    assert f"| v | b (2) | {0.40 / 0.32:.2f} | " in text and "lucky ←" not in text
    assert text.count("Frequency baseline (the most frequent term for every image): captions 32.4.") == 1
    assert (tmp_path / "recall_against_terms.png").stat().st_size > 1000
    chosen = json.loads((tmp_path / "table.json").read_text())
    assert (chosen["selected"], chosen["baseline"]) == ("a", "dense")
    # (0.3 + 0.5) / 2 of the best, 0.05 above (0.4 + 0.5) / 2, and of that; of images alone (0.35 + 0.5) / 2
    assert "v, t→i R@1 at 64 terms on both sides: 0.800 of its best cut, 0.889 of all terms" in text
    assert "v, t→i R@1 at 64 terms an image: 0.850 of its best cut, 0.944 of all terms" in text
    assert f"| v | b (2) | 1.25 | 1.25 | – | 1.25 | {0.4 / 0.45:.3f} / 1.000 |" in text
    scripts[1].write_table(plan, tmp_path, ["1"])
    assert "| a ← (1) | 50.0 |" in (tmp_path / "table.md").read_text()
    assert f"| v | weaker (2) | {0.20 / 0.32:.2f} | {0.20 / 0.32:.2f} | – | {0.20 / 0.32:.2f} | – | – |" in text


@pytest.mark.slow
def test_the_miniature_runs_and_is_not_run_twice(tmp_path):
    write_scenes(tmp_path / "scenes", train=64, val=16, image_size=32)
    plan = (HOME / "plans" / "miniature.yaml").read_text().replace("runs/paper_table/scenes", str(tmp_path / "scenes"))
    (tmp_path / "plan.yaml").write_text(plan)
    command = [sys.executable, str(HOME / "run.py"), str(tmp_path / "plan.yaml"), str(tmp_path / "out")]
    command += ["--trainer.enable_model_summary", "false"]  # further words go to every stage
    first = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "done: dense, seed 0" in first.stdout and "done: stages, seed 0" in first.stdout
    assert "STAIR ← (1)" in (tmp_path / "out" / "table.md").read_text()
    logs = [log.read_text() for log in (tmp_path / "out" / "trained").glob("*/train.log")]
    assert len(logs) == 3 and not any("Total params" in log for log in logs)
    again = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert again.returncode == 0 and "done:" not in again.stdout
    more = f"test: {{again: {tmp_path}/scenes/val-*.tar}}\n"
    (tmp_path / "plan.yaml").write_text(plan + more)
    began = time.time()
    added = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "again: dense, seed 0: the plan says other sets" in added.stdout and added.returncode == 0
    assert "## again (test" in (tmp_path / "out" / "table.md").read_text()
    assert all(log.stat().st_mtime < began for log in (tmp_path / "out" / "trained").glob("*/train.log"))
    (tmp_path / "plan.yaml").write_text(plan.replace("warmup_steps: 1", "warmup_steps: 0"))
    changed = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert "again: dense, seed 0: the plan says other settings" in changed.stdout and changed.returncode == 0

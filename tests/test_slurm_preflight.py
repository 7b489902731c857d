"""What a stage's job checks before its tasks start, without SLURM: a stand-in for srun tells what would be started."""

import json
import os
import re
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

import main

ROOT = Path(__file__).parents[1]
BASE = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())["data"]


@pytest.fixture
def job(tmp_path):
    """Runs a stage's script as a job of some nodes of 8 tasks; stderr is why it was refused, stdout what it started."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/sh\nprintf '%s\\n' started \"$@\"\n")
    (tools / "srun").chmod(0o755)
    for name in ("a-0", "a-1", "b-0", "val"):
        (tmp_path / f"{name}.tar").touch()

    def run(*words, stage=1, nodes=1, **changes):
        env = {
            "RUN": str(tmp_path / "r"),
            "DATA_TRAIN": f"{tmp_path}/a-*.tar",
            "DATA_VAL": f"{{val: {tmp_path}/val.tar}}",
            "STAIR_HOME": str(ROOT),
            "SLURM_JOB_ID": "1",
            "SLURM_NNODES": str(nodes),
            "SLURM_NTASKS": str(8 * nodes),
            "SLURM_NTASKS_PER_NODE": "8",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            **changes,
        }
        script = ROOT / "slurm" / f"stage{stage}.sh"
        done = subprocess.run(["bash", script, *words], env=env, capture_output=True, text=True)
        assert done.returncode == (0 if "started" in done.stdout else 2), done.stderr
        return done

    return run


def handed_over(tmp_path, stage):
    (tmp_path / "r" / f"stage{stage}" / "stair").mkdir(parents=True)
    (tmp_path / "r" / f"stage{stage}" / "stair" / "config.json").touch()


# ------------------------------------------------------------------ the global batch


@pytest.mark.parametrize(
    "path", ["docs/slurm.md", *(f"slurm/{n}.sh" for n in ("stage1", "stage2", "stage3", "pipeline"))]
)
def test_the_sizes_that_are_shown_share_the_batch_of_the_recipe(path):
    tasks = int(re.search(r"--ntasks-per-node=(\d+)", (ROOT / "slurm" / "stage1.sh").read_text())[1])
    shown = [int(nodes) for nodes in re.findall(r"--nodes=(\d+)", (ROOT / path).read_text())]
    assert shown and all(BASE["global_batch_size"] % (nodes * tasks) == 0 for nodes in shown)


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_what_to_give(job, tmp_path):
    done = job(nodes=13)
    assert "data.global_batch_size=1024 cannot be shared by 104 ranks (13 nodes of 8 tasks)" in done.stderr
    assert "wanted a multiple of 104" in done.stderr
    assert "--nodes=8 or 16 to sbatch, or --data.global_batch_size 936 or 1040 after the script" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--data.global_batch_size=1040",),
        ("--config", "CONFIG"),
        ("--data.global_batch_size", "7", "--config", "CONFIG"),
    ],
)
def test_a_batch_that_was_given_to_the_job_is_the_one_that_is_checked(job, tmp_path, words):
    (tmp_path / "my.yaml").write_text("data: {global_batch_size: 1040}\n")
    words = [word.replace("CONFIG", str(tmp_path / "my.yaml")) for word in words]
    assert "started" in job(*words, nodes=13).stdout
    assert "global_batch_size=1040 cannot be shared by 128 ranks" in job(*words, nodes=16).stderr


@pytest.mark.parametrize("text", ["data: {global_batch_size: '${oc.env:BATCH}'}", "data: other.yaml"])
def test_a_batch_that_cannot_be_known_is_left_to_the_program(job, tmp_path, text):
    (tmp_path / "my.yaml").write_text(text)
    assert "started" in job("--config", tmp_path / "my.yaml", nodes=13).stdout


def test_words_mean_to_the_check_what_they_mean_to_the_program(capsys, tmp_path):
    settings = runpy.run_path(str(ROOT / "slurm" / "preflight.py"))["settings"]
    files = {"a": "data: {global_batch_size: 35}\ntransition: {after: 1}", "b": "data.global_batch_size: 33"}
    files |= {"c": f"data: {tmp_path}/d.yaml", "d": "global_batch_size: 34", "e": "data: {workers: 3}"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    a, b, c, d, e = (str(tmp_path / f"{name}.yaml") for name in "abcde")
    for words in (
        ["--data.global_batch_size=33", "--config", a],
        ["--config", a, "--data.global_batch_size=33", "--config", e],
        [f"-c{a}", "--transition.after", "null"],
        [f"-c={a}", "--transition.start_from", "x"],
        ["--config", b, "--data.workers", "0"],
        ["--config", c, "--transition={after: 0}"],
        ["--config", "{data: {global_batch_size: 55}}", "-c", e],
        ["--data", d, "--transition", json.dumps({"after": 2})],
        ["--data.global_batch_size", "0512"],
        ["--data.train", "[x.tar, '{0..3}.tar']", "--data.workers=7"],
    ):
        all_words = ["--config", str(ROOT / "configs" / "stage3.yaml"), *words]
        with pytest.raises(SystemExit):
            main.main(["fit", *all_words, "--print_config"])
        program = yaml.safe_load(capsys.readouterr().out)
        said = settings(all_words)
        for key in ("data.global_batch_size", "data.workers", "transition.after", "transition.start_from"):
            group, name = key.split(".")
            assert said.get(key) == program[group][name], (words, key)


# ------------------------------------------------------------------ mixtures


@pytest.mark.parametrize(
    ("train", "shards"),
    [
        ("{TMP}/a-{0..1}.tar", 2),
        ("['{TMP}/a-{0..1}.tar', {TMP}/b-0.tar]", 3),
        ("{coco: '{TMP}/a-{0..1}.tar', cc: {TMP}/b-*.tar}", 3),
        ("{coco: {shards: {TMP}/a-*.tar, weight: 3}, cc: {shards: 'https://host/{00..99}.tar', weight: 1}}", 102),
    ],
)
def test_whatever_the_program_trains_on_is_let_through(job, tmp_path, train, shards):
    train = train.replace("{TMP}", str(tmp_path))
    done = job(DATA_TRAIN=train)
    assert f"{shards} training shards for 64 readers" in done.stdout and "started" in done.stdout, done.stderr
    assert train in done.stdout.splitlines()  # the program is given it word for word


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        (
            "{coco: {TMP}/a-*.tar, cc: {TMP}/none-*.tar}",
            "no shard matches '{TMP}/none-*.tar'.* source 'cc' of DATA_TRAIN",
        ),
        (
            "{coco: {shards: {TMP}/none.tar, weight: 3}, cc: {shards: {TMP}/b-0.tar, weight: 1}}",
            "no shard matches '{TMP}/none.tar'.* source 'coco' of DATA_TRAIN",
        ),
        ("{coco: {shards: {TMP}/a-0.tar, weight: 3}, cc: {TMP}/b-0.tar}", "['cc'] have no weight and others have"),
        ("{coco: {TMP}/a-{0..1}.tar}", "cannot be read as one.*between quotes"),
        ("{}", "no training shards in it"),
    ],
)
def test_a_mixture_that_cannot_be_trained_on_is_refused_by_source(job, tmp_path, train, wanted):
    done = job(DATA_TRAIN=train.replace("{TMP}", str(tmp_path)))
    pattern = ".*".join(re.escape(part) for part in wanted.replace("{TMP}", str(tmp_path)).split(".*"))
    assert re.search(pattern, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_validation_set_that_is_not_there_is_refused_by_name(job, tmp_path):
    done = job(DATA_VAL=f"{{a: {tmp_path}/val.tar, b: {tmp_path}/none.tar}}")
    assert "no shard matches" in done.stderr and "set 'b' of DATA_VAL" in done.stderr
    done = job(DATA_VAL=f"{{a: {tmp_path}/a-{{0..1}}.tar}}")
    assert "between quotes" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------------ the hand-over


@pytest.mark.parametrize(
    "how", [("--transition.after", "1"), ("--transition.after=1",), ("--config", "{transition: {after: 1}}")]
)
def test_a_stage_that_follows_another_than_the_one_before_needs_the_hand_over_of_that_one(job, tmp_path, how):
    assert f"no hand-over of stage 1 at {tmp_path}/r/stage1/stair" in job(*how, stage=3).stderr
    handed_over(tmp_path, 1)
    assert "started" in job(*how, stage=3).stdout
    assert f"no hand-over of stage 2 at {tmp_path}/r/stage2/stair" in job(stage=3).stderr


@pytest.mark.parametrize("word", ["--transition.after=0", "--transition.start_from=elsewhere/stair"])
def test_a_stage_that_begins_from_nothing_or_from_elsewhere_needs_no_hand_over(job, word):
    assert "started" in job(word, stage=3).stdout


def test_a_stage_after_itself_or_a_later_one_is_refused(job):
    assert (
        "--transition.after is 3: stage 3 can start from 0 (nothing) to 2"
        in job("--transition.after=3", stage=3).stderr
    )


def test_a_recipe_is_a_file_for_each_stage_and_words_for_all_stages_are_none_of_one(job, tmp_path):
    handed_over(tmp_path, 1)
    started = job("--config", "mine.yaml", stage=2, RECIPE="paper").stdout.splitlines()
    files = [following for word, following in pairwise(started) if word == "--config"]
    assert files == ["configs/stage2.yaml", "configs/paper/stage2.yaml", "configs/hardware/ddp.yaml", "mine.yaml"]
    env = {**os.environ, "RUN": "r", "DATA_TRAIN": "a.tar", "DATA_VAL": "b.tar"}
    line = ["bash", ROOT / "slurm" / "pipeline.sh", "--config", "configs/paper/stage1.yaml"]
    done = subprocess.run(line, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "would go to all three stages" in done.stderr


def test_a_refused_stage_leaves_no_folder(job, tmp_path):
    job(stage=2)
    assert not (tmp_path / "r").exists()

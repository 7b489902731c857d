"""The jobs' scripts without SLURM: stand-ins for srun, scontrol and lightning write down how they were called."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SETTINGS = "run: {run}\nckpt_path: null\ndata:\n  train: {train}\n  val: x\n  test: null\n"
TOOLS = {
    "lightning": 'printf "%s\\0" "$@" > "$LOG/resolve"; echo x >> "$LOG/resolved"; printf "$SETTINGS"; exit "${STATUS:-0}"',
    "srun": 'printf "%s\\0" "$@" > "$LOG/srun"; eval "${TASKS:-true}"',
    "scontrol": '[ "$1" = show ] && echo "JobId=17 JobState=${STATE:-RUNNING} TimeLimit=${LIMIT:-1-00:00:00} x" '
    '|| echo "$@" >> "$LOG/scontrol"',
    "sbatch": 'printf "%s\\0" "$STAIR_SETTINGS" "$@" >> "$LOG/sbatch"; echo "4$RANDOM;cluster"',
}


@pytest.fixture
def log(tmp_path):
    (tmp_path / "tools").mkdir()
    for name, line in TOOLS.items():
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


def called(log, name):
    path = log / name
    return path.read_text().split("\0")[:-1] if path.exists() else None


@pytest.fixture
def job(log, tmp_path):
    """Runs a script as a job of two nodes of 8 tasks, in a folder of the user's."""

    def run(*args, script="stage1", **changes):
        env = {
            "HOME": str(tmp_path / "home"),
            "RUN": "runs/mine",
            "DATA_TRAIN": "a-{0..1}.tar",
            "DATA_VAL": "{val: val.tar}",
            "STAIR_HOME": str(ROOT),
            "STAIR_VENV": "/nowhere",
            "SLURM_JOB_ID": "17",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS": "16",
            "SLURM_NTASKS_PER_NODE": "8",
            "LOG": str(log),
            "SETTINGS": SETTINGS.format(run="null", train="x"),
            "PATH": f"{tmp_path / 'tools'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        } | changes
        command = ["bash", ROOT / "slurm" / f"{script}.sh", *args]
        return subprocess.run(
            command,
            cwd=tmp_path,
            env={name: value for name, value in env.items() if value is not None},
            capture_output=True,
            text=True,
        )

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stages_jobs_differ_in_nothing_but_the_stage(stage):
    one, this = ((ROOT / "slurm" / f"stage{k}.sh").read_text() for k in (1, stage))
    assert this == one.replace("stage1", f"stage{stage}").replace("Stage 1", f"Stage {stage}").replace(
        "STAGE=1", f"STAGE={stage}"
    )
    # to the steps and not to the batch shell (B:), which could not save; and the log of the first start is kept
    for line in ("--signal=SIGUSR1@300", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in this


@pytest.mark.parametrize(
    "path", ["docs/guides/slurm.md", *(f"slurm/{s}.sh" for s in ("stage1", "stage2", "stage3", "pipeline"))]
)
def test_the_sizes_that_are_shown_share_the_batch_of_the_recipe(path):
    batch = yaml.safe_load((ROOT / "configs" / "base.yaml").read_text())["data"]["global_batch_size"]
    tasks = int(re.search(r"--ntasks-per-node=(\d+)", (ROOT / "slurm" / "stage1.sh").read_text())[1])
    shown = [int(nodes) for nodes in re.findall(r"--nodes=(\d+)", (ROOT / path).read_text())]
    assert shown and all(batch % (nodes * tasks) == 0 for nodes in shown)


# ------------------------------------------------------------------ what a user gives


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_arguments_after_the_script_reach_the_program_unchanged_and_win_over_the_environment(job, log, stage):
    args = ["--data.train", "{a: 'b c/{00..09}.tar', d: e-*.tar}", "--config", "my own.yaml", '--x=it\'s "$HOME"']
    assert job(*args, script=f"stage{stage}", RECIPE="paper").returncode == 0
    files = [
        f"--config={ROOT}/configs/{name}.yaml" for name in (f"stage{stage}", f"paper/stage{stage}", "hardware/ddp")
    ]
    data = ["--data.train=a-{0..1}.tar", "--data.val={val: val.tar}"]
    assert called(log, "resolve") == ["fit", *files, *data, *args, "--print_config"]


def test_the_tasks_train_with_the_resolved_settings_in_a_run_folder_below_the_users_folder(job, log, tmp_path):
    assert job().returncode == 0
    settings = tmp_path / "runs/mine/jobs/stage1-17.yaml"
    assert settings.read_text() == SETTINGS.format(run="null", train="x")
    expected = ["lightning", "fit", "--config", str(settings), "--run", f"{tmp_path}/runs/mine", "--ckpt_path", "last"]
    assert called(log, "srun")[-len(expected) :] == expected


@pytest.mark.parametrize("run", ["~/r", "/tmp/r s"])
def test_a_run_folder_in_home_or_with_spaces_is_that_folder(job, log, tmp_path, run):
    run = run.replace("/tmp", str(tmp_path))
    assert job(RUN=run).returncode == 0
    assert run.replace("~", str(tmp_path / "home")) in called(log, "srun")


def test_a_validation_spec_with_a_quote_is_one_set(job, log):
    job(DATA_VAL="it's.tar")
    given = next(arg for arg in called(log, "resolve") if arg.startswith("--data.val="))
    assert yaml.safe_load(given.partition("=")[2]) == {"val": "it's.tar"}


def test_the_seed_of_an_array_is_the_last_of_all_settings(job, log, tmp_path):
    array = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "4"}
    assert job("--config", "with_seed.yaml", **array).returncode == 0
    assert called(log, "srun")[-4:] == ["--seed_everything", "4", "--data.seed", "4"]
    assert f"{tmp_path}/runs/mine/seed4" in called(log, "srun")
    for arg in ("--seed_everything=1", "--data.seed"):
        done = job(arg, "1", **array)
        assert done.returncode == 2 and arg in done.stderr and "--array" in done.stderr


def test_a_later_start_has_the_settings_of_the_first_and_a_new_job_those_of_now(job, log, tmp_path):
    job()
    assert job(SLURM_RESTART_COUNT="1", SETTINGS="run: null\nother: 1\n").returncode == 0
    assert (log / "resolved").read_text().count("x") == 1
    assert (tmp_path / "runs/mine/jobs/stage1-17.yaml").read_text() == SETTINGS.format(run="null", train="x")
    job(SETTINGS=SETTINGS.format(run="null", train="y"))
    assert "train: y" in (tmp_path / "runs/mine/jobs/stage1-17.yaml").read_text()


def test_a_pipeline_resolves_the_settings_of_all_stages_at_submission(job, log, tmp_path):
    done = job("--from", "2", "--data.workers", "3", script="pipeline", SBATCH_OPTIONS="--nodes=16 --comment='a b'")
    assert done.returncode == 0 and done.stdout.count("stage ") == 2
    second = called(log, "sbatch")[called(log, "sbatch").index("--comment=a b") :]
    assert f"{ROOT}/slurm/stage3.sh" in second and second[-2:] == ["--data.workers", "3"]
    settings = called(log, "sbatch")[0]
    assert settings.startswith(f"{tmp_path}/runs/mine/jobs/stage2-") and Path(settings).exists()
    job("--data.workers", "3", script="stage2", STAIR_SETTINGS=settings)
    assert (log / "resolved").read_text().count("x") == 2 and settings in called(log, "srun")


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"RUN": None}, r"RUN is not set.*RUN=runs/mine"),
        ({"SETTINGS": SETTINGS.format(run="null", train="null")}, r"DATA_TRAIN is not set.*--data\.train"),
        ({"SETTINGS": SETTINGS.format(run="r", train="x")}, r"run=r .*RUN"),
        ({"STRATEGY": "magic"}, r"STRATEGY=magic: there is no configs/hardware/magic.yaml; known are ddp and fsdp2"),
        ({"RECIPE": "magic"}, r"RECIPE=magic: there is no folder configs/magic"),
        ({"RECIPE": "demo2"}, r"RECIPE=demo2"),
        ({"RESTARTS": "many"}, r"RESTARTS=many: expected a number"),
        ({"STRATERGY": "fsdp2"}, r"STRATERGY=fsdp2 is not read; known are .*STRATEGY"),
        ({"restarts": "3"}, r"restarts=3 is not read: write RESTARTS"),
        ({"SLURM_JOB_ID": None}, r"not in a SLURM job"),
        ({"SLURM_NTASKS_PER_NODE": None}, r"no tasks per node"),
        ({"SLURM_NTASKS": "3"}, r"3 tasks on 2 nodes, expected 8 on each"),
        ({"SLURM_GPUS_ON_NODE": "1"}, r"8 tasks but 1 GPUs on a node"),
        ({"SLURM_JOB_NAME": "bash"}, r"a job named bash"),
        ({"RUN": "/proc/nowhere"}, r"cannot write to /proc/nowhere"),
        ({"LIMIT": "00:05:00"}, r"--time=00:05:00 \(300 s\) is not longer than the lead of --signal \(300 s\)"),
        ({"LIMIT": "00:02:00", "SBATCH_SIGNAL": "USR1"}, None),
        ({"LIMIT": "00:01:00", "SBATCH_SIGNAL": "B:USR1@60"}, r"--time=00:01:00"),
        ({"LIMIT": "00:02:00", "SBATCH_SIGNAL": "USR1@60"}, None),
        ({"LIMIT": "UNLIMITED"}, None),
    ],
)
def test_a_job_that_cannot_train_is_refused_before_its_tasks_start(job, log, change, expected):
    done = job(**change)
    assert (done.returncode, called(log, "srun") is None) == ((0, False) if expected is None else (2, True)), (
        done.stderr
    )
    assert expected is None or re.search(expected, done.stderr), done.stderr
    assert bool(list(log.parent.glob("runs/mine/jobs/*.yaml*"))) == (expected is None)


def test_settings_that_cannot_be_used_end_the_job_with_the_programs_status(job, log, tmp_path):
    assert job(STATUS="1").returncode == 1 and called(log, "srun") is None
    assert not list(tmp_path.glob("runs/mine/jobs/*.yaml*"))
    assert job(script="pipeline", STATUS="2").returncode == 2 and called(log, "sbatch") is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("--from", "4"), "--from 4: expected 1, 2 or 3"),
        (("--config", "configs/paper/stage1.yaml"), "would go to all stages"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused(job, log, args, expected):
    done = job(*args, script="pipeline")
    assert done.returncode == 2 and expected in done.stderr and called(log, "sbatch") is None


# ------------------------------------------------------------------ after a crash

CRASH = "mkdir -p runs/mine/stage1/checkpoints; {0}; exit 137"
SAVES = CRASH.format("sleep 0.02; touch runs/mine/stage1/checkpoints/last.ckpt")


@pytest.mark.parametrize(
    ("tasks", "changes", "reason"),
    [
        (SAVES, {}, None),
        (CRASH.format("true"), {}, "this start has written no checkpoint"),
        (SAVES.replace("exit", 'touch "$STAIR_JOB.error"; exit'), {}, "the same error"),
        (SAVES, {"STATE": "COMPLETING"}, ""),
        (SAVES, {"RESTARTS": "0"}, ""),
    ],
)
def test_a_job_restarts_after_a_crash_with_progress_and_for_no_other_reason(job, log, tasks, changes, reason):
    done = job(TASKS=tasks, **{"RESTARTS": "1", **changes})
    assert done.returncode == 137
    asked = (log / "scontrol").read_text() if (log / "scontrol").exists() else ""
    assert asked == ("requeue 17\n" if reason is None else "")
    assert ("no restart: " in done.stderr and reason in done.stderr) if reason else "no restart" not in done.stderr


def test_restarts_are_counted_over_the_starts_of_a_job(job, log):
    for start in range(3):
        job(TASKS=SAVES, RESTARTS="2", SLURM_RESTART_COUNT=str(start))
    assert (log / "scontrol").read_text() == "requeue 17\n" * 2
    job(TASKS=SAVES, RESTARTS="2")  # another job
    assert (log / "scontrol").read_text() == "requeue 17\n" * 3

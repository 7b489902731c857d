"""The jobs under a real SLURM of two nodes, on CPUs: the chain, requeueing, and what stops the chain.

Needs a tool that starts a throw-away cluster: `TOOL up DIR NODES`, `TOOL env DIR` (prints exports), `TOOL down DIR`. It is
STAIR_SLURM_CLUSTER, or ../shared/tools/slurm-cluster.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from main import main
from stair import Stair
from tests.support.ranks import Case
from tests.support.ranks import run as on_ranks
from tests.support.runs import stage_args, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[1]
TOOL = Path(os.environ.get("STAIR_SLURM_CLUSTER", ROOT.parent / "shared" / "tools" / "slurm-cluster"))
SHAPE = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
LIVING = {"PENDING", "RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING", "REQUEUED"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which sbatch and its like talk to a cluster that requeues only jobs that ask for it."""
    if not TOOL.exists():
        pytest.skip(f"no SLURM to be had: no tool at {TOOL}; name one in STAIR_SLURM_CLUSTER")
    folder = tmp_path_factory.mktemp("slurm")
    extra = "JobRequeue=0\nPreemptType=preempt/partition_prio\nPreemptMode=REQUEUE"
    asked = {**os.environ, "SLURM_CLUSTER_EXTRA": extra, "SLURM_CLUSTER_PARTITIONS": "debug,urgent"}
    up = subprocess.run([TOOL, "up", folder, "2"], env=asked, capture_output=True, text=True)
    if up.returncode:
        pytest.skip(f"no SLURM to be had: {TOOL} up ended with {up.returncode}: {(up.stdout + up.stderr)[-500:]}")
    try:
        out = subprocess.run([TOOL, "env", folder], check=True, capture_output=True, text=True).stdout
        new = dict(line.removeprefix("export ").split("=", 1) for line in out.splitlines())
        old = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MASTER_"))}
        bin_folder = str(Path(sys.executable).parent)
        yield {**old, **new, "PATH": f"{bin_folder}:{old['PATH']}", "OMP_NUM_THREADS": "1", "STAIR_HOME": str(ROOT)}
    finally:
        subprocess.run([TOOL, "down", folder], check=True)


class Pace(L.Callback):
    """Makes steps last, so that SLURM, which looks at the clock every 30 s, finds the job at work."""

    def on_train_batch_end(self, *args):
        time.sleep(0.4)


def small_args(scenes, steps=60):
    overlays = ("--config", str(ROOT / "configs/model/tiny.yaml"), "--config", str(scenes / "small.yaml"))
    long = ("--trainer.max_steps", str(steps), "--trainer.val_check_interval", "20", "--data.workers", "1")
    return [*overlays, *long, "--model.init_args.stair.vocabulary", str(scenes / "vocab.txt")]


PACED = ("--trainer.callbacks+", "tests.test_slurm.Pace")


@pytest.fixture
def submit(cluster, scenes, tmp_path):
    """Runs a script of the project's on the cluster, from a folder of its own, and returns what it printed."""

    def run(*command, run, more=(), cwd=tmp_path, **changes):
        env = {**cluster, "RUN": str(run), "SBATCH_OPTIONS": " ".join(SHAPE)}
        env |= {"DATA_TRAIN": str(scenes / "train-*.tar"), "DATA_VAL": f"{{scenes: {scenes}/val-*.tar}}"}
        done = subprocess.run(
            [*command, *small_args(scenes), *more],
            cwd=cwd,
            env=env | changes,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    return run


def state(cluster, job):
    command = ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"]
    return subprocess.run(command, env=cluster, check=True, capture_output=True, text=True).stdout.strip()


def tell(cluster, *command):
    subprocess.run(command, env=cluster, check=True)


def until(cluster, job, holds):
    """Waits while a job lives, until something holds."""
    while not holds():
        assert state(cluster, job) in LIVING, f"job {job} is {state(cluster, job)}"
        time.sleep(0.1)


def saved(run):
    return lambda: (run / "stage1" / "checkpoints" / "best.ckpt").exists()


def wait(cluster, job, limit=1500):
    end = time.monotonic() + limit
    while (now := state(cluster, job)) in LIVING or not now:
        assert time.monotonic() < end, f"job {job} is {now} after {limit} s"
        time.sleep(0.2)
    return now


def log_of(folder, job):
    return "".join(path.read_text() for path in folder.glob(f"*-{job}.out"))


def jobs(printed):
    return [line.split("job ")[1] for line in printed.splitlines() if line.startswith("stage ")]


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    return tmp_path_factory.mktemp("chain") / "r"


def test_the_chain_trains_three_stages_on_two_nodes_up_to_a_release(submit, cluster, chain, tmp_path):
    queued = jobs(submit(ROOT / "slurm" / "pipeline.sh", run=chain))
    assert len(queued) == 3
    for job in queued:
        assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
        assert "MEMBER: 2/2" in log_of(tmp_path, job) and "srun 'lightning' 'fit'" in log_of(tmp_path, job)
    model = Stair.from_pretrained(chain / "stage3" / "stair")
    assert model.encode_text(["a red circle"]).shape[0] == 1


def train_here(case):
    """The same two ranks, without SLURM and never interrupted."""
    folder = Path(case.folder)
    chosen = ("--trainer.devices", "2", "--config", str(ROOT / "configs" / "hardware" / "ddp.yaml"))
    main(stage_args(folder, 1, folder / "whole", *small_args(folder, 150)[4:], *chosen))


def test_a_job_that_runs_into_its_time_limit_ends_with_the_weights_of_one_never_interrupted(
    submit, cluster, scenes, tmp_path
):
    run = tmp_path / "stopped"
    more = ("--trainer.max_steps", "150", *PACED)
    job = submit("sbatch", "--parsable", *SHAPE, ROOT / "slurm" / "stage1.sh", run=run, more=more).strip()
    until(cluster, job, saved(run))
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 120))
    tell(cluster, "scontrol", "update", f"JobId={job}", f"EndTime={soon}")
    # it is as long again for the second start, with the limit rounded up to minutes
    until(cluster, job, lambda: "is requeued and will resume" in log_of(tmp_path, job))
    tell(cluster, "scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "start 1, node" in log and "start 2, node" in log  # one log for both
    assert "SIGUSR1: this SLURM job is requeued and will resume from step" in log and "Restored all states" in log
    on_ranks(Case(None, "", str(scenes), ranks=2), train_here)
    for (name, a), b in zip(weights(run, 1).items(), weights(scenes / "whole", 1).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_node_that_disappears_ends_in_a_new_start(submit, cluster, tmp_path):
    run = tmp_path / "r"
    job = submit("sbatch", "--parsable", *SHAPE, ROOT / "slurm" / "stage1.sh", run=run, more=PACED).strip()
    until(cluster, job, saved(run))
    tell(cluster, "scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=gone")
    try:
        while state(cluster, job) == "RUNNING":
            time.sleep(0.1)
    finally:
        # refused where the node has registered again meanwhile, and so is back
        subprocess.run(["scontrol", "update", "NodeName=node2", "State=RESUME"], env=cluster, check=False)
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "start 2, node" in log and "Restored all states" in log and weights(run, 1)


def test_stage_2_alone_as_a_user_types_it_sharded_and_the_chain_from_there(submit, cluster, chain, tmp_path):
    if not (chain / "stage1" / "stair").exists():
        pytest.skip("goes on from stage 1 of the chain, which is not there")
    run = tmp_path / "r"
    shutil.copytree(chain / "stage1" / "stair", run / "stage1" / "stair")
    job = submit("sbatch", "--parsable", *SHAPE, "slurm/stage2.sh", run=run, cwd=ROOT, STRATEGY="fsdp2").strip()
    assert wait(cluster, job) == "COMPLETED", log_of(ROOT, job)[-3000:]
    queued = jobs(submit(ROOT / "slurm" / "pipeline.sh", "--from", "3", run=run))
    assert len(queued) == 1 and wait(cluster, queued[0]) == "COMPLETED", log_of(tmp_path, queued[0])[-3000:]
    for path in ROOT.glob(f"stair-stage2-{job}.out"):
        path.unlink()
    settings = yaml.safe_load((run / "jobs" / f"stage2-{job}.yaml").read_text())
    assert "FullySharded" in str(settings["trainer"]["strategy"])
    assert Stair.from_pretrained(run / "stage3" / "stair").encode_text(["a red circle"]).isfinite().all()


def settings_of(run):
    (path,) = (run / "stage1").rglob("config.yaml")
    return yaml.safe_load(path.read_text())


def test_an_array_submitted_from_another_folder_trains_its_seeds_on_the_data_given_after_the_script(
    submit, cluster, scenes, tmp_path
):
    overlay = "seed_everything: 7\ndata: {seed: 7}\nhealth: {patience: 77}\n"
    (tmp_path / "my own.yaml").write_text(overlay)
    train = f"{{a: '{scenes}/train-000{{0..1}}.tar', b: {scenes}/train-0003.tar}}"
    more = ("--config", "my own.yaml", "--data.train", train)
    one = ("--nodes=1", *SHAPE[1:], "--array=0-1")
    script = ROOT / "slurm" / "stage1.sh"
    job = submit("sbatch", "--parsable", *one, script, run="runs/r s", more=more, DATA_TRAIN="/nowhere/a.tar").strip()
    assert [wait(cluster, f"{job}_{task}") for task in (0, 1)] == ["COMPLETED"] * 2, log_of(tmp_path, f"{job}*")[-3000:]
    runs = [tmp_path / "runs" / "r s" / f"seed{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        settings = settings_of(run)
        assert settings["seed_everything"] == settings["data"]["seed"] == seed
        assert settings["health"]["patience"] == 77 and list(settings["data"]["train"]) == ["a", "b"]
    first, second = (weights(run, 1) for run in runs)
    assert not torch.equal(first["image_head.dense.weight"], second["image_head.dense.weight"])


def tasks_of(job):
    """The training processes of a job, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            env = dict(part.split("=", 1) for part in (folder / "environ").read_text().split("\0") if "=" in part)
            args = (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if (
            env.get("SLURM_JOB_ID") == job
            and "SLURM_STEP_ID" in env
            and any(arg.endswith("/lightning") for arg in args)
        ):
            found.setdefault(int(env["SLURM_PROCID"]), int(folder.name))
    return found


def test_a_job_whose_rank_is_killed_restarts_with_the_settings_of_its_first_start(submit, cluster, tmp_path):
    run = tmp_path / "r"
    (tmp_path / "my.yaml").write_text("health: {patience: 77}\n")
    more = ("--config", "my.yaml", *PACED)
    script = ROOT / "slurm" / "stage1.sh"
    job = submit("sbatch", "--parsable", *SHAPE, script, run="r", more=more, RESTARTS="1").strip()
    until(cluster, job, saved(run))
    (tmp_path / "my.yaml").write_text("health: {patience: 78}\n")
    os.kill(tasks_of(job)[1], signal.SIGKILL)
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "restart 1 of 1" in log and "start 2, node" in log and "Restored all states" in log
    assert settings_of(run)["health"]["patience"] == 77 and weights(run, 1)


def test_a_job_whose_rank_is_killed_without_restarts_is_a_failed_one(submit, cluster, tmp_path):
    script = ROOT / "slurm" / "stage1.sh"
    job = submit("sbatch", "--parsable", *SHAPE, script, run="r", more=PACED).strip()
    until(cluster, job, saved(tmp_path / "r"))
    os.kill(tasks_of(job)[1], signal.SIGKILL)
    assert wait(cluster, job) == "FAILED" and "start 2" not in log_of(tmp_path, job)


def test_a_job_whose_time_is_not_longer_than_the_lead_of_its_signal_is_refused(submit, cluster, tmp_path):
    job = submit("sbatch", "--parsable", *SHAPE, "--time=5", ROOT / "slurm" / "stage1.sh", run="r").strip()
    assert wait(cluster, job) == "FAILED"
    log = log_of(tmp_path, job)
    assert "--time=00:05:00" in log and "--signal" in log and "srun" not in log


def test_a_setting_that_is_refused_is_one_line_and_starts_no_task(submit, cluster, tmp_path):
    more = ("--data.wrokers", "3")
    job = submit("sbatch", "--parsable", *SHAPE, ROOT / "slurm" / "stage1.sh", run="r", more=more, RESTARTS="3").strip()
    assert wait(cluster, job) == "FAILED"
    log = log_of(tmp_path, job)
    assert log.count("wrokers") == 1 and "Traceback" not in log and "srun '" not in log


def start_of_python(submit, cluster, folder, *options):
    """A job whose tasks have just begun to import."""
    job = submit("sbatch", "--parsable", *SHAPE, *options, ROOT / "slurm" / "stage1.sh", run=folder / "r").strip()
    until(cluster, job, lambda: "srun 'lightning'" in log_of(folder, job))
    time.sleep(1)
    return job


def test_a_signal_while_python_starts_requeues_the_job_after_a_step(submit, cluster, tmp_path):
    job = start_of_python(submit, cluster, tmp_path)
    tell(cluster, "scancel", "--signal=USR1", job)
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "SIGUSR1: this SLURM job is requeued and will resume from step 1," in log and "start 2, node" in log
    assert "Restored all states" in log and "Traceback" not in log and weights(tmp_path / "r", 1)


def test_a_job_that_is_signalled_before_each_first_step_is_requeued_once(submit, cluster, tmp_path):
    job = start_of_python(submit, cluster, tmp_path)
    tell(cluster, "scancel", "--signal=USR1", job)
    until(cluster, job, lambda: log_of(tmp_path, job).count("srun 'lightning'") == 2)
    time.sleep(1)
    tell(cluster, "scancel", "--signal=USR1", job)
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "2 starts in a row made no progress" in log and "--time" in log and "start 3, node" not in log


def test_a_job_that_is_preempted_while_python_starts_comes_back(submit, cluster, tmp_path):
    tell(cluster, "scontrol", "update", "PartitionName=debug", "GraceTime=600")
    tell(cluster, "scontrol", "update", "PartitionName=urgent", "PriorityTier=10")
    try:
        job = start_of_python(submit, cluster, tmp_path)
        tell(cluster, "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
        assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    finally:
        tell(cluster, "scontrol", "update", "PartitionName=debug", "GraceTime=0")
    log = log_of(tmp_path, job)
    # by itself, before the grace time was over: SLURM takes a job that ends meanwhile for a failed one
    assert "SIGTERM: this SLURM job is requeued and will resume from step 0," in log and "start 2, node" in log
    assert "DUE TO PREEMPTION" not in log and weights(tmp_path / "r", 1)


def test_a_job_that_may_not_be_requeued_says_so_and_trains_on(submit, cluster, tmp_path):
    job = start_of_python(submit, cluster, tmp_path, "--no-requeue")
    tell(cluster, "scancel", "--signal=USR1", job)
    assert wait(cluster, job) == "COMPLETED", log_of(tmp_path, job)[-3000:]
    log = log_of(tmp_path, job)
    assert "SLURM does not requeue this job" in log and "submit it again" in log and "start 2" not in log
    assert weights(tmp_path / "r", 1)


def test_a_cancelled_stage_does_not_start_the_next(submit, cluster, tmp_path):
    queued = jobs(submit(ROOT / "slurm" / "pipeline.sh", run=tmp_path / "r"))
    until(cluster, queued[0], lambda: state(cluster, queued[0]) == "RUNNING")
    tell(cluster, "scancel", queued[0])
    assert [wait(cluster, job) for job in queued] == ["CANCELLED", "CANCELLED", "CANCELLED"]
    assert not (tmp_path / "r" / "stage2").exists()


def test_a_failed_stage_does_not_start_the_next(submit, cluster, tmp_path):
    queued = jobs(submit(ROOT / "slurm" / "pipeline.sh", run=tmp_path / "r", DATA_TRAIN=str(tmp_path / "none-*.tar")))
    assert [wait(cluster, job) for job in queued] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "no shard matches" in log_of(tmp_path, queued[0])
    assert not (tmp_path / "r" / "stage2").exists()


def test_stage_2_alone_fails_with_what_is_missing(submit, cluster, tmp_path):
    job = submit("sbatch", "--parsable", *SHAPE, ROOT / "slurm" / "stage2.sh", run=tmp_path / "r").strip()
    assert wait(cluster, job) == "FAILED"
    assert f"no exported model of stage 1 at {tmp_path}/r/stage1/stair" in log_of(tmp_path, job)

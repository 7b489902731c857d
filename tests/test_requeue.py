"""Leaving on a signal and coming back: a running process, a Trainer of one's own, and what SLURM would be asked."""

import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from callbacks import requeue
from callbacks.requeue import Requeue
from datamodules.synthetic import write_scenes
from main import main
from stair.errors import FileError, SettingError
from tests.support.runs import SMALL, Line, stage_args, start, weights

ROOT = Path(__file__).parents[1]


@pytest.fixture
def fit(tmp_path):
    def run(module, steps=8, **more):
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            default_root_dir=tmp_path,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=None,
            callbacks=[ModelCheckpoint(dirpath=tmp_path / "checkpoints", save_last=True, save_top_k=0), Requeue()],
            **{"val_check_interval": 100, **more},
        )
        before = [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)]
        status = None
        try:
            trainer.fit(module, ckpt_path="last")
        except SystemExit as leaving:
            status = leaving.code
        assert [signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGTERM)] == before
        return status, trainer

    return run


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_once_after_the_batch_and_ends_with_its_number(fit, tmp_path, signum):
    status, trainer = fit(Line(when=3, signum=signum))
    assert status == 128 + signum and trainer.global_step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    resumed = Line()
    status, trainer = fit(resumed)
    assert status is None and trainer.global_step == 8 and resumed.w.item() == 8


def test_handlers_are_put_back_after_a_fit_and_after_a_broken_one(fit):
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    assert fit(Line())[0] is None

    class Broken(Line):
        def training_step(self, batch, batch_idx):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(Broken(), steps=20)
    assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before


def test_a_validation_that_is_due_is_not_lost(fit):
    first, second = Line(when=3), Line()
    assert fit(first, val_check_interval=4)[0] and fit(second, val_check_interval=4)[0] is None
    # due after the step of the signal: done first, and the state saved is that after the next batch
    assert first.validated == [4] and second.validated == [8]


def test_where_every_batch_is_validated_it_leaves_all_the_same(fit):
    assert fit(Line(when=3), val_check_interval=1)[1].global_step == 5


def test_a_signal_in_the_last_step_lets_the_run_finish(fit):
    status, trainer = fit(Line(when=7))
    assert status is None and trainer.global_step == 8


def test_forked_workers_note_nothing():
    callback = Requeue()
    callback._pid = os.getpid() + 1
    callback._note(signal.SIGUSR1, None)
    assert callback._noted == 0
    callback._pid = os.getpid()
    callback._note(signal.SIGTERM, None)
    callback._note(signal.SIGUSR1, None)
    assert callback._noted == 2  # a job that is being ended is not queued again


def test_out_of_range_arguments_are_refused():
    with pytest.raises(SettingError) as refused:
        Requeue(0)
    assert refused.value.setting == "requeue.every"


# ------------------------------------------------------------------ SLURM, asked through a stand-in for scontrol


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """Writes down what it is asked, tells of the job, and ends as told."""

    def make(ends_with, job="JobState=RUNNING Reason=None"):
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "scontrol").write_text(
            f'#!/bin/sh\n[ "$1" != show ] || {{ echo "JobId=17 {job}"; exit 0; }}\n'
            f'echo "$@" >> {folder}/asked\necho not today >&2\nexit {ends_with}\n'
        )
        (folder / "scontrol").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "17")
        monkeypatch.setattr(requeue, "SLURMEnvironment", SimpleNamespace(detect=lambda: True))
        return folder / "asked"

    return make


def test_sigusr1_requeues_the_job_and_leaves(fit, scontrol):
    asked = scontrol(0)
    status, trainer = fit(Line(when=3, signum=signal.SIGUSR1))
    assert status == 0 and trainer.global_step == 4 and asked.read_text() == "requeue 17\n"


def test_a_task_of_an_array_is_requeued_and_not_the_array(fit, scontrol, monkeypatch):
    asked = scontrol(0)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert fit(Line(when=3, signum=signal.SIGUSR1))[0] == 0 and asked.read_text() == "requeue 15_2\n"


# as SLURM 22.05 shows them: in a preemption's grace time, at the time limit, cancelled, requeued by another hand
@pytest.mark.parametrize(
    ("job", "comes_back"),
    [
        ("JobState=RUNNING Reason=None", True),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None", False),
        ("JobState=PENDING Reason=BeginTime", False),
    ],
)
def test_sigterm_requeues_a_job_that_is_not_being_ended_for_good(fit, scontrol, job, comes_back):
    asked = scontrol(0, job)
    status, trainer = fit(Line(when=3))
    assert status == (0 if comes_back else 128 + signal.SIGTERM) and trainer.global_step == 4
    assert asked.exists() == comes_back


class Early(Line):
    """Is sent a signal before its first step."""

    def on_fit_start(self):
        if self.when == "before":
            os.kill(os.getpid(), self.signum)


def test_sigterm_before_the_first_step_leaves_at_once_and_sigusr1_after_one(fit, scontrol, tmp_path):
    asked = scontrol(0)
    for signum, steps in ((signal.SIGTERM, 0), (signal.SIGUSR1, 1)):
        (tmp_path / "requeue.json").unlink(missing_ok=True)
        status, trainer = fit(Early("before", signum))
        assert status == 0 and trainer.global_step == steps
        assert (tmp_path / "checkpoints" / "last.ckpt").exists() == (steps > 0)
    assert asked.read_text() == "requeue 17\n" * 2


def test_a_job_is_not_requeued_after_two_starts_in_a_row_without_progress(fit, scontrol, caplog):
    asked = scontrol(0)
    requeued = []
    # early signals leave a single step; a start in between that makes progress begins the count anew
    for number, when in enumerate(("before", 3, "before", "before")):
        module = Early(when, signal.SIGUSR1)
        status, trainer = fit(module, steps=30)
        requeued.append(status == 0)
        assert asked.read_text().count("requeue 17") == sum(requeued), number
    assert requeued == [True, True, True, False] and trainer.global_step == 30
    assert "2 starts in a row made no progress" in caplog.text and "--time" in caplog.text and "--signal" in caplog.text


def test_a_preempted_job_that_never_began_is_requeued_once_and_a_new_job_counts_anew(fit, scontrol, monkeypatch):
    asked = scontrol(0)
    assert [fit(Early("before"))[0] for _ in range(2)] == [0, 128 + signal.SIGTERM]
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    assert fit(Early("before"))[0] == 0 and asked.read_text() == "requeue 17\nrequeue 18\n"


def test_a_checkpoint_of_lightnings_own_requeueing_is_not_resumed_from(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "r" / "stage1").mkdir(parents=True)
    (tmp_path / "r" / "stage1" / "hpc_ckpt_1.ckpt").write_text("of another run")
    with pytest.raises(FileError) as refused:
        main(stage_args(tmp_path, 1, tmp_path / "r"))
    assert refused.value.path.name == "hpc_ckpt_1.ckpt"


def test_where_slurm_refuses_training_goes_on_and_says_so(fit, scontrol, caplog, tmp_path):
    scontrol(1)
    module = Line(when=3, signum=signal.SIGUSR1)
    status, trainer = fit(module)
    assert status is None and trainer.global_step == 8 and module.w.item() == 8
    assert "not today" in caplog.text and "submit it again" in caplog.text and (tmp_path / "checkpoints").exists()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_while_python_imports_waits_until_the_job_can_be_requeued(tmp_path, scontrol, monkeypatch, signum):
    asked = scontrol(0)
    task = {"NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**task, "NODELIST": "here", "JOB_NAME": "stair"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    process = start(stage_args(tmp_path, 1, tmp_path / "r", "--trainer.devices", "1", "--ckpt_path", "last"))
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and not held(status, signum):
        time.sleep(0.005)
    process.send_signal(signum)
    output = process.communicate(timeout=800)[0]
    assert process.returncode == 0 and asked.read_text() == "requeue 17\n", output[-3000:]
    assert (
        f"{signum.name}: this SLURM job is requeued and will resume from step" in output and "Traceback" not in output
    )
    saved = tmp_path / "r" / "stage1" / "checkpoints" / "last.ckpt"
    assert saved.exists() == (signum == signal.SIGUSR1)  # which leaves time for a step
    assert not (tmp_path / "r" / "stage1" / "stair").exists()


def held(status, signum):
    """Whether a process has a signal wait."""
    mask = re.search(r"SigBlk:\s*([0-9a-f]+)", status.read_text())
    return mask is not None and int(mask[1], 16) >> (signum - 1) & 1


# ------------------------------------------------------------------ a real run


@pytest.mark.slow
def test_sigterm_saves_ends_with_its_status_and_resumes_to_the_same_weights(tmp_path):
    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    more = ["--trainer.max_steps", "60", "--trainer.val_check_interval", "10", "--data.workers", "1"]
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    # a session of its own, to signal all processes as SLURM does, the reading ones as well
    process = start(stage_args(tmp_path, 1, stopped, *more), start_new_session=True)
    checkpoints = stopped / "stage1" / "checkpoints"
    while not (checkpoints / "best.ckpt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=100)[0]
    assert process.returncode == 128 + signal.SIGTERM, output[-3000:]
    assert "SIGTERM: stopped at step" in output and "--ckpt_path last" in output and "Traceback" not in output
    assert not (stopped / "stage1" / "stair").exists()
    assert 10 <= torch.load(checkpoints / "last.ckpt", weights_only=False)["global_step"] < 60
    resumed = start(stage_args(tmp_path, 1, stopped, *more, "--ckpt_path", "last"))
    output = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0 and "Restored all states" in output, output[-3000:]
    main(stage_args(tmp_path, 1, whole, *more))
    for (name, a), b in zip(weights(stopped, 1).items(), weights(whole, 1).values(), strict=True):
        assert torch.equal(a, b), name

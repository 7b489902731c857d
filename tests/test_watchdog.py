"""What stands still ends with a message; what is slow, suspended or done is left alone."""

import multiprocessing as mp
import os
import re
import signal
import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from callbacks.watchdog import Watchdog
from stair.errors import SettingError
from tests.support.runs import Line

LIMIT = 2.0


class Samples(Dataset):
    def __init__(self, where):
        self.where = where

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if self.where == "input" and i == 2:
            time.sleep(60)
        if self.where == "first batch":
            time.sleep(1.5 * LIMIT)
        return torch.zeros(1)


class Stuck(Line):
    where = ""

    def training_step(self, batch, batch_idx):
        if self.where == "step" and self.trainer.global_step == 2:
            time.sleep(60)
        time.sleep(0.3)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self):
        return DataLoader(Samples(self.where))


def train(where, log, folder):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    module = Stuck()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    fixed = {"accelerator": "cpu", "limit_val_batches": 0, **off}
    checkpoint = None
    if folder is not None:
        begun = L.Trainer(max_steps=1, **fixed)
        begun.fit(module)
        begun.save_checkpoint(checkpoint := folder / "begun.ckpt")
    module.where = where
    trainer = L.Trainer(max_steps=8, callbacks=[Watchdog(LIMIT)], **fixed)
    trainer.fit(module, ckpt_path=checkpoint)
    time.sleep(2 * LIMIT if where == "after" else 0)


@pytest.fixture
def start(tmp_path):
    def begin(where, resumed=False):
        arguments = (where, str(tmp_path / "log"), tmp_path if resumed else None)
        process = mp.get_context("fork").Process(target=train, args=arguments, daemon=True)
        process.start()
        return process, tmp_path / "log"

    return begin


@pytest.mark.parametrize(
    ("where", "expected", "frame"),
    [
        (
            "step",
            r"rank 0 of 1 on .* has not moved for 2 s\. Last activity: in the training step.*after step 2",
            "training_step",
        ),
        ("input", r"Last activity: waiting for the batch.*after step 2", "__getitem__"),
    ],
)
def test_a_stalled_run_ends_with_rank_place_and_stack(start, where, expected, frame):
    process, log = start(where)
    process.join(40)
    output = log.read_text()
    assert process.exitcode == 70 and re.search(expected, output) and frame in output, output
    assert "the same command with --ckpt_path last" in output.lower()


@pytest.mark.parametrize("resumed", [False, True])
def test_the_first_batch_has_no_more_time_than_the_limit_in_a_resumed_run_either(start, resumed):
    process, log = start("first batch", resumed)
    process.join(40)
    assert process.exitcode == 70 and re.search(
        r"for 2 s\. Last activity: waiting for the first batch", log.read_text()
    )


@pytest.mark.slow
def test_a_run_that_is_suspended_or_done_is_left_alone(start):
    process, log = start("after")
    time.sleep(1)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(3 * LIMIT)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 0, log.read_text()


def test_a_negative_limit_is_refused():
    with pytest.raises(SettingError) as refused:
        Watchdog(-1)
    assert refused.value.setting == "watchdog.limit"

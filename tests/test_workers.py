"""Reading processes outlive signals to the job, and do not outlive the process that trains."""

import multiprocessing as mp
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from datamodules import workers
from datamodules.workers import LivelyLoader, begin

fork = mp.get_context("fork")


def read(pipe):
    begin(0)
    pipe.send(os.getpid())
    time.sleep(100)


def start():
    here, there = fork.Pipe()
    worker = fork.Process(target=read, args=(there,), daemon=True)
    worker.start()
    return worker, here.recv()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_reader_leaves_signals_of_others_to_the_training_process():
    worker, pid = start()
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)
    time.sleep(0.5)
    assert alive(pid)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def train(pipe):
    pipe.send(start()[1])
    time.sleep(100)


def test_a_reader_ends_when_the_training_process_is_killed():
    here, there = fork.Pipe()
    trainer = fork.Process(target=train, args=(there,))
    trainer.start()
    pid = here.recv()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    end = time.monotonic() + 30
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(pid)


def iterate(pipe, stuck):
    """Reads ten numbers with two processes; the first `stuck` ones wait for a lock from their fork on."""
    workers._PATIENCE = 2
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # how long torch waits for one that should end
    left = mp.Value("i", stuck)
    lock = threading.Lock()
    lock.acquire()

    def wait():
        with left.get_lock():
            left.value -= 1
            waits = left.value >= 0
        if waits:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            lock.acquire()

    os.register_at_fork(after_in_child=wait)
    try:
        pipe.send(list(LivelyLoader(range(10), batch_size=None, num_workers=2)))
    except RuntimeError as error:
        pipe.send(str(error))
    pipe.send([child.pid for child in mp.active_children()])


@pytest.mark.parametrize("stuck", [0, 1, pytest.param(100, marks=pytest.mark.slow)])
def test_readers_that_are_stuck_in_their_fork_are_started_again_three_times(stuck):
    here, there = fork.Pipe()
    reader = fork.Process(target=iterate, args=(there, stuck))
    reader.start()
    got, left = here.recv(), here.recv()
    reader.join(10)
    assert reader.exitcode == 0 and left == []
    assert got == list(range(10)) if stuck < 100 else "2 of 2 reading processes did not start, 3 times over" in got

"""Reading processes outlive signals to the job, and do not outlive the process that trains."""

import multiprocessing as mp
import os
import signal
import subprocess
import time
from pathlib import Path

from datamodules.workers import begin

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

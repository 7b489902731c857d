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


def iterate(pipe, stuck, interrupted):
    """Reads ten numbers with two processes; the first `stuck` ones wait for a lock from their fork on."""
    workers._PATIENCE = 2
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # how long torch waits for one that should end
    signal.signal(signal.SIGTERM, lambda *args: None)  # as a trainer has: a stuck process then heeds SIGKILL only
    left = mp.Value("i", stuck)
    lock = threading.Lock()
    lock.acquire()

    def wait():
        with left.get_lock():
            left.value -= 1
            waits = left.value >= 0
        if waits:
            lock.acquire()

    os.register_at_fork(after_in_child=wait)
    told: list[str] = []
    workers.logger.warning = lambda text, *values: told.append(text % values)
    if interrupted:
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.alarm(1)
    try:
        got = list(LivelyLoader(range(10), batch_size=None, num_workers=2))
    except (RuntimeError, KeyboardInterrupt) as error:
        got = repr(error)
    pipe.send((got, told, [child.pid for child in mp.active_children()]))


@pytest.fixture
def outcome():
    """Runs `iterate` in a process of its own, which must end by itself."""
    started = []

    def run(stuck, interrupted=False):
        here, there = fork.Pipe()
        reader = fork.Process(target=iterate, args=(there, stuck, interrupted))
        reader.start()
        started.append(reader)
        there.close()
        assert here.poll(100)
        result = here.recv()
        reader.join(20)
        assert reader.exitcode == 0
        return result

    yield run
    for reader in started:
        reader.kill()


@pytest.mark.parametrize("stuck", [0, 1])
def test_readers_that_are_stuck_in_their_fork_are_started_again(outcome, stuck):
    got, told, left = outcome(stuck)
    assert got == list(range(10)) and left == []
    assert [line[:40] for line in told] == ["1 of 2 reading processes did not start w"] * stuck


@pytest.mark.slow
def test_readers_that_are_stuck_each_time_end_in_a_message(outcome):
    got, told, left = outcome(100)
    assert "2 of 2 reading processes did not start, 3 times over" in got and len(told) == 3 and left == []


def test_who_gives_up_waiting_for_stuck_readers_is_not_held_up_by_them(outcome):
    got, told, left = outcome(2, interrupted=True)
    assert got == "KeyboardInterrupt()" and told == [] and left == []


class Four(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index


def test_a_reader_that_dies_before_its_first_word_is_told_of_at_once(monkeypatch):
    def dies(*args):
        raise RuntimeError("no signals here")

    monkeypatch.setattr(workers.signal, "pthread_sigmask", dies)
    with pytest.raises(RuntimeError, match="no signals here"):
        list(LivelyLoader(Four(), num_workers=2))

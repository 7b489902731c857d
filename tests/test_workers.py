"""Reading processes outlive signals to the job, and do not outlive the process that trains."""

import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datamodules.workers import ReadingLoader, begin, start_server

# as in training: a fork of this process would also have threads of libraries that other tests loaded, which take SIGTERM
server = mp.get_context("forkserver")


def read(pipe):
    begin(0)
    pipe.send(os.getpid())
    time.sleep(100)


def start():
    start_server()
    here, there = server.Pipe()
    worker = server.Process(target=read, args=(there,), daemon=True)
    worker.start()
    return worker, here.recv()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pid, seconds=30):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pid)


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
    start_server()
    here, there = server.Pipe()
    trainer = server.Process(target=train, args=(there,))
    trainer.start()
    pid = here.recv()
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.join()
    assert ended(pid)


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return os.getpid(), os.getppid(), index


def test_readers_and_their_server_outlive_a_signal_to_all_processes_of_a_job():
    loader = ReadingLoader(Numbers(), batch_size=None, workers=2, lasting=True)
    batches = iter(loader)
    pid, server, first = next(batches)
    for process in (pid, server):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process, number) if process == server else subprocess.run(
                ["kill", f"-{int(number)}", str(pid)], check=True
            )
    assert [first, *(index for _, _, index in batches)] == list(range(12))
    assert {pid for pid, _, _ in loader} == {process.pid for process in loader._iterator._workers}


UNGUARDED = """
import sys, time
sys.path.insert(0, {root!r})
print("imported", flush=True)
from tests.test_workers import Numbers
from datamodules.workers import ReadingLoader
loader = ReadingLoader(Numbers(), batch_size=None, workers=2, lasting=True)
seen = list(loader)
print(len(seen), *{{number for pid, server, _ in seen for number in (pid, server)}}, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_script_leaves_no_process_behind_and_readers_did_not_run_it_again(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED.format(root=str(Path(__file__).parents[1])))
    trainer = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True)
    assert [trainer.stdout.readline()] == ["imported\n"]
    count, *pids = map(int, trainer.stdout.readline().split())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    assert count == 12 and len(pids) == 3
    assert all(ended(pid) for pid in pids)

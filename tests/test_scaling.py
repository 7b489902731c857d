"""The formulae for bytes between ranks are those of the code."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


def run(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["2", "4"])
def test_what_processes_receive_equals_the_formulae_to_the_byte(ranks):
    done = run("--check", ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all gathers of the loss") == 4 and "by columns" in done.stdout


@pytest.mark.slow
def test_the_plan_says_that_it_is_modelled():
    done = run("--pairs", "1024", "--ranks", "8", "--strategy", "fsdp2")
    assert done.returncode == 0 and "modelled" in done.stdout, done.stderr
    assert "multiple of --ranks" in run("--pairs", "10", "--ranks", "3").stderr

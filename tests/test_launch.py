"""Starting the program: what a user did wrong is one line, once, and soon; torchrun starts its ranks."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from main import main
from stair import cli, launch
from stair.errors import SettingError, TrainingError
from tests.support.runs import stage_args

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
NAMES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")


STARTED = []


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def start(*command, cwd=ROOT, **env):
    process = subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    STARTED.append(process)
    return process


COMMANDS = {
    "lightning": [BIN / "lightning"],
    "stair": [BIN / "stair"],
    "main.py": [sys.executable, ROOT / "main.py"],
    "-m main": [sys.executable, "-m", "main"],
}


@pytest.mark.parametrize(
    ("command", "args"),
    [*zip(COMMANDS, [("--config", "no.yaml"), ("--config=no.yaml",), ("-c", "no.yaml"), ("-cno.yaml",)], strict=True)],
)
def test_a_config_file_that_does_not_exist_is_one_line_before_torch_is_imported(tmp_path, command, args):
    process = start(*COMMANDS[command], "fit", "--config", ROOT / "configs/stage1.yaml", *args, cwd=tmp_path)
    begin = time.perf_counter()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and len(err.splitlines()) == 1
    assert "no.yaml" in err and str(tmp_path) in err
    assert time.perf_counter() - begin < 5  # importing torch and lightning alone takes as long


def test_settings_in_place_of_a_file_are_left_to_the_parser(tmp_path):
    (tmp_path / "my.yaml").touch()
    launch.prepare(
        ["fit", "--config", "{data: {workers: 3}}", "-c", str(tmp_path / "my.yaml"), "--data.train", "no.yaml"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "status", "expected"),
    [
        (("--data.wrokers", "1"), 2, "wrokers"),
        (("--data.workers", "many"), 2, "data.workers"),
        (("--data.workers", "-1"), 1, "workers"),
        (("--trainer.devices", "0"), 1, "devices"),
        (("--data.train", "/nowhere/a.tar"), 1, "/nowhere/a.tar"),
        (("--model.init_args.stair.vocabulary", "/nowhere/v.txt"), 1, "/nowhere/v.txt does not exist"),
        (("--model.init_args.stair.image.name", "nonsense"), 1, "'nonsense'"),
        (("--data.global_batch_size", "4096"), 1, "4096"),
    ],
)
def test_an_error_of_the_user_is_one_line(scenes, tmp_path, args, status, expected):
    process = start(BIN / "lightning", *stage_args(scenes, 1, tmp_path / "r", *args))
    _, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if "error: " in line]
    assert process.returncode == status and "Traceback" not in err, err
    assert len(lines) == 1 and expected in lines[0] and len(lines[0]) < 700 and "usage" not in err


@pytest.mark.parametrize("name", NAMES)
def test_only_the_first_rank_prints_an_error_that_all_have(tmp_path, name):
    # a launcher ends the other ranks when the first has failed
    other = start(BIN / "lightning", "fit", "--config", "no.yaml", **{name: "1"})
    with pytest.raises(subprocess.TimeoutExpired):
        other.wait(timeout=3)
    other.terminate()
    assert other.communicate(timeout=20) == ("", "") and other.returncode == 1


def test_a_rank_prints_an_error_that_it_alone_has(monkeypatch, capsys):
    monkeypatch.setattr(launch, "_PATIENCE", 0.0)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    monkeypatch.setattr(launch.signal, "pthread_sigmask", lambda *_: None)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as end, launch.one_line_errors():
        raise SettingError("a\nb is wrong", "b")
    assert end.value.code == 1 and capsys.readouterr().err.endswith("error: a b is wrong\n")


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(RuntimeError), launch.one_line_errors():
        raise RuntimeError("broken")


@pytest.mark.parametrize("error", [SettingError("wrong", "b"), TrainingError("the run is dead")])
def test_a_job_is_not_restarted_after_an_error_that_comes_back(tmp_path, monkeypatch, error):
    monkeypatch.setenv("STAIR_JOB", str(tmp_path / "job"))
    with pytest.raises(SystemExit), launch.one_line_errors():
        raise error
    assert (tmp_path / "job.error").exists()


# ------------------------------------------------------------------ torchrun


@pytest.mark.slow
@pytest.mark.parametrize("program", [[BIN / "lightning"], [ROOT / "main.py"], ["-m", "main"]], ids=str)
def test_torchrun_starts_ranks_that_train_together(scenes, tmp_path, program):
    # `--` before the program: the parser of torchrun would take --run for its own --run-path
    options = ["-m", "--"] if program[0] == "-m" else ["--"]
    run = ("--standalone", "--nproc-per-node", "2", *options, program[-1], *stage_args(scenes, 1, tmp_path / "r"))
    process = start(BIN / "torchrun", *run)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "MEMBER: 2/2" in out + err, err[-3000:]
    assert (tmp_path / "r/stage1/stair/model.safetensors").exists()


@pytest.mark.slow
def test_ranks_that_the_settings_contradict_are_refused_once(scenes, tmp_path):
    command = stage_args(scenes, 1, tmp_path / "r", "--trainer.devices", "1")
    process = start(BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--", ROOT / "main.py", *command)
    _, err = process.communicate(timeout=300)
    ours = [line for line in err.splitlines() if "error: " in line and "trainer.devices" in line]
    assert process.returncode == 1 and len(ours) == 1, err
    assert re.search(r"trainer\.devices is 1, but torchrun started 2 processes", ours[0])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("value", ["#sunset", "~", "007", "no", "2024-01-01", "null", " null"])
def test_a_text_that_yaml_reads_as_something_else_stays_as_typed(value, monkeypatch):
    given = []

    monkeypatch.setattr(
        "stair.index.commands.search", lambda index, **options: given.extend([str(index), *options.values()])
    )
    monkeypatch.setattr("sys.argv", ["stair", "search", value, "--text", value, "--words", "-" + value])
    cli.main()
    assert given == [value, value, "-" + value]


@pytest.mark.parametrize("text", ["trainer: [", ""])
def test_a_file_of_settings_that_cannot_be_read_is_named(tmp_path, text, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/stage1.yaml"), "--config", str(tmp_path / "mine.yaml")])
    assert str(tmp_path / "mine.yaml") in capsys.readouterr().err

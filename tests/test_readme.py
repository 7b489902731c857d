"""README.md: its Python and its commands run as they stand, on data and encoders small enough for a test."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from stair import SparseIndex
from tests.support.runs import ROOT, write_small_scenes

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
PORT = 8080  # that of `stair serve`; the README gives none


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(*programs):
    """The README's lines of these programs, without their comments."""
    lines = "".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split()[0] in programs]


def test_the_python_runs_and_prints_lines_as_shown(tiny_stair, photos, tmp_path, monkeypatch, capsys):
    (code,), (shown,) = blocks("python"), blocks("text")
    monkeypatch.chdir(tmp_path)
    tiny_stair.save_pretrained("runs/demo/stage3/stair")
    names = [path.name for path in photos]
    SparseIndex.build("runs/demo/index", tiny_stair.encode(images=photos), names, model=tiny_stair)
    exec(code.replace("a purple square on stripes", "a dog"), {})
    for text in (shown, capsys.readouterr().out):
        lines = text.splitlines()
        assert len(lines) == 2 and all(re.fullmatch(r"\S+ \d+\.\d+ \{.*\}", line) for line in lines)


@pytest.mark.slow
def test_the_commands_train_three_stages_and_search(photos, tmp_path):
    scenes = write_small_scenes(tmp_path / "scenes")
    for folder in ("shards", "val"):
        (tmp_path / folder).mkdir()
    for path in scenes.glob("train-*.tar"):
        shutil.copy(path, tmp_path / "shards" / f"0{path.stem[-4:]}.tar")
    shutil.copy(scenes / "val-0000.tar", tmp_path / "val")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = ["--config", "configs/model/tiny.yaml", "--config", str(scenes / "small.yaml")]
    small += ["--model.init_args.stair.vocabulary", str(scenes / "vocab.txt")]
    training = commands("lightning")
    assert [line[1] for line in training] == ["fit"] * 3
    for line in training:
        line = [argument.replace("00999", "00003") for argument in line]
        subprocess.run([BIN / line[0], *line[1:], *small], cwd=tmp_path, check=True)
    *searching, serving = commands("stair")
    assert [line[1] for line in (*searching, serving)] == ["embed", "index", "serve"]
    for line in searching:
        subprocess.run([BIN / line[0], *line[1:]], cwd=tmp_path, check=True)
    assert len(SparseIndex.open(tmp_path / "photos.index")) == len(photos)
    with subprocess.Popen([BIN / serving[0], *serving[1:]], cwd=tmp_path) as server:
        try:
            assert answer(server, f"http://127.0.0.1:{PORT}") == 200
        finally:
            server.terminate()


def answer(server, url):
    """The status of a page, as soon as its server listens."""
    for _ in range(600):
        try:
            return urllib.request.urlopen(url, timeout=10).status
        except OSError:
            assert server.poll() is None, "the server ended"
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")

"""README and pages of docs/: Python and commands run as they stand, on data and encoders small enough for a test."""

import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from PIL import Image

from stair import SparseIndex, Stair
from stair.data.pairs import EvaluationPairs
from stair.images import MAX_PIXELS
from tests.support.files import noise_png, write_tar
from tests.support.models import tiny_config
from tests.support.runs import ROOT, write_small_scenes

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
PORT = 8080  # that of `stair serve`; the README gives none


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(*programs, page=README):
    """The page's lines of these programs, without their comments."""
    lines = "".join(blocks("sh", page)).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.split()[0] in programs]


def test_the_python_runs_and_prints_lines_as_shown(tiny_stair, photos, tmp_path, monkeypatch, capsys):
    (code,), (shown,) = blocks("python"), blocks("text")
    monkeypatch.chdir(tmp_path)
    tiny_stair.save_pretrained("runs/demo/stage3/stair")
    names = [path.name for path in photos]
    SparseIndex.build("runs/demo/index", tiny_stair.encode(images=photos), names, model=tiny_stair)
    exec(code.replace("three yellow mushrooms", "a dog"), {})
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
    assert [line[1] for line in commands("stair")] == ["embed", "index", "serve"]
    search(commands("stair"), tmp_path)
    assert len(SparseIndex.open(tmp_path / "photos.index")) == len(photos)


def search(lines, folder):
    """Runs the commands of a page in a folder; what serves has to answer."""
    for program, *args in lines:
        if args[0] != "serve":
            subprocess.run([BIN / program, *args], cwd=folder, check=True)
            continue
        with subprocess.Popen([BIN / program, *args], cwd=folder) as server:
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


@pytest.mark.slow
def test_own_data_is_prepared_trained_on_and_searched_as_get_started_says(tmp_path):
    scenes = write_small_scenes(tmp_path / "scenes")
    (tmp_path / "photos").mkdir()
    for split, name in (("train", "captions.csv"), ("val", "captions_val.csv")):
        lines = ["image,caption"]
        samples = EvaluationPairs(f"{scenes}/{split}-*.tar", image_size=32, max_pixels=MAX_PIXELS)
        for n, sample in enumerate(map(samples.__getitem__, range(len(samples))), 1):
            path = f"{n:04d}.jpg" if split == "train" else f"val{n}.jpg"
            Image.fromarray(sample.pixels.permute(1, 2, 0).numpy()).save(tmp_path / "photos" / path)
            lines += [f'{path},"{caption}"' for caption in sample.captions]
        (tmp_path / name).write_text("\n".join(lines))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    pages = [(ROOT / "docs" / "start" / f"{name}.md").read_text() for name in ("own-data", "search")]
    own_data = commands("stair", "lightning", page=pages[0])
    gpu, cpu = (n for n, line in enumerate(own_data) if line[0] == "lightning")
    vocabulary = str(scenes / "vocab.txt")
    prepare = [[*line, *["--vocabulary", vocabulary] * (line[1] == "doctor")] for line in own_data[:gpu]]
    search(prepare, tmp_path)
    (tmp_path / "trained.yaml").write_text("model: {init_args: {stair: {image: {freeze_until: null}}}}")
    # encoders from scratch: those of the page are downloaded
    few = ["--config", "configs/model/tiny.yaml", "--config", "trained.yaml"]
    few += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.global_batch_size", "32"]
    few += ["--model.init_args.optimizer.warmup_steps", "1"]
    for line, more in ((own_data[gpu], ["--print_config"]), (own_data[cpu], [])):
        for stage in "123":
            words = [word.replace("$k", stage) for word in line[: line.index("||")]]
            offline = ["--model.init_args.stair.vocabulary", vocabulary]
            subprocess.run([BIN / words[0], *words[1:], *offline, *few, *more], cwd=tmp_path, check=True)
    search(own_data[cpu + 1 :], tmp_path)
    shutil.rmtree(tmp_path / "embeddings")
    shutil.rmtree(tmp_path / "photos.index")
    search(commands("stair", page=pages[1]), tmp_path)
    assert "score" in (tmp_path / "why.html").read_text()


def test_indexes_of_two_machines_as_the_page_fills_them_answer_as_one(stair, vocab_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vocab.txt").write_text(vocab_file.read_text() + "beach\n")
    torch.manual_seed(0)
    Stair(tiny_config("vocab.txt")).save_pretrained("MODEL")
    for n in range(508):
        write_tar(Path(f"shards/{n:04d}.tar"), [("a.png", noise_png(n))])
    page = (ROOT / "docs/guides/export.md").read_text().partition("## Beyond one machine")[2].partition("\n## ")[0]
    lines, (code,) = commands("stair", "python", page=page), blocks("python", page)
    second = [[word.replace("s-0", "s-1").replace("{0000..0499}", "{0500..0507}") for word in line] for line in lines]
    for (_, *embed), (_, *index), _ in (lines, second):
        stair(*embed)
        stair(*embed[:-1], "1/2")
        stair(*index)
    stair("index", "one.index", "embeddings-0", "embeddings-1")
    Path("examples").symlink_to(ROOT / "examples")
    search(lines[2:], tmp_path)
    assert len(Path("photos-0.os/bulk.ndjson").read_text().splitlines()) == 2 * 500  # an action before each document
    exec(code, names := {})
    expected = SparseIndex.open("one.index").search(words="dog:2 beach", k=10)
    assert [(hit.id, hit.score) for hit in names["best"]] == [(hit.id, hit.score) for hit in expected]
    assert [len(shard) for shard in names["shards"]] == [500, 8] and len(expected) == 10

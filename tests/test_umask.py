"""What any command writes can be read by whom the umask lets read it."""

import os

import pytest
from PIL import Image

from examples.lucene import export
from main import main as lightning
from stair import cli
from tests.support.runs import stage_args, write_small_scenes


@pytest.fixture(params=[0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def wrong_modes(folder, umask):
    """Every path below a folder whose mode is not the one that `open` or `mkdir` gives."""
    paths = [(path, 0o777 if path.is_dir() else 0o666) for path in folder.rglob("*")]
    assert len(paths) > 1
    return [
        f"{path}: {path.stat().st_mode & 0o777:o}"
        for path, mode in paths
        if path.stat().st_mode & 0o777 != mode & ~umask
    ]


def test_every_command_gives_its_files_the_mode_of_the_umask(tiny_stair, tmp_path, umask, monkeypatch):
    def stair(*arguments):
        monkeypatch.setattr("sys.argv", ["stair", *map(str, arguments)])
        cli.main()

    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    out.mkdir()
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), colour).save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {colour} ball")
    (tmp_path / "t.csv").write_text("file,caption\na.png,a red ball\nb.png,a blue ball\n")
    model, index = out / "model", out / "index"
    tiny_stair.save_pretrained(model)
    tiny_stair.save_pretrained(model)  # over itself
    stair("prepare", "folder", tmp_path / "t.csv", pictures, out / "shards", "--workers", "1")
    stair("embed", model, pictures, out / "embeddings", "--workers", "0")
    stair("index", index, out / "embeddings")
    stair("evaluate", model, out / "shards" / "*.tar", "--output", out / "evaluation")
    for name in ("page.html", "heat.png"):
        stair("explain", model, out / name, "--image", pictures / "a.png", "--text", "a red ball")
    stair("export", "sqlite", index, out / "index.sqlite")
    stair("export", "qdrant", index, out / "points.jsonl")
    export("elasticsearch", index, out / "elasticsearch")
    assert wrong_modes(out, umask) == []


@pytest.mark.parametrize("umask", [0o027], ids=oct, indirect=True)
def test_a_training_gives_its_files_the_mode_of_the_umask(tmp_path, umask):
    scenes = write_small_scenes(tmp_path / "scenes")
    lightning(stage_args(scenes, 1, tmp_path / "run"))
    assert {"model.safetensors", "last.ckpt"} <= {path.name for path in (tmp_path / "run").rglob("*")}
    assert wrong_modes(tmp_path / "run", umask) == wrong_modes(scenes, umask) == []

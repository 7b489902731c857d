"""Fixtures of several test files: a small vocabulary, model and data set, the folder of real data, a browser."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support.models import IMAGE_TOWERS, tiny_config, write_vocabulary

torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# of Lightning's calls; `pytest.warns` repeats warnings without the module by which pyproject.toml ignores them
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"


def pytest_collection_modifyitems(items):
    # after an export to ONNX, torch starts a thread with the next backward pass, and no forked rank can train any more
    items.sort(key=lambda item: item.path.name == "test_export.py")


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


@pytest.fixture
def tiny_stair(vocab_file):
    from stair.model import Stair

    torch.manual_seed(0)
    return Stair(tiny_config(vocab_file)).eval()


@pytest.fixture(params=IMAGE_TOWERS)
def any_stair(vocab_file, request):
    """A model with an image encoder of each kind."""
    from stair.model import Stair

    torch.manual_seed(0)
    return Stair(tiny_config(vocab_file, request.param)).eval()


@pytest.fixture
def model(tiny_stair, tmp_path):
    """The folder of a small exported model."""
    tiny_stair.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def stair(monkeypatch, capsys):
    """The command `stair`, called with its arguments; returns what it printed."""

    def run(*arguments):
        from stair.cli import main

        monkeypatch.setattr("sys.argv", ["stair", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def captions():
    return ["a red ball on the sea", "two dogs", "the small cat sleeps.", "zzz"]


@pytest.fixture
def pixels():
    return torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photos(tmp_path, pixels):
    """The images of `pixels` as files in `photos/`, in their order."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"p{n}.png")
    return sorted(folder.glob("*.png"))


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real images, where there is one."""
    folder = Path(os.environ.get("STAIR_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}; set STAIR_SHARED_DATA")
    return folder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Drawn scenes for runs of seconds, with a vocabulary, and the overlay `small.yaml`."""
    from tests.support.runs import write_small_scenes

    return write_small_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def vocab(tmp_path):
    """The path of a small vocabulary file."""
    from tests.support.shards import write_words

    return write_words(tmp_path)


@pytest.fixture
def browser():
    """Chromium, where it and playwright are installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()

"""What several test files need: a small vocabulary, a small model, and where the real data lies."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = (
    "a an the of on two red blue green round dog cat bird runs sleeps ##s ##ning ball house tree sea "
    "small big photo . ,"
).split()


def pytest_collection_modifyitems(items):
    # after an export to ONNX, torch starts a thread with the next backward pass, and no forked rank can train any more
    items.sort(key=lambda item: item.path.name == "test_export.py")


def write_vocabulary(path: Path, unused: int = 3) -> Path:
    """A BERT-shaped vocab.txt of some 35 pieces, `[unusedN]` included as in the published one."""
    special = ["[PAD]", *(f"[unused{i}]" for i in range(unused)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    path.write_text("\n".join([*special, *WORDS]) + "\n")
    return path


@pytest.fixture(scope="session")
def vocab_file(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


def tiny_config(vocab_file, **changes):
    """A model of two small towers from scratch."""
    from stair.encoders import ImageTower, TextTower
    from stair.model import StairConfig

    image = ImageTower(
        "vit_tiny_patch16_224", False, 32, options={"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8}
    )
    text = TextTower("bert", False, 12, options=TEXT_OPTIONS)
    return StairConfig(str(vocab_file), image, text, **changes)


TEXT_OPTIONS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


@pytest.fixture
def tiny_stair(vocab_file):
    from stair.model import Stair

    torch.manual_seed(0)
    return Stair(tiny_config(vocab_file)).eval()


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


def write_small_scenes(folder: Path, settings: str) -> Path:
    """Drawn scenes for runs of seconds, with a vocabulary, and `small.yaml` to overlay."""
    from datamodules.synthetic import write_scenes

    write_scenes(folder, train=64, val=12, image_size=32)
    (folder / "small.yaml").write_text(settings)
    return folder

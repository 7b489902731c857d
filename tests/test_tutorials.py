"""The tutorials of docs/tutorials run as they stand, in their order: the second uses what the first made."""

import subprocess
import sys
from pathlib import Path

import pytest

from stair import SparseIndex

ROOT = Path(__file__).parents[1]


def run(name: str, home: Path) -> str:
    """What a tutorial prints, run in a folder that has the project's configs."""
    script = ROOT / "docs" / "tutorials" / name
    return subprocess.run([sys.executable, script], cwd=home, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the first tutorial has run."""
    home = tmp_path_factory.mktemp("clone")
    (home / "configs").symlink_to(ROOT / "configs")
    run("train_on_your_folder.py", home)
    return home


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_on_a_captioned_folder_gives_a_model_and_an_index_of_its_pictures(home):
    tutorial = home / "runs" / "tutorial"
    assert all((tutorial / f"stage{stage}" / "stair" / "model.safetensors").is_file() for stage in (1, 2, 3))
    assert len(SparseIndex.open(tutorial / "photos.index")) == 1700
    assert (tutorial / "stage3" / "stair-evaluation" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_hit_is_taken_apart_into_terms_and_patches(home):
    output = run("why_it_matched.py", home)
    assert "of the score comes from patch row" in output and "stripes -purple" in output
    assert (home / "runs" / "tutorial" / "why.html").is_file()

"""What `encode` returns, what evaluation measures, what is pushed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stair import Stair
from stair.evaluate import EvaluationSet, Sample, evaluate, open_model
from stair.hub import push
from stair.images import decode_image
from stair.index.calibration import Calibration


def test_encode_gives_the_rows_of_the_encoders(tiny_stair, photos, captions):
    opened = [Image.open(path) for path in photos]
    expected = tiny_stair.encode_image(opened).numpy()
    np.testing.assert_allclose(tiny_stair.encode(images=photos, batch_size=3).toarray(), expected, atol=1e-6)
    np.testing.assert_allclose(tiny_stair.encode(images=iter(opened)).toarray(), expected, atol=1e-6)
    expected = tiny_stair.encode_text(captions).numpy()
    np.testing.assert_allclose(tiny_stair.encode(texts=captions, batch_size=1).toarray(), expected, atol=1e-6)
    sparse = tiny_stair.encode(texts=captions, output="torch")
    assert sparse.layout == torch.sparse_csr
    np.testing.assert_allclose(sparse.to_dense().numpy(), expected, atol=1e-6)
    assert tiny_stair.encode(texts=[]).shape == (0, len(tiny_stair.vocabulary))


def test_encode_refuses_what_it_cannot_mean(tiny_stair, tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    for arguments, complaint in [
        ({}, "one of both"),
        ({"images": [], "texts": []}, "one of both"),
        ({"texts": "a dog"}, "give a list"),
        ({"texts": ["a"], "output": "numpy"}, "'scipy' or 'torch'"),
        ({"images": [tmp_path / "x.png"]}, r"x\.png: image undecodable"),
        ({"images": [b"bytes"]}, "an image is a bytes"),
        ({"texts": ["a", None]}, "a text is None"),
        ({"texts": ["a"], "batch_size": 0}, "batch_size is 0"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            tiny_stair.encode(**arguments)
    for call, argument, complaint in [
        (tiny_stair.encode_text, "dog", "give a list"),
        (tiny_stair.encode_text, [], "no texts"),
        (tiny_stair.encode_image, [], "no images"),
        (tiny_stair.encode_image, [tmp_path / "x.png"], "give PIL images"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            call(argument)


def test_a_photograph_held_sideways_is_the_same_from_its_file_and_from_pillow(tiny_stair, tmp_path):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        upright.save(tmp_path / "held.png", exif=exif)
        opened = Image.open(tmp_path / "held.png")
        decoded = decode_image((tmp_path / "held.png").read_bytes())
        rows = [tiny_stair.encode(images=[image]).toarray() for image in (tmp_path / "held.png", opened, decoded)]
        rows.append(tiny_stair.encode(images=[decoded.resize(decoded.size)]).toarray())
        assert (rows[0] > 0).any() and all((row == rows[0]).all() for row in rows), orientation


def test_the_fingerprint_survives_saving_and_names_all_that_makes_an_embedding(tiny_stair, tmp_path):
    before = tiny_stair.fingerprint
    tiny_stair.save_pretrained(tmp_path / "m")
    assert Stair.from_pretrained(tmp_path / "m").fingerprint == before
    tiny_stair.config.text.max_tokens -= 1
    assert tiny_stair.fingerprint != before


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that is a folder: what is uploaded lies there, and is downloaded from there."""
    import shutil

    import huggingface_hub

    class FolderHub:
        def create_repo(self, name, private, exist_ok):
            (tmp_path / "hub" / name).mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "HfApi", FolderHub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "hub" / name))
    return tmp_path / "hub"


def test_a_model_comes_back_from_the_hub_with_a_card(tiny_stair, hub, tmp_path):
    (tmp_path / "results.json").write_text('{"recall@1 | val": 0.123456, "note": "one\\nline"}')
    tiny_stair.push_to_hub("me/tiny", "cc-by-nc-4.0", "Drawn scenes.", tmp_path / "results.json")
    assert Stair.from_pretrained("me/tiny").fingerprint == tiny_stair.fingerprint
    card = (hub / "me/tiny/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\n") and 'from_pretrained("me/tiny")' in card
    assert "| recall@1 \\| val | 0.1235 |" in card and "| note | one line |" in card
    assert "Drawn scenes." in card and "truncated to 12 tokens" in card and "No results" not in card
    with pytest.raises(ValueError, match="USER/MODEL"):
        tiny_stair.push_to_hub("tiny", "mit")


def test_a_calibration_goes_to_the_hub_with_its_model(model, hub):
    calibration = Calibration(Stair.from_pretrained(model).fingerprint, "d", 1, 1, [0.5])
    calibration.save(model)
    push(str(model), "me/tiny", "mit")
    loaded = Stair.from_pretrained("me/tiny")
    assert Calibration.load(loaded.folder, loaded.fingerprint) == calibration


def test_a_card_takes_what_was_evaluated_and_refuses_what_it_cannot_show(tiny_stair, hub, tmp_path):
    tiny_stair.recorded = {"stage": 3, "steps": 7}
    samples = [Sample(Image.new("RGB", (40, 40), colour), ["a red ball"]) for colour in ("red", "blue")]
    tiny_stair.save_pretrained(tmp_path / "m")
    result, _ = evaluate(open_model(str(tmp_path / "m")), [EvaluationSet("mine", samples)])
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    Stair.from_pretrained(tmp_path / "m").push_to_hub("me/tiny", "mit", results=tmp_path / "evaluation.json")
    card = (hub / "me/tiny/README.md").read_text()
    assert "### Retrieval" in card and "2 images with 1 captions each" in card and "stage: 3, steps: 7" in card
    (tmp_path / "evaluation.json").write_text('{"mine": {"recall": 1}}')
    with pytest.raises(ValueError, match=r"'mine' is neither a number.*evaluation\.json"):
        tiny_stair.push_to_hub("me/tiny", "mit", results=tmp_path / "evaluation.json")


def test_only_the_files_of_a_model_are_uploaded(tiny_stair, hub, tmp_path):
    from stair.hub import FILES, push

    tiny_stair.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "notes-to-self.txt").write_text("private")
    push(str(tmp_path / "m"), "me/other", "mit")
    assert {path.name for path in (hub / "me/other").iterdir()} <= {*FILES, "README.md"}
    assert "No results" in (hub / "me/other/README.md").read_text()

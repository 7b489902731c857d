"""The drawn demo data: captions say what pixels show, nothing leaks, and the same arguments give the same bytes.

The claims are checked on files as training reads them: captions, spec and pixels come out of the tar shards.
"""

import io
import json
import math
import shutil
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES
from datamodules.synthetic import write_scenes
from stair.errors import SettingError
from stair.vocabulary import Vocabulary

TRAIN, VAL = 600, 100
NOUNS = {noun: name for name, shape in SHAPES.items() for pair in shape.nouns for noun in pair}
COLOUR_WORDS = {word: name for name, (_, words) in COLOURS.items() for word in words}
SIZE_WORDS = {word: name for name, words in SIZES.items() for word in words}

Sample = dict[str, Any]


def read(folder: Path, split: str) -> list[Sample]:
    samples: dict[str, Sample] = defaultdict(dict)
    for shard in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                content = tar.extractfile(member).read()
                samples[key] |= (
                    json.loads(content) if kind == "json" else {"pixels": np.asarray(Image.open(io.BytesIO(content)))}
                )
    return list(samples.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    assert write_scenes(folder, train=TRAIN, val=VAL)
    return folder


@pytest.fixture(scope="module")
def train(folder: Path) -> list[Sample]:
    return read(folder, "train")


@pytest.fixture(scope="module")
def val(folder: Path) -> list[Sample]:
    return read(folder, "val")


def pixels_of(sample: Sample, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels that have this colour (hues are drawn at most 17 away from it)."""
    distance = np.linalg.norm(sample["pixels"].astype(float) - COLOURS[colour][0], axis=-1)
    return np.nonzero(distance < 25)


def test_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path: Path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_scenes(tmp_path / name, train=24, val=8, seed=seed)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert set(files) == {f"train-000{i}.tar" for i in range(4)} | {"val-0000.tar", "vocab.txt", "manifest.json"}
    for name, content in files.items():
        assert (tmp_path / "b" / name).read_bytes() == content
        assert name == "vocab.txt" or (tmp_path / "c" / name).read_bytes() != content


def test_validation_does_not_depend_on_the_size_of_training(tmp_path: Path):
    write_scenes(tmp_path / "a", train=8, val=8)
    write_scenes(tmp_path / "b", train=40, val=8)
    assert (tmp_path / "a/val-0000.tar").read_bytes() == (tmp_path / "b/val-0000.tar").read_bytes()


def test_complete_data_is_left_alone_and_damaged_data_is_written_again(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert not write_scenes(copy, train=TRAIN, val=VAL)
    (copy / "val-0000.tar").write_bytes(b"half")
    assert write_scenes(copy, train=TRAIN, val=VAL)
    assert (copy / "val-0000.tar").read_bytes() == (folder / "val-0000.tar").read_bytes()
    assert write_scenes(copy, train=8, val=4)


def test_no_scene_occurs_twice_in_either_split_or_across_them(train: list[Sample], val: list[Sample]):
    specs = [json.dumps(sample["spec"], sort_keys=True) for sample in train + val]
    assert len(train) == TRAIN and len(val) == VAL
    assert len(set(specs)) == TRAIN + VAL


def test_first_captions_are_unique_in_validation(val: list[Sample]):
    assert len({sample["captions"][0] for sample in val}) == VAL


def test_every_colour_named_in_a_caption_is_in_the_pixels(val: list[Sample]):
    for sample in val:
        named = {COLOUR_WORDS[w] for caption in sample["captions"] for w in caption.split() if w in COLOUR_WORDS}
        for colour in named:
            # the smallest thing drawn, a crescent of 14 pixels, has about 40
            assert len(pixels_of(sample, colour)[0]) >= 20, (colour, sample["captions"], sample["spec"])


def test_the_first_caption_names_all_of_the_scene_and_no_caption_anything_else(train: list[Sample]):
    for sample in train:
        groups, first = sample["spec"]["groups"], sample["captions"][0]
        words = first.split()
        assert {NOUNS[w] for w in words if w in NOUNS} == {g["shape"] for g in groups}
        assert {COLOUR_WORDS[w] for w in words if w in COLOUR_WORDS} == {g["colour"] for g in groups}
        assert {SIZE_WORDS[w] for w in words if w in SIZE_WORDS} == {g["size"] for g in groups}
        assert any(phrase in first for phrase in BACKGROUNDS[sample["spec"]["background"]].phrases)
        for caption in sample["captions"]:
            assert {NOUNS[w] for w in caption.split() if w in NOUNS} <= {g["shape"] for g in groups}
            assert {COLOUR_WORDS[w] for w in caption.split() if w in COLOUR_WORDS} <= {g["colour"] for g in groups}


@pytest.mark.parametrize(("layout", "axis"), [("row", 1), ("column", 0)])
def test_the_group_named_left_or_above_is_drawn_there(train: list[Sample], layout: str, axis: int):
    forward = ("left of",) if layout == "row" else (" above ", " over ", " on top of ")
    checked = 0
    for sample in train:
        groups, caption = sample["spec"]["groups"], sample["captions"][0]
        if sample["spec"]["layout"] != layout or groups[0]["colour"] == groups[1]["colour"]:
            continue
        nouns = [NOUNS[w] for w in caption.split() if w in NOUNS]
        if not any(phrase in caption for phrase in forward):
            nouns.reverse()
        colour_of = {g["shape"]: g["colour"] for g in groups}
        first, second = (pixels_of(sample, colour_of[shape])[axis] for shape in nouns)
        # the median ignores details in the other group's colour
        assert np.median(first) < np.median(second), (caption, sample["spec"])
        checked += 1
    assert checked > 50


def test_every_word_of_a_caption_is_one_piece_and_captions_fit_32_tokens(folder: Path, train: list[Sample]):
    vocabulary = Vocabulary(folder / "vocab.txt")
    for sample in train:
        for caption in sample["captions"]:
            assert vocabulary.tokens_of(vocabulary.token_ids(caption)) == caption.split()
            assert len(caption.split()) + 2 <= 32
    assert 200 < len(vocabulary) < 400


def test_words_of_no_caption_can_still_be_spelt(folder: Path):
    vocabulary = Vocabulary(folder)
    ids, _ = vocabulary.tokenize(["a zebra"], max_tokens=16)
    assert vocabulary.tokens.index("[UNK]") not in ids


def test_captions_vary_in_words_and_leave_things_out(train: list[Sample]):
    captions = [caption for sample in train for caption in sample["captions"]]
    assert all(len(sample["captions"]) == 5 == len(set(sample["captions"])) for sample in train)
    assert len(set(captions)) > 0.95 * len(captions)
    used = {word for caption in captions for word in caption.split()}
    assert used >= NOUNS.keys() | COLOUR_WORDS.keys() | SIZE_WORDS.keys()
    lengths = [[len(caption.split()) for caption in sample["captions"]] for sample in train]
    full, alone = np.mean([row[0] for row in lengths]), np.mean([row[3] for row in lengths])
    assert alone < 0.5 * full


def test_objects_stand_out_from_their_background(train: list[Sample]):
    for sample in train:
        ground = BACKGROUNDS[sample["spec"]["background"]].tones[0]
        assert all(math.dist(COLOURS[g["colour"]][0], ground) > 80 for g in sample["spec"]["groups"])


@pytest.mark.parametrize(("setting", "value"), [("train", 3), ("val", 0), ("image_size", 15)])
def test_numbers_too_small_are_refused_by_name(tmp_path: Path, setting: str, value: int):
    with pytest.raises(SettingError) as refused:
        write_scenes(tmp_path, **{setting: value})
    assert refused.value.setting == setting and not list(tmp_path.iterdir())

"""What makes the figures of a set unfair is counted, alike in `stair evaluate` and validation, on any number of ranks."""

import json
import logging

import pytest
import torch
import torch.multiprocessing as mp
from PIL import Image

from main import main
from stair import Vocabulary, cli
from stair.evaluate.classify import zero_shot
from stair.ranking import SparseRows
from stair.set_counts import SetCounts, class_counts, image_hashes, sentences, text_captions, token_captions
from tests.support.files import encoded, members_of, write_tar
from tests.support.runs import stage_args, write_small_scenes

LONGEST = 8
LONG = "a red ball on the green sea " * 3
# colour and captions of each image
SET = [
    ("red", ["a red ball", "the red ball"]),
    ("red", ["a red house", LONG]),
    ("blue", ["a blue ball", "a dog"]),
    ("green", ["a dog", "a blue ball"]),
    ("white", ["a cat xylophone", "the sea", "a red ball"]),
    ("black", ["a bird", "a tree"]),
]
WANTED = {
    "images": 6,
    "captions": 13,
    "repeated_images": 2,
    "images_with_the_captions_of_another": 0,
    "shared_captions": 6,
    "images_without_captions": 0,
    "cut_captions": 1,
    "captions_with_unknown_tokens": 1,
    "empty_captions": 0,
}


def pictures():
    return [Image.new("RGB", (32, 32), colour) for colour, _ in SET]


def add(counts, vocabulary, places):
    """Adds images by place; -1 is padding, a copy of the first image."""
    texts = [text for place in places for text in SET[max(place, 0)][1]]
    encoded = vocabulary.encode(texts)
    cut = torch.tensor([len(ids) > LONGEST for ids in encoded])
    owner = torch.tensor([place for place in places for _ in SET[max(place, 0)][1]])
    captions = token_captions(vocabulary, *vocabulary.pad(encoded, LONGEST), cut)
    counts.update(image_hashes([pictures()[max(place, 0)] for place in places]), captions, torch.tensor(places), owner)


def test_every_count_of_a_small_set_is_the_one_found_by_hand(vocab_file):
    vocabulary, counts = Vocabulary(vocab_file), SetCounts()
    add(counts, vocabulary, [0, 1, 2])
    add(counts, vocabulary, [3, 4, 5, -1])
    add(counts, vocabulary, [2])  # a sampler that repeats
    assert counts.compute() == WANTED


def _rank(rank, vocab_file, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    counts = SetCounts()
    if rank == 0:
        add(counts, Vocabulary(vocab_file), [4, 0, 2, 5, 3, 1])  # the other rank has no row
    (folder / f"{rank}.json").write_text(json.dumps(counts.compute()))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*compute.*was called before.*update")
def test_the_counts_are_those_of_the_set_on_two_ranks_also_if_one_has_no_image(vocab_file, tmp_path):
    mp.start_processes(_rank, (vocab_file, tmp_path), nprocs=2, start_method="fork")
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [WANTED, WANTED]


def test_images_with_the_same_captions_and_empty_captions_are_counted():
    counts = SetCounts()
    texts = ["a dog", "a dog", "", "a dog", "  "]
    ids = torch.arange(3)
    captions = text_captions(texts, torch.tensor([False] * 4 + [True]))
    counts.update(image_hashes(pictures()[:3]), captions, ids, torch.tensor([0, 1, 2, 2, 2]))
    found = counts.compute()
    assert found["images_with_the_captions_of_another"] == 2
    assert found["shared_captions"] == 3
    assert (found["empty_captions"], found["cut_captions"]) == (2, 1)


def test_pixels_and_their_picture_differ_only_where_the_pixels_do():
    pixels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    pixels[2, 0, 0, 0] = 1
    first, second, third = image_hashes(pixels).tolist()
    assert first == second != third


def test_classes_are_counted_by_place_and_a_shared_name_hides_none():
    found = class_counts(["crane", "Crane", "dog", "cat"], [0, 1, 2, 2, -1], [7, 7, 8, 9, 10])
    assert found == {
        "images_without_class": 1,
        "images_of_several_classes": 2,
        "classes_sharing_a_name": 2,
        "classes_without_images": 1,
    }
    classes = SparseRows.of(torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]]))
    images = SparseRows.of(torch.tensor([[1.0, 0, 0]] * 5 + [[0, 0, 1.0]] * 4))
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    found = zero_shot(images, labels, classes, ["crane", "crane", "dog"], 3)
    assert found["mean_class_top1"] == pytest.approx(1 / 3)
    assert [one["images"] for one in found["per_class"]] == [3, 2, 4]
    assert [one["top1"] for one in found["per_class"]] == [0, 0, 1]
    assert found["tied"] == 5


def test_only_what_is_there_is_stated():
    assert sentences({"images": 20, "repeated_images": 0}, (1, 5)) == []
    assert len(sentences({"images": 4, "repeated_images": 2, "tied_t2i": 1}, (1, 5))) == 3


def write_set(path):
    samples = {
        f"{n:03}": {"png": encoded(image), "json": json.dumps({"captions": captions}).encode()}
        for n, (image, (_, captions)) in enumerate(zip(pictures(), SET, strict=True))
    }
    return write_tar(path, members_of(samples))


def test_an_evaluation_states_the_counts_in_its_table_its_page_and_its_json(tiny_stair, tmp_path, monkeypatch, capsys):
    write_set(tmp_path / "set" / "test-0.tar")
    tiny_stair.save_pretrained(tmp_path / "m")
    monkeypatch.setattr("sys.argv", ["stair", "evaluate", str(tmp_path / "m"), f"s={tmp_path}/set/test-0.tar"])
    cli.main()
    printed = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "m-evaluation" / "evaluation.json").read_text())["sets"]["s"]["protocol"]
    assert {key: found[key] for key in WANTED} == WANTED
    assert found["tied_t2i"] >= 4  # the captions of the repeated images
    page = (tmp_path / "m-evaluation" / "report.html").read_text()
    for sentence in sentences(found, (1, 5, 10)):
        assert sentence in printed and sentence in page, sentence


def test_validation_states_the_counts_in_its_log(tmp_path, caplog):
    scenes = write_small_scenes(tmp_path / "scenes")
    write_set(tmp_path / "set" / "val-0.tar")
    more = "--data.val", f"{{s: {tmp_path}/set/val-0.tar}}", "--model.init_args.stair.text.max_tokens", str(LONGEST)
    with caplog.at_level(logging.INFO):
        main(stage_args(scenes, 1, tmp_path / "run", *more))
    (line,) = [record.getMessage() for record in caplog.records if "val/s: " in record.getMessage()]
    # counts of tokens are those of another vocabulary here
    for sentence in sentences({"images": 6, "repeated_images": 2, "shared_captions": 6, "tied_t2i": 4}, (10,)):
        assert sentence in line, sentence

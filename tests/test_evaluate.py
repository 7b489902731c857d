"""`stair evaluate` through the command line, and each of its figures against counting by hand."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.synthetic import write_scenes
from stair import Stair, Vocabulary, cli
from stair.clip import ClipConfig, DenseClip
from stair.evaluate import EvaluatedModel, EvaluationSet, Sample, evaluate, open_model
from stair.evaluate.classify import class_rows, linear_probe, zero_shot
from stair.evaluate.open_set import open_set
from stair.evaluate.prune import cost, curve, index_bytes
from stair.evaluate.vocabulary_probe import correct_terms, term_rows, vocabulary_probe
from stair.ranking import SparseRows
from stair.report.tables import tables
from tests.support.files import encoded, members_of, write_tar
from tests.support.models import tiny_config, write_vocabulary
from tests.support.oracles import oracle


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return Vocabulary(write_vocabulary(tmp_path_factory.mktemp("v") / "vocab.txt"))


def picture(colour, size=40):
    return Image.new("RGB", (size, size + 4), colour)


@pytest.fixture(scope="module")
def models(tmp_path_factory, vocabulary):
    """A sparse and a dense model of the same towers, exported."""
    folder = tmp_path_factory.mktemp("models")
    vocab_file = write_vocabulary(folder / "vocab.txt")
    torch.manual_seed(0)
    config = tiny_config(vocab_file, similarity="cosine")
    Stair(config).save_pretrained(folder / "stair", {"stage": 3, "steps": 7})
    DenseClip(ClipConfig(config.vocabulary, config.image, config.text, 12)).save_pretrained(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """12 scenes of five captions, and tars of two classes with train, val and test."""
    folder = tmp_path_factory.mktemp("sets")
    write_scenes(folder / "scenes", train=8, val=12, image_size=32)
    for split, count in (("train", 8), ("val", 4), ("test", 6)):
        samples = {}
        for i in range(count):
            name = ("dog", "cat")[i % 2]
            image = picture((200, 10 * i, 0) if name == "dog" else (0, 10 * i, 200))
            fields = {"captions": [f"a photo of a {name}."], "class": name, "label": i % 2}
            samples[f"{i:04d}"] = {"png": encoded(image), "json": json.dumps(fields).encode()}
        write_tar(folder / "pets" / f"{split}-00000.tar", members_of(samples))
    (folder / "pets" / "classnames.json").write_text('{"classes": ["dog", "cat"]}')
    return folder


def command(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["stair", "evaluate", *map(str, args)])
    cli.main()


def test_the_command_measures_shards_and_classes_and_writes_what_it_found(
    models, shards, monkeypatch, tmp_path, capsys
):
    sets = f"scenes={shards}/scenes/val-*.tar", shards / "pets"
    command(monkeypatch, models / "stair", *sets, "--output", tmp_path / "out", "--ks", "1", "3")
    printed = capsys.readouterr().out
    assert "12 images with 5 captions each (60)" in " ".join(printed.split()) and "ties count against" in printed
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    scenes, pets = result["sets"]["scenes"], result["sets"]["pets"]
    assert result["model"]["training"] == {"stage": 3, "steps": 7}
    assert {"i2t/recall@1", "t2i/recall@3", "t2i/mrr", "i2t/ndcg@10", "t2i/median_rank"} <= scenes["retrieval"].keys()
    # captions that only name the class tell no images apart
    assert "retrieval" not in pets and pets["protocol"]["images_with_the_captions_of_another"] == 6
    assert pets["terms"]["sparsity/image/active_terms"] > 0
    assert not any("text" in name or name.startswith(("grounding", "expansion")) for name in pets["terms"])
    assert [one["name"] for one in pets["zero_shot"]["per_class"]] == ["dog", "cat"] and pets["linear_probe"]["images"][
        "test"
    ] == 6
    assert scenes["pruned"][0]["kept"] == "all" and scenes["cost"]["index_bytes"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") >= 13 and "<script" not in page and "Quality against size: scenes" in page
    card = (tmp_path / "out" / "model_card.md").read_text()
    assert "### Retrieval" in card and "split test" in card and "steps: 7" in card


def test_retrieval_through_the_command_is_that_of_all_scores(models, shards):
    model = Stair.from_pretrained(models / "stair")
    what = open_set(f"{shards}/scenes/val-*.tar")
    samples = [what.samples[i] for i in range(len(what.samples))]
    image = model.comparable(model.encode_image([s.image for s in samples])).numpy()
    text = model.comparable(model.encode_text([c for s in samples for c in s.captions])).numpy()
    expected = oracle(image, text, np.repeat(np.arange(12), 5), (1, 5, 10))
    result, _ = evaluate(open_model(str(models / "stair")), [what], batch_size=5)
    for key, value in result["sets"][what.name]["retrieval"].items():
        assert value == pytest.approx(expected[key], abs=1e-6), key


def test_a_dense_model_is_measured_alike(models, shards):
    sets = [open_set(str(shards / "pets")), open_set(f"scenes={shards}/scenes/val-*.tar")]
    result, _ = evaluate(open_model(str(models / "clip")), sets)
    scenes = result["sets"]["scenes"]
    assert result["model"]["kind"] == "dense" and "terms" not in scenes and "pruned" not in scenes
    # what is held of it: 12 images of 12 numbers
    assert scenes["cost"]["index_bytes"] == 12 * 12 * 4
    assert result["sets"]["pets"]["vocabulary_probe"]["class"]["images"] == 6
    assert {table.title for table in tables(result)} == {"Retrieval", "Classification", "Vocabulary probe", "Cost"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{models}/none", "{sets}/pets"], "no such folder"),
        (["{models}/stair", "{sets}/nothing-*.tar"], "no shard matches"),
        (["{models}/stair", "{sets}"], "neither tars nor class folders"),
        (["{models}/stair", "a={sets}/pets", "a={sets}/pets"], "a name of its own"),
        (["{models}/stair", "{sets}/pets", "--limit", "0"], "at least 1"),
        (["{models}/stair", "{sets}/pets", "--classnames", "{sets}/pets/classnames.json:names"], "no list of names"),
        (["{models}/stair", "{sets}/pets", "--classnames", "{sets}/no.json"], r"no\.json: no such file"),
        (["{models}/stair", "{sets}/pets", "--classnames", "{sets}/pets/test-00000.tar"], "contains no names"),
        (["{models}/stair", "{sets}/pets", "--output", "{sets}/pets/classnames.json"], "File exists"),
        (["{models}/stair", "{sets}/pets", "--vocabulary", "{sets}/scenes/vocab.txt"], "--vocabulary"),
        (["open_clip:ViT-B-32", "{sets}/pets"], "ARCHITECTURE:CHECKPOINT"),
        (["sentence_transformers:{models}", "{sets}/pets"], "modules.json is missing"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(models, shards, monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message):
        command(monkeypatch, *(arg.format(models=models, sets=shards) for arg in args))


def test_results_lie_beside_the_model_however_its_folder_is_named(models, shards, monkeypatch, tmp_path):
    shutil.copytree(models / "stair", tmp_path / "m")
    (tmp_path / "k=3").mkdir()
    shutil.copy(shards / "pets" / "test-00000.tar", tmp_path / "k=3" / "test.tar")
    shutil.copy(shards / "pets" / "classnames.json", tmp_path / "k=3")
    monkeypatch.chdir(tmp_path / "m")
    command(monkeypatch, ".", tmp_path / "k=3" / "test.tar")
    page = (tmp_path / "m-evaluation" / "report.html").read_text()
    assert "<h1>" in page and "&amp;" not in page
    assert json.loads((tmp_path / "m-evaluation" / "evaluation.json").read_text())["sets"].keys() == {"k=3"}


def test_class_folders_are_a_set_with_splits(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("fire_engine", "ship"):
            (tmp_path / split / name).mkdir(parents=True)
            picture("red").save(tmp_path / split / name / "a.png")
    (tmp_path / "test" / ".ipynb_checkpoints").mkdir()
    picture("red").save(tmp_path / "test" / ".ipynb_checkpoints" / "a.png")
    what = open_set(f"cars={tmp_path}")
    assert (what.name, what.split, list(what.classes)) == ("cars", "test", ["fire engine", "ship"])
    assert [len(part) for part in (what.samples, what.train, what.val)] == [2, 2, 2]
    assert [what.samples[i].label for i in range(2)] == [0, 1] and not what.retrieval
    assert open_set(str(tmp_path), split="val").split == "val" and not len(open_set(str(tmp_path), split="train").train)


def test_folders_are_called_by_the_names_given_one_for_each(tmp_path):
    for name in ("n01", "n02"):
        (tmp_path / "val" / name).mkdir(parents=True)
        picture("red").save(tmp_path / "val" / name / "a.png")
    (tmp_path / "names.json").write_text('{"n02": "tench", "n01": "goldfish"}')
    (tmp_path / "keyed.json").write_text('{"mine": ["goldfish", "tench"], "short": ["tench"]}')
    for given in ("names.json", "keyed.json:mine"):
        assert open_set(str(tmp_path), classnames=f"{tmp_path}/{given}").classes == ["goldfish", "tench"]
    with pytest.raises(ValueError, match="1 names for 2 folders"):
        open_set(str(tmp_path), classnames=f"{tmp_path}/keyed.json:short")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json contains no names"):
        open_set(str(tmp_path), classnames=f"{tmp_path}/broken.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json: no such file"):
        open_set(str(tmp_path), classnames=f"{tmp_path}/nowhere.json")
    (tmp_path / "val" / "n01").rename(tmp_path / "val" / "001.Black_footed_Albatross")
    assert open_set(str(tmp_path)).classes == ["Black footed Albatross", "n02"]


def test_published_retrieval_sets_have_a_caption_on_each_line(tmp_path):
    write_samples(tmp_path / "coco" / "test" / "0.tar", {"txt": b"a dog\nthe dog \n"}, {"txt": b"a cat"})
    assert list(open_set(str(tmp_path / "coco")).samples[0].captions) == ["a dog\nthe dog"]
    (tmp_path / "coco" / "dataset_type.txt").write_text("retrieval\n")
    for place in ("coco", "coco/test/0.tar"):
        what = open_set(str(tmp_path / place))
        assert [list(what.samples[i].captions) for i in range(2)] == [["a dog", "the dog"], ["a cat"]]


def test_a_file_of_another_make_hides_no_names(tmp_path):
    write_samples(tmp_path / "a.tar", {"cls": b"0"})
    (tmp_path / "classnames.json").write_text('{"version": 2}')
    (tmp_path / "classnames.txt").write_text("dog\n")
    assert open_set(str(tmp_path / "a.tar")).classes == ["dog"]


def test_names_of_other_classes_are_not_guessed_at(shards, tmp_path):
    (tmp_path / "birds.json").write_text('{"classes": ["owl", "hen"], "mine": ["cat", "owl"]}')
    assert not open_set(f"{shards}/pets/test-*.tar", classnames=f"{tmp_path}/birds.json").classes
    cats = open_set(f"{shards}/pets/test-*.tar", classnames=f"{tmp_path}/birds.json:mine")
    assert [cats.samples[i].label for i in range(4)] == [None, 0, None, 0]


def test_captions_can_be_cut_to_a_protocols_number(shards):
    whole, two = (open_set(f"{shards}/scenes/val-*.tar", captions=captions) for captions in (None, 2))
    assert len(whole.samples[0].captions) == 5 and two.samples[0].captions == whole.samples[0].captions[:2]


def write_samples(path, *samples):
    """A tar of samples, each its members by type; an image beside them all."""
    image = {"png": encoded(picture("red"))}
    return write_tar(path, members_of({f"{number:04d}": image | members for number, members in enumerate(samples)}))


def test_tars_of_images_and_the_numbers_of_their_classes_are_classified(models, monkeypatch, tmp_path, capsys):
    classes = [b"0", b"1", b"1\n"]
    write_samples(tmp_path / "pets" / "test" / "0.tar", *({"cls": number} for number in classes))
    for part in ("train", "val"):
        write_samples(tmp_path / "pets" / part / "0.tar", *({"cls": number, "json": b"{}"} for number in classes))
    (tmp_path / "pets" / "classnames.txt").write_text("a dog\ncat\n")
    command(monkeypatch, models / "stair", tmp_path / "pets", "--output", tmp_path / "out")
    pets = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]["pets"]
    assert (pets["protocol"]["split"], pets["protocol"]["captions"]) == ("test", 0) and "retrieval" not in pets
    assert pets["protocol"]["images_with_the_captions_of_another"] == 0
    assert {one["name"] for one in pets["zero_shot"]["per_class"]} == {"a dog", "cat"}
    assert pets["linear_probe"]["images"]["test"] == 3
    # one picture for all: whichever class it is taken for, the share of right answers is that class's share
    assert pets["zero_shot"]["top1"] == pytest.approx(1 / 3) or pets["zero_shot"]["top1"] == pytest.approx(2 / 3)
    val = open_set(str(tmp_path / "pets"), split="val")
    assert [val.samples[i].label for i in range(3)] == [0, 1, 1] and not val.val and not val.train


@pytest.mark.parametrize(
    ("samples", "names", "complaint"),
    [
        (({"cls": b"0"}, {"cls": b"0", "txt": b"a dog"}), "dog\n", "1 of 2 images have a class and no caption"),
        (({"cls": b"dog"},), "dog\n", r"'0000' of .*a\.tar: its \.cls is b'dog', expected the number of a class"),
        (({"cls": b"0"},), "dog\n\ncat\n", r"classnames\.txt: line 2 is blank"),
        (({"cls": b"0"},), "", "no caption: members are"),
        (({"json": b"[]"},), "dog\n", "the JSON is a list"),
    ],
)
def test_class_numbers_that_say_nothing_are_refused_by_name(tmp_path, samples, names, complaint):
    write_samples(tmp_path / "a.tar", *samples)
    (tmp_path / "classnames.txt").write_text(names)
    with pytest.raises(ValueError, match=complaint):
        open_set(str(tmp_path / "a.tar"))


def test_what_is_measured_is_not_learned_from(shards):
    assert len(open_set(f"{shards}/pets/test-*.tar").train) == 8
    assert not len(open_set(f"{shards}/pets/val-*.tar").train)
    assert not len(open_set(f"{shards}/pets/../pets/./train-00000.tar").train)


def test_a_probe_that_cannot_be_learned_costs_no_other_figure(models):
    def of(*labels):
        return [Sample(picture((40 * n, 0, 0)), label=label) for n, label in enumerate(labels)]

    sets = [
        EvaluationSet(
            "one class", of(0, 1), classes=["dog", "cat"], train=of(0, 0, None), val=of(0, 1), retrieval=False
        ),
        EvaluationSet(
            "some", of(0, 1), classes=["dog", "cat"], train=of(0, None, 1), val=of(0, 1, None), retrieval=False
        ),
    ]
    output = []
    result, _ = evaluate(open_model(str(models / "stair")), sets, progress=output.append)
    assert "linear_probe" not in result["sets"]["one class"] and "zero_shot" in result["sets"]["one class"]
    assert any("no linear probe of one class" in line for line in output)
    assert result["sets"]["some"]["linear_probe"]["images"] == {"train": 2, "val": 2, "test": 2}


class Spoken:
    """An encoder whose embeddings are written down."""

    similarity = "cosine"

    def __init__(self, texts):
        self.texts = texts

    def encode_text(self, texts):
        return torch.stack([torch.tensor(self.texts[text]) for text in texts])


def test_a_class_is_the_mean_of_its_templates_term_by_term():
    texts = {"dog": [2.0, 0, 0], "a dog": [0.0, 5, 0], "cat": [0.0, 0, 1], "a cat": [0.0, 0, 3]}
    evaluated = EvaluatedModel(Spoken(texts), "m", "sparse", None, None, "", {})
    rows = class_rows(evaluated, ["dog", "cat"], ["{}", "a {}"])
    # each template has length 1 before the mean, whatever its weights
    torch.testing.assert_close(rows.columns(0, 2, 3).T, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))
    images = SparseRows.of(torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]]))
    found = zero_shot(images, torch.tensor([0, 1, 1]), rows, ["dog", "cat"], 3)
    # the empty image ties with all classes and loses
    assert found["top1"] == pytest.approx(2 / 3) and {"name": "cat", "top1": 0.5, "images": 2} in found["per_class"]
    assert found["mean_class_top1"] == pytest.approx(0.75) and found["top5"] == 1
    with pytest.raises(ValueError, match="each with"):
        class_rows(evaluated, ["dog"], ["a dog"])


def test_the_probe_learns_on_train_and_chooses_on_val():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    rows = torch.rand(60, 8, generator=generator) + 3 * torch.nn.functional.one_hot(labels, 8)
    parts = [(SparseRows.of(rows[part]), labels[part]) for part in (slice(0, 30), slice(30, 45), slice(45, 60))]
    found = linear_probe(*parts, 8)
    assert found["top1"] == 1 and found["swept"][f"{found['inverse_penalty']:g}"] == found["val_top1"]
    wrong = [parts[0], parts[1], (parts[2][0], (parts[2][1] + 1) % 3)]
    assert linear_probe(*wrong, 8)["top1"] == 0


def test_correct_terms_are_whole_and_name_something(vocabulary):
    tokens = vocabulary.tokens_of(correct_terms(vocabulary, ["A small dog runs.", "two dogs, the sea of zzz"]))
    # `dogs` is cut into dog ##s; a, the, of, two say nothing
    assert sorted(tokens) == ["dog", "runs", "sea", "small"]


def test_the_vocabulary_test_reads_sparse_weights_off_and_ties_count_against():
    weights = torch.tensor([[0.0, 3, 2, 1], [0, 0, 5, 0], [1, 1, 0, 0], [0, 0, 0, 0]])
    right = [[2, 3], [1], [0], []]
    found = vocabulary_probe(SparseRows.of(weights), right, 4)
    # ranks: word 2 behind word 1: 2 · word 1 is inactive, ties with two others behind word 2: 4 · ties with word 1: 2
    assert found["top1"] == 0 and found["median_rank"] == 2 and found["top5"] == 1
    assert (found["images"], found["skipped"]) == (3, 1)
    # one with two of them: the middle is between
    assert vocabulary_probe(SparseRows.of(weights), [[2, 3], [], [0], []], 4)["median_rank"] == 2
    assert vocabulary_probe(SparseRows.of(weights), [[2, 3], [1], [], []], 4)["median_rank"] == 3


def test_the_vocabulary_test_gives_nothing_for_what_is_no_number():
    broken = torch.tensor([[float("nan")] * 4, [0, float("nan"), 2, 1]])
    found = vocabulary_probe(SparseRows.of(broken), [[1], [2]], 4)
    assert found["top1"] == 0 and found["median_rank"] == 3  # ranks 4, and 2: behind what is no number


def test_the_vocabulary_test_says_what_the_frequency_baseline_gets():
    right = [[7, 3], [7], [7, 5], [3, 5], [9], []]
    found = vocabulary_probe(SparseRows.of(torch.rand(6, 12)), right, 12)
    # said of every image: 7 (right for three), then 3 and 5 (two each, tied), then 9: ranks 1, 1, 1, 2 (behind 7), 4
    assert found["frequency_baseline/top1"] == 3 / 5 and found["frequency_baseline/top5"] == 1
    alone = vocabulary_probe(SparseRows.of(torch.rand(12, 12)), [[i] for i in range(12)], 12)
    # each right once: all tied, and ties count against
    assert alone["frequency_baseline/top10"] == 0


def test_the_vocabulary_test_of_a_dense_model_embeds_every_whole_word(models, vocabulary):
    evaluated = open_model(str(models / "clip"))
    rows, ids = term_rows(evaluated)
    assert not [v for v in ids.tolist() if vocabulary.tokens[v].startswith(("##", "["))]
    dog = vocabulary.tokens.index("dog")
    image = evaluated.encoder.encode_text(["dog"])
    found = vocabulary_probe(SparseRows.of(image).unit(), [[dog]], 12, (rows, ids))
    assert found["top1"] == 1


def test_pruning_loses_what_it_cuts_and_size_is_counted():
    # image i says word i loudly, all say word 5; captions ask for word i
    images = torch.eye(4, 6) * 2
    images[:, 5] = 3
    texts, owner = SparseRows.of(torch.eye(4, 6)), torch.arange(4)
    lines = curve(SparseRows.of(images), texts, owner, "dot", [1], [0.7])
    by_name = {line["kept"]: line for line in lines if line["side"] == "both"}
    assert by_name["all"]["t2i"] == 1 and by_name["all"]["index_bytes"] == 8 * 8 + 5 * 8
    assert by_name["top 1"]["t2i"] == 0 and by_name["top 1"]["images"] == 1
    assert by_name["≥ 0.7 of the heaviest"]["index_bytes"] == index_bytes(SparseRows.of(images * (images > 2)))
    assert cost(SparseRows.of(images), texts, 6, True)["search_ms_p50"] > 0


def test_images_are_pruned_alone_too_as_an_index_is():
    # text i says word i less loudly than word 5, image i says word i alone: cutting texts loses it, cutting images does not
    images, texts, owner = torch.eye(4, 6) * 2, torch.eye(4, 6), torch.arange(4)
    images[:, 4], texts[:, 5] = 1, 3
    lines = curve(SparseRows.of(images), SparseRows.of(texts), owner, "dot", [1], [])
    found = {(line["kept"], line["side"]): line for line in lines}
    assert set(found) == {("all", "both"), ("top 1", "both"), ("top 1", "images")}
    assert found["top 1", "both"]["t2i"] == 0 and found["top 1", "both"]["texts"] == 1
    assert found["top 1", "images"]["t2i"] == 1 and found["top 1", "images"]["texts"] == 2
    assert found["top 1", "images"]["images"] == 1


def test_names_that_are_hostile_stay_text(models, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    for name in ("<script>alert(1)</script>"[:8] + "x", "b"):
        (folder / name).mkdir(parents=True)
        picture("red").save(folder / name / "a.png")
    command(monkeypatch, models / "stair", f"<b>={folder}", "--output", tmp_path / "out", "--no_probe")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page.replace("<b>1", "")


def test_a_set_of_nothing_is_refused(models):
    empty = EvaluationSet("x", [Sample(picture("red"))], retrieval=False)
    for what, message in [
        (empty, "neither captions"),
        (EvaluationSet("x", []), "has no images"),
        (
            EvaluationSet("x", [Sample(picture("red"), label=2)], classes=["dog", "cat"], retrieval=False),
            "label 2 and 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(open_model(str(models / "stair")), [what])
    with pytest.raises(ValueError, match="give a list"):
        Sample(picture("red"), "a dog")


def test_a_blank_caption_is_refused_by_name_as_in_training(tmp_path):
    write_samples(tmp_path / "a.tar", {"json": b'{"captions": ["a dog", " "]}'})
    with pytest.raises(ValueError, match=r"'0000' of .*a\.tar: no caption: one of the 2 is blank"):
        open_set(str(tmp_path / "a.tar"))


@pytest.fixture(scope="module")
def open_clip_model(tmp_path_factory):
    """A small open_clip model with weights on disk."""
    open_clip = pytest.importorskip("open_clip", reason="the extra `openclip`")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open_clip")
    sizes = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "tiny-open-clip.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(folder / "tiny-open-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-open-clip").eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, str(folder / "weights.safetensors"))
    return model, folder / "weights.safetensors"


def test_an_open_clip_checkpoint_is_measured_alike(open_clip_model, models, shards):
    model, weights = open_clip_model
    evaluated = open_model(f"open_clip:tiny-open-clip:{weights}", str(models / "vocab.txt"))
    import open_clip

    tokens = open_clip.get_tokenizer("tiny-open-clip")(["two dogs"])
    torch.testing.assert_close(evaluated.encoder.encode_text(["two dogs"]), model.encode_text(tokens).detach())
    result, _ = evaluate(evaluated, [open_set(str(shards / "pets"))])
    pets = result["sets"]["pets"]
    assert "77 tokens" in pets["protocol"]["truncation"] and pets["vocabulary_probe"]["class"]["images"] == 6
    with pytest.raises(ValueError, match="open_clip cannot open"):
        open_model(f"open_clip:tiny-open-clip:{weights}x")


class SentenceDouble:
    """What is used of a sentence-transformers model of images and texts."""

    similarity_fn_name, max_seq_length = "dot", 9

    def __init__(self, folder, device, trust_remote_code):
        assert not trust_remote_code

    def encode(self, what, convert_to_tensor, show_progress_bar):
        rows = [[0.0, 2.0, 0.0] if isinstance(item, str) else [0.0, 0.0, 3.0] for item in what]
        return torch.tensor(rows).to_sparse()


def test_sentence_transformers_models_are_opened_as_what_they_are(monkeypatch, tmp_path, vocabulary, vocab_file):
    library = pytest.importorskip("sentence_transformers", reason="the extra `openclip`")
    for family in ("SparseEncoder", "SentenceTransformer"):
        (tmp_path / family).mkdir()
        (tmp_path / family / "modules.json").write_text("[]")
        settings = json.dumps({"model_type": family})
        (tmp_path / family / "config_sentence_transformers.json").write_text(settings)
        monkeypatch.setattr(library, family, type(family, (SentenceDouble,), {}))
        evaluated = open_model(f"sentence_transformers:{tmp_path / family}")
        assert type(evaluated.encoder.model).__name__ == family
        assert evaluated.kind == {"SparseEncoder": "sparse"}.get(family, "dense")
        assert evaluated.terms is None
        assert evaluated.encoder.similarity == "dot" and "9 tokens" in evaluated.truncation
        assert evaluated.encoder.encode_image([picture("red")]).tolist() == [[0, 0, 3]]
    # its dimensions have names where its tokenizer has the given tokens, in their order
    source = f"sentence_transformers:{tmp_path / 'SparseEncoder'}"
    for tokens, named in ((vocabulary.tokens, True), (vocabulary.tokens[::-1], False)):
        table = {token: i for i, token in enumerate(tokens)}
        monkeypatch.setattr(SentenceDouble, "tokenizer", SimpleNamespace(get_vocab=table.copy), raising=False)
        assert (open_model(source, str(vocab_file)).terms is not None) == named
    monkeypatch.setattr(SentenceDouble, "similarity_fn_name", "euclidean")
    with pytest.raises(ValueError, match="only cosine and dot"):
        open_model(f"sentence_transformers:{tmp_path / 'SparseEncoder'}")


def test_a_name_of_two_classes_is_refused_as_a_class_and_a_number_is_taken(models, monkeypatch, tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "classnames.txt").write_text("crane\ncrane\ndog\n")
    given = [{"class": "crane", "label": 1}, {"label": 0}, {"class": "dog"}]
    write_samples(tmp_path / "birds" / "0.tar", *({"json": json.dumps(one).encode()} for one in given))
    command(monkeypatch, models / "stair", tmp_path / "birds", "--output", tmp_path / "out")
    birds = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"]["birds"]
    assert [one["images"] for one in birds["zero_shot"]["per_class"]] == [1, 1, 1]
    assert birds["protocol"]["classes_sharing_a_name"] == 2
    write_samples(tmp_path / "birds" / "0.tar", {"json": b'{"class": "crane"}'})
    with pytest.raises(SystemExit, match="crane"):
        command(monkeypatch, models / "stair", tmp_path / "birds", "--output", tmp_path / "out")

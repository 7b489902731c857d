"""`stair dictionary` through the command line, and each of its figures against counting by hand."""

import base64
import hashlib
import json
import re

import numpy as np
import pytest
import simplemma
import torch
from scipy.sparse import csr_matrix

from datamodules.synthetic import write_scenes
from stair import Stair, Vocabulary, cli
from stair.data.tars import read_samples
from stair.errors import SettingError
from stair.evaluate.dictionary import dictionary
from stair.evaluate.term_evidence import Evidence, Lemmas, describe, summary
from stair.explain import read_image
from stair.hub import model_card
from stair.images import decode_image
from tests.support.files import encoded, members_of, plain_image, write_tar
from tests.support.models import tiny_config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with random weights, twelve scenes, and its dictionary, made by the command."""
    folder = tmp_path_factory.mktemp("dictionary")
    write_scenes(folder / "scenes", train=60, val=12, image_size=32)
    torch.manual_seed(0)
    config = tiny_config(folder / "scenes" / "vocab.txt", similarity="cosine", text_bias_start=0.2)
    model = Stair(config).eval()
    with torch.no_grad():
        for head in (model.image_head, model.text_head):
            head.bias += 0.5 * torch.randn(len(model.vocabulary))
    model.save_pretrained(folder / "stair")
    with pytest.MonkeyPatch.context() as patch:
        val = str(folder / "scenes" / "val-*.tar")
        patch.setattr("sys.argv", ["stair", "dictionary", str(folder / "stair"), val, "--output", str(folder / "out")])
        cli.main()
    samples = list(read_samples(str(folder / "scenes" / "val-0000.tar")))
    return Stair.from_pretrained(folder / "stair"), samples, folder


def facts(sample):
    return json.loads(sample.members["json"])


def test_every_figure_is_what_counting_by_hand_gives(made):
    model, samples, folder = made
    result = json.loads((folder / "out" / "dictionary.json").read_text())
    vocabulary = model.vocabulary
    pictures = [decode_image(sample.members["png"]) for sample in samples]
    images, readings = model.encode(images=pictures).toarray(), [read_image(model, picture) for picture in pictures]
    captions = [facts(sample)["captions"] for sample in samples]
    texts = model.encode(texts=[text for each in captions for text in each]).toarray()
    owner = [n for n, each in enumerate(captions) for _ in each]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12) for rows in (images, texts)]

    def right(left_out=None):
        query = unit[1].copy()
        if left_out is not None:
            query[:, left_out] = 0
        scores = query @ unit[0].T
        return sum(sum(scores[c] >= scores[c, n]) == 1 for c, n in enumerate(owner))

    seen = {term["term"]: term for term in result["terms"]}
    assert set(seen) == {vocabulary.tokens[v] for v in np.flatnonzero(images.any(0) | texts.any(0))}
    assert sum(figures["terms"] for figures in result["summary"].values()) == len(vocabulary)
    for side in ("images", "texts"):
        assert sum(figures[side] for figures in result["summary"].values()) == pytest.approx(1)
    for name, term in seen.items():
        v = vocabulary.tokens.index(name)
        held = []
        for each in captions:
            words = re.findall("[a-z]+", " ".join(each))
            lemmas = {simplemma.lemmatize(word, lang="en") for word in words}
            tokens = vocabulary.tokens_of(v for text in each for v in vocabulary.token_ids(text))
            held.append(name in tokens or (name.isalpha() and simplemma.lemmatize(name, lang="en") in lemmas))
        active = images[:, v] > 0
        assert (term["images"], term["texts"]) == (active.sum(), (texts[:, v] > 0).sum())
        assert term["weight"] == pytest.approx(images[:, v].sum() / images.sum(), rel=1e-5)
        if active.any():
            assert term["precision"] == pytest.approx(np.mean(np.array(held)[active]))
            assert term["low"] <= term["precision"] <= term["high"]
            places = [r.positions[list(r.terms).index(name)] for r in readings if name in r.terms]
            assert term["same_position"] == pytest.approx(max(map(places.count, places)) / len(places))
        # of each image that holds the word: how many of the images with at least its weight hold it too
        shares = [np.mean(np.array(held)[images[:, v] >= images[n, v]]) for n in np.flatnonzero(held)]
        expected = pytest.approx(np.mean(shares), rel=1e-5) if shares and active.any() else None
        assert term["average_precision"] == expected
        heaviest = sorted(range(12), key=lambda n: (-images[n, v], n))[:5]
        assert term["top"] == [f"val-0000/{samples[n].key}" for n in heaviest if images[n, v] > 0]
        assert term["recall_effect"] == pytest.approx(100 * (right() - right(v)) / len(owner), abs=1e-6), name


def test_terms_are_looked_for_in_the_boxes_of_their_word(made):
    model, samples, folder = made
    result = json.loads((folder / "out" / "dictionary.json").read_text())
    readings = [read_image(model, decode_image(sample.members["png"])) for sample in samples]
    boxed = 0
    for term in result["terms"]:
        inside = []
        for sample, reading in zip(samples, readings, strict=True):
            if term["term"] not in reading.terms:
                continue
            own = [each["box"] for each in facts(sample)["boxes"] if term["term"] in each["names"]]
            if not own:
                continue
            row, column = reading.patch(list(reading.terms).index(term["term"]))
            y, x = (row + 0.5) / reading.grid[0], (column + 0.5) / reading.grid[1]
            inside.append(any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for box in own))
        if inside:
            boxed += 1
            assert (term["boxed"], term["pointing"]) == (len(inside), pytest.approx(np.mean(inside)))
    assert boxed > 3


def test_the_page_runs_its_own_script_only_and_names_every_image(made):
    _, _, folder = made
    page = (folder / "out" / "dictionary.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', page)
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert all(data["images"][n].startswith("data:image/png") for term in data["terms"] for n in term["top"])


@pytest.mark.slow
def test_terms_of_the_page_are_sorted_by_each_column_and_searched_by_part_and_class(made, browser):
    folder = made[2]
    terms = json.loads((folder / "out" / "dictionary.json").read_text())["terms"]
    page = browser.new_page()
    page.goto((folder / "out" / "dictionary.html").as_uri())

    def shown():
        return page.locator(".dictionary tbody th").all_inner_texts()

    assert shown() == [term["term"] for term in terms[:100]]
    columns = {"term": "term", "images": "images", "precision %": "precision", "AP %": "average_precision"}
    for head, field in columns.items():
        known = [term for term in terms if term[field] is not None]
        unknown = [term["term"] for term in terms if term[field] is None]
        for falling in (field != "term", field == "term"):  # the second click reverses
            page.locator(".dictionary thead").get_by_text(head, exact=True).click()
            order = sorted(known, key=lambda term: term[field], reverse=falling)
            assert shown() == ([term["term"] for term in order] + unknown)[:100]
    kind, part = terms[0]["class"], terms[0]["term"][:2]
    page.fill("#word", part.upper())
    page.select_option("#class", kind)
    found = {term["term"] for term in terms if part in term["term"] and term["class"] == kind}
    assert set(shown()) == found and 0 < len(found) < len(terms)


@pytest.fixture
def lemmas(tmp_path):
    words = "dog dogs cat beach sand sea obeyed the car tree house".split()
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return Lemmas(Vocabulary(file))


def test_terms_are_classed_by_what_their_images_captions_say(lemmas):
    captions = [["dogs"], ["the sand"], ["the cat"], ["car tree"]] * 10
    active = {"dog": 0, "beach": 1, "obeyed": 2, "the": 2, "house": 3}  # on every image of this kind
    tokens = lemmas.vocabulary.tokens
    image = np.zeros((40, len(tokens)))
    for term, kind in active.items():
        image[kind::4, tokens.index(term)] = 1.0
    image[1:4, tokens.index("tree")] = 1.0  # 3 images, of which one has its word, as a fourth of all have
    empty = csr_matrix(image.shape)
    evidence = Evidence(csr_matrix(image), empty, empty, csr_matrix(image), np.arange(40), lemmas.held(captions))
    corpus = lemmas.held([["a beach of sand"]] * 5 + [["house"], ["sea"], ["cat"]] * 5)
    terms = describe(lemmas, evidence, corpus, "dot")
    kinds = {term["term"]: term["class"] for term in terms}
    shown = {"dog": "grounded", "beach": "related", "obeyed": "code", "the": "stop word", "house": "code"}
    assert kinds == {**shown, "tree": "unproven"}
    assert next(term["near"] for term in terms if term["term"] == "beach") == ["sand"]
    figures = summary(terms, len(tokens))
    assert figures["dead"]["terms"] == len(tokens) - 6
    assert figures["code"]["images"] == pytest.approx(20 / 53)


def test_a_term_that_every_image_has_is_no_evidence(lemmas):
    captions = [["dog"], ["cat"]] * 10
    tokens = lemmas.vocabulary.tokens
    image = np.zeros((20, len(tokens)))
    image[:, tokens.index("dog")] = 1.0
    empty = csr_matrix(image.shape)
    evidence = Evidence(csr_matrix(image), empty, empty, csr_matrix(image), np.arange(20), lemmas.held(captions))
    (term,) = describe(lemmas, evidence, evidence.held_NV, "dot")
    assert (term["class"], term["lift"]) == ("code", 1.0)


def test_the_model_card_states_the_share_of_each_class(made):
    _, _, folder = made
    result = json.loads((folder / "out" / "dictionary.json").read_text())
    card = model_card(folder / "stair", "mit", dictionary=result)
    for name, figures in result["summary"].items():
        assert re.search(rf"\| {name} \| {figures['terms']} \| {100 * figures['images']:.1f} ", card)
    with pytest.raises(ValueError, match="summary"):
        model_card(folder / "stair", "mit", dictionary={"terms": [], "classes": {}})


@pytest.mark.parametrize(
    ("fields", "setting"),
    [
        ({"class": "dog", "label": 0}, "data"),
        ({"captions": ["a dog"], "boxes": [{"names": ["dog"], "box": [0, 0, 30, 30]}]}, None),
        ({"captions": ["a dog"], "boxes": {"dog": 1}}, None),
        ({"captions": ["a dog"], "boxes": [{"names": ["dog"]}]}, None),
    ],
)
def test_sets_without_captions_and_other_boxes_are_errors(made, tmp_path, fields, setting):
    members = {"0": {"png": encoded_image(), "json": json.dumps(fields).encode()}}
    write_tar(tmp_path / "a.tar", members_of(members))
    (tmp_path / "classnames.json").write_text('["dog"]')
    with pytest.raises(ValueError, match=None if setting else "a/0.*boxes") as caught:
        dictionary(str(made[2] / "stair"), str(tmp_path / "a.tar"), str(tmp_path / "out"))
    assert getattr(caught.value, "setting", None) == setting


def encoded_image():
    return encoded(decode_image(plain_image()))


@pytest.mark.parametrize("setting", ["limit", "batch_size"])
def test_numbers_below_one_are_errors(made, setting):
    with pytest.raises(SettingError) as caught:
        dictionary(str(made[2] / "stair"), "none.tar", **{setting: 0})
    assert caught.value.setting == setting

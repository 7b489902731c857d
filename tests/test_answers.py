"""Whether an answer can be trusted: the calibrated threshold, words that no document has, expansions."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse

from datamodules.synthetic import write_scenes
from stair import Embeddings, SparseIndex, Stair
from stair.data.tars import read_samples
from stair.embeddings import EmbeddingSpace
from stair.errors import FileError, SettingError
from stair.images import decode_image
from stair.index.calibration import Calibration
from stair.vocabulary import STOP_WORDS
from tests.support.models import tiny_config
from tests.support.rows import SPACE, V


def threshold_by_definition(scores, owner, rate):
    """The greatest score t with 1 + sum over images of the share of scores below t <= rate · (K + 1)."""
    groups = [scores[owner == k] for k in set(owner.tolist())]
    fits = [t for t in scores if 1 + sum((group < t).mean() for group in groups) <= rate * (len(groups) + 1) + 1e-9]
    return max(fits, default=None)


@pytest.mark.parametrize("captions", [1, 4])
def test_the_threshold_is_the_one_of_the_definition(captions):
    generator = np.random.default_rng(captions)
    owner = np.repeat(np.arange(39), generator.integers(1, captions + 1, 39))
    scores = np.round(generator.random(len(owner)), 2) + 0.01  # with ties
    found = Calibration.fit("m", "d", scores, owner)
    for step in range(1, 40):
        assert found.threshold(step / 40) == threshold_by_definition(scores, owner, step / 40)
    if captions == 1:
        assert found.threshold(0.1) == sorted(scores)[math.floor(0.1 * 40) - 1]
        assert found.threshold(0.124) == found.threshold(0.1)  # rates between steps: the stricter one


@pytest.mark.parametrize(("images", "captions"), [(60, 1), (60, 3), (2500, 1)])
def test_a_new_text_loses_its_image_no_more_often_than_stated(images, captions):
    """Captions of one image are alike. The error is at most the rate, and at least the rate less a step."""
    generator, rate, errors = np.random.default_rng(0), 0.1, []
    for _ in range(4000 if images < 100 else 300):
        image = generator.normal(5, 1, (images + 1, 1))
        scores = (image + generator.normal(0, 0.5, (images + 1, captions))).clip(0.01)
        found = Calibration.fit("m", "d", scores[:-1].ravel(), np.repeat(np.arange(images), captions))
        errors.append((scores[-1] < found.threshold(rate)).mean())
    noise = 3 * np.std(errors) / math.sqrt(len(errors))
    assert rate - 2 / images - noise <= np.mean(errors) <= rate + noise


def test_rates_that_cannot_be_kept_are_errors():
    scores = np.array([0.0, 0.0, *np.linspace(0.1, 1, 17)])
    found = Calibration.fit("m", "d", scores, np.arange(19))
    stated = {0.049: "19", 0.1: "0.15"}  # how many images there are; the lowest rate possible
    for rate in (0, 1, -0.1, 1.5, math.nan, 0.049, 0.05, 0.1):
        with pytest.raises(SettingError) as error:
            found.threshold(rate)
        assert error.value.setting == "max_error" and stated.get(rate, "") in str(error.value)
    assert found.threshold(0.15) == pytest.approx(0.1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model with random weights, thirty scenes, and an index of them."""
    folder = tmp_path_factory.mktemp("answers")
    write_scenes(folder / "scenes", train=10, val=30, image_size=32)
    torch.manual_seed(0)
    model = Stair(tiny_config(folder / "scenes" / "vocab.txt", similarity="cosine", text_bias_start=0.2)).eval()
    with torch.no_grad():
        for head in (model.image_head, model.text_head):
            head.bias += 0.5 * torch.randn(len(model.vocabulary))
    model.save_pretrained(folder / "stair")
    samples = list(read_samples(str(folder / "scenes" / "val-0000.tar")))
    images = [decode_image(sample.members["png"]) for sample in samples]
    SparseIndex.build(folder / "index", model.encode(images=images), [s.key for s in samples], model=model)
    return folder, samples


def test_from_calibration_to_no_match_on_the_command_line(made, stair, capsys):
    folder, samples = made
    result = json.loads(stair("calibrate", folder / "stair", folder / "scenes" / "val-*.tar", "--json"))
    model = Stair.from_pretrained(folder / "stair")
    captions = [json.loads(sample.members["json"])["captions"] for sample in samples]
    owner = np.repeat(np.arange(len(samples)), [len(own) for own in captions])
    images, texts = (
        rows.toarray() / np.linalg.norm(rows.toarray(), axis=1, keepdims=True)
        for rows in (
            model.encode(images=[decode_image(sample.members["png"]) for sample in samples]),
            model.encode(texts=[text for own in captions for text in own]),
        )
    )
    scores = (images[owner] * texts).sum(1)
    expected = threshold_by_definition(scores, owner, 0.1)
    assert result["images"] == 30 and result["pairs"] == len(owner)
    assert result["thresholds"]["0.1"] == pytest.approx(expected)
    index, text = SparseIndex.open(folder / "index", model), captions[3][0]
    kept = index.search(text, 30, max_error=0.1)
    assert [hit.id for hit in kept] == [hit.id for hit in index.search(text, 30) if hit.score >= expected - 1e-6]
    options = ("--model", folder / "stair", "--k", "30")
    rows = json.loads(stair("search", folder / "index", "--text", text, *options, "--max_error", "0.1", "--json"))
    assert [row["id"] for row in rows] == [hit.id for hit in kept]
    highest = Calibration("", "", 1, 1, [2.0])
    Calibration(**{**vars(highest), "model": model.fingerprint}).save(folder / "stair")
    assert "no match" in stair("search", folder / "index", "--text", text, *options, "--max_error", "0.5")
    assert SparseIndex.open(folder / "index", Stair.from_pretrained(folder / "stair")).search(text, max_error=0.5) == []


def test_what_max_error_cannot_be_used_with_is_an_error(made, tmp_path):
    folder, _ = made
    model = Stair.from_pretrained(folder / "stair")
    index = SparseIndex.open(folder / "index", model)
    Calibration("other", "d", 1, 1, [0.1]).save(folder / "stair")
    with pytest.raises(SettingError):  # of another model
        index.search("a red circle", max_error=0.5)
    Calibration(model.fingerprint, "d", 1, 1, [0.1]).save(folder / "stair")
    for options in (
        {"words": "red"},
        {"like": next(index.ids)},
        {"query": sparse.csr_matrix((1, len(model.vocabulary)))},
    ):
        with pytest.raises(SettingError) as error:
            index.search(**options, max_error=0.5)
        assert error.value.setting == "max_error"
    for content in ("{", "[]", "{}", '{"format": "stair-calibration-1", "thresholds": "x"}'):
        (folder / "stair" / "calibration.json").write_text(content)
        with pytest.raises(FileError):
            index.search("a red circle", max_error=0.5)
    (folder / "stair" / "calibration.json").unlink()
    with pytest.raises(SettingError):
        index.search("a red circle", max_error=0.5)
    with pytest.raises(SettingError):  # without a model
        SparseIndex.open(folder / "index").search("a red circle", max_error=0.5)


@pytest.mark.parametrize(
    ("text", "said"), [("", "empty"), ("  ", "empty"), ("qqq zzz", "'qqq zzz'"), ("[MASK]", "MASK")]
)
def test_a_text_without_a_known_word_has_no_hits_and_a_message(made, text, said, stair):
    folder, _ = made
    index = SparseIndex.open(folder / "index", Stair.from_pretrained(folder / "stair"))
    hits, many = index.search(text), index.search_many(["a red circle", text])
    assert hits == [] == many[1] and said in hits.message == many[1].message
    assert many[0] and not many[0].message
    assert hits.missing == text.split()
    assert said in stair("search", folder / "index", "--text", text, "--model", folder / "stair")


def documents(*rows):
    weights = sparse.lil_matrix((len(rows), V), dtype=np.float32)
    for n, row in enumerate(rows):
        for token, weight in row.items():
            weights[n, SPACE.term_ids[token]] = weight
    return Embeddings(weights.tocsr(), [f"d{n}" for n in range(len(rows))], SPACE)


def test_words_that_no_document_has_are_named(tmp_path):
    index = SparseIndex.build(tmp_path / "i", documents({"dog": 1, "w9": 2}, {"dog": 3, "##s": 1}, {"w10": 1}))
    assert index.search(words="dog beach people:2").missing == ["beach", "people"]
    assert index.search(words="dog w10").missing == []
    assert index.search(words="beach").missing == ["beach"]  # also without hits
    assert index.search(words={"dogs": 1}).missing == []  # dog ##s
    index.add(Embeddings(documents({"beach": 1}).vectors, ["e"], SPACE))
    assert index.search(words="dog beach people").missing == ["people"]
    index.delete("e")
    assert index.search(words="dog beach people").missing == ["beach", "people"]


def test_a_term_that_was_not_typed_is_an_expansion(made, stair):
    folder, samples = made
    model = Stair.from_pretrained(folder / "stair")
    index = SparseIndex.open(folder / "index", model)
    text = json.loads(samples[0].members["json"])["captions"][0]
    tokens = {model.vocabulary.tokens[v] for v in model.vocabulary.token_ids(text)}
    hits = index.search(text, 5)
    terms = [term for hit in hits for term in hit.terms]
    assert {term.expansion for term in terms} == {True, False}
    assert all(term.expansion == (term.token not in tokens) for term in terms)
    assert not any(term.expansion for hit in index.search(words="red circle") for term in hit.terms)
    assert not any(term.expansion for hit in index.search(like=hits[0].id) for term in hit.terms)
    options = ("--text", text, "--model", folder / "stair", "--k", "1", "--shown", "100")
    [row] = json.loads(stair("search", folder / "index", *options, "--json"))
    assert set(row["expansions"]) == set(row["terms"]) - tokens and row["missing"] == hits.missing
    printed = stair("search", folder / "index", *options).split()[2:]
    assert {each.partition(":")[0] for each in printed if each.startswith("+")} == {f"+{e}" for e in row["expansions"]}


def test_the_stop_words_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    assert STOP_WORDS == ENGLISH_STOP_WORDS


def test_refining_terms_are_those_of_counting_by_hand(tmp_path):
    generator = np.random.default_rng(3)
    weights = sparse.csr_matrix((generator.random((60, V)) < generator.random(V) ** 3).astype(np.float32))
    index = SparseIndex.build(tmp_path / "i", Embeddings(weights, [f"d{n}" for n in range(60)], SPACE))
    hits = index.search(words="dog beach people w20 w21 w22", k=9)
    among = [index.vector(hit.id).keys() for hit in hits]
    everywhere = [index.vector(name).keys() for name in index.ids]
    values = {}
    for token in set().union(*among):
        count = sum(token in vector for vector in among)
        lift = (count / 9) / (sum(token in vector for vector in everywhere) / 60)
        if count < 9 and not token.startswith("##"):
            values[token] = (count > 1, count / 9 * (1 - count / 9) * math.log(1 + lift)), count, lift
    best = sorted(values, key=lambda token: (values[token][0], -SPACE.term_ids[token]), reverse=True)
    groups = [tuple(token in vector for vector in among) for token in best]
    best = [token for n, token in enumerate(best) if groups[n] not in groups[:n]]
    found = hits.refine(12)
    assert [part.token for part in found] == best[:12]
    assert [(part.hits, pytest.approx(part.lift)) for part in found] == [values[token][1:] for token in best[:12]]
    kept = hits.having([best[0], best[1]])
    assert [hit.id for hit in kept] == [hit.id for hit, has in zip(hits, among, strict=True) if {*best[:2]} <= has]
    assert index.search(words="dog", k=1).refine() == [] == index.search(words="-dog").refine()
    with pytest.raises(SettingError):
        hits.having(["nothing"])


def test_function_words_and_terms_of_all_hits_are_not_offered(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "dog", "the", "##s", "snow", "2"]
    space = EmbeddingSpace("m" * 64, "dot", tuple(tokens))
    rows = np.zeros((4, 9), np.float32)
    rows[:, 4] = 1
    rows[:2, 5:] = 1
    rows[2, 5] = 1
    index = SparseIndex.build(tmp_path / "i", Embeddings(sparse.csr_matrix(rows), ["a", "b", "c", "d"], space))
    assert [(part.token, part.hits, part.lift) for part in index.search(words="dog").refine()] == [("snow", 2, 1.0)]


def test_refining_terms_are_printed_and_in_the_json(made, stair):
    folder, _ = made
    options = (folder / "index", "--words", "red circle", "--k", "2")
    hits = SparseIndex.open(folder / "index").search(words="red circle", k=100)
    result = json.loads(stair("search", *options, "--refine", "3", "--json"))
    assert result["refine"] == [vars(part) for part in hits.refine(3)] and len(result["hits"]) == 2
    assert result["hits"] == json.loads(stair("search", *options, "--json"))
    assert [line.split()[1] for line in stair("search", *options, "--refine", "3").splitlines()[2:]] == [
        f"{part.token}," for part in hits.refine(3)
    ]


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_idf_weighs_the_terms_of_a_query_by_their_rarity(tmp_path, similarity, stair):
    generator = np.random.default_rng(1)
    space = EmbeddingSpace("m" * 64, similarity, SPACE.tokens)
    weights = sparse.csr_matrix(generator.random((70, V)) * (generator.random((70, V)) < generator.random(V) ** 2))
    index = SparseIndex.build(
        tmp_path / "i", Embeddings(weights.astype(np.float32), [f"d{n}" for n in range(70)], space)
    )
    index.delete(["d3", "d9"])
    rows = sparse.csr_matrix(weights[[n for n in range(70) if n not in (3, 9)]])
    query = np.zeros(V)
    query[[space.term_ids[token] for token in ("dog", "beach", "w20", "w200")]] = 1, 2, 0.5, -1
    factors = np.log((68 + 1) / (rows.getnnz(0) + 0.5))
    unit = [rows.toarray(), query * factors]
    if similarity == "cosine":
        unit = [each / np.linalg.norm(each, axis=-1, keepdims=True).clip(1e-12) for each in unit]
    scores = unit[0] @ unit[1]
    names = [f"d{n}" for n in range(70) if n not in (3, 9)]
    expected = [
        (names[n], pytest.approx(scores[n], rel=1e-5)) for n in np.argsort(-scores, kind="stable") if scores[n] > 0
    ]
    words = "dog beach:2 w20:.5 -w200"
    hits = index.search(words=words, k=68, weighting="idf")
    assert [(hit.id, hit.score) for hit in hits] == expected
    assert [hit.id for hit in hits] != [hit.id for hit in index.search(words=words, k=68)]
    assert index.search(query=sparse.csr_matrix(query), k=68, weighting="idf")[0].id == hits[0].id
    options = (tmp_path / "i", "--words", words, "--k", "1", "--weighting", "idf", "--json")
    assert json.loads(stair("search", *options))[0]["id"] == hits[0].id
    for wrong in ({"words": "dog", "weighting": "tf"}, {"query": "dog", "weighting": "idf", "max_error": 0.1}):
        with pytest.raises(SettingError):
            index.search(**wrong)

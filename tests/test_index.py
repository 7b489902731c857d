"""The index: exact against the plain product, whole on disk whatever happens, and closed to other models' vectors."""

import json
import math
import multiprocessing
import operator
import os
import pty
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

import stair.index.scoring as scoring
import stair.index.storage as storage
from stair.embeddings import Embeddings, EmbeddingSpace, to_csr
from stair.errors import FileError, SettingError
from stair.files import lock
from stair.index import SparseIndex
from stair.index.postings import canonical, invert
from stair.index.query import Query, parse_words
from tests.support.rows import SPACE, TOKENS, V, embeddings, rows


@pytest.fixture
def small_blocks(monkeypatch):
    """Segments of 40 documents, so that few documents make many."""
    monkeypatch.setattr(storage, "SEGMENT", 40)


def oracle(vectors, query, k, allowed=None):
    """All scores in float64, ranked by score and then by place."""
    score_N = vectors.astype(np.float64).toarray() @ np.asarray(query.todense(), np.float64).ravel()
    order = [n for n in np.lexsort((np.arange(len(score_N)), -score_N)) if score_N[n] > 0]
    return [(int(n), score_N[n]) for n in order if allowed is None or allowed[n]][:k]


def found(hits):
    return [int(hit.id.lstrip("d")) for hit in hits], [hit.score for hit in hits]


@pytest.mark.parametrize("k", [1, 7, 500])
def test_search_equals_the_plain_product(tmp_path, small_blocks, k):
    documents = embeddings(130)
    index = SparseIndex.build(tmp_path / "i", documents)
    for query in rows(12, seed=5):
        ids, scores = found(index.search(query, k))
        expected = oracle(documents.vectors, query, k)
        assert ids == [n for n, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-14)


def test_search_is_exact_for_weights_of_any_size_and_sign(tmp_path):
    generator = np.random.default_rng(3)
    documents = rows(400, seed=1, density=0.2)
    documents.data = np.exp(generator.normal(0, 4, len(documents.data))).astype(np.float32)
    index = SparseIndex.build(tmp_path / "i", Embeddings(documents, [f"d{n}" for n in range(400)], SPACE))
    for seed in range(10):
        query = rows(1, seed=seed, density=0.3)
        query.data = (generator.normal(0, 1, len(query.data)) * 10.0 ** generator.integers(-6, 6)).astype(np.float32)
        ids, scores = found(index.search(query, 10))
        expected = oracle(documents, query, 10)
        assert ids == [n for n, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-9)


@pytest.mark.parametrize("num_terms", [V, 1])
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30), counts=st.lists(st.integers(1, 700), max_size=3), k=st.sampled_from([1, 3, 10, 900])
)
def test_search_is_exact_over_rare_and_frequent_words(num_terms, seed, counts, k):
    """Words that one document holds, or all; some documents hidden; sums of quarters, which are exact, so that many tie."""
    generator = np.random.default_rng(seed)
    density_V = 10.0 ** generator.uniform(-3, 0.2, num_terms)
    best, scores, shown = scoring.Best(1, k), [], []
    chosen = np.sort(generator.choice(num_terms, min(num_terms, 6), replace=False))
    weights = generator.integers(-4, 9, len(chosen)).astype(np.float32) / 4
    query = Query(chosen[weights != 0], weights[weights != 0], num_terms)
    for count in counts:
        dense = (generator.random((count, num_terms)) < density_V) * generator.integers(1, 30, (count, num_terms)) / 4
        arrays = invert(canonical(dense, num_terms))
        for array in arrays.values():
            array.flags.writeable = False  # as maps are; for others the loops would be compiled once more
        allowed = generator.random(count) < 0.7 if generator.random() < 0.5 else np.zeros(0, bool)
        queries = np.array([0, len(query.terms)]), query.terms, query.weights
        scoring.search_segment(arrays, queries, num_terms, allowed, sum(map(len, scores)), best)
        scores.append(dense @ query.dense())
        shown.append(allowed if len(allowed) else np.ones(count, bool))
    score_N = np.concatenate([*scores, []]) * np.concatenate([*shown, []])
    order = [n for n in np.lexsort((np.arange(len(score_N)), -score_N)) if score_N[n] > 0][:k]
    assert best.documents[0, : best.count[0]].tolist() == order
    assert best.scores[0, : best.count[0]].tolist() == score_N[order].tolist()


def test_a_word_of_many_documents_takes_a_byte_for_each_of_them_and_no_numbers():
    dense = np.zeros((100, 3), np.float32)
    dense[:60, 0], dense[:20, 1], dense[:21, 2] = 2, 1, 1  # three fifths, just a fifth, a document more
    arrays = invert(canonical(dense, 3))
    assert np.diff(arrays["number_start"]).tolist() == [0, 20, 0]
    assert np.diff(arrays["run_start"]).tolist() == [100, 20, 100]
    for word, (start, end) in enumerate(zip(arrays["run_start"][:-1], arrays["run_start"][1:], strict=True)):
        held = arrays["bytes"][start:end] * arrays["scale"][word]
        np.testing.assert_allclose(held, dense[: end - start, word], rtol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_document_a_hair_better_in_a_later_segment_is_found(tmp_path, sign):
    """What rounding to bytes hides: the first segment's score prunes the second's, where 0.498 lies between two bytes."""

    def document(name, weights, shown):
        row = sparse.lil_matrix((1, V), dtype=np.float32)
        for word, weight in weights.items():
            row[0, SPACE.term_ids[word]] = weight
        return Embeddings(row.tocsr(), [name], SPACE, [{"shown": shown}])

    # of the word alone, or of what another word leaves above it; `most` sets the step of the second segment's bytes
    first, second = ({"dog": 0.49806}, {"dog": 0.4981}) if sign > 0 else ({"beach": 0.75}, {"beach": 1, "dog": 0.4981})
    parts = [document("better", second, 1), document("most", {"dog": 1}, 0)]
    index = SparseIndex.build(tmp_path / "i", document("good", first, 1))
    rows = sparse.vstack([part.vectors for part in parts], format="csr")
    index.add(Embeddings(rows, ["better", "most"], SPACE, [{"shown": 1}, {"shown": 0}]))
    words = {"dog": 1.0} if sign > 0 else {"beach": 2.0, "dog": -1.0}
    assert [hit.id for hit in index.search(words=words, k=1, where="shown=1")] == ["better"]


def test_search_is_exact_over_more_documents_than_a_block_holds(tmp_path):
    count = 66_000
    documents = sparse.random(count, V, 0.01, "csr", np.float32, np.random.default_rng(0))
    index = SparseIndex.build(tmp_path / "i", Embeddings(documents, [f"d{n}" for n in range(count)], SPACE))
    for seed in range(3):
        query = rows(1, seed=seed)
        ids, scores = found(index.search(query, 20))
        expected = oracle(documents, query, 20)
        assert ids == [n for n, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-13)


def test_the_contributions_of_a_hit_make_its_score(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(50))
    for hit in index.search(rows(1, seed=9, density=0.4), 10):
        in_order = sorted(hit.terms, key=lambda term: SPACE.term_ids[term.token])
        assert sum(term.contribution for term in in_order) == hit.score
        assert hit.terms == sorted(hit.terms, key=lambda term: -term.contribution)
        assert all(index.vector(hit.id)[term.token] == term.document for term in hit.terms)


def test_nothing_shared_means_no_hit(tmp_path):
    index = SparseIndex.build(tmp_path / "i", Embeddings(rows(3), ["a", "b", "c"], SPACE))
    assert index.search(sparse.csr_matrix((1, V), dtype=np.float32)) == []
    assert index.search(words={"w299": -1.0}) == []
    assert SparseIndex.build(tmp_path / "empty", Embeddings(rows(0), [], SPACE)).search(rows(1)) == []


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_scores_are_those_of_the_model(tmp_path, tiny_stair, captions, similarity):
    tiny_stair.config.similarity = similarity
    index = SparseIndex.build(tmp_path / "i", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    query = "a blue bird and two dogs"
    expected = tiny_stair.score(tiny_stair.encode_text(captions), tiny_stair.encode_text([query]))[:, 0]
    scores = {hit.id: hit.score for hit in index.search(query)}
    for caption, score in zip(captions, expected.tolist(), strict=True):
        assert scores.get(caption, 0) == pytest.approx(score, rel=1e-5)


def test_an_image_finds_texts_and_a_text_images(tmp_path, tiny_stair, captions, pixels):
    from PIL import Image

    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    texts = SparseIndex.build(tmp_path / "t", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    images = SparseIndex.build(tmp_path / "i", tiny_stair.encode(images=pictures), model=tiny_stair)
    score = tiny_stair.score(tiny_stair.encode_image(pixels), tiny_stair.encode_text(captions))
    assert texts.search(pictures[2], 1)[0].id == captions[int(score[2].argmax())]
    assert images.search(captions[0], 1)[0].id == str(int(score[:, 0].argmax()))
    assert images.search(pictures[1], 1)[0].score == pytest.approx(
        float(tiny_stair.encode_image(pixels)[1].pow(2).sum())
    )


def test_weighted_words_are_a_query(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(200))
    query = sparse.lil_matrix((1, V), dtype=np.float32)
    query[0, 4], query[0, 5], query[0, 6] = 2, 1, -1
    expected = [(hit.id, hit.score) for hit in index.search(query.tocsr(), 20)]
    assert [(hit.id, hit.score) for hit in index.search(words="Dog:2 beach -people", k=20)] == expected
    assert [(hit.id, hit.score) for hit in index.search(words={"dog": 2, "beach": 1, "people": -1}, k=20)] == expected


def test_weighted_words_read_signs_weights_and_colons():
    assert parse_words("dog:2 beach -people -sea:.5 dog") == {"dog": 3, "beach": 1, "people": -1, "sea": -0.5}
    assert parse_words(": - ::2") == {":": 3, "-": 1}
    for text in ("dog:x", "  "):
        with pytest.raises(SettingError) as error:
            parse_words(text)
        assert error.value.setting == "words"


def test_a_word_that_is_no_piece_is_its_pieces(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(5))
    assert index.query(words="dogs").terms.tolist() == [4, 7]
    with pytest.raises(SettingError) as error:
        index.query(words="qqq")
    assert error.value.setting == "words"


def test_a_vocabulary_in_which_case_counts_keeps_words_of_other_case_apart(tmp_path):
    space = replace(SPACE, tokens=(*TOKENS[:8], "us", "US", *TOKENS[10:]))
    index = SparseIndex.build(tmp_path / "i", Embeddings(rows(5), [f"d{n}" for n in range(5)], space))
    assert [index.query(words={word: 1}).terms.tolist() for word in ("us", "US", "Dog")] == [[8], [9], [4]]


def test_like_finds_neighbours_without_the_document_itself(tmp_path):
    documents = embeddings(60)
    hits = SparseIndex.build(tmp_path / "i", documents).search(like="d7", k=5)
    expected = [n for n, _ in oracle(documents.vectors, documents.vectors[7], 61) if n != 7]
    assert found(hits)[0] == expected[:5]


METADATA = [
    {"n": n, "half": n / 2, "split": "test" if n % 3 else "train", "tags": [f"t{n % 4}", "all"]}
    | {"title": ("sugar", "salt and pepper")[n % 2]}
    for n in range(90)
]


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("split=test", lambda row: row["split"] == "test"),
        ("split != test", lambda row: row["split"] != "test"),
        ("n>=40", lambda row: row["n"] >= 40),
        (
            ["n<70", "half > 11.5", "split=train"],
            lambda row: row["n"] < 70 and row["half"] > 11.5 and row["n"] % 3 == 0,
        ),
        (
            "n<70 and half > 11.5 and split=train",
            lambda row: row["n"] < 70 and row["half"] > 11.5 and row["n"] % 3 == 0,
        ),
        ('title="salt and pepper" and n<50', lambda row: row["n"] % 2 and row["n"] < 50),
        ("tags=t2", lambda row: "t2" in row["tags"]),
        ("split=nothing", lambda row: False),
    ],
)
def test_filters_leave_exactly_what_they_say(tmp_path, small_blocks, where, holds):
    documents = embeddings(90, metadata=METADATA)
    index = SparseIndex.build(tmp_path / "i", documents)
    query = rows(1, seed=8, density=0.5)
    ids, _ = found(index.search(query, 15, where=where))
    assert ids == [n for n, _ in oracle(documents.vectors, query, 15, [holds(row) for row in METADATA])]
    assert [hit.metadata for hit in index.search(query, 3)] == [
        METADATA[n] for n, _ in oracle(documents.vectors, query, 3)
    ]


def test_filters_that_cannot_be_read_are_refused(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(90, metadata=METADATA))
    for where in ("split", "color=red", "n=many"):
        with pytest.raises(SettingError) as error:
            index.search(rows(1), where=where)
        assert error.value.setting == "where"


PHOTOS = [
    {"year": year, "price": price, "product name": "Bike"}
    for year, price in [("999", "9.5"), ("2010", "10"), ("2024", "100"), ("", "-3"), ("N/A", "1e3"), ("+2011", " 7 ")]
]
LARGE = 1 << 60  # neighbours of which are one float
TYPED = [
    {"n": value} for value in [LARGE, LARGE + 1, float(LARGE), 1 << 70, True, str(LARGE + 1), None, [1, LARGE + 1]]
]
TYPED += [{"n": date(2020, 1, 1)}, {"n": datetime(2020, 1, 1, 5)}, {"n": {"a": [1]}}, {}, {"n": 0.1}, {"n": "true"}]
NAMED = [
    {"id": "x", "score": 1, "file": "mine", "a>=b": "c and d", 'say "hi"': "=1", "stair:file": "theirs", "日本": "é"}
]


def matching(metadata, where, source=()):
    """Which documents a filter leaves, and what is stated of those that do not compare."""
    vectors = sparse.csr_matrix(np.ones((len(metadata), V), np.float32))
    documents = Embeddings(vectors, [f"d{n}" for n in range(len(metadata))], SPACE, metadata, source)
    with TemporaryDirectory() as folder:
        hits = SparseIndex.build(f"{folder}/i", documents).search(words="dog", k=50, where=where)
        return sorted(found(hits)[0]), sum(hits.not_comparable.values())


@pytest.mark.parametrize(
    ("metadata", "where", "left", "not_comparable"),
    [
        # texts compare as numbers if the filter's value is one
        (PHOTOS, "year>=2010", [1, 2, 5], 2),
        (PHOTOS, "price>5", [0, 1, 2, 4, 5], 0),
        (PHOTOS, "price<0", [3], 0),
        (PHOTOS, "year=2010.0", [1], 0),
        (PHOTOS, 'year="2010.0"', [], 0),
        (PHOTOS, "year!=2010", [0, 2, 3, 4, 5], 0),
        (PHOTOS, "year=", [3], 0),
        (PHOTOS, "product name=Bike and year<1000", [0], 2),
        # each value by its own type, to the last digit
        (TYPED, f"n={LARGE + 1}", [1, 5, 7], 0),
        (TYPED, f"n>{LARGE}", [1, 3, 5], 8),
        (TYPED, f"n<={LARGE}", [0, 2, 12], 8),
        (TYPED, "n>1e19", [3], 8),
        (TYPED, f"n>{9 * 10**400}", [], 8),
        (TYPED, "n<0.5", [12], 8),
        (TYPED, "n=0.1", [12], 0),
        (TYPED, "n=TRUE", [4], 0),
        (TYPED, "n=true", [4, 13], 0),
        (TYPED, "n=2020-01-01", [8], 0),
        (TYPED, "n>=2020-01-01 ", [8, 9, 13], 10),
        ([{"n": 2010}, {"n": 2011}, {}], "n>2010.5", [1], 1),
        ([{"n": 2010}, {"n": 2011}, {}], "n<=2010.5", [0], 1),
        ([{"n": float(1 << 53)}], f"n<{(1 << 53) + 1}", [0], 0),
        # any name can be asked for
        (NAMED, "id=x and score=1 and file=mine and 日本=é", [0], 0),
        (NAMED, '"a>=b"="c and d" and "say ""hi"""="=1"', [0], 0),
        (NAMED, ['"a>=b"=c and d'], [0], 0),
        (NAMED, 'stair:file=ours and "stair:file"=theirs and stair:id=d0', [0], 0),
    ],
)
def test_values_compare_by_the_type_they_were_given_with(metadata, where, left, not_comparable):
    assert matching(metadata, where, [{"file": "ours"}] * len(metadata)) == (left, not_comparable)


@pytest.mark.parametrize(
    ("metadata", "where"),
    [
        ([{"n": 1}], "m=1"),
        ([{"n": 1}], "stair:nothing=1"),
        ([{"n": 1}, {"n": 2.5}], "n>many"),
        ([{"n": True}], "n=yes"),
        ([{"n": True}], "n>false"),
        ([{"n": date(2020, 1, 1)}], "n>2020"),
        ([{"n": {"a": 1}}], "n=1"),
        *(
            ([{"n": 1}], where)
            for where in ["n", "n==1", "n=>1", "=1", "n=1 and", "n=1 and m", 'n="a" and "b', "n= and n=1"]
        ),
    ],
)
def test_a_filter_that_cannot_mean_anything_here_is_an_error(metadata, where):
    with pytest.raises(SettingError) as error:
        matching(metadata, where)
    assert error.value.setting == "where"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    values=st.lists(
        st.integers(-(1 << 70), 1 << 70)
        | st.integers((1 << 53) - 3, (1 << 53) + 3)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.just(float(1 << 53)),
        min_size=1,
        max_size=8,
    ),
    limit=st.integers(-(1 << 70), 1 << 70) | st.integers((1 << 53) - 3, (1 << 53) + 3) | st.floats(-1e30, 1e30),
    sign=st.sampled_from(["=", "!=", "<", "<=", ">", ">="]),
    text=st.booleans(),
)
def test_numbers_of_all_types_compare_exactly(values, limit, sign, text):
    """As Python compares integers of any size with floats; as text too."""
    compare = {"=": "__eq__", "!=": "__ne__", "<": "__lt__", "<=": "__le__", ">": "__gt__", ">=": "__ge__"}[sign]
    expected = [n for n, value in enumerate(values) if getattr(operator, compare)(value, limit)]
    assert matching([{"n": repr(value) if text else value} for value in values], f"n{sign}{limit!r}") == (expected, 0)


GIVEN = {
    "int": 3, "zero": 0, "large": 1 << 63, "exact": (1 << 53) + 1, "float": 1.0, "tiny": 5e-324, "no": False, "empty": "",
    "number": "007", "text": "é\0\u202e", "list": [1, "1", 1.0, None, [True]], "nested": {"a": {"b": [1 << 70]}},
    "date": date(1, 1, 1), "time": datetime(2020, 1, 1, 5, 0, 0, 7, timezone(timedelta(hours=2))), "": "no name",
    "id": 1, "score": "s", "words": [], "metadata": {}, "stair:text": 1, "user:int:x": 2,
}  # fmt: skip


def test_values_come_back_as_they_were_given_whatever_is_added_and_deleted_later(tmp_path):
    def types(value):
        parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return type(value), [(key, types(part)) for key, part in sorted(parts, key=str)]

    others = [{key: "text"} for key in GIVEN] + [{key: None} for key in GIVEN] + [{key: 1.5} for key in GIVEN]
    index = SparseIndex.build(tmp_path / "i", embeddings(1, prefix="first", metadata=[GIVEN]))
    index.add(embeddings(len(others), metadata=others)).delete(["d3"])
    index.add(embeddings(1, prefix="second", metadata=[GIVEN]))
    for name in ("first0", "second0"):
        assert index.metadata(name) == GIVEN and types(index.metadata(name)) == types(GIVEN)
    assert index.metadata("d4") == {list(GIVEN)[4]: "text"}


def test_a_key_without_a_value_has_no_type_yet(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(1, metadata=[{"title": None}]))
    assert index.search(np.ones((1, V)), where="title=cat") == []
    index.add(embeddings(2, prefix="e", metadata=[{"title": "cat"}, {"title": 7}]))
    assert [hit.id for hit in index.search(np.ones((1, V)), where="title=cat")] == ["e0"]
    assert [hit.id for hit in index.search(np.ones((1, V)), where="title>6")] == ["e1"]


@pytest.mark.parametrize(
    "bad", [(1, 2), {1: 2}, math.inf, [math.nan], b"x", "\udce9", ["\udce9"], object(), {"a": (1,)}]
)
def test_a_value_that_would_change_is_refused_with_key_and_id(tmp_path, bad):
    with pytest.raises(SettingError, match=r"'n' of 'd1'") as error:
        SparseIndex.build(tmp_path / "i", embeddings(2, metadata=[{}, {"n": bad}]))
    assert error.value.setting == "metadata" and not (tmp_path / "i").exists()


@pytest.mark.parametrize("keys", [3, "\udce9", None])
def test_a_key_that_is_no_text_is_refused(tmp_path, keys):
    with pytest.raises(SettingError) as error:
        SparseIndex.build(tmp_path / "i", embeddings(1, metadata=[{keys: 1}]))
    assert error.value.setting == "metadata"


def test_an_id_that_is_no_unicode_is_refused_by_name_and_leaves_nothing(tmp_path):
    with pytest.raises(SettingError, match="caf") as error:
        SparseIndex.build(tmp_path / "i", Embeddings(rows(2), ["plain", "caf\udce9"], SPACE))
    assert error.value.setting == "ids" and not (tmp_path / "i").exists()


@pytest.mark.parametrize("name", ["d9", "caf\udce9", 3])
def test_an_id_that_no_document_has_is_an_error_of_the_setting_delete(tmp_path, name):
    index = SparseIndex.build(tmp_path / "i", embeddings(2))
    with pytest.raises(SettingError) as error:
        index.delete(["d0", name])
    assert error.value.setting == "delete" and list(index.ids) == ["d0", "d1"]


def test_the_source_is_kept_apart_from_metadata_of_the_same_names(tmp_path):
    both = [{"file": "user's", "n": n} for n in range(3)], [{"file": f"{n}.jpg", "offset": n} for n in range(3)]
    index = SparseIndex.build(tmp_path / "i", Embeddings(rows(3, density=1), ["d0", "d1", "d2"], SPACE, *both))
    index.delete("d0")
    [hit] = index.search(np.ones((1, V)), where="stair:file=2.jpg")
    assert (hit.id, hit.metadata, hit.source) == ("d2", both[0][2], both[1][2])
    assert (index.metadata("d1"), index.source("d1")) == (both[0][1], both[1][1])
    [content] = index.content()
    assert (content.metadata, content.source) == (both[0][1:], both[1][1:])


def test_a_document_without_a_key_matches_only_unequal(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(2, metadata=[{"a": 1, "b": "x"}, {}]))
    for where, ids in [("", [0, 1]), ("a=1", [0]), ("a<9", [0]), ("a!=1", [1]), ("b=x", [0]), ("b!=x", [1])]:
        assert sorted(found(index.search(np.ones((1, V)), where=where))[0]) == ids, where


# ------------------------------------------------------------------ changes


def test_adding_and_deleting_equal_building_anew(tmp_path, small_blocks):
    rest = [n for n in range(100) if n % 7]
    documents = embeddings(100, metadata=[{"n": n} for n in range(100)])
    index = SparseIndex.build(tmp_path / "i", _some(documents, range(30)))
    for begin in range(30, 100, 10):
        index.add(_some(documents, range(begin, begin + 10)))
    index.delete([f"d{n}" for n in range(0, 100, 7)])
    anew = SparseIndex.build(tmp_path / "anew", _some(documents, rest))
    for _ in ("changed", "opened again"):
        assert len(index) == len(anew) == len(list(index.ids)) and list(index.ids) == list(anew.ids)
        assert "d7" not in index and "d8" in index
        for query in rows(5, seed=4, density=0.3):
            a, b = index.search(query, 12, where="n<80"), anew.search(query, 12, where="n<80")
            assert [(x.id, x.score, x.metadata) for x in a] == [(x.id, x.score, x.metadata) for x in b]
        index = SparseIndex.open(tmp_path / "i")
    index.verify()


def _some(documents, places):
    places = list(places)
    metadata = [documents.metadata[n] for n in places]
    return Embeddings(documents.vectors[places], [documents.ids[n] for n in places], documents.space, metadata)


def test_a_deleted_id_can_be_added_again(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(3)).delete(["d1"])
    index.add(Embeddings(rows(1, seed=7), ["d1"], SPACE))
    assert list(index.ids) == ["d0", "d2", "d1"]
    index.delete("d1").delete(["d0", "d2"])
    assert len(index) == 0 and index.search(np.ones((1, V))) == []


def test_an_open_index_outlives_changes_by_others(tmp_path):
    reader = SparseIndex.build(tmp_path / "i", embeddings(50))
    before = [(hit.id, hit.score) for hit in reader.search(np.ones((1, V)))]
    SparseIndex.open(tmp_path / "i").delete([f"d{n}" for n in range(25)])
    assert [(hit.id, hit.score) for hit in reader.search(np.ones((1, V)))] == before


CHANGES = {
    "add": lambda index: index.add(embeddings(9, seed=2, prefix="e")),
    "replace": lambda index: index.add(embeddings(9, seed=2), replace=True),
    "delete": lambda index: index.delete(["d1", "d20"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kill_at_any_write_leaves_the_old_index_or_the_new(tmp_path, change):
    def make(name):
        return SparseIndex.build(tmp_path / name, embeddings(30)).add(embeddings(5, seed=1, prefix="x")).delete(["x2"])

    def state(index):
        names = sorted(path.name for path in index.folder.iterdir())
        return list(index.ids), [(hit.id, hit.score) for hit in index.search(np.ones((1, V)), 50)], names

    whole = make("whole")
    syncs = _syncs_until_killed(None, lambda: CHANGES[change](whole))
    old, new = state(make("old")), state(SparseIndex.open(tmp_path / "whole"))
    assert old != new and syncs >= 2
    for step in sorted({0, syncs // 2, *range(max(0, syncs - 4), syncs)}):
        index = make(str(step))
        assert _syncs_until_killed(step, lambda index=index: CHANGES[change](index)) == step
        left = SparseIndex.open(tmp_path / str(step))
        left.verify()
        # the last wait is for the folder's name of the new file: from there on it is the new one
        assert state(left)[:2] == (new if step == syncs - 1 else old)[:2], step
        # the next writer can go on, and clears what the killed one left
        assert state(left.delete(["d3"]))[2] == ["index.arrow"]


def _syncs_until_killed(step, change):
    """Runs a change in a child that dies at the step-th wait for the disk; how many waits there were before its end."""
    child = os.fork()
    if child == 0:
        count, sync = [0], os.fsync

        def dying_sync(handle):
            if count[0] == step:
                os._exit(step)
            count[0] += 1
            sync(handle)

        os.fsync = dying_sync
        try:
            change()
            os._exit(count[0])
        finally:
            os._exit(255)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_change_that_is_refused_changes_nothing(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(4))
    before = (tmp_path / "i" / "index.arrow").read_bytes()
    bad = rows(1)
    bad.data[:] = -1
    for setting, change in [
        ("ids", lambda: index.add(embeddings(3))),
        ("ids", lambda: index.add(Embeddings(rows(2), ["x", "x"], SPACE))),
        ("delete", lambda: index.delete(["d1", "d9"])),
        ("vectors", lambda: index.add(Embeddings(bad, ["x"], SPACE))),
        ("model", lambda: index.add(rows(1), ["x"])),
        ("metadata", lambda: index.add(Embeddings(rows(1), ["x"], SPACE, [{"n": math.inf}]))),
        ("metadata", lambda: index.add(Embeddings(rows(1), ["x"], SPACE, [{"n": [math.nan]}]))),
        ("metadata", lambda: index.add(Embeddings(rows(1), ["x"], SPACE, [{3: "a"}]))),
        ("ids", lambda: index.add(Embeddings(rows(2), ["d1", "d1"], SPACE), replace=True)),
        ("model", lambda: _delete_and_add(index.folder, ["d1"], space=replace(SPACE, model="x" * 64))),
    ]:
        with pytest.raises(SettingError) as error:
            change()
        assert error.value.setting == setting
        assert (tmp_path / "i" / "index.arrow").read_bytes() == before
    with pytest.raises(FileExistsError):
        SparseIndex.build(tmp_path / "i", embeddings(2))


def _delete_and_add(folder, gone, **other):
    storage.write_index(folder, [embeddings(1, prefix="new", **other)], gone)


def test_any_number_of_threads_search_while_another_process_changes_the_index(tmp_path):
    """An open index keeps its state; one that is opened meanwhile has a state that there was."""

    def change():
        for n in range(6):
            SparseIndex.open(tmp_path / "i").add(embeddings(10, seed=n, prefix=f"e{n}-"))
        SparseIndex.open(tmp_path / "i").add(embeddings(300, metadata=metadata), replace=True)

    def search(thread):
        query, done = queries[thread % 4], 0
        while child.is_alive() or done < 3:
            assert found(shared.search(query, 10, where="n>=50")) == expected[thread % 4]
            opened = SparseIndex.open(tmp_path / "i")
            assert len(opened) in range(300, 370, 10)
            assert opened.search(query, 3, where="stair:id=d7")[0].metadata == {"n": "7"}
            done += 1

    metadata = [{"n": str(n)} for n in range(300)]
    shared = SparseIndex.build(tmp_path / "i", embeddings(300, metadata=metadata))
    queries = [rows(1, seed=seed, density=0.5) for seed in range(4)]
    expected = [found(shared.search(query, 10, where="n>=50")) for query in queries]
    child = multiprocessing.get_context("fork").Process(target=change)
    child.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(search, range(8)))
    assert child.exitcode == 0 and len(SparseIndex.open(tmp_path / "i")) == 360


def test_what_is_replaced_is_as_if_it_had_been_deleted_and_added(tmp_path, small_blocks):
    fresh = Embeddings(rows(50, seed=3), [f"d{n}" for n in range(60, 110)], SPACE, [{"n": n} for n in range(50)])
    replaced = SparseIndex.build(tmp_path / "a", embeddings(90)).add(fresh, replace=True)
    expected = SparseIndex.build(tmp_path / "b", embeddings(90)).delete([f"d{n}" for n in range(60, 90)]).add(fresh)
    query = rows(1, seed=8, density=0.5)
    assert list(replaced.ids) == list(expected.ids) and len(replaced) == 110
    assert found(replaced.search(query, 110)) == found(expected.search(query, 110))
    assert replaced.metadata("d75") == {"n": 15}


def test_what_a_table_has_no_number_for_is_missing(tmp_path):
    index = SparseIndex.build(
        tmp_path / "i", embeddings(2, metadata=[{"a": math.nan, "b": math.nan}, {"a": 1, "b": "x"}])
    )
    assert [index.metadata(name) for name in ("d0", "d1")] == [{}, {"a": 1, "b": "x"}]


def test_one_writer_at_a_time(tmp_path):
    index = SparseIndex.build(tmp_path / "i", embeddings(4))
    with lock(tmp_path / "i/lock"), pytest.raises(FileError) as error:
        index.delete(["d1"])
    assert error.value.path == tmp_path / "i/lock"
    index.delete(["d1"])


@pytest.mark.parametrize("field", ["model", "similarity", "tokens"])
def test_vectors_of_another_model_are_refused(tmp_path, field):
    index = SparseIndex.build(tmp_path / "i", embeddings(4))
    other = {"model": "n" * 64, "similarity": "cosine", "tokens": tuple(reversed(TOKENS))}[field]
    space = EmbeddingSpace(**{**{"model": SPACE.model, "similarity": "dot", "tokens": TOKENS}, field: other})
    with pytest.raises(SettingError) as error:
        index.add(embeddings(2, prefix="x", space=space))
    assert error.value.setting == "model"


def test_a_model_with_other_weights_is_another_model(tmp_path, tiny_stair, captions):
    SparseIndex.build(tmp_path / "i", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    tiny_stair.log_scale.data += 1  # no weight of an embedding
    SparseIndex.open(tmp_path / "i", model=tiny_stair)
    with torch.no_grad():
        tiny_stair.text_head.bias[7] += 1e-3
    with pytest.raises(SettingError) as error:
        SparseIndex.open(tmp_path / "i", model=tiny_stair)
    assert error.value.setting == "model"


@pytest.mark.parametrize("count", [50, 30_000])
def test_damage_is_found(tmp_path, count):
    """A small file when it is opened, a large one by `verify` and before a change; one that is cut short always."""
    path = SparseIndex.build(tmp_path / "i", embeddings(count)).folder / "index.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    opening = SparseIndex.open if len(content) > storage.SMALL else nothing
    opening(tmp_path / "i")
    for use in (lambda index: index.verify(), lambda index: index.delete("d3")):
        with pytest.raises(FileError) as error:
            use(SparseIndex.open(tmp_path / "i"))
        assert error.value.path == path
    for cut in (content[:-4], content[:-1000], content[:100], b""):
        path.write_bytes(cut)
        with pytest.raises(FileError) as error:
            SparseIndex.open(tmp_path / "i")
        assert error.value.path == path
    with pytest.raises(FileNotFoundError):
        SparseIndex.open(tmp_path)


def nothing(folder):
    """In place of an opening that would fail."""


def test_an_index_of_another_format_is_refused_with_what_to_do(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FORMAT", "stair-index-1")
        SparseIndex.build(tmp_path / "i", embeddings(3))
        SparseIndex.open(tmp_path / "i")
    with pytest.raises(FileError) as error:
        SparseIndex.open(tmp_path / "i")
    assert error.value.path == tmp_path / "i/index.arrow"


def test_opening_takes_no_longer_for_a_large_index(tmp_path):
    def seconds(folder):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            SparseIndex.open(folder)
            times.append(time.perf_counter() - start)
        return min(times)

    small = SparseIndex.build(tmp_path / "small", embeddings(10))
    ids = [str(n) for n in range(50_000)]
    large = SparseIndex.build(tmp_path / "large", Embeddings(rows(50_000, density=0.1), ids, SPACE))
    assert large.facts["bytes"] > 100 * small.facts["bytes"]
    assert seconds(tmp_path / "large") < 5 * seconds(tmp_path / "small") + 0.01


@pytest.mark.parametrize(
    "query",
    [
        dict(),
        dict(query="a", words="a"),
        dict(words="dog", k=0),
        dict(query=np.ones((1, 3))),
        dict(query=["a dog"]),
        dict(query=b"a dog"),
    ],
)
def test_queries_that_make_no_sense_are_refused(tmp_path, query):
    with pytest.raises(SettingError):
        SparseIndex.build(tmp_path / "i", embeddings(4)).search(**query)


@pytest.mark.parametrize(("vectors", "ids", "setting"), [(rows(1), [7], "ids"), (torch.ones(1, V), ["a"], "vectors")])
def test_documents_that_make_no_sense_are_refused(tmp_path, tiny_stair, vectors, ids, setting):
    with pytest.raises(SettingError) as error:
        SparseIndex.build(tmp_path / "i", vectors, ids, model=tiny_stair)
    assert error.value.setting == setting


def test_a_text_without_a_model_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(SettingError) as error:
        SparseIndex.build(tmp_path / "i", embeddings(4)).search("red bicycle")
    assert error.value.setting == "model"


# ------------------------------------------------------------- many queries


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_many_queries_have_the_hits_that_each_has_alone(tmp_path, small_blocks, similarity):
    metadata = [{"n": n} for n in range(150)]
    index = SparseIndex.build(
        tmp_path / "i", embeddings(150, space=replace(SPACE, similarity=similarity), metadata=metadata)
    )
    queries = sparse.vstack([rows(40, seed=5), -rows(3, seed=6), rows(3, seed=7) - rows(3, seed=8)], format="csr")
    alone = [found(index.search(query, 7, where="n>=9")) for query in queries]
    for same in (queries, queries.toarray(), torch.tensor(queries.toarray()), [index.query(row) for row in queries]):
        for threads in (1, 3):
            many = index.search_many(same, 7, where="n>=9", threads=threads)
            assert [found(hits) for hits in many] == alone
    assert [term.document for term in many[0][0].terms] == [term.document for term in index.search(queries[0])[0].terms]
    assert index.search_many(queries[:0]) == index.search_many([]) == []


def test_many_texts_or_pictures_are_encoded_together(tmp_path, tiny_stair, captions, pixels):
    from PIL import Image

    index = SparseIndex.build(tmp_path / "i", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    for queries in (captions, pictures):
        for query, hits in zip(queries, index.search_many(queries, 2), strict=True):
            alone = index.search(query, 2)
            assert [hit.id for hit in hits] == [hit.id for hit in alone]
            assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in alone], rel=1e-5)


@pytest.mark.parametrize(
    ("queries", "k", "setting"),
    [
        (np.ones((2, 3)), 1, "query"),
        (np.full((2, V), np.nan), 1, "query"),
        (["a dog", "a cat"], 1, "model"),
        (["a dog", 3], 1, "query"),
        ("a dog", 1, "query"),
        (rows(2), 0, "k"),
    ],
)
def test_many_queries_that_make_no_sense_are_refused(tmp_path, queries, k, setting):
    with pytest.raises(SettingError) as error:
        SparseIndex.build(tmp_path / "i", embeddings(4)).search_many(queries, k)
    assert error.value.setting == setting


def test_a_query_of_more_terms_than_the_bound_counts_is_exact(tmp_path):
    """Terms beyond the heaviest 512 are known by their sum alone; some of them are negative."""
    tokens, generator = tuple(f"w{v}" for v in range(1500)), np.random.default_rng(0)
    documents = sparse.random(500, 1500, 0.05, "csr", np.float32, generator)
    space = EmbeddingSpace("m", "dot", tokens)
    index = SparseIndex.build(tmp_path / "i", Embeddings(documents, [f"d{n}" for n in range(500)], space))
    for least in (0, -0.2):
        query = sparse.csr_matrix(generator.uniform(least, 1, (1, 1500)).astype(np.float32))
        ids, scores = found(index.search(query, 20))
        expected = oracle(documents, query, 20)
        assert ids == [n for n, _ in expected]
        np.testing.assert_allclose(scores, [score for _, score in expected], rtol=1e-13)


def test_a_file_of_queries_is_searched_on_the_command_line(stair, tmp_path, tiny_stair, captions):
    def search(*args):
        lines = stair("search", tmp_path / "i", *args, "--k", "3", "--json").splitlines()
        return [(line["query"], [(hit["id"], hit["score"]) for hit in line["hits"]]) for line in map(json.loads, lines)]

    captions = [caption for caption in captions if caption != "zzz"]  # no token of the vocabulary
    tiny_stair.save_pretrained(tmp_path / "m")
    index = SparseIndex.build(tmp_path / "i", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    (tmp_path / "words.txt").write_text("dog:2 bird\nred -dog\n-dog\n")
    (tmp_path / "texts.txt").write_text("\n".join(captions))
    Embeddings(tiny_stair.encode(texts=captions), captions, tiny_stair.space).save(tmp_path / "e.safetensors")
    expected = [(words, index.search(words=words, k=3)) for words in ("dog:2 bird", "red -dog", "-dog")]
    expected = [(words, [(hit.id, hit.score) for hit in hits]) for words, hits in expected]
    assert search("--queries", tmp_path / "words.txt", "--threads", "2") == expected
    printed = stair("search", tmp_path / "i", "--queries", tmp_path / "words.txt").splitlines()
    assert printed[0] == "dog:2 bird" and printed[-2:] == ["-dog", "no document scores above 0"]
    rows = search("--queries", tmp_path / "e.safetensors")
    many = index.search_many(tiny_stair.encode(texts=captions), 3)
    assert rows == [
        (caption, [(hit.id, hit.score) for hit in hits]) for caption, hits in zip(captions, many, strict=True)
    ]
    texts = search("--queries", tmp_path / "texts.txt", "--model", tmp_path / "m")
    assert [[name for name, _ in hits] for _, hits in texts] == [[name for name, _ in hits] for _, hits in rows]


@pytest.mark.parametrize(
    ("content", "model", "complaint"),
    [
        ("", False, "empty"),
        ("dog\nqqq\n", False, "line 2"),
        ("dog\n\nbird", False, "line 2"),
        ("a dog\n☃\n", True, "line 2"),
        ("dog:x", False, "line 1"),
    ],
)
def test_a_line_that_is_no_query_is_named(stair, tmp_path, tiny_stair, captions, content, model, complaint):
    tiny_stair.save_pretrained(tmp_path / "m")
    SparseIndex.build(tmp_path / "i", tiny_stair.encode(texts=captions), captions, model=tiny_stair)
    (tmp_path / "q.txt").write_text(content)
    with pytest.raises(SystemExit, match=complaint):
        stair(
            "search", tmp_path / "i", "--queries", tmp_path / "q.txt", *(["--model", tmp_path / "m"] if model else [])
        )


def test_embeddings_of_another_vocabulary_are_no_queries(stair, tmp_path):
    SparseIndex.build(tmp_path / "i", embeddings(4))
    other = EmbeddingSpace(SPACE.model, "dot", TOKENS[:9])
    Embeddings(rows(2, words=9), ["a", "b"], other).save(tmp_path / "q.parquet")
    with pytest.raises(SystemExit, match="vocabulary"):
        stair("search", tmp_path / "i", "--queries", tmp_path / "q.parquet")


# --------------------------------------------------------------- embeddings


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_embeddings_come_back_as_they_were_written(tmp_path, kind):
    metadata = [{"text": f'<"{n}">', "file": n} for n in range(7)]  # names that `source` has too
    written = embeddings(7, metadata=metadata, source=[{"file": "a.tar", "offset": n} for n in range(7)])
    written.save(tmp_path / f"part-0.{kind}", {"top": 3})
    for read in (Embeddings.load(tmp_path), Embeddings.load(tmp_path / f"part-0.{kind}")):
        assert (read.vectors != written.vectors).nnz == 0 and read.vectors.dtype == np.float32
        assert (list(read.ids), list(read.metadata), read.space) == (written.ids, written.metadata, SPACE)
        assert read.source == written.source


def test_files_that_are_no_embeddings_are_refused(tmp_path):
    (tmp_path / "x.safetensors").write_text("no")
    with pytest.raises(FileError) as error:
        Embeddings.load(tmp_path / "x.safetensors")
    assert error.value.path == tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError):
        Embeddings.load(tmp_path / "nowhere")
    with pytest.raises(FileError):
        embeddings(1).save(tmp_path / "x.csv")


def test_pruning_keeps_the_heaviest_words():
    dense = torch.tensor([[0.0, 3, 1, 2, 2], [0, 0, 0, 0, 0], [5, 0.5, 0, 0, 0]])
    assert to_csr(dense, budget=2).toarray().tolist() == [[0, 3, 0, 2, 0], [0] * 5, [5, 0.5, 0, 0, 0]]
    assert to_csr(dense, threshold=1.5).toarray().tolist() == [[0, 3, 0, 2, 2], [0] * 5, [5, 0, 0, 0, 0]]
    assert (to_csr(dense).toarray() == dense.numpy()).all()


def test_cosine_rows_have_length_one():
    vectors = sparse.csr_matrix(np.float32([[3, 4, 0], [0, 0, 0], [0, 0, 2]]))
    scaled = EmbeddingSpace("m", "cosine", ("a", "b", "c")).comparable(vectors).toarray()
    np.testing.assert_allclose(
        scaled, torch.nn.functional.normalize(torch.tensor(vectors.toarray())).numpy(), rtol=1e-6
    )
    assert math.isclose(scaled[0] @ scaled[0], 1, rel_tol=1e-6)
    assert json.dumps(scaled.tolist())


def test_a_terminal_shows_that_the_search_is_compiled_and_only_then(tmp_path):
    embeddings(3).save(tmp_path / "e.safetensors")

    def terminal(cache, out, *options):
        ours, theirs = pty.openpty()
        stair, given = Path(sys.executable).with_name("stair"), tmp_path / "e.safetensors"
        # an earlier test may have run a command with --quiet in this process, which sets the variable
        environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
        environment["NUMBA_CACHE_DIR"] = str(tmp_path / cache)
        command = [stair, "index", tmp_path / out, given, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
        os.write(theirs, b"end")
        shown = b""
        while not shown.endswith(b"end"):
            shown += os.read(ours, 1000)
        os.close(ours)
        os.close(theirs)
        return shown.count(b"compiling")

    assert [terminal("a", "1"), terminal("a", "2"), terminal("b", "3", "--quiet")] == [1, 0, 0]
    assert list((tmp_path / "b").rglob("*.nbi"))

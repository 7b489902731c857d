"""Random and damaged input at every door: refused with a reason or answered rightly, never a crash, never wrong in silence.

Shards have their own (test_fuzz_shards.py). The quick forms are the same on every run; the slow ones draw anew.
"""

import io
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stair import Embeddings, SparseIndex, Vocabulary
from stair.data.samples import captions
from stair.errors import FileError
from stair.index.metadata import conditions
from stair.index.query import parse_words
from stair.index.storage import FILE, State
from stair.plain import escape, one_line
from stair.towers import read_description
from tests.support.files import UNSEEN
from tests.support.fuzzing import BOTH, fuzz
from tests.support.models import write_vocabulary
from tests.support.rows import TOKENS, V, embeddings

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from stair.serve.app import application

ANY_TEXT = st.text(st.characters(), max_size=60)  # halves of characters too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)

# ------------------------------------------------------------------ captions


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return Vocabulary(write_vocabulary(tmp_path_factory.mktemp("v") / "vocab.txt"))


@BOTH
def test_captions_become_pieces_or_are_refused(vocabulary, slow):
    @fuzz(25, slow)
    @given(
        content=JSON | st.dictionaries(st.sampled_from(["caption", "captions", "x"]), JSON), text=st.binary(max_size=60)
    )
    def run(content, text):
        try:
            found = captions({"json": json.dumps(content).encode(), "txt": text})
        except ValueError as error:
            assert str(error).startswith(("no caption: ", "caption unreadable: ", "caption too long: "))
            return
        ids, mask = vocabulary.tokenize(found, 12)
        assert ids.shape == mask.shape and ids.shape[1] <= 12 and int(ids.max()) < len(vocabulary)
        assert ((ids == vocabulary.pad_id) | mask).all()
        own = vocabulary.in_caption_terms(ids, mask)
        assert not own[:, vocabulary.never_active].any()
        for caption in found:
            assert not UNSEEN.search(escape(caption)) and "\n" not in one_line(caption)

    run()


# ------------------------------------------------------------------ descriptions of models


@BOTH
def test_descriptions_of_models_are_read_or_refused(tiny_stair, tmp_path, slow):
    tiny_stair.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    good = json.loads(file.read_text())

    @fuzz(15, slow)
    @given(data=st.data())
    def run(data):
        content = json.loads(json.dumps(good))
        place = content
        while isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if data.draw(st.booleans()) or not isinstance(place[key], dict):
                place[key] = data.draw(JSON)
                break
            place = place[key]
        file.write_text(json.dumps(content))
        try:
            described = read_description(tmp_path / "m")
            # what would be built may be of any size: only its description is read here
            type(tiny_stair.config).from_dict(described["model"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            assert str(error)

    run()


# ------------------------------------------------------------------ indices


@pytest.mark.parametrize("broken", [b"", b"ARROW1", b"x" * 5000, b"{}", b"[]"])
def test_a_file_that_is_no_index_is_a_damaged_one(tmp_path, monkeypatch, broken):
    SparseIndex.build(tmp_path / "i", embeddings(5))
    (tmp_path / "i" / FILE).write_bytes(broken)
    monkeypatch.setattr(State, "check_digest", lambda _: None)  # as if the checksum were of this content
    with pytest.raises(FileError) as error:
        SparseIndex.open(tmp_path / "i")
    assert error.value.path == tmp_path / "i" / FILE


@pytest.mark.parametrize("key", ["format", "model", "similarity", "tokens"])
def test_an_index_that_lacks_a_fact_is_refused(tmp_path, monkeypatch, key):
    file = SparseIndex.build(tmp_path / "i", embeddings(3)).folder / FILE
    file.write_bytes(file.read_bytes().replace(f"{key}".encode(), f"{key[:-1]}_".encode()))
    monkeypatch.setattr(State, "check_digest", lambda _: None)
    with pytest.raises(FileError) as error:
        SparseIndex.open(tmp_path / "i")
    assert error.value.path == file


@BOTH
def test_a_damaged_index_is_refused_or_answers_rightly(tmp_path, slow):
    query = np.ones((1, V), np.float32)
    SparseIndex.build(tmp_path / "i", embeddings(30, metadata=[{"n": n, "t": f"t{n % 3}"} for n in range(30)]))
    right = [(hit.id, hit.score, hit.metadata) for hit in SparseIndex.open(tmp_path / "i").search(query, 30)]
    files = sorted(path for path in (tmp_path / "i").rglob("*") if path.is_file() and path.name != "lock")
    whole = {path: path.read_bytes() for path in files}

    @fuzz(25, slow)
    @given(data=st.data())
    def run(data):
        path = data.draw(st.sampled_from(files))
        content = bytearray(whole[path])
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        how = data.draw(st.sampled_from(["flip", "flip", "cut", "insert", "zero", "gone"]))
        if how == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        elif how == "zero":
            content[at : at + 16] = bytes(len(content[at : at + 16]))
        path.unlink() if how == "gone" else path.write_bytes(content)
        try:
            found = SparseIndex.open(tmp_path / "i").search(query, 30)
            assert [(hit.id, hit.score, hit.metadata) for hit in found] == right
        except (ValueError, FileNotFoundError) as error:
            assert str(error)
        finally:
            path.write_bytes(whole[path])

    run()


@pytest.mark.parametrize("key", ["model", "similarity", "tokens", "facts"])
def test_embeddings_that_do_not_say_what_they_are_are_damaged(tmp_path, key):
    embeddings(3).save(tmp_path / "part-0.safetensors")
    whole = (tmp_path / "part-0.safetensors").read_bytes()
    (tmp_path / "part-0.safetensors").write_bytes(whole.replace(f'"{key}":'.encode(), f'"{key[:-1]}_":'.encode()))
    with pytest.raises(ValueError, match=f"part-0.safetensors is damaged.* {key};"):
        Embeddings.load(tmp_path)


@BOTH
def test_damaged_embeddings_are_refused_or_read_rightly(tmp_path, slow):
    part = embeddings(12, metadata=[{"n": n} for n in range(12)])
    part.save(tmp_path / "part-0.safetensors")
    whole = (tmp_path / "part-0.safetensors").read_bytes()

    @fuzz(30, slow)
    @given(at=st.integers(0, len(whole) - 1), bit=st.integers(0, 7), cut=st.booleans())
    def run(at, bit, cut):
        content = bytearray(whole)
        if cut:
            del content[at:]
        else:
            content[at] ^= 1 << bit
        (tmp_path / "part-0.safetensors").write_bytes(content)
        try:
            read = Embeddings.load(tmp_path)
        except ValueError as error:
            assert "part-0.safetensors" in str(error)
            return
        # these files have no checksum: a weight or a letter may be another, nothing may point elsewhere
        assert read.vectors.shape[1] == len(read.space.tokens) and read.vectors.indices.max(initial=0) < len(
            read.space.tokens
        )
        assert len(read.ids) == read.vectors.shape[0]

    run()


@BOTH
def test_what_people_type_is_a_query_or_refused(tmp_path, slow):
    index = SparseIndex.build(tmp_path / "i", embeddings(9, metadata=[{"n": n, "t": "x"} for n in range(9)]))
    words = st.lists(
        st.sampled_from([*TOKENS[4:8], "dog:2", "-people", ":", "-", "a:b:c", "w9:nan", "w9:1e999"]) | ANY_TEXT
    )
    condition = st.builds(
        "{}{}{}".format, st.sampled_from(["n", "t", "q", ""]), st.sampled_from(["=", "<=", "!", "!="]), ANY_TEXT
    )

    @fuzz(25, slow)
    @given(typed=words.map(" ".join), where=st.lists(condition | ANY_TEXT, max_size=2))
    def run(typed, where):
        try:
            hits = index.search(words=parse_words(typed), where=where, k=5)
            assert all(np.isfinite(hit.score) and hit.score > 0 for hit in hits)
        except ValueError as error:
            assert str(error)

    run()


def test_half_of_a_character_is_refused_by_name_wherever_text_is_cut_into_pieces(vocabulary):
    for cut in (vocabulary.token_ids, lambda text: vocabulary.tokenize(["a dog", text], 12)):
        with pytest.raises(ValueError, match=r"two .*ud800.*dogs.*holds half of a character"):
            cut("two \ud800\ndogs")


def test_conditions_of_many_blanks_take_no_longer_than_their_length():
    start = time.process_time()
    assert conditions("a =" + " " * 50_000 + "x" + " " * 50_000)[0].value == "x"
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        conditions("x" * 100_000)
    assert time.process_time() - start < 2


# ------------------------------------------------------------------ the search page


@pytest.fixture
def client(tiny_stair, tmp_path):
    (tmp_path / "p").mkdir()
    image = Image.new("RGB", (16, 16), "red")
    image.save(tmp_path / "p" / "0.png")
    places = [{"file": "0.png"}, {"file": "0.png", "offset": -5}, {"file": "0.png", "offset": "x"}, {"file": "a\0b"}]
    places += [{"file": "x" * 5000}, {"file": "."}, {"file": "0.png", "length": 1 << 50}, {"file": 3}, {}]
    vectors = tiny_stair.encode(images=[image] * len(places))
    documents = Embeddings(vectors, [str(n) for n in range(len(places))], tiny_stair.space, source=places)
    index = SparseIndex.build(tmp_path / "i", documents, model=tiny_stair)
    app = application(index, tiny_stair, tmp_path / "p", ["localhost"])
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


WORDS = st.dictionaries(
    st.sampled_from(["dog", "red", "##s"]) | ANY_TEXT, st.integers() | st.floats() | JSON, max_size=4
)
ASKED = st.fixed_dictionaries({}, optional={"text": ANY_TEXT | JSON, "words": WORDS | JSON, "k": JSON, "where": JSON})
PATHS = ["/", "/api/about", "/api/text", "/api/image", "/api/search", "/api/words", "/picture", "/heat", "/x"]


@st.composite
def requests(draw):
    path = draw(st.sampled_from(PATHS))
    posts = path in ("/api/text", "/api/image", "/api/search")
    method = draw(st.sampled_from(["POST" if posts else "GET"] * 6 + ["PUT", "HEAD", "GET", "POST"]))
    body = draw(st.one_of(ASKED.map(lambda asked: json.dumps(asked).encode()), st.binary(max_size=80)))
    if draw(st.integers(0, 9)) == 0:
        body = draw(
            st.sampled_from(
                [b"[" * 30_000, b'{"words": {"dog": ' + b"9" * 5000 + b"}}", b'{"text": "\\ud800"}', b"x" * 70_000]
            )
        )
    query = {}
    if draw(st.booleans()):
        query["id"] = draw(st.sampled_from([str(n) for n in range(9)]) | st.text(max_size=20))
    if draw(st.booleans()):
        query["words"] = draw(
            WORDS.map(json.dumps) | st.sampled_from(["[" * 5000, "{", '{"dog": 1e999}', '{"red": NaN}'])
        )
    return method, path, body, query


def test_a_picture_whose_place_is_none_is_not_found(client):
    # a damaged or hostile index may name anything
    assert [client.get("/picture", params={"id": str(n)}).status_code for n in range(9)] == [200] + [404] * 5 + [
        200,
        404,
        404,
    ]


@BOTH
def test_no_request_makes_the_search_page_fail(client, slow):
    @fuzz(25, slow)
    @given(asked=requests())
    def run(asked):
        method, path, body, query = asked
        answer = client.request(method, path, content=body if method in ("POST", "PUT") else None, params=query)
        assert answer.status_code < 500, (asked, answer.text)
        if answer.status_code >= 400 and method != "HEAD":
            assert answer.headers["content-type"] == "application/problem+json" and answer.json()["detail"]

    run()


def test_pictures_that_are_damaged_anywhere_are_shown_or_refused(client):
    buffer = io.BytesIO()
    Image.new("RGB", (24, 24), "blue").save(buffer, "JPEG")
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        data = bytearray(buffer.getvalue())
        for at in torch.randint(len(data), (3,), generator=generator).tolist():
            data[at] ^= 255
        assert client.post("/api/image", content=bytes(data)).status_code in (200, 400)

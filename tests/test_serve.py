"""The search page: what it answers, what it refuses, and, in a real browser, what a person does with it."""

import io
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

from stair.embeddings import Embeddings
from stair.errors import SettingError
from stair.explain import read_image
from stair.index import SparseIndex
from stair.index.calibration import Calibration
from stair.model import Stair

pytest.importorskip("starlette")
pytest.importorskip("httpx")
from starlette.testclient import TestClient

from stair.serve import app as serving

CAPTIONS = [
    "a red ball",
    "two dogs",
    "<img src=x onerror=alert(1)>",
    "a blue house",
    "a green tree",
    "a bird on the sea",
]


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in CAPTIONS]


@pytest.fixture
def application(tiny_stair, pictures, tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png(pictures[0]))
    for n, picture in enumerate(pictures):
        (root / f"p{n}.png").write_bytes(b"12345" + png(picture) if n == 1 else png(picture))
    # the user's columns have the names of ours, and stay the user's
    metadata = [{"file": "p3.png", "offset": 7, "length": 3, "text": "exit", "n": n} for n in range(len(CAPTIONS))]
    source = [{"file": f"p{n}.png", "captions": [caption]} for n, caption in enumerate(CAPTIONS)]
    source[1]["offset"] = 5
    source[4]["file"] = "../secret.png"
    source[5]["file"] = "/etc/hostname"
    ids = [f"id {n} & é" for n in range(len(CAPTIONS))]
    documents = Embeddings(tiny_stair.encode(images=pictures), ids, tiny_stair.space, metadata, source)
    index = SparseIndex.build(tmp_path / "i", documents, model=tiny_stair)
    return serving.application(index, tiny_stair, root, ["localhost", "127.0.0.1"])


@pytest.fixture
def client(application):
    return TestClient(application, base_url="http://localhost", raise_server_exceptions=False)


def test_a_text_becomes_words_and_words_become_the_hits_of_the_index(client, tiny_stair, tmp_path):
    words = client.post("/api/text", json={"text": "a red ball"}).json()["words"]
    embedding = tiny_stair.encode_text(["a red ball"])[0]
    assert words == {tiny_stair.vocabulary.tokens[v]: float(embedding[v]) for v in embedding.nonzero()[:, 0].tolist()}
    hits = client.post("/api/search", json={"words": words, "k": 3, "where": ["n<5"]}).json()["hits"]
    expected = SparseIndex.open(tmp_path / "i", tiny_stair).search("a red ball", 3, where="n<5")
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit.id, pytest.approx(hit.score)) for hit in expected]
    assert sum(share for _, share in hits[0]["words"]) == pytest.approx(hits[0]["score"])
    assert client.post("/api/search", json={"words": {}}).json() == {"hits": []}


def test_a_text_comes_with_its_own_tokens_and_the_words_that_no_document_has(client, tmp_path):
    answer = client.post("/api/text", json={"text": "a red zzz"}).json()
    assert answer["own"] == ["a", "red"] and "zzz" in answer["missing"]
    refused = client.post("/api/text", json={"text": "zzz"})
    assert refused.status_code == 400 and "zzz" in refused.json()["detail"]


def test_a_calibrated_page_leaves_out_hits_below_the_threshold(tiny_stair, pictures, tmp_path):
    index = SparseIndex.build(tmp_path / "c", tiny_stair.encode(images=pictures), model=tiny_stair)
    tiny_stair.save_pretrained(tmp_path / "m")
    model = Stair.from_pretrained(tmp_path / "m")
    with pytest.raises(SettingError):  # not calibrated
        serving.application(index, model, None, ["localhost"], 0.5)
    scores = [hit.score for hit in index.search("a red ball")]
    Calibration(model.fingerprint, "d", 1, 1, [scores[2]]).save(tmp_path / "m")
    client = TestClient(serving.application(index, model, None, ["localhost"], 0.5), base_url="http://localhost")
    assert client.get("/api/about").json()["max_error"] == 0.5
    words = client.post("/api/text", json={"text": "a red ball"}).json()["words"]
    answer = client.post("/api/search", json={"words": words, "max_error": 0.5}).json()
    assert len(answer["hits"]) == 3 and answer["threshold"] == scores[2]
    assert len(client.post("/api/search", json={"words": words}).json()["hits"]) == len(scores) > 3
    for wrong in (0, 1, "x", 0.1):
        assert client.post("/api/search", json={"words": words, "max_error": wrong}).status_code == 400


def test_a_chip_keeps_the_hits_that_have_its_term(tiny_stair, tmp_path):
    weights = np.random.default_rng(0).random((30, len(tiny_stair.vocabulary)))
    rows = sparse.csr_matrix(np.where(weights > 0.5, weights, 0).astype(np.float32))
    index = SparseIndex.build(tmp_path / "r", rows, None, (), tiny_stair)
    client = TestClient(serving.application(index, tiny_stair, None, ["localhost"]), base_url="http://localhost")
    words = {"red": 1.0, "dog": 0.5}
    answer = client.post("/api/search", json={"words": words, "refine": 2}).json()
    hits = index.search(words=words, k=100)
    assert answer["refine"] == [vars(part) for part in hits.refine(2)]
    token = answer["refine"][0]["token"]
    kept = client.post("/api/search", json={"words": words, "having": [token], "refine": 8}).json()
    assert [hit["id"] for hit in kept["hits"]] == [hit.id for hit in hits.having([token])]
    assert token not in [part["token"] for part in kept["refine"]]
    for wrong in ({"having": ["qqqq"]}, {"having": "dog"}, {"refine": "x"}):
        assert client.post("/api/search", json={"words": words, **wrong}).status_code == 400


def test_steering_down_a_word_lowers_what_has_it(client):
    words = client.post("/api/text", json={"text": "a red ball"}).json()["words"]
    best = client.post("/api/search", json={"words": words}).json()["hits"][0]
    word = best["words"][0][0]
    words[word] = -5
    again = {hit["id"]: hit["score"] for hit in client.post("/api/search", json={"words": words}).json()["hits"]}
    assert again.get(best["id"], 0) < best["score"]


def test_a_dropped_picture_finds_itself(client, pictures):
    words = client.post("/api/image", content=png(pictures[3])).json()["words"]
    assert client.post("/api/search", json={"words": words, "k": 1}).json()["hits"][0]["id"] == "id 3 & é"
    shown = client.get("/api/words", params={"id": "id 3 & é"}).json()["words"]
    assert list(shown.items()) == [(word, pytest.approx(weight)) for word, weight in words.items()]


def test_a_query_of_many_words_ranks_by_all_of_them(tiny_stair, pictures, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("\n".join([*tiny_stair.vocabulary.tokens, *(f"word{n}" for n in range(200))]) + "\n")
    torch.manual_seed(0)
    model = Stair(replace(tiny_stair.config, vocabulary=str(path))).eval()
    index = SparseIndex.build(tmp_path / "many", model.encode(images=pictures), None, (), model)
    client = TestClient(serving.application(index, model, None, ["localhost"]), base_url="http://localhost")
    words = client.post("/api/image", content=png(pictures[2])).json()["words"]
    hits = client.post("/api/search", json={"words": words}).json()["hits"]
    expected = SparseIndex.open(tmp_path / "many", model).search(pictures[2], 24)
    assert len(words) > 40 and list(words) == sorted(words, key=words.get, reverse=True)
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit.id, pytest.approx(hit.score)) for hit in expected]


def test_pictures_come_from_files_and_from_places_in_them(client, pictures, tiny_stair):
    for n in (0, 1):
        answer = client.get("/picture", params={"id": f"id {n} & é"})
        assert answer.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(answer.content)).size == pictures[n].size
    word = read_image(tiny_stair, pictures[0]).terms[0]
    cold, hot = (
        np.asarray(
            Image.open(io.BytesIO(client.get("/heat", params={"id": "id 0 & é", "words": words}).content)), np.int64
        )
        for words in ("{}", json.dumps({word: 1}))
    )
    assert ((hot[..., 0] - hot[..., 2]).max() > 100) and (cold[..., 0] == cold[..., 2]).all()


@pytest.mark.parametrize("path", ["/picture", "/heat"])
@pytest.mark.parametrize("name", ["id 4 & é", "id 5 & é", "no such", "../secret.png"])
def test_paths_cannot_leave_the_collection(client, path, name):
    answer = client.get(path, params={"id": name})
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "detail"),
    [
        ("post", "/api/image", {"content": b"no picture"}, 400, "image undecodable"),
        ("post", "/api/image", {"content": b""}, 400, "image empty"),
        ("post", "/api/image", {"content": b"x" * (serving.MAX_UPLOAD_BYTES + 1)}, 413, "more than"),
        ("post", "/api/text", {"content": b"{"}, 400, "not JSON"),
        ("post", "/api/text", {"json": {"text": " "}}, 400, "empty"),
        ("post", "/api/text", {"json": [1]}, 400, "object"),
        ("post", "/api/search", {"json": {"words": {"qqqq": 1}}}, 400, "no token"),
        ("post", "/api/search", {"json": {"words": {"dog": "x"}}}, 400, "numbers"),
        ("post", "/api/search", {"json": {"words": {"dog": 1}, "k": 10**9}}, 400, "from 1 to"),
        ("post", "/api/search", {"json": {"words": {"dog": 1}, "where": ["colour=red"]}}, 400, "no document has it"),
        ("get", "/heat", {"params": {"id": "id 0 & é", "words": "x"}}, 400, "JSON"),
        ("get", "/nothing", {}, 404, "Not Found"),
    ],
)
def test_errors_are_problem_json(client, method, path, options, status, detail):
    answer = getattr(client, method)(path, **options)
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status and detail in problem["detail"] and problem["type"] and problem["title"]


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(client, monkeypatch):
    monkeypatch.setattr(serving, "MAX_UPLOAD_PIXELS", 100)
    answer = client.post("/api/image", content=png(Image.new("RGB", (11, 10))))
    assert answer.status_code == 400 and "image too large" in answer.json()["detail"]


def test_other_hosts_are_refused(client):
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_the_page_asks_no_other_host_and_runs_only_its_own_script(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    assert "http://" not in answer.text and "https://" not in answer.text and "innerHTML" not in answer.text
    assert client.get("/api/about").json() == {
        "documents": 6,
        "similarity": "dot",
        "keys": ["file", "length", "n", "offset", "stair:captions", "stair:file", "stair:offset", "text"],
        "pictures": True,
    }


@pytest.fixture
def address(application):
    """The server on a free port of this machine."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(600):
        if server.started:
            break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def until(page, expression):
    """Waits for an expression; asked from here, as the page's policy lets no string be run inside."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        time.sleep(0.1)
    raise AssertionError(f"never came true: {expression}")


@pytest.mark.slow
def test_a_person_searches_steers_explains_and_uploads_in_a_browser(browser, address, pictures, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "good.png").write_bytes(png(pictures[3]))
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.set_default_timeout(60_000)
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("dialog", lambda dialog: failed.append("a script of the data ran"))
    page.goto(address)
    # search by keyboard alone
    page.keyboard.type("a red ball")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert page.locator("#status").inner_text() == "6 hits"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "fits a phone's width"
    # markup in a caption is text
    assert "<img src=x" in page.locator("#hits").inner_text()
    # steer: a word off, a word up
    words = page.locator("#query .word").all_inner_texts()
    page.evaluate(old := "document.querySelector('.hit').dataset.old = true")
    page.get_by_role("button", name=f"remove {words[0].split()[0]}", exact=True).click()
    until(page, f"document.querySelector('#query .word').innerText !== {json.dumps(words[0])}")
    until(page, new := "!document.querySelector('.hit[data-old]')")  # the query changes before the hits
    weight = float(page.locator("#query .word small").first.inner_text())
    page.evaluate(old)
    page.locator("#query button[aria-label^='raise the weight of']").first.click()
    until(page, f"parseFloat(document.querySelector('#query .word small').textContent) > {weight}")
    until(page, new)
    # explain: the heat map comes at focus, the words of a picture at a press
    page.wait_for_selector(".hit .open")
    page.locator(".hit .open").first.focus()
    until(page, "document.querySelector('.hit .open img').src.includes('/heat?')")
    until(page, "document.querySelector('.hit .open img').naturalWidth === 320")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] #list li")
    page.keyboard.press("Escape")
    # words that the vocabulary, or no document, has
    page.fill("#text", "zzz")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    assert "no word of 'zzz'" in page.locator("#status").inner_text() and not page.locator(".hit").count()
    page.fill("#text", "a red zzz")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit")
    assert page.locator("#missing").inner_text() == "No document has: zzz"
    # a bad upload, then a good one
    page.set_input_files("#file", tmp_path / "bad.png")
    page.wait_for_selector("#status.bad")
    assert "image undecodable" in page.locator("#status").inner_text()
    page.set_input_files("#file", tmp_path / "good.png")
    until(page, "document.querySelector('.caption')?.textContent === 'a blue house'")
    assert not failed and all(url.startswith(address) or url.startswith("data:") for url in asked), (failed, asked)

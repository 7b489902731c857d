"""Search without a server: the exported page finds what the index finds, and reads little; its scripts are run by node."""

import io
import json
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import FileError, SettingError
from stair.export.web import EXPANSION, web
from stair.index import SparseIndex
from stair.index.query import parse_words
from stair.pages import asset
from stair.vocabulary import Vocabulary
from tests.support.server import Server

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
TOKENS = (*SPECIAL, *(f"w{v}" for v in range(6, 60)))
_NODE = """
const fs = require('fs'), [folder, given] = JSON.parse(fs.readFileSync(0, 'utf8')), text = name =>
  fs.readFileSync(folder + '/' + name, 'utf8');
let sent = 0;
const read = async (name, from, to) => {
  const file = fs.openSync(folder + '/' + name), buffer = new ArrayBuffer(to - from);
  if (fs.readSync(file, new Uint8Array(buffer), 0, to - from, from) !== to - from) throw new Error('outside of ' + name);
  fs.closeSync(file);
  sent += to - from;
  return buffer;
};
const tokens = () => text('vocab.txt').replace(/\\n$/, '').split('\\n');
const open = () => new StaticIndex(JSON.parse(text('about.json')), tokens(), read);
(async () => console.log(JSON.stringify(await (async () => { BODY })())))();
"""


def run(body, folder="", given=None):
    """What a body of JavaScript returns, with static.js before it; `open()` is the index of a folder."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed, which runs the page's script")
    script = str(asset("static.js")) + _NODE.replace("BODY", body)
    done = subprocess.run(
        ["node", "--eval", script], input=json.dumps([str(folder), given]), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(folder, vectors, similarity="dot", tokens=TOKENS, ids=None, **more):
    names = ids or [f"d{n}" for n in range(vectors.shape[0])]
    space = EmbeddingSpace("m" * 64, similarity, tuple(tokens))
    return SparseIndex.build(folder, Embeddings(sparse.csr_matrix(vectors, dtype=np.float32), names, space, **more))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("weights", ["few", "many"])
def test_hits_and_scores_are_those_of_the_index(tmp_path, monkeypatch, similarity, weights):
    """Few different weights make ties; layers of two postings are read in many rounds; some documents are empty."""
    monkeypatch.setattr(sys.modules["stair.export.web"], "FIRST", 2)
    generator = np.random.default_rng(0)
    values = generator.choice([0.25, 0.5, 1], (400, 60)) if weights == "few" else generator.gamma(2, 0.5, (400, 60))
    dense = values * (generator.random((400, 60)) < np.linspace(0, 0.9, 60))
    dense[:, :6], dense[::7] = 0, 0
    index = build(tmp_path / "i", dense, similarity)
    index.add(Embeddings(sparse.csr_matrix(dense[:50], dtype=np.float32), [f"e{n}" for n in range(50)], index.space))
    web(tmp_path / "i", tmp_path / "site")
    queries = []
    for _ in range(60):
        terms = generator.choice(np.arange(6, 60), generator.integers(1, 9), replace=False)
        signs = generator.choice([1, 1, 1, -1], len(terms))
        queries.append(
            dict(
                zip(
                    [f"w{v}" for v in terms],
                    (signs * generator.choice([0.5, 1, 2.3], len(terms))).tolist(),
                    strict=True,
                )
            )
        )
    queries += [{"w59": 1, "w58": -1}, {"w59": -1}, {"w6": 1}, {name: 1.0 for name in TOKENS[6:]}]
    found = run(
        "const out = []; for (const words of given) "
        "out.push((await open().search(words, 10)).map(hit => [hit.id, hit.score, hit.words])); return out;",
        tmp_path / "site",
        queries,
    )
    for words, hits in zip(queries, found, strict=True):
        expected = index.search(words=words, k=10)
        assert [(name, score) for name, score, _ in hits] == [(hit.id, hit.score) for hit in expected], words
        assert [shared for *_, shared in hits] == [[[t.token, t.contribution] for t in hit.terms] for hit in expected]


def test_a_query_reads_the_heaviest_postings_alone(tmp_path):
    generator = np.random.default_rng(0)
    dense = np.zeros((30_000, 60), np.float32)
    dense[:, 6:12] = generator.gamma(2, 0.5, (30_000, 6))
    index = build(tmp_path / "i", dense)
    web(tmp_path / "i", tmp_path / "site")
    a_list = (tmp_path / "site" / "postings.bin").stat().st_size / 6
    for words, most in (({"w6": 1.0}, a_list / 3), ({"w6": 1.0, "w7": 0.5, "w8": 0.1}, 3 * a_list)):
        code = "return [(await open().search(given, 10)).map(hit => hit.id), sent]"
        hits, sent = run(code, tmp_path / "site", words)
        assert hits == [hit.id for hit in index.search(words=words, k=10)] and sent < most


TRICKY = [
    *"Café au lait|naïve ΣΑΣ σας|中文 dog犬x㐀|don't stop!!|zzz ☃ unknown|İstanbul ǅ|e\u0301te\u0301|ﬁ ½ ²|ß|ＤＯＧ".split(
        "|"
    ),
    *"हिन्दी भाषा|dog\u00a0cat\u2003x\u3000y|\u200bzero\u00adwidth\ufeff|a\tb\r\nc\u2028d\x0be|x\x00y\x07z\ufffd".split(
        "|"
    ),
    *"[MASK] dog [UNK][SEP]|[mask] [ x ]|a_b-c/d\\e|“quoted” – dash…|한국어|ไทย|¿qué?|Å Ω K|«x»·٪|don’t|😀 smile".split(
        "|"
    ),
    "$5 a+b=c `x` ^ ~ | <>",
    "\U00020000\U0002a6d6",
    "",
    " ",
]


@pytest.mark.parametrize("cased", [False, True])
def test_texts_become_the_tokens_of_the_library(tmp_path, cased):
    generator = np.random.default_rng(0)
    # characters that are younger than the library's Unicode tables are left out
    ranges = [(0x20, 0x250), (0x370, 0x530), (0x620, 0x700), (0x1E00, 0x2070), (0x3000, 0x3100), (0x4E00, 0x4F00)]
    ranges += [(0xFF00, 0xFFEF), (0x1F600, 0x1F640)]
    starts = [generator.integers(*ranges[generator.integers(len(ranges))], 6).tolist() for _ in range(400)]
    texts = [*TRICKY, "x" * 100, "x" * 101, *("".join(map(chr, codes)) for codes in starts)]
    letters = sorted(
        {c for text in texts for form in (text, text.lower()) for c in form if c.isprintable() and c != " "}
    )
    tokens = [*SPECIAL, *letters, *(f"##{c}" for c in letters), "dog", "##og", "don", "xx", "##xxx"]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": not cased}))
    vocabulary = Vocabulary(folder)
    about = {"lowercase": not cased, "strip": not cased, "chinese": True, "never": vocabulary.never_active}
    found = run(
        "const index = new StaticIndex(given.about, given.tokens); return given.texts.map(text => index.tokenIds(text))",
        given={"about": about, "tokens": vocabulary.tokens, "texts": texts},
    )
    for text, ids in zip(texts, found, strict=True):
        assert vocabulary.tokens_of(ids) == vocabulary.tokens_of(vocabulary.token_ids(text)), ascii(text)


def test_weighted_words_are_read_as_on_the_command_line():
    texts = ["dog:2 beach -people", "-people:0.5 dog", "a:b:3 -", "dog:2 dog", "dog:-1", ":2 x:1", "-dog"]
    assert run("return given.map(weighted)", given=texts) == [parse_words(text) for text in texts]
    assert run("return given.map(weighted)", given=["a dog", "black-and-white 10", "", "at: the"]) == [None] * 4


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (40, 300, 3), dtype=np.uint8)) for _ in range(6)]
    for n, image in enumerate(images):
        image.save(folder / f"p{n}.png")
    return folder


@pytest.fixture
def index(tiny_stair, pictures, tmp_path):
    """Six pictures; the first one's id is markup, the last one's file is missing."""
    files = sorted(pictures.iterdir())
    vectors = tiny_stair.encode(images=files)
    files[-1].unlink()
    ids = ["<img src=x onerror=alert(1)>", *(f"id {n} é" for n in range(1, 6))]
    source = [{"file": file.name, "captions": [f"caption {n}"] if n else []} for n, file in enumerate(files)]
    embeddings = Embeddings(vectors, ids, tiny_stair.space, [{"n": n} for n in range(6)], source)
    return SparseIndex.build(tmp_path / "i", embeddings).folder


def test_a_text_is_the_greatest_weight_of_its_tokens(tiny_stair, model, index, pictures, stair, tmp_path):
    printed = stair("export", "web", index, tmp_path / "site", "--model", model, "--pictures", pictures)
    assert "1 of 6 documents have no image" in printed
    text = "a red ball, zzz dogs"
    ids = tiny_stair.vocabulary.token_ids(text)
    [[first, last]] = tiny_stair.vocabulary.encode([""])
    alone = torch.tensor([[first, v, last] for v in ids])
    alone_TV = tiny_stair.embed_tokens(alone, torch.ones_like(alone, dtype=torch.bool)).detach()
    best_TV = alone_TV.where(alone_TV >= alone_TV.topk(EXPANSION).values[:, -1:], 0.0)
    expected_V = torch.nn.functional.normalize(best_TV).amax(0)
    found, hits = run(
        "const index = open(), words = await index.expand(given); return [words, await index.search(words, 3)]",
        tmp_path / "site",
        text,
    )
    expected = {tiny_stair.vocabulary.tokens[v]: float(expected_V[v]) for v in expected_V.nonzero()[:, 0].tolist()}
    assert found == pytest.approx(expected, rel=1e-5)
    best = SparseIndex.open(index).search(words=found, k=3)
    assert [(hit["id"], hit["score"], hit["metadata"]["n"]) for hit in hits] == [
        (hit.id, pytest.approx(hit.score), hit.metadata["n"]) for hit in best
    ]


def test_without_a_model_rare_tokens_weigh_more(index, tmp_path):
    web(index, tmp_path / "site")
    words = run("return await open().expand('a red dog dog')", tmp_path / "site")
    count = {word: len(SparseIndex.open(index).search(words={word: 1}, k=6)) for word in words}
    assert set(words) == {"a", "red", "dog"} and all(
        weight == pytest.approx(np.log(1 + 6 / (count[word] + 1))) for word, weight in words.items()
    )


def test_thumbnails_lie_where_the_places_state(index, pictures, tmp_path):
    web(index, tmp_path / "site", pictures=pictures)
    places = np.fromfile(tmp_path / "site" / "places.bin", "<f8").reshape(-1, 2).astype(int)
    data = (tmp_path / "site" / "thumbnails.bin").read_bytes()
    files = [data[start:end] for (_, start), (_, end) in pairwise(places)]
    assert [Image.open(io.BytesIO(file)).size for file in files[:-1]] == [(192, 26)] * 5 and not files[-1]


def test_what_cannot_be_exported_is_an_error_and_leaves_nothing(index, tiny_stair, tmp_path, pictures):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        web(index, tmp_path / "site", pictures=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError) as error:
        web(index, tmp_path / "site", pictures=tmp_path / "empty")
    assert error.value.setting == "pictures"
    with torch.no_grad():
        tiny_stair.text_head.bias += 1
    tiny_stair.save_pretrained(tmp_path / "other")
    with pytest.raises(SettingError) as error:
        web(index, tmp_path / "site", str(tmp_path / "other"))
    assert error.value.setting == "model" and not list(tmp_path.glob("*site*"))
    web(index, tmp_path / "site")
    with pytest.raises(FileError):
        web(index, tmp_path / "site")


@pytest.mark.slow
def test_a_person_searches_in_a_browser_without_a_server(browser, index, model, pictures, tmp_path):
    web(index, tmp_path / "site", str(model), pictures)
    server = Server(tmp_path / "site")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: failed.append("a script of the data ran"))
    page.goto(server.url("plain", "index.html"))
    page.keyboard.type("a red ball")
    page.keyboard.press("Enter")
    page.wait_for_selector(".hit img[src^=data]")
    assert page.locator("#status").inner_text() == "6 hits" and page.locator(".hit img").count() == 5
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "fits a phone's width"
    assert "<img src=x" in page.locator("#hits").inner_text(), "markup in an id is text"
    alts = page.locator(".hit img").evaluate_all("images => images.map(image => image.alt)")
    assert set(alts) == {"<img src=x onerror=alert(1)>", *(f"caption {n}" for n in range(1, 5))}
    page.locator(".hit .open").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] #list li")
    page.get_by_role("button", name="Search like this").click()
    page.fill("#text", "red:2 -dog zzzz")
    page.keyboard.press("Enter")
    page.wait_for_selector("#status.bad")
    assert "no token of" in page.locator("#status").inner_text()
    assert not failed and all(url.startswith((server.url("plain"), "data:")) for url in asked), (failed, asked)


@pytest.mark.slow
def test_a_host_without_ranges_is_named_and_sends_no_whole_file(browser, index, tmp_path):
    web(index, tmp_path / "site")
    server = Server(tmp_path / "site")
    page = browser.new_page()
    page.goto(server.url("rangeless", "index.html"))
    page.wait_for_selector("#status.bad")
    assert "ignores Range requests" in page.locator("#status").inner_text()
    page.goto((Path(tmp_path) / "site" / "index.html").as_uri())
    page.wait_for_selector("#status.bad")
    assert "over http" in page.locator("#status").inner_text()

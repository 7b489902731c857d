"""Exports are complete or absent, and keep ids, metadata and scores. tests/test_engines.py searches the engines."""

import importlib.util
import json
import math
import sqlite3
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import sparse

from examples import lucene
from examples.search_engines import duckdb_search, qdrant_search, sqlite_search
from stair import Stair
from stair.cli import main
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import MissingPackageError, SettingError, StairError
from stair.export import sql, target, vectors
from stair.index import SparseIndex
from tests.support.files import encoded, members_of, write_tar
from tests.support.models import WORDS, tiny_config

V = 250
# pieces that engines would take for paths, or fold into one
TOKENS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "u.s",
    "u",
    "US",
    "us",
    "\\",
    '"',
    "##s",
    *(f"w{v}" for v in range(11, V)),
)


def rows(count, seed, density=0.1):
    generator = np.random.default_rng(seed)
    dense = (generator.random((count, V)) < density) * generator.gamma(2, 0.5, (count, V))
    return sparse.csr_matrix(dense.astype(np.float32))


QUERIES = [rows(1, seed, 0.15) for seed in range(100, 106)]


@pytest.fixture(scope="module", params=["dot", "cosine"])
def index(request, tmp_path_factory):
    ids = [f"d/{n} é'\"" for n in range(120)]
    metadata = [{"n": n, "caption": f"<{n}>"} for n in range(120)]
    folder = tmp_path_factory.mktemp("index") / "i"
    return SparseIndex.build(
        folder, Embeddings(rows(120, 1), ids, EmbeddingSpace("m" * 64, request.param, TOKENS), metadata)
    )


@pytest.fixture
def export(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["stair", "export", *map(str, args)])
        main()
        return capsys.readouterr().out

    return run


def agree(index, search, rel=1e-6, k=10):
    """Ids and scores of an engine are those of the index; ids may change places where scores are that near."""
    for row in QUERIES:
        query = index.query(row)
        expected, found = index.top(query, k), search(query, k)
        scores = {hit.id: hit.score for hit in index.top(query, 1000)}
        assert len(found) == len(expected)
        np.testing.assert_allclose([score for _, score in found], [hit.score for hit in expected], rtol=rel)
        np.testing.assert_allclose([score for _, score in found], [scores[name] for name, _ in found], rtol=rel)


def test_an_export_that_fails_leaves_nothing_in_its_place(index, export, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        export("sqlite", tmp_path / "nowhere", tmp_path / "x.db")
    assert not list(tmp_path.glob("*x.db*"))
    export("sqlite", index.folder, tmp_path / "x.db")
    assert [path.name for path in tmp_path.glob("*x.db*")] == ["x.db"]


def small(folder, ids=("d0", "d1", "d2"), **extra):
    """The folder of a new index."""
    vectors = Embeddings(rows(len(ids), 2, 0.5), list(ids), EmbeddingSpace("m" * 64, "dot", TOKENS), **extra)
    return SparseIndex.build(folder, vectors).folder


#: module, name of the target, most bytes of an id
ENGINES = {
    "sqlite": ("sqlite3", "x.db", None),
    "duckdb": ("duckdb", "x.db", None),
    "postgres": ("json", "x.sql", 2_600),
    "qdrant": ("qdrant_client", "x", None),
    "milvus": ("milvus_lite", "x.db", 65_535),
    "elasticsearch": ("json", "x", 512),
    "opensearch": ("json", "x", 512),
}


#: exports of the command, and of examples/
EXPORTS = {name: partial(lucene.export, name) for name in ("elasticsearch", "opensearch")}
EXPORTS |= {"sqlite": sql.sqlite, "duckdb": sql.duckdb, "postgres": sql.postgres}
EXPORTS |= {"qdrant": vectors.qdrant, "milvus": vectors.milvus}


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    """Name of an engine, and its export of an index to a fixed target."""
    module, name, _ = ENGINES[request.param]
    pytest.importorskip(module)
    out = tmp_path / name
    return request.param, lambda index: EXPORTS[request.param](
        index, str(out) if request.param in ("qdrant", "milvus") else out
    )


def test_what_an_engine_cannot_hold_is_refused_by_name_before_anything_is_written(engine, tmp_path):
    name, export = engine
    cases = {"no documents": SparseIndex.open(small(tmp_path / "empty")).delete(["d0", "d1", "d2"]).folder}
    if longest := ENGINES[name][2]:
        cases["id 'bbb"] = small(tmp_path / "long", ["a", "b" * (longest + 1)])
        cases["id ''"] = small(tmp_path / "short", ["a", ""])
    if name in ("qdrant", "milvus"):
        cases["'d1'"] = small(tmp_path / "large", metadata=[{}, {"n": {"deep": [1 << 63]}}, {}])
    if name == "postgres":
        cases["'a.x00': PostgreSQL"] = small(tmp_path / "nul", ["b", "a\0"])
    before = sorted(tmp_path.rglob("*"))
    for complaint, index in cases.items():
        with pytest.raises(SettingError, match=complaint):
            export(index)
        assert sorted(tmp_path.rglob("*")) == before


def test_an_export_that_breaks_leaves_nothing_and_one_that_ends_is_not_overwritten(engine, tmp_path, monkeypatch):
    name, export = engine
    index = small(tmp_path / "i")
    before = sorted(tmp_path.rglob("*"))

    def breaking(opened):
        yield next(target.rows(opened))
        raise RuntimeError("the engine\n broke")

    with monkeypatch.context() as patch, pytest.raises(Exception, match="broke"):
        patch.setattr(sys.modules[getattr(EXPORTS[name], "func", EXPORTS[name]).__module__], "rows", breaking)
        export(index)
    assert sorted(tmp_path.rglob("*")) == before
    export(index)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StairError):
        export(index)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}.keys() == after.keys()


# tests/test_engines.py reads that of PostgreSQL from the server
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "postgres"], indirect=True)
def test_a_users_column_replaces_no_field_of_an_engine(engine, tmp_path):
    name, export = engine
    taken = {
        "id": "theirs",
        "terms": 1,
        "document": 2,
        "metadata": {"a": 3},
        "source": [4],
        "vector": None,
        "n": (1 << 53) + 1,
    }
    export(small(tmp_path / "i", metadata=[taken] * 3, source=[{"file": "ours"}] * 3))
    kept = {key: value for key, value in taken.items() if value is not None}
    assert _stored(name, tmp_path / ENGINES[name][1]) == ("d0", kept, {"file": "ours"})


def _stored(name, out):
    """Id, metadata and source of the first document, as the engine returns them."""
    if name in ("sqlite", "duckdb"):
        database = sqlite3.connect(out) if name == "sqlite" else pytest.importorskip("duckdb").connect(str(out))
        row = database.execute("SELECT id, metadata, source FROM documents ORDER BY document").fetchone()
        return row[0], json.loads(row[1]), json.loads(row[2])
    if name == "qdrant":
        client = pytest.importorskip("qdrant_client").QdrantClient(path=str(out))
        row = min((point.payload for point in client.scroll("stair")[0]), key=lambda payload: payload["id"])
        client.close()
    elif name == "milvus":
        client = pytest.importorskip("pymilvus").MilvusClient(str(out))
        client.load_collection("stair")
        [row] = client.get("stair", ["d0"], output_fields=["id", "metadata", "source"])
        client.close()
    else:
        lines = [json.loads(line) for line in (out / "bulk.ndjson").read_text().splitlines()]
        row = {"id": lines[0]["index"]["_id"], **lines[1]}
    return row["id"], row["metadata"], row["source"]


def test_errors_of_an_engine_are_one_line(tmp_path, monkeypatch, capfd):
    pytest.importorskip("qdrant_client")
    index = small(tmp_path / "i")
    for name in ("qdrant", "milvus") if importlib.util.find_spec("pymilvus") else ("qdrant",):
        monkeypatch.setattr(sys, "argv", ["stair", "export", name, str(index), "http://127.0.0.1:9"])
        with pytest.raises(SystemExit) as error:
            main()
        assert str(error.value).count("\n") == 0 and not capfd.readouterr().err.strip()


@pytest.mark.parametrize(
    ("name", "module"), [("duckdb", "duckdb"), ("qdrant", "qdrant_client"), ("milvus", "pymilvus")]
)
def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError) as error:
        EXPORTS[name](small(tmp_path / "i"), tmp_path / "x" if name == "duckdb" else str(tmp_path / "x"))
    assert error.value.extra == "export" and not list(tmp_path.glob("*x*"))


def test_sqlite_scores_exactly(index, export, tmp_path):
    export("sqlite", index.folder, tmp_path / "x.db")
    database = sqlite3.connect(tmp_path / "x.db")
    agree(index, lambda query, k: sqlite_search(database, query, k), rel=1e-12)
    metadata = database.execute("SELECT metadata FROM documents WHERE id = ?", (next(index.ids),)).fetchone()[0]
    assert json.loads(metadata) == {"n": 0, "caption": "<0>"}
    statement = database.execute("SELECT value FROM facts WHERE name = 'score'").fetchone()[0]
    negative = index.query(words={"us": 1.0, "u.s": -2.0})
    weights = json.dumps(dict(zip(map(str, negative.terms.tolist()), negative.weights.tolist(), strict=True)))
    expected = [(hit.id, pytest.approx(hit.score)) for hit in index.top(negative, 10)]
    assert database.execute(statement, (weights, 10)).fetchall() == expected
    with pytest.raises(SystemExit, match="exists"):
        export("sqlite", index.folder, tmp_path / "x.db")


def test_duckdb_scores_exactly(index, export, tmp_path):
    engine = pytest.importorskip("duckdb")
    export("duckdb", index.folder, tmp_path / "x.duckdb")
    database = engine.connect(str(tmp_path / "x.duckdb"))
    agree(index, lambda query, k: duckdb_search(database, query, k), rel=1e-12)


def test_qdrant_scores_by_the_dot_product(index, export, tmp_path):
    client_of = pytest.importorskip("qdrant_client").QdrantClient

    export("qdrant", index.folder, tmp_path / "q")
    client = client_of(path=str(tmp_path / "q"))
    agree(index, lambda query, k: qdrant_search(client, query, k), rel=1e-5)
    client.close()


def test_the_bodies_for_a_qdrant_server_fit_its_own_models(index, export, tmp_path):
    models = pytest.importorskip("qdrant_client").models
    export("qdrant", index.folder, tmp_path / "q.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    models.CreateCollection(**lines[0])
    points = [models.PointStruct(**point) for line in lines[1:] for point in line["points"]]
    assert [point.payload["id"] for point in points] == list(index.ids)
    assert len({point.id for point in points}) == len(points)
    vector = points[3].vector["terms"]
    named = {TOKENS[v]: weight for v, weight in zip(vector.indices, vector.values, strict=True)}
    assert named == pytest.approx(index.vector(points[3].payload["id"]))


@pytest.mark.parametrize(("engine", "kind"), [("elasticsearch", "sparse_vector"), ("opensearch", "rank_features")])
def test_files_for_lucene_engines_stay_within_their_limits(index, tmp_path, engine, kind):
    lucene.export(engine, index.folder, tmp_path / "x")
    lines = [json.loads(line) for line in (tmp_path / "x/bulk.ndjson").read_text().splitlines()]
    assert [line["index"]["_id"] for line in lines[::2]] == list(index.ids)
    for document in lines[1::2]:
        kept = lucene.lucene_weights(list(document["terms"].values()))
        assert kept.tolist() == list(document["terms"].values()), "a document says what the engine keeps"
    assert json.loads((tmp_path / "x/mapping.json").read_text())["mappings"]["properties"]["terms"] == {"type": kind}
    for row in QUERIES:
        heavy = index.query(row)
        heavy.weights[:] *= 300 / heavy.weights.max()
        body = lucene.engine_query(engine, heavy)
        features = next(iter(body.values()))
        features = features.get("query_vector") or features["terms"]["query_tokens"]
        assert 32 < max(features.values()) <= 64 and all(w > 0 and name.isdigit() for name, w in features.items())
        assert math.log2(lucene.query_scale(heavy)).is_integer()
    with pytest.raises(ValueError, match="negative"):
        lucene.engine_query(engine, index.query(words={"us": 1, "u": -1}))
    assert lucene.lucene_weights([0, 1, 1.999]).tolist() == [0, 1, 1.99609375]


@pytest.fixture
def saved(tiny_stair, tmp_path):
    tiny_stair.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "margin", "image"), [("full", 0.0, "vit"), ("full", 0.05, "cnn"), ("masked", 0.0, "swin")]
)
def test_onnx_graphs_give_the_non_zero_terms(vocab_file, captions, pixels, export, tmp_path, form, margin, image):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    stair = Stair(tiny_config(vocab_file, image, text_form=form, in_caption_margin=margin)).eval()
    stair.save_pretrained(tmp_path / "model")
    export("onnx", tmp_path / "model", tmp_path / "o")

    def run(name, count, **inputs):
        row, word, weight = runtime.InferenceSession(tmp_path / "o" / f"{name}.onnx").run(None, inputs)
        assert (weight > 0).all() and sorted(zip(row, word, strict=True)) == list(zip(row, word, strict=True))
        return sparse.csr_matrix((weight, (row, word)), shape=(count, len(stair.vocabulary))).toarray()

    for count in (1, 3, 4):  # batches of any size
        expected = stair.encode_image(pixels[:count])
        np.testing.assert_allclose(run("image", count, pixels=pixels[:count].numpy()), expected, atol=1e-5)
        ids, mask = stair.vocabulary.tokenize(captions[:count], 12)
        expected = stair.encode_text(captions[:count])
        np.testing.assert_allclose(run("text", count, ids=ids.numpy(), mask=mask.numpy()), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_sentence_transformers_loads_the_folder_and_scores_the_same(
    tiny_stair, captions, pixels, export, tmp_path, similarity
):
    encoder_of = pytest.importorskip("sentence_transformers").SparseEncoder
    tiny_stair.config.similarity = similarity
    tiny_stair.save_pretrained(tmp_path / "model")
    export("sentence-transformers", tmp_path / "model", tmp_path / "st")
    encoder = encoder_of(str(tmp_path / "st"), device="cpu", trust_remote_code=True, local_files_only=True)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    image, text = encoder.encode(pictures, batch_size=3), encoder.encode(captions, batch_size=3)
    assert image.is_sparse and text.is_sparse
    expected = tiny_stair.score(tiny_stair.encode_image(pixels), tiny_stair.encode_text(captions))
    torch.testing.assert_close(encoder.similarity(image, text).to_dense(), expected, atol=1e-5, rtol=1e-5)
    assert encoder.decode(text[0], top_k=3)[0][0] in tiny_stair.vocabulary.tokens


@pytest.mark.slow
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_mteb_measures_our_recall_of_the_exported_folder(vocab_file, export, stair, tmp_path, monkeypatch, similarity):
    """Its own evaluation of a local task, in both directions; `hit_rate` is recall with several right answers."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("sentence_transformers")
    mteb = pytest.importorskip("mteb")
    from mteb.models import SparseEncoderWrapper

    torch.manual_seed(0)
    Stair(tiny_config(vocab_file, similarity=similarity)).save_pretrained(tmp_path / "model")
    export("sentence-transformers", tmp_path / "model", tmp_path / "st")
    generator = np.random.default_rng(0)
    images = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(40)]
    orders = [generator.permutation(WORDS[:-2])[:8] for _ in range(80)]
    captions = [" ".join(word.removeprefix("##") for word in order) for order in orders]
    samples = {
        f"{n:04d}": {"png": encoded(image), "json": json.dumps({"captions": captions[n::40]}).encode()}
        for n, image in enumerate(images)
    }
    write_tar(tmp_path / "val-0000.tar", members_of(samples))
    stair("evaluate", tmp_path / "model", f"toy={tmp_path}/val-0000.tar", "--output", tmp_path / "out", "--no_probe")
    [ours] = json.loads((tmp_path / "out" / "evaluation.json").read_text())["sets"].values()
    encoder = SparseEncoderWrapper(str(tmp_path / "st"), device="cpu", trust_remote_code=True, local_files_only=True)
    # by default it asks for texts alone
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    for way in ("i2t", "t2i"):
        task = _toy_task(mteb, way, images, captions)
        [result] = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results
        [scores] = result.scores["test"]
        for k in (1, 5, 10):
            assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours["retrieval"][f"{way}/recall@{k}"], abs=1e-5)


def _toy_task(mteb, category, images, captions):
    """Image n has captions n and n + 40, as a retrieval task of mteb."""
    from datasets import Dataset
    from mteb.abstasks.retrieval import AbsTaskRetrieval

    class Toy(AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name=f"Toy{category}",
            description="generated",
            type="Any2AnyRetrieval",
            category=category,
            modalities=["image", "text"],
            dataset={"path": "local", "revision": "1"},
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="hit_rate_at_1",
        )

        def load_data(self, *_, **__):
            image_rows = Dataset.from_dict({"id": [f"i{n}" for n in range(40)], "image": images})
            text_rows = Dataset.from_dict({"id": [f"t{n}" for n in range(80)], "text": captions})
            if category == "i2t":
                queries, corpus = image_rows, text_rows
                relevant = {f"i{n}": {f"t{n}": 1, f"t{n + 40}": 1} for n in range(40)}
            else:
                queries, corpus = text_rows, image_rows
                relevant = {f"t{n}": {f"i{n % 40}": 1} for n in range(80)}
            part = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset, self.data_loaded = {"default": {"test": part}}, True

    return Toy()

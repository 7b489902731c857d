"""How to search an exported index in each engine: ids and scores of the best documents for a query of the index.

    query = index.query("a red bicycle")                       # term ids and weights
    print(sqlite_search(sqlite3.connect("photos.db"), query, 10))

Most functions search what `stair export` writes; `qdrant_shard`, `seismic_index` and `pisa_index` build their own index.
For Lucene, see examples/lucene.py. tests/test_engines.py compares hits and scores with those of the index.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from stair.export.target import opened, rows

Found = list[tuple[str, float]]


def sqlite_search(database: Any, query: Any, k: int) -> Found:
    """Searches a file of `stair export sqlite`; the table `facts` has the query for scores."""
    weights = {str(term): float(weight) for term, weight in zip(query.terms, query.weights, strict=True)}
    return database.execute(_statement(database), (json.dumps(weights), k)).fetchall()


def duckdb_search(database: Any, query: Any, k: int) -> Found:
    """Searches a file of `stair export duckdb`."""
    parameters = [query.terms.tolist(), [float(weight) for weight in query.weights], k]
    return database.execute(_statement(database), parameters).fetchall()


def postgres_search(connection: Any, query: Any, k: int) -> Found:
    """Searches a database with a script of `stair export postgres`, over psycopg. Dimensions are numbered from 1."""
    weights = ",".join(f"{term + 1}:{weight:.9g}" for term, weight in zip(query.terms, query.weights, strict=True))
    vector = f"{{{weights}}}/{query.size}"
    return connection.execute("SELECT * FROM stair.search(%s::sparsevec, %s)", (vector, k)).fetchall()


def _statement(database: Any) -> str:
    return database.execute("SELECT value FROM facts WHERE name = 'score'").fetchone()[0]


def qdrant_search(client: Any, query: Any, k: int, collection: str = "stair") -> Found:
    """Searches a collection of `stair export qdrant`."""
    from qdrant_client import models

    vector = models.SparseVector(indices=query.terms.tolist(), values=query.weights.tolist())
    points = client.query_points(collection, query=vector, using="terms", limit=k).points
    return [(point.payload["id"], point.score) for point in points]


def qdrant_shard(requests: Path, folder: Path) -> Any:
    """Builds a shard of Qdrant in this process, without a server, from a .jsonl file of `stair export qdrant`."""
    import qdrant_edge as edge

    config = edge.EdgeConfig(sparse_vectors={"terms": edge.EdgeSparseVectorParams()})
    shard = edge.EdgeShard.create(str(folder), config)
    with requests.open(encoding="utf-8") as file:
        next(file)  # the body that creates the collection
        for line in file:
            points = json.loads(line)["points"]
            vectors = [edge.SparseVector(**point["vector"]["terms"]) for point in points]
            made = [edge.Point(p["id"], {"terms": v}, p["payload"]) for p, v in zip(points, vectors, strict=True)]
            shard.update(edge.UpdateOperation.upsert_points(made))
    shard.optimize()
    return shard


def qdrant_shard_search(shard: Any, query: Any, k: int) -> Found:
    """Searches a shard of `qdrant_shard`."""
    import qdrant_edge as edge

    vector = edge.SparseVector(query.terms.tolist(), query.weights.tolist())
    points = shard.query(edge.QueryRequest(k, query=edge.Query.Nearest(vector, "terms"), with_payload=["id"]))
    return [(point.payload["id"], point.score) for point in points]


def milvus_search(client: Any, query: Any, k: int, collection: str = "stair") -> Found:
    """Searches a collection of `stair export milvus`, loaded by `client.load_collection(collection)`."""
    vector = dict(zip(query.terms.tolist(), query.weights.tolist(), strict=True))
    hits = client.search(collection, [vector], anns_field="terms", limit=k, search_params={"metric_type": "IP"})[0]
    return [(hit["id"], hit["distance"]) for hit in hits]


def seismic_index(index: Path, out: Path) -> None:
    """Writes a Seismic index (pyseismic-lsr): approximate search, float16 weights. Seismic appends its suffix to `out`."""
    from seismic import SeismicDataset, SeismicIndex, get_seismic_string

    dataset = SeismicDataset()
    for row in rows(opened(index, "Seismic")):
        terms = np.array(row.terms).astype(get_seismic_string())
        dataset.add_document(row.id, terms, np.array(row.weights, np.float32))
    SeismicIndex.build_from_dataset(dataset).save(str(out))


def seismic_search(index: Any, query: Any, k: int) -> Found:
    """Searches an index of `seismic_index` with settings for recall rather than speed."""
    from seismic import get_seismic_string

    words = query.terms.astype(get_seismic_string())
    hits = index.search("", words, query.weights, k, query_cut=len(words), heap_factor=0.0)
    return [(name, score) for _, score, name in hits]


def pisa_index(index: Path, folder: Path, steps: int = 255) -> tuple[Any, float]:
    """Builds a PISA index (pyterrier-pisa) of integer weights up to `steps`; returns it and the size of a step."""
    from pyterrier_pisa import PisaIndex

    documents = opened(index, "PISA")
    step = max(max(row.weights, default=0.0) for row in rows(documents)) / steps
    engine = PisaIndex(str(folder), text_field="toks", stemmer="none", stops="none")
    # PISA stores a name per line: names are ids as JSON
    toks = ({"docno": json.dumps(row.id), "toks": _whole(row.terms, row.weights, step)} for row in rows(documents))
    engine.toks_indexer(scale=1).index(toks)
    return engine, step


def pisa_search(engine: Any, step: float, queries: list[Any], k: int, steps: int = 255) -> list[Found]:
    """Searches an index of `pisa_index`. Query weights are integers, too: PISA repeats a term as often as its weight.

    Raises:
        ValueError: for negative weights, which PISA does not allow.
    """
    import pandas

    if any((query.weights < 0).any() for query in queries):
        raise ValueError("PISA does not allow negative query weights; use a filter to exclude words")
    query_steps = [max(query.weights, default=0.0) / steps for query in queries]
    toks = [_whole(query.terms, query.weights, s) for query, s in zip(queries, query_steps, strict=True)]
    frame = pandas.DataFrame({"qid": [str(n) for n in range(len(queries))], "query_toks": toks})
    found: list[Found] = [[] for _ in queries]
    for hit in engine.quantized(num_results=k, toks_scale=1)(frame).itertuples():
        n = int(hit.qid)
        found[n].append((json.loads(hit.docno), float(hit.score) * step * query_steps[n]))
    return found


def _whole(terms: Any, weights: Any, step: float) -> dict[str, int]:
    steps = np.rint(np.asarray(weights) / step).astype(int)
    return {str(term): int(count) for term, count in zip(terms, steps, strict=True) if count > 0}

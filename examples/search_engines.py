"""How to search an exported index in each engine: ids and scores of the best documents for a query of the index.

    query = index.query("a red bicycle")                       # term ids and weights
    print(sqlite_search(sqlite3.connect("photos.db"), query, 10))

`stair export` makes what these functions search. tests/test_export.py compares their scores with those of the index.
"""

import json
from typing import Any

Found = list[tuple[str, float]]


def sqlite_search(database: Any, query: Any, k: int) -> Found:
    """A file of `stair export sqlite`; the statement that scores is in the table `facts`."""
    weights = {str(term): float(weight) for term, weight in zip(query.terms, query.weights, strict=True)}
    return database.execute(_statement(database), (json.dumps(weights), k)).fetchall()


def duckdb_search(database: Any, query: Any, k: int) -> Found:
    """A file of `stair export duckdb`."""
    parameters = [query.terms.tolist(), [float(weight) for weight in query.weights], k]
    return database.execute(_statement(database), parameters).fetchall()


def _statement(database: Any) -> str:
    return database.execute("SELECT value FROM facts WHERE name = 'score'").fetchone()[0]


def qdrant_search(client: Any, query: Any, k: int, collection: str = "stair") -> Found:
    """A collection of `stair export qdrant`."""
    from qdrant_client import models

    vector = models.SparseVector(indices=query.terms.tolist(), values=query.weights.tolist())
    points = client.query_points(collection, query=vector, using="terms", limit=k).points
    return [(point.payload["id"], point.score) for point in points]


def milvus_search(client: Any, query: Any, k: int, collection: str = "stair") -> Found:
    """A collection of `stair export milvus`."""
    client.load_collection(collection)
    vector = dict(zip(query.terms.tolist(), query.weights.tolist(), strict=True))
    hits = client.search(collection, [vector], anns_field="terms", limit=k, search_params={"metric_type": "IP"})[0]
    return [(hit["id"], hit["distance"]) for hit in hits]


def seismic_search(index: Any, query: Any, k: int) -> Found:
    """An index of `stair export seismic`, with settings that favour recall over speed."""
    from seismic import get_seismic_string

    words = query.terms.astype(get_seismic_string())
    hits = index.search("", words, query.weights, k, query_cut=len(words), heap_factor=0.0)
    return [(name, score) for _, score, name in hits]

"""An index for engines on Lucene, Elasticsearch and OpenSearch, which store rounded weights. Tested by Lucene's arithmetic.

    python examples/lucene.py elasticsearch photos.index photos.es     # mapping.json, bulk.ndjson, query.json, vocab.txt

A feature of Elasticsearch's `sparse_vector` and OpenSearch's `rank_features` is a term frequency that holds the upper 17
bits of a float32: sign, exponent, 8 bits of mantissa. Weights are cut here already, so that a document states what the
engine will score with, and the engine's score is the dot product of what was written; cutting takes at most 2^-8 = 0.4 %
off each weight. Feature names are term ids (`7592`): tokens hold dots, capitals and characters that engines interpret.
"""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.export.target import new_target, opened, rows
from stair.index import SparseIndex
from stair.index.query import Query

MAX_QUERY_WEIGHT = 64.0  # of Lucene's FeatureField.newLinearQuery
_MIN_NORMAL = float(np.finfo(np.float32).tiny)


def lucene_weights(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What Lucene's FeatureField keeps of weights: float32 without its lower 15 bits."""
    return (np.ascontiguousarray(weights, np.float32).view(np.uint32) >> 15 << 15).view(np.float32)


def elasticsearch(index: Path, out: Path, name: str = "stair") -> None:
    """Writes what Elasticsearch (8.15 or newer) takes: mapping.json, bulk.ndjson, query.json as an example.

    Args:
        index: folder of the index.
        out: a new folder for the files.
        name: of the engine's index.
    """
    _write(opened(index, "Elasticsearch", longest_id=512), out, name, "sparse_vector", elasticsearch_query)


def opensearch(index: Path, out: Path, name: str = "stair") -> None:
    """Writes what OpenSearch (2.14 or newer) takes: mapping.json, bulk.ndjson, query.json as an example.

    Args:
        index: folder of the index.
        out: a new folder for the files.
        name: of the engine's index.
    """
    _write(opened(index, "OpenSearch", longest_id=512), out, name, "rank_features", opensearch_query)


def elasticsearch_query(query: Query) -> dict[str, Any]:
    """The query in Elasticsearch's json; its score is the dot product with the stored weights, times `query_scale`.

    Raises:
        ValueError: for negative weights, which Lucene's features do not take.
    """
    return {"sparse_vector": {"field": "terms", "query_vector": _features(query), "prune": False}}


def opensearch_query(query: Query) -> dict[str, Any]:
    """The query in OpenSearch's json; as for Elasticsearch."""
    return {"neural_sparse": {"terms": {"query_tokens": _features(query)}}}


def query_scale(query: Query) -> float:
    """What the query's weights are multiplied by to stay under Lucene's limit of 64: 1, or a smaller power of two."""
    highest = float(query.weights.max()) if len(query.weights) else 0.0
    return 1.0 if highest <= MAX_QUERY_WEIGHT else 2.0 ** math.floor(math.log2(MAX_QUERY_WEIGHT / highest))


def _features(query: Query) -> dict[str, float]:
    if (query.weights < 0).any():
        raise ValueError("Lucene's features take no negative weights; leave the words to avoid to a filter")
    scale = query_scale(query)
    return {str(w): float(x) * scale for w, x in zip(query.terms.tolist(), query.weights, strict=True)}


def _write(index: SparseIndex, out: Path, name: str, kind: str, query_of: Callable[[Query], dict[str, Any]]) -> None:
    query = {"query": query_of(index.query(like=next(index.ids)))}
    stored = {"type": "object", "enabled": False}
    fields = {"terms": {"type": kind}, "metadata": stored, "source": stored}
    meta = {"model": index.space.model, "similarity": index.space.similarity}
    mapping = {"mappings": {"_meta": meta, "dynamic": False, "properties": fields}}
    with new_target(out, folder=True) as part:
        (part / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n")
        (part / "query.json").write_text(json.dumps(query, indent=2) + "\n")
        (part / "vocab.txt").write_text("\n".join(index.space.tokens) + "\n", encoding="utf-8")
        with (part / "bulk.ndjson").open("w", encoding="utf-8") as file:
            for row in rows(index):
                weights = lucene_weights(np.array(row.weights, np.float32)).tolist()
                # a feature must be a normal, positive float
                features = {str(w): x for w, x in zip(row.terms, weights, strict=True) if x >= _MIN_NORMAL}
                file.write(json.dumps({"index": {"_index": name, "_id": row.id}}) + "\n")
                file.write(json.dumps({"terms": features, **row.fields}) + "\n")


if __name__ == "__main__":
    {"elasticsearch": elasticsearch, "opensearch": opensearch}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))

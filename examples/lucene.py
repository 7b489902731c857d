"""Elasticsearch and OpenSearch: mapping, documents and queries; and Lucene itself, the core of both, on the same files.

    python examples/lucene.py elasticsearch photos.index photos.es     # mapping.json, bulk.ndjson, query.json, vocab.txt
    python examples/lucene.py opensearch photos.index photos.os

Elasticsearch's `sparse_vector` and OpenSearch's `rank_features` store a weight as the upper 17 bits of a float32: sign,
exponent, 8 bits of mantissa. Weights are truncated before they are written, so the engine's score is the dot product of
the written weights. Truncation lowers a weight by at most 2^-8 = 0.4 %. Feature names are term ids (`7592`), because
tokens can contain dots, capitals and characters that engines interpret.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stair.export.target import new_target, opened, rows

PROGRAM = Path(__file__).with_name("Lucene.java")
MAX_QUERY_WEIGHT = 64.0  # of Lucene's FeatureField.newLinearQuery
KINDS = {"elasticsearch": "sparse_vector", "opensearch": "rank_features"}


def lucene_weights(weights: Any) -> Any:
    """Weights as Lucene's FeatureField stores them: float32 without the lower 15 bits."""
    return (np.ascontiguousarray(weights, np.float32).view(np.uint32) >> 15 << 15).view(np.float32)


def export(engine: str, index: Path, out: Path, name: str = "stair") -> None:
    """Writes mapping.json, bulk.ndjson and query.json for Elasticsearch (8.15 or newer) or OpenSearch (2.14 or newer).

    Args:
        engine: `elasticsearch` or `opensearch`.
        index: folder of the index.
        out: a new folder for the files.
        name: name of the engine's index.
    """
    documents = opened(index, engine, longest_id=512)
    query = {"query": engine_query(engine, documents.query(like=next(documents.ids)))}
    stored = {"type": "object", "enabled": False}
    fields = {"terms": {"type": KINDS[engine]}, "metadata": stored, "source": stored}
    meta = {"model": documents.space.model, "similarity": documents.space.similarity}
    mapping = {"mappings": {"_meta": meta, "dynamic": False, "properties": fields}}
    with new_target(out, folder=True) as part:
        (part / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n")
        (part / "query.json").write_text(json.dumps(query, indent=2) + "\n")
        (part / "vocab.txt").write_text("\n".join(documents.space.tokens) + "\n", encoding="utf-8")
        with (part / "bulk.ndjson").open("w", encoding="utf-8") as file:
            for row in rows(documents):
                weights = zip(row.terms, lucene_weights(row.weights).tolist(), strict=True)
                # a feature must be a normal, positive float
                features = {str(term): weight for term, weight in weights if weight >= np.finfo(np.float32).tiny}
                file.write(json.dumps({"index": {"_index": name, "_id": row.id}}) + "\n")
                file.write(json.dumps({"terms": features, **row.fields}) + "\n")


def engine_query(engine: str, query: Any) -> dict[str, Any]:
    """The query in the engine's JSON. Its score is the dot product with the stored weights, times `query_scale`."""
    if engine == "elasticsearch":
        return {"sparse_vector": {"field": "terms", "query_vector": features(query), "prune": False}}
    return {"neural_sparse": {"terms": {"query_tokens": features(query)}}}


def features(query: Any) -> dict[str, float]:
    """Scaled weights of a query by feature; ValueError for negative weights, which Lucene does not allow."""
    if (query.weights < 0).any():
        raise ValueError("Lucene does not allow negative query weights; use a filter to exclude words")
    return {str(t): float(w) * query_scale(query) for t, w in zip(query.terms.tolist(), query.weights, strict=True)}


def query_scale(query: Any) -> float:
    """Factor that keeps query weights within Lucene's limit of 64: 1, or a smaller power of two."""
    highest = float(query.weights.max()) if len(query.weights) else 0.0
    return 1.0 if highest <= MAX_QUERY_WEIGHT else 2.0 ** math.floor(math.log2(MAX_QUERY_WEIGHT / highest))


def lucene_build(jar: Path, bulk: Path, folder: Path) -> dict[str, Any]:
    """Builds a Lucene index of a bulk file in one segment; returns version, documents and seconds. Needs Java 11 or newer.

    Args:
        jar: lucene-core, such as /usr/share/java/lucene-core-8.7.0.jar of Debian's liblucene8-java.
        bulk: bulk.ndjson of `export`.
        folder: folder of Lucene's index.
    """
    return json.loads(_java(jar, "build", str(bulk), str(folder)))


def lucene_search(jar: Path, folder: Path, queries: list[Any], k: int) -> list[tuple[float, list[tuple[int, float]]]]:
    """For each query its seconds in Lucene, and the numbers and scores of the best documents."""
    lines = "".join(" ".join(f"{t}:{w}" for t, w in features(query).items()) + "\n" for query in queries)
    found = []
    for query, line in zip(queries, _java(jar, "search", str(folder), str(k), given=lines).splitlines(), strict=True):
        nanoseconds, *hits = line.split()
        scored = [(int(document), float(score)) for document, score in (hit.split(":") for hit in hits)]
        found.append((int(nanoseconds) / 1e9, [(n, score / query_scale(query)) for n, score in scored]))
    return found


def _java(jar: Path, *args: str, given: str = "") -> str:
    command = ["java", "-XX:+UseSerialGC", "-cp", str(jar), str(PROGRAM), *args]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    export(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))

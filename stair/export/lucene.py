"""Engines on Lucene: Elasticsearch, OpenSearch, Anserini (and through it PISA). They store rounded weights.

A feature of Elasticsearch's `sparse_vector` and OpenSearch's `rank_features` is a term frequency that holds the upper 17
bits of a float32: sign, exponent, 8 bits of mantissa, cut off. Weights are cut here already, so that a document says what
the engine will score with, and the engine's score is the dot product of what was written; cutting takes at most 2^-8 =
0.4 % off each weight. Anserini stores whole numbers; the error of those is written beside them.

Feature names are ids of words (`7592`): pieces hold dots, capitals lost by analysers, and other characters that engines
give a meaning, so that two of them could fall on one name.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stair.index import SparseIndex
from stair.index.scoring import Query

MAX_QUERY_WEIGHT = 64.0  # of Lucene's FeatureField.newLinearQuery
_MIN_NORMAL = float(np.finfo(np.float32).tiny)


def lucene_weights(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What Lucene's FeatureField keeps of weights: float32 without its lower 15 bits."""
    return (np.ascontiguousarray(weights, np.float32).view(np.uint32) >> 15 << 15).view(np.float32)


def elasticsearch(index: Path, out: Path, name: str = "stair") -> None:
    """Writes what Elasticsearch (8.15 or newer) takes: mapping.json, bulk.ndjson, query.json as an example.

    Args:
        index: folder of the index.
        out: folder for the three files.
        name: of the engine's index.
    """
    opened = SparseIndex.open(index)
    _write(opened, out, name, "sparse_vector", {"query": elasticsearch_query(_example(opened))})


def opensearch(index: Path, out: Path, name: str = "stair") -> None:
    """Writes what OpenSearch (2.14 or newer) takes: mapping.json, bulk.ndjson, query.json as an example.

    Args:
        index: folder of the index.
        out: folder for the three files.
        name: of the engine's index.
    """
    opened = SparseIndex.open(index)
    _write(opened, out, name, "rank_features", {"query": opensearch_query(_example(opened))})


def elasticsearch_query(query: Query) -> dict[str, Any]:
    """The query in Elasticsearch's json; its score is the dot product with the stored weights, times `query_scale`.

    Raises:
        ValueError: for negative weights, which Lucene's features do not take.
    """
    return {"sparse_vector": {"field": "words", "query_vector": _features(query), "prune": False}}


def opensearch_query(query: Query) -> dict[str, Any]:
    """The query in OpenSearch's json; as for Elasticsearch."""
    return {"neural_sparse": {"words": {"query_tokens": _features(query)}}}


def query_scale(query: Query) -> float:
    """What the query's weights are multiplied by to stay under Lucene's limit of 64: 1, or a smaller power of two."""
    highest = float(query.weights.max()) if len(query.weights) else 0.0
    return 1.0 if highest <= MAX_QUERY_WEIGHT else 2.0 ** math.floor(math.log2(MAX_QUERY_WEIGHT / highest))


def _features(query: Query) -> dict[str, float]:
    if (query.weights < 0).any():
        raise ValueError("Lucene's features take no negative weights; leave the words to avoid to a filter")
    scale = query_scale(query)
    return {str(w): float(x) * scale for w, x in zip(query.words.tolist(), query.weights, strict=True)}


def _example(index: SparseIndex) -> Query:
    name = next(index.ids, None)
    return index.query(like=name) if name is not None else Query(np.zeros(0, np.int64), np.zeros(0, np.float32), 0)


def _write(index: SparseIndex, out: Path, name: str, kind: str, query: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fields = {"words": {"type": kind}, "metadata": {"type": "object", "enabled": False}}
    meta = {"model": index.space.model, "similarity": index.space.similarity}
    mapping = {"mappings": {"_meta": meta, "dynamic": False, "properties": fields}}
    (out / "mapping.json").write_text(json.dumps(mapping, indent=2) + "\n")
    (out / "query.json").write_text(json.dumps(query, indent=2) + "\n")
    (out / "vocab.txt").write_text("\n".join(index.space.tokens) + "\n", encoding="utf-8")
    with (out / "bulk.ndjson").open("w", encoding="utf-8") as file:
        for identity, features, metadata in _documents(index):
            file.write(json.dumps({"index": {"_index": name, "_id": identity}}) + "\n")
            file.write(json.dumps({"words": features, "metadata": metadata}) + "\n")


def _documents(index: SparseIndex) -> Iterator[tuple[str, dict[str, float], dict[str, Any]]]:
    for part in index.content():
        for n, name in enumerate(part.ids):
            if not 0 < len(name.encode()) <= 512:
                raise ValueError(f"id {name[:40]!r}... has {len(name.encode())} bytes; these engines take 1 to 512")
            row = slice(part.vectors.indptr[n], part.vectors.indptr[n + 1])
            weights = lucene_weights(part.vectors.data[row])
            words = part.vectors.indices[row]
            # a feature must be a normal, positive float
            features = {str(w): float(x) for w, x in zip(words, weights, strict=True) if x >= _MIN_NORMAL}
            yield name, features, part.metadata[n] if part.metadata else {}


def anserini(index: Path, out: Path, steps: int = 255) -> None:
    """Writes Anserini's JsonVectorCollection, which it indexes with `-impact -pretokenized` (and hands on to PISA as CIFF).

    Args:
        index: folder of the index.
        out: folder; documents.jsonl, whose features are ids of words, vocab.txt with the word of each id on its line,
            and quantisation.json with the step and the largest error of a weight.
        steps: whole numbers that the heaviest weight of all is divided into.
    """
    opened = SparseIndex.open(index)
    out.mkdir(parents=True, exist_ok=True)
    heaviest = max((float(part.vectors.data.max()) for part in opened.content() if part.vectors.nnz), default=1.0)
    step = heaviest / steps
    with (out / "documents.jsonl").open("w", encoding="utf-8") as file:
        for part in opened.content():
            whole = np.rint(part.vectors.data / step).astype(int)
            for n, name in enumerate(part.ids):
                row = slice(part.vectors.indptr[n], part.vectors.indptr[n + 1])
                pairs = zip(part.vectors.indices[row].tolist(), whole[row].tolist(), strict=True)
                vector = {str(word): weight for word, weight in pairs if weight > 0}
                file.write(json.dumps({"id": name, "contents": "", "vector": vector}) + "\n")
    (out / "vocab.txt").write_text("\n".join(opened.space.tokens) + "\n", encoding="utf-8")
    facts = {"step": step, "largest_error_of_a_weight": step / 2, "steps": steps, "model": opened.space.model}
    (out / "quantisation.json").write_text(json.dumps(facts, indent=2) + "\n")

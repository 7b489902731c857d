"""The engines of benchmarks/search.py: how each is built from parts of embeddings, and how what was built is searched."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from examples import lucene
from stair.embeddings import Embeddings
from stair.index import SparseIndex
from stair.index.query import Query

V, K = 30_522, 10
STEPS = 255  # of whole-number engines: the heaviest weight of all documents
Search = Callable[[Any, Any], tuple[list[int], list[float]]]


def read_parts(data: Path) -> Iterator[Embeddings]:
    yield from Embeddings.parts(data)


def facts_of(data: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((data / "facts.json").read_text())
    return facts


def whole(weights: Any, step: float) -> Any:
    return np.maximum(np.rint(weights / step), 1).astype(np.uint32)


# --------------------------------------------------------------- engines: how to build, and how to search what was built


def stair_build(data: Path, out: Path) -> None:
    SparseIndex.build(out / "i", read_parts(data))


def stair_open(out: Path, data: Path) -> Search:
    index = SparseIndex.open(out / "i")

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        hits = index.search(sparse.csr_matrix((weights, terms, [0, len(terms)]), (1, V)), K)
        return [int(hit.id) for hit in hits], [hit.score for hit in hits]

    return search


def seismic_build(data: Path, out: Path) -> None:
    from seismic import SeismicDataset, SeismicIndex

    dataset = SeismicDataset()
    for part in read_parts(data):
        csr = part.vectors
        dataset.add_documents_by_id(list(part.ids), csr.indices.astype(np.int64), csr.data, csr.indptr.astype(np.int64))
    SeismicIndex.build_from_dataset(dataset, num_threads=1).save(str(out / "i"))


def seismic_open(out: Path, data: Path) -> Search:
    from seismic import SeismicIndex, get_seismic_string

    index = SeismicIndex.load(str(out / "i.index.seismic"))

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        words = terms.astype(get_seismic_string())
        found = index.search("0", words, weights, K, query_cut=40, heap_factor=0.7)
        return [int(row[2]) for row in found], [float(row[1]) for row in found]

    return search


def pisa_build(data: Path, out: Path) -> None:
    """As pyterrier_pisa's `PisaToksIndexer` writes it, without a dictionary for each document."""
    from pyterrier_pisa import _pisathon

    facts, columns, lengths, start = facts_of(data), [], [], 0
    for part in read_parts(data):
        steps = whole(part.vectors.data, facts["heaviest"] / STEPS)
        csc = sparse.csr_matrix((steps, part.vectors.indices, part.vectors.indptr), part.vectors.shape).tocsc()
        columns.append((csc.indptr, (csc.indices + start).astype(np.uint32), csc.data.astype(np.uint8)))
        lengths.append(np.add.reduceat(steps, part.vectors.indptr[:-1]).astype(np.uint32))
        start += len(part)
    names = [f"{v}" for v in range(V)]
    with (out / "inv.docs").open("wb") as documents, (out / "inv.freqs").open("wb") as weights:
        documents.write(np.array([1, start], np.uint32).tobytes())
        held = []
        for v in sorted(range(V), key=names.__getitem__):
            lists = [(docs[a:b], steps[a:b]) for p, docs, steps in columns for a, b in [(p[v], p[v + 1])] if b > a]
            if lists:
                held.append(names[v])
                for file, each in zip((documents, weights), zip(*lists, strict=True), strict=True):
                    joined = np.concatenate(each).astype(np.uint32)
                    file.write(np.array([len(joined)], np.uint32).tobytes() + joined.tobytes())
    (out / "inv.sizes").write_bytes(np.concatenate([[start], *lengths]).astype(np.uint32).tobytes())
    for name, lines in (("documents", map(str, range(start))), ("terms", held)):
        (out / f"fwd.{name}").write_text("".join(f"{line}\n" for line in lines))
        _pisathon.build_binlex(str(out / f"fwd.{name}"), str(out / f"fwd.{name[: -1 if name == 'terms' else 3]}lex"))
    about = {"type": "sparse_index", "format": "pisa", "package_hint": "pyterrier-pisa", "stemmer": "none"}
    (out / "pt_meta.json").write_text(json.dumps(about))
    pisa_open(out, data)(np.array([0, 1]), np.ones(2, np.float32))  # compresses the postings


def pisa_open(out: Path, data: Path, algorithm: str = "block_max_wand") -> Search:
    from pyterrier_pisa import PisaIndex, _pisathon

    index = PisaIndex(str(out), text_field="toks", stemmer="none", stops="none").quantized(num_results=K, toks_scale=1)
    texts, numbers = np.empty(K, object), [np.empty(K, kind) for kind in (np.int32, np.int32, np.float32)]

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        steps = whole(weights, weights.max() / STEPS)
        query = {str(v): float(step) for v, step in zip(terms.tolist(), steps.tolist(), strict=True)}
        options = {"k": K, "threads": 1, "query_weighted": 1, "pretokenised": True, "result_docnos": texts}
        results = dict(zip(("result_qidxs", "result_ranks", "result_scores"), numbers, strict=True))
        size = _pisathon.retrieve(index._ctxt, algorithm, [(0, query)], **options, **results)
        return [int(name) for name in texts[:size]], numbers[2][:size].tolist()

    return search


def pisa_maxscore_open(out: Path, data: Path) -> Search:
    return pisa_open(out, data, "maxscore")


def bmp_build(data: Path, out: Path) -> None:
    import bmp

    step, indexer = facts_of(data)["heaviest"] / STEPS, bmp.Indexer(str(out / "i"), 32, False)
    for part in read_parts(data):
        terms, steps = part.vectors.indices.tolist(), whole(part.vectors.data, step).tolist()
        names = [str(v) for v in range(V)]
        for n, name in enumerate(part.ids):
            row = slice(part.vectors.indptr[n], part.vectors.indptr[n + 1])
            indexer.add_document(name, {names[v]: s for v, s in zip(terms[row], steps[row], strict=True)})
    indexer.finish()


def bmp_open(out: Path, data: Path) -> Search:
    import bmp

    index = bmp.Searcher(str(out / "i"))

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        query = {str(v): float(w) for v, w in zip(terms.tolist(), weights.tolist(), strict=True)}
        names, scores = index.search(query, K, 1.0, 1.0)
        return [int(name) for name in names], list(scores)

    return search


def qdrant_build(data: Path, out: Path) -> None:
    import qdrant_edge as edge

    config = edge.EdgeConfig(sparse_vectors={"terms": edge.EdgeSparseVectorParams()})
    (out / "i").mkdir()
    shard, number = edge.EdgeShard.create(str(out / "i"), config), 0
    for part in read_parts(data):
        for start in range(0, len(part), 1_000):
            rows = part.vectors[start : start + 1_000]
            vectors = [edge.SparseVector(row.indices.tolist(), row.data.tolist()) for row in rows]
            points = [edge.Point(number + n, {"terms": vector}, {}) for n, vector in enumerate(vectors)]
            shard.update(edge.UpdateOperation.upsert_points(points))
            number += len(points)
    shard.optimize()
    shard.close()


def qdrant_open(out: Path, data: Path) -> Search:
    import qdrant_edge as edge

    shard = edge.EdgeShard.load(str(out / "i"))

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        vector = edge.SparseVector(terms.tolist(), weights.tolist())
        found = shard.query(edge.QueryRequest(K, query=edge.Query.Nearest(vector, "terms")))
        return [int(point.id) for point in found], [point.score for point in found]

    return search


def milvus_build(data: Path, out: Path) -> None:
    from pymilvus import DataType, MilvusClient

    client = MilvusClient(str(out / "i.db"))
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("terms", DataType.SPARSE_FLOAT_VECTOR)
    params = client.prepare_index_params()
    params.add_index("terms", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection("c", schema=schema, index_params=params)
    number = 0
    for part in read_parts(data):
        for start in range(0, len(part), 1_000):
            rows = [
                dict(zip(r.indices.tolist(), r.data.tolist(), strict=True)) for r in part.vectors[start : start + 1_000]
            ]
            client.insert("c", [{"id": number + n, "terms": row} for n, row in enumerate(rows)])
            number += len(rows)
    client.close()


def milvus_open(out: Path, data: Path) -> Search:
    from pymilvus import MilvusClient

    client = MilvusClient(str(out / "i.db"))
    client.load_collection("c")

    def search(terms: Any, weights: Any) -> tuple[list[int], list[float]]:
        vector = dict(zip(terms.tolist(), weights.tolist(), strict=True))
        [found] = client.search("c", [vector], anns_field="terms", limit=K, search_params={"metric_type": "IP"})
        return [hit["id"] for hit in found], [hit["distance"] for hit in found]

    return search


def _jar() -> Path:
    return next(Path("build/lucene/usr/share/java").glob("lucene-core-*.jar"))


def lucene_build(data: Path, out: Path) -> None:
    with (out / "bulk.ndjson").open("w", encoding="utf-8") as file:
        for part in read_parts(data):
            for row in part.vectors:
                weights = lucene.lucene_weights(row.data).tolist()
                features = {str(v): weight for v, weight in zip(row.indices.tolist(), weights, strict=True)}
                file.write("{}\n" + json.dumps({"terms": features}) + "\n")
    lucene.lucene_build(_jar(), out / "bulk.ndjson", out / "i")
    (out / "bulk.ndjson").unlink()


def lucene_open(out: Path, data: Path) -> Callable[[Any], tuple[list[list[int]], list[float]]]:
    """Asks all queries at once: Java measures them, after three rounds."""

    def search(rows: Any) -> tuple[list[list[int]], list[float]]:
        queries = [Query(row.indices.astype(np.int64), row.data, V) for row in rows]
        found = lucene.lucene_search(_jar(), out / "i", queries, K)
        return [[number for number, _ in hits] for _, hits in found], [seconds for seconds, _ in found]

    return search


ENGINES: dict[str, tuple[str, Callable[[Path, Path], None], Callable[[Path, Path], Any]]] = {
    "stair": ("exact", stair_build, stair_open),
    "pisa": ("exact for weights of 8 bits, block-max WAND", pisa_build, pisa_open),
    "pisa-maxscore": ("exact for weights of 8 bits, MaxScore", pisa_build, pisa_maxscore_open),
    "bmp": ("exact for weights of 8 bits", bmp_build, bmp_open),
    "qdrant": ("exact", qdrant_build, qdrant_open),
    "milvus": ("exact", milvus_build, milvus_open),
    "lucene": ("exact for the upper 17 bits of weights", lucene_build, lucene_open),
    "seismic": ("approximate", seismic_build, seismic_open),
}

"""Search engines side by side in one process: ours, scipy CSR, faiss flat and HNSW over 512 numbers, pyseismic.

    python benchmarks/search.py                                        # synthetic, 100,000 documents
    python benchmarks/search.py --documents 1000000 --queries 200
    python benchmarks/search.py --embeddings EMB --queries_from TEXTS  # what `stair embed` wrote: images, texts
    python benchmarks/crops.py 'photos/*.tar' CROPS                    # many different pictures to embed, from few

Engines take turns query by query, so that whatever else the machine does hits all of them. One thread each. CPU time and
wall-clock time are both printed: on a busy machine believe the former, and no ratio of the latter. Recall counts a hit
right if its exact score reaches the true k-th one, since ties make ids differ. The dense vectors that faiss gets are random
projections of the sparse ones: they cost what 512-d embeddings cost, and their recall means nothing, so none is given.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from stair.embeddings import Embeddings, EmbeddingSpace
from stair.index import SparseIndex

WORDS, DENSE = 30_522, 512
Found = tuple[list[int], list[float]]


def synthetic(documents: int, queries: int, nnz: int, query_nnz: int, seed: int = 0) -> tuple[Any, Any]:
    """Documents and queries of a few topics each; words of a topic, and topics, are as frequent as Zipf says."""
    generator, topics, topic_words = np.random.default_rng(seed), 2_000, 400
    words_TW = np.stack([generator.choice(WORDS, topic_words, replace=False) for _ in range(topics)])
    zipf = 1 / np.arange(1, topic_words + 1) ** 0.8
    topic_share = 1 / np.arange(1, topics + 1) ** 0.6

    def rows(count: int, length: int) -> Any:
        topic = generator.choice(topics, (count, 3), p=topic_share / topic_share.sum())
        which = generator.choice(3, (count, length), p=[0.6, 0.3, 0.1])
        place = generator.choice(topic_words, (count, length), p=zipf / zipf.sum())
        word = words_TW[np.take_along_axis(topic, which, 1), place]
        # rarer words of a topic weigh more, as they do after training with FLOPs
        weight = np.log1p(generator.gamma(2.0, 0.5, word.shape) * (1 + place / 80)).astype(np.float32)
        matrix = sparse.csr_matrix(
            (weight.ravel(), word.ravel(), np.arange(count + 1) * length), shape=(count, WORDS), dtype=np.float32
        )
        matrix.sum_duplicates()
        return matrix

    return sparse.vstack([rows(min(50_000, documents - i), nnz) for i in range(0, documents, 50_000)], "csr"), rows(
        queries, query_nnz
    )


def engines(
    vectors: Any, space: EmbeddingSpace, k: int, folder: Path, expected: list[str]
) -> dict[str, dict[str, Any]]:
    """For each engine `search` (a prepared query to ids and scores), `prepare`, seconds to build, bytes a document."""
    count, made = vectors.shape[0], dict[str, dict[str, Any]]()
    projection_VD = np.random.default_rng(1).normal(0, DENSE**-0.5, (vectors.shape[1], DENSE)).astype(np.float32)
    dense_ND = np.asarray(vectors @ projection_VD) if any("faiss" in name for name in expected) else None

    def add(name: str, build: Callable[[], Any], size: Callable[[Any], float], prepare: Any, search: Any) -> None:
        if name in expected:
            start = time.process_time()
            engine = build()
            seconds = time.process_time() - start
            made[name] = {
                "seconds": seconds,
                "bytes": size(engine) / count,
                "prepare": prepare(engine),
                "search": search(engine),
            }

    add(
        "stair",
        lambda: SparseIndex.build(folder / "index", Embeddings(vectors, [str(n) for n in range(count)], space)),
        lambda index: index.facts["bytes"],
        lambda index: index.query,
        lambda index: lambda query: _pairs(index.top(query, k)),
    )
    add(
        "scipy csr",
        lambda: vectors,
        lambda csr: csr.data.nbytes + csr.indices.nbytes + csr.indptr.nbytes,
        lambda csr: lambda row: row.toarray().ravel(),
        lambda csr: lambda query_V: _best(csr @ query_V, k),
    )
    add(
        "faiss flat 512-d",
        lambda: _faiss(dense_ND, "flat"),
        lambda index: DENSE * 4 * count,
        lambda index: lambda row: np.asarray(row @ projection_VD),
        lambda index: lambda query: _from_faiss(index.search(query, k)),
    )
    add(
        "faiss hnsw 512-d",
        lambda: _faiss(dense_ND, "hnsw"),
        lambda index: (DENSE * 4 + 2 * 32 * 4) * count,
        lambda index: lambda row: np.asarray(row @ projection_VD),
        lambda index: lambda query: _from_faiss(index.search(query, k)),
    )
    add(
        "seismic",
        lambda: _seismic(vectors),
        lambda index: float("nan"),
        _seismic_query,
        lambda index: _seismic_search(index, k),
    )
    return made


def _warm_up(folder: Path, space: EmbeddingSpace) -> None:
    """Imports and compiles what the first index and search of a process import and compile: up to two seconds."""
    index = SparseIndex.build(
        folder / "first", Embeddings(sparse.eye(2, len(space.tokens), format="csr"), ["0", "1"], space)
    )
    index.top(index.query(like="0"), 1)


def _pairs(hits: Any) -> Found:
    return [int(hit.id) for hit in hits], [hit.score for hit in hits]


def _best(score_N: Any, k: int) -> Found:
    top = np.argpartition(-score_N, k - 1)[:k]
    top = top[np.argsort(-score_N[top])]
    return top.tolist(), score_N[top].tolist()


def _faiss(dense_ND: Any, kind: str) -> Any:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.IndexFlatIP(DENSE) if kind == "flat" else faiss.IndexHNSWFlat(DENSE, 32, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(dense_ND))
    if kind == "hnsw":
        index.hnsw.efSearch = 64
    return index


def _from_faiss(result: Any) -> Found:
    return result[1][0].tolist(), result[0][0].tolist()


def _seismic(vectors: Any) -> Any:
    from seismic import SeismicDataset, SeismicIndex, get_seismic_string

    kind, dataset = get_seismic_string(), SeismicDataset()
    for n in range(vectors.shape[0]):
        row = vectors[n]
        dataset.add_document(str(n), row.indices.astype(kind), row.data)
    return SeismicIndex.build_from_dataset(dataset)


def _seismic_query(index: Any) -> Callable[[Any], Any]:
    from seismic import get_seismic_string

    return lambda row: (row.indices.astype(get_seismic_string()), row.data)


def _seismic_search(index: Any, k: int) -> Callable[[Any], Found]:
    def search(query: Any) -> Found:
        found = index.search("0", query[0], query[1], k, query_cut=40, heap_factor=0.7)
        return [int(row[2]) for row in found], [float(row[1]) for row in found]

    return search


def measure(made: dict[str, dict[str, Any]], vectors: Any, queries: Any, k: int) -> list[dict[str, Any]]:
    """Times every engine on every query, in turns, and checks what it found."""
    cpu, wall = ({name: list[float]() for name in made} for _ in range(2))
    right: dict[str, list[float]] = {name: [] for name in made}
    exact = vectors.astype(np.float64)
    for n in range(queries.shape[0]):
        exact_N = exact @ queries[n].toarray().ravel().astype(np.float64)
        true = np.sort(exact_N)[::-1][:k]
        bar = true[true > 0][-1] * (1 - 1e-6) if (true > 0).any() else np.inf
        for name, engine in made.items():
            prepared = engine["prepare"](queries[n])
            engine["search"](prepared)  # once unmeasured: every engine finds its own data in the cache
            began, started = time.process_time(), time.perf_counter()
            ids, _ = engine["search"](prepared)
            cpu[name].append(time.process_time() - began)
            wall[name].append(time.perf_counter() - started)
            right[name].append(float((exact_N[ids] >= bar).sum()) / max(1, (true > 0).sum()))
    base = np.median(cpu["scipy csr"]) if "scipy csr" in cpu else float("nan")
    return [
        {
            "engine": name,
            "p50_cpu_ms": 1e3 * np.median(cpu[name]),
            "p99_cpu_ms": 1e3 * np.percentile(cpu[name], 99),
            "p50_wall_ms": 1e3 * np.median(wall[name]),
            "p99_wall_ms": 1e3 * np.percentile(wall[name], 99),
            "of_scipy": np.median(cpu[name]) / base,
            "recall": float("nan") if "faiss" in name else float(np.mean(right[name])),
            "docs_per_s": vectors.shape[0] / max(engine["seconds"], 1e-9),
            "bytes_per_doc": engine["bytes"],
        }
        for name, engine in made.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--embeddings", help="what `stair embed` wrote; synthetic ones where left out")
    parser.add_argument(
        "--queries_from", help="embeddings whose rows are the queries; the documents' own where left out"
    )
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--nnz", type=int, default=138)
    parser.add_argument("--query_nnz", type=int, default=40)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--engines", default="stair,scipy csr,faiss flat 512-d,faiss hnsw 512-d,seismic")
    parser.add_argument("--json", help="append the rows to this file, one JSON object a line")
    options = parser.parse_args()
    if options.embeddings:
        loaded = Embeddings.load(options.embeddings)
        asked = Embeddings.load(options.queries_from) if options.queries_from else loaded
        # compared by dot product here, so that every engine gets the same comparable rows
        space = EmbeddingSpace(loaded.space.model, "dot", loaded.space.tokens)
        vectors, queries = (sparse.csr_matrix(e.space.comparable(e.vectors)) for e in (loaded, asked))
        repeat = -(-options.documents // vectors.shape[0])
        vectors = sparse.vstack([vectors] * repeat, "csr")[: options.documents]
        print(f"real embeddings, {len(loaded)} of them, repeated {repeat} times")
    else:
        space = EmbeddingSpace("synthetic", "dot", tuple(f"w{v}" for v in range(WORDS)))
        vectors, queries = synthetic(options.documents, options.queries, options.nnz, options.query_nnz)
    queries = queries[: options.queries]
    folder = Path(tempfile.mkdtemp(prefix="search-"))
    try:
        _warm_up(folder, space)
        made = engines(vectors, space, options.k, folder, options.engines.split(","))
        rows = measure(made, vectors, queries, options.k)
    finally:
        shutil.rmtree(folder)
    bounds = pairwise(vectors.indptr.tolist())
    facts = {
        "documents": vectors.shape[0],
        "distinct": len({vectors.indices[a:b].tobytes() + vectors.data[a:b].tobytes() for a, b in bounds}),
        "nnz": vectors.nnz / vectors.shape[0],
        "queries": queries.shape[0],
        "query_nnz": queries.nnz / queries.shape[0],
        "k": options.k,
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }
    print(json.dumps(facts))
    print(f"{'engine':18}" + "".join(f"{key:>15}" for key in rows[0] if key != "engine"))
    for row in rows:
        print(f"{row['engine']:18}" + "".join(f"{value:15.4g}" for key, value in row.items() if key != "engine"))
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps({**facts, **row}) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main())

"""Search engines side by side on synthetic embeddings, each in processes of its own, on one core.

    python -m benchmarks.search make DATA --documents 1000000                # parts of documents, queries, true hits
    python -m benchmarks.search run DATA --engines stair,seismic,pisa,bmp    # build and search; results are added to DATA
    python -m benchmarks.search table DATA                                   # as Markdown

Needs the extra `engines`, `pip install bmp`, and for Lucene Java and `.ci/lucene`. Recall counts a hit as right if its
true score reaches the true tenth one, since ties make ids differ; true scores are those of scipy in float64, of the first
queries. Every query is searched once before it is measured. Times are CPU times of the process, but wall-clock times of
Lucene and Milvus; those of all are in the results. On a busy machine caches are cold and both are longer: compare engines
of one run. Peak memory is `ru_maxrss`, which counts the pages of mapped files.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from benchmarks.search_engines import ENGINES, K, V, facts_of, read_parts
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.index import SparseIndex

PART, TRUE = 250_000, 50


# ------------------------------------------------------------------ data


def generate(documents: int, queries: int, lengths: tuple[int, int], frequent: float) -> Iterator[Any]:
    """The queries, then parts of the documents: rows of a few topics; terms of a topic, and topics, as Zipf says.

    Args:
        documents: how many.
        queries: how many.
        lengths: draws of a document and of a query; equal draws are one term.
        frequent: share of draws from all terms, as Zipf says, instead of a topic: then some terms are in most documents.
    """
    generator = np.random.default_rng(0)
    topic_TW = np.stack([generator.choice(V, 400, replace=False) for _ in range(2_000)])
    common = generator.permutation(V)[:6_000]
    tables = [_table(size, exponent) for size, exponent in ((400, 0.8), (2_000, 0.6), (6_000, 1.0))]
    gamma = generator.gamma(2.0, 0.5, 1 << 20).astype(np.float32)

    def rows(count: int, length: int) -> Any:
        place, topic, overall = (table[generator.integers(0, len(table), (count, length))] for table in tables)
        which = np.searchsorted([0.6, 0.9], generator.random((count, length)))  # most terms are of the first topic
        term = topic_TW[np.take_along_axis(topic[:, :3], which, 1), place]
        if frequent:
            term = np.where(generator.random((count, length)) < frequent, common[overall], term)
        # rarer terms of a topic weigh more, as they do after training with FLOPs
        weight = np.log1p(gamma[generator.integers(0, len(gamma), term.shape)] * (1 + place / 80))
        parts = weight.ravel().astype(np.float32), term.ravel(), np.arange(count + 1) * length
        matrix = sparse.csr_matrix(parts, shape=(count, V))
        matrix.sum_duplicates()
        return matrix

    yield rows(queries, lengths[1])
    for start in range(0, documents, PART):
        yield rows(min(PART, documents - start), lengths[0])


def _table(size: int, exponent: float) -> Any:
    """65,536 draws, as frequent as Zipf says."""
    share = 1 / np.arange(1, size + 1) ** exponent
    return np.searchsorted(np.cumsum(share / share.sum()), (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.int32)


def make(data: Path, documents: int, queries: int, lengths: tuple[int, int], frequent: float) -> None:
    """Writes queries, parts, and the true scores of the best hits of the first queries."""
    space = EmbeddingSpace("synthetic", "dot", tuple(f"w{v}" for v in range(V)))
    data.mkdir(parents=True)
    drawn = generate(documents, queries, lengths, frequent)
    asked = next(drawn)
    sparse.save_npz(data / "queries.npz", asked, compressed=False)
    dense_VQ = asked[:TRUE].toarray().T.astype(np.float64)
    best, start, nonzeros, heaviest = np.zeros((TRUE, K)), 0, 0, 0.0
    for number, part in enumerate(drawn):
        ids = [str(n) for n in range(start, start + part.shape[0])]
        Embeddings(part, ids, space).save(data / f"part-{number:03}.safetensors")
        scores = (part.astype(np.float64) @ dense_VQ).T
        best = -np.sort(-np.concatenate([best, -np.partition(-scores, K, axis=1)[:, :K]], 1), 1)[:, :K]
        start, nonzeros, heaviest = start + part.shape[0], nonzeros + part.nnz, max(heaviest, float(part.data.max()))
    np.save(data / "true.npy", best)
    facts = {"documents": start, "terms a document": nonzeros / start, "terms a query": asked.nnz / queries}
    facts |= {"queries": queries, "frequent": frequent, "heaviest": heaviest}
    (data / "facts.json").write_text(json.dumps(facts))


# ----------------------------------------------------------------- measure


def step(engine: str, phase: str, data: Path) -> dict[str, Any]:
    """Builds or searches, in this process."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    out, (_, build, opened) = data / engine.split("-")[0], ENGINES[engine]
    result: dict[str, Any] = {}
    if phase == "build":
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        start, wall = sum(os.times()[:4]), time.perf_counter()  # with Java
        build(data, out)
        result["build_s"], result["build_wall_s"] = sum(os.times()[:4]) - start, time.perf_counter() - wall
        result["bytes"] = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        return result | {"build_memory": _memory()}
    search, queries = opened(out, data), sparse.load_npz(data / "queries.npz")
    rows = [(row.indices.astype(np.int64), row.data) for row in queries]
    if engine == "lucene":
        found, wall_times = search(queries)
    else:
        found, cpu, wall_times = [search(*row)[0] for row in rows], [], []
        for row in rows:
            start, wall = time.process_time(), time.perf_counter()
            search(*row)
            cpu.append(time.process_time() - start)
            wall_times.append(time.perf_counter() - wall)
    if engine in ("lucene", "milvus"):  # which work in another process
        cpu = wall_times
    for name, times in (("", cpu), ("wall_", wall_times)):
        result |= {f"{name}p50_ms": 1e3 * np.median(times), f"{name}p99_ms": 1e3 * np.percentile(times, 99)}
    result["mean_ms"] = 1e3 * np.mean(cpu)
    if engine == "stair":
        index = SparseIndex.open(out / "i")
        index.search_many(queries, K)
        start = time.process_time()
        index.search_many(queries, K)
        result["many_ms"] = 1e3 * (time.process_time() - start) / len(rows)
    result["search_memory"] = _memory()
    return result | {"recall": recall(data, queries, found[:TRUE])}


def _memory() -> int:
    """Peak bytes of this process, or of Java."""
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) << 10


def recall(data: Path, queries: Any, found: list[list[int]]) -> float:
    """Share of the true ten hits, by the true scores of what was found."""
    best, right, start = np.load(data / "true.npy"), np.zeros(len(found)), 0
    dense_VQ = queries[: len(found)].toarray().T.astype(np.float64)
    for part in read_parts(data):
        for q, ids in enumerate(found):
            here = [n - start for n in ids if start <= n < start + len(part)]
            if here:
                scores = part.vectors[here].astype(np.float64) @ dense_VQ[:, q]
                right[q] += (scores >= best[q, -1] * (1 - 1e-6)).sum()
        start += len(part)
    return float(right.mean() / K)


def run(data: Path, engines: list[str], limit: int) -> None:
    """Each engine and phase in a process; a result, or why there is none, is a line of results.jsonl."""
    for engine in engines:
        result: dict[str, Any] = {"engine": engine, "load": os.getloadavg()[0]}
        built = engine == "pisa-maxscore"  # of what was built for `pisa`
        for phase in ("search",) if built else ("build", "search"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.search",
                "step",
                str(data),
                "--engines",
                engine,
                "--phase",
                phase,
            ]
            one = {name: "1" for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "NUMBA_NUM_THREADS")}
            try:
                done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True, timeout=limit)
                if done.returncode:
                    raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
                result |= json.loads(done.stdout.splitlines()[-1])
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                result["failed"] = (
                    f"{phase}: {str(error)[-300:]}" if isinstance(error, RuntimeError) else f"{phase}: {limit} s"
                )
                break
        print(json.dumps(result), flush=True)
        with (data / "results.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")


def table(data: Path) -> None:
    """The last result of each engine, as a section of a record."""
    facts, rows = facts_of(data), {}
    for line in (data / "results.jsonl").read_text().splitlines():
        rows[json.loads(line)["engine"]] = json.loads(line)
    documents = facts.pop("documents")
    print(f"## {documents:,} documents\n\n{', '.join(f'{value:,.4g} {name}' for name, value in facts.items())}\n")
    columns = (
        "Engine | Scores | p50 ms | p99 ms | Recall@10 | Build s | Bytes per document | Memory: build, search | Load"
    )
    print(f"| {columns} |\n|{'---|' * (columns.count('|') + 1)}")
    for engine, row in rows.items():
        if "failed" in row:
            print(f"| {engine} | {ENGINES[engine][0]} | – | – | – | {row['failed']} | – | – | – |")
            continue
        built = rows["pisa"] if engine == "pisa-maxscore" else row
        memory = ", ".join(f"{each / 2**30:.2f} GiB" for each in (built["build_memory"], row["search_memory"]))
        times = f"{row['p50_ms']:.2f} | {row['p99_ms']:.2f} | {row['recall']:.3f} | {built['build_s']:,.0f}"
        size = f"{built['bytes'] / documents:,.0f} | {memory} | {row['load']:.1f}"
        print(f"| {engine} | {ENGINES[engine][0]} | {times} | {size} |")
    many = rows["stair"]
    print(f"\nstair, mean: `search` {many['mean_ms']:.3f} ms, `search_many` {many['many_ms']:.3f} ms a query.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=["make", "run", "step", "table"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 30), help="draws of a document, and of a query")
    parser.add_argument("--frequent", type=float, default=0.0, help="share of draws from all terms instead of a topic")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--phase", default="")
    parser.add_argument("--limit", type=int, default=600, help="seconds of a phase at most")
    options = parser.parse_args()
    if options.command == "make":
        make(options.data, options.documents, options.queries, tuple(options.lengths), options.frequent)
    elif options.command == "run":
        run(options.data, options.engines.split(","), options.limit)
    elif options.command == "step":
        print(json.dumps(step(options.engines, options.phase, options.data)))
    else:
        table(options.data)


if __name__ == "__main__":
    main()

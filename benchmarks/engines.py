"""SparseIndex and other search engines on one core: the same documents and queries, hits, scores, bytes and times.

    pip install -e '.[engines]' && .ci/lucene
    python -m benchmarks.engines 100000 100 benchmarks/results/engines_100k_MACHINE_DATE.md [ENGINE ...]

The lines of the engines, of all by default, are added to the record. Engines are filled by `stair export` and examples/,
one after the other, and asked one query at a time. A hit is right if its exact score, in float64, reaches the exact tenth
one. The score difference is relative to the exact score.
"""

import os
import shutil
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from scipy import sparse

from benchmarks.search import generate
from benchmarks.search_engines import V
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.index import SparseIndex
from tests.support import engines

STORED = {"Lucene": "float32, upper 17 bits", "PISA": "255 steps", "Seismic": "float16"}
HEADS = ["Engine", "Weights", "Right hits", "Largest score difference", "Build s", "MB", "p50 ms", "p99 ms"]


def main(count: int, asked: int, record: Path, *chosen: str) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for servers too
    wanted, *parts = generate(count, asked, (138, 40), 0.0)
    vectors = sparse.vstack(parts, "csr")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{v}" for v in range(4, V))]
    space, exact = EmbeddingSpace("m" * 64, "dot", tuple(names)), vectors.astype(np.float64)
    with tempfile.TemporaryDirectory() as folder, record.open("a", encoding="utf-8") as file:
        index = SparseIndex.build(Path(folder) / "index", Embeddings(vectors, [str(n) for n in range(count)], space))
        queries = [index.query(row) for row in wanted]
        index.top(queries[0], engines.K)  # compiles
        write = partial(print, file=file, flush=True)
        if not file.tell():
            write(f"# Search engines, {count:,} synthetic documents\n")
            write(f"{date.today()}, one core of {_processor()}, load {os.getloadavg()[0]:.1f}. Documents have")
            write(f"{vectors.nnz / count:.0f} terms, queries {wanted.nnz / asked:.0f}. {asked} queries, 10 hits.\n")
            write(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
        makers = {name: engine[0] for name, engine in engines.ENGINES.items() if not engines.missing(name)}
        makers = {"SparseIndex": engines.sparse_index, **makers, "Seismic": engines.seismic}
        for n, name in enumerate(chosen or makers):
            own = Path(folder) / str(n)
            own.mkdir()
            start = time.perf_counter()
            with makers[name](index.folder, own) as (search, size):
                seconds = time.perf_counter() - start
                search(queries[:3])
                found = search(queries)
            shutil.rmtree(own, ignore_errors=True)
            right, most = _compare(exact, wanted, [hits for _, hits in found])
            p50, p99 = np.percentile([1e3 * taken for taken, _ in found], (50, 99))
            figures = f"{right:.1%} | {most:.0e} | {seconds:.1f} | {size / 1e6:.0f} | {p50:.2f} | {p99:.2f}"
            write(f"| {name} | {STORED.get(name, 'float32')} | {figures} |")


def _compare(exact, wanted, found) -> tuple[float, float]:
    right, most = [], 0.0
    for row, hits in zip(wanted, found, strict=True):
        exact_N = exact @ row.toarray().ravel().astype(np.float64)
        tenth = np.sort(exact_N)[-engines.K]
        most = max([most, *(abs(score / exact_N[int(name)] - 1) for name, score in hits)])
        right.append(sum(exact_N[int(name)] >= tenth * (1 - 1e-6) for name, _ in hits) / engines.K)
    return float(np.mean(right)), most


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])

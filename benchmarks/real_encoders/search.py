"""Time and size of a search of the training images by texts, all variants side by side in one process.

N images, P positions, T tokens, V terms, codes, or the width of a dense embedding, E of late interaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits
from torch import Tensor

from benchmarks.ratios import interleaved
from benchmarks.real_encoders.embedders import Embedder
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.index import SparseIndex

_QUERIES, _HITS = 200, 10


@torch.inference_mode()
def save(path: Path, embedder: Embedder, queries: str) -> None:
    """Keeps the images of the training set, and the first texts of another one."""
    images, texts = embedder.images("train"), embedder.texts(queries)[:_QUERIES]
    if embedder.columns != "dense":
        images = images.to_sparse_csr()
    torch.save({"images": images, "texts": texts, "similarity": embedder.similarity}, path)


def table(files: Mapping[str, Path]) -> list[str]:
    """Rows of Markdown for what `save` has kept of each variant."""
    with TemporaryDirectory() as folder, threadpool_limits(1):
        found = {name: torch.load(path, weights_only=True) for name, path in files.items()}
        engines = {name: _engine(each, Path(folder) / str(n)) for n, (name, each) in enumerate(found.items())}
        turns = {name: _turn(search, found[name]["texts"]) for name, (_, search) in engines.items()}
        seconds = interleaved(turns, _QUERIES, torch.device("cpu"))
    count = len(next(iter(found.values()))["images"]) if found else 0
    lines = [
        f"## Search: {count} training images, one text at a time, one thread, CPU time\n",
        "| variant | bytes an image | ms, median | ms, 95 % |",
        "|---|---|---|---|",
    ]
    for name, (size, _) in engines.items():
        median, high = np.percentile(seconds[name], [50, 95]) * 1000
        lines.append(f"| {name} | {size / count:.0f} | {median:.3f} | {high:.3f} |")
    return [*lines, ""]


def _turn(search: Callable[[np.ndarray], object], texts: Tensor) -> Callable[[], object]:
    queries = cycle(texts.float().numpy())
    return lambda: search(next(queries))


def _engine(found: Mapping[str, object], folder: Path) -> tuple[int, Callable[[np.ndarray], object]]:
    """Bytes, and a search of the ten best images: `SparseIndex`, or products with all fp32 rows in memory."""
    images = found["images"]
    if images.layout == torch.sparse_csr:
        parts = (images.values().numpy(), images.col_indices().numpy(), images.crow_indices().numpy())
        space = EmbeddingSpace("benchmark", found["similarity"], tuple(map(str, range(images.shape[1]))))
        vectors = sparse.csr_matrix(parts, shape=tuple(images.shape))
        index = SparseIndex.build(folder, Embeddings(vectors, [str(n) for n in range(len(images))], space))
        return index.facts["bytes"], lambda query_V: index.search(query_V, _HITS)
    rows = images.reshape(-1, images.shape[-1]).numpy()
    if images.ndim == 2:
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return rows.nbytes, lambda query_V: _best(rows @ query_V)
    positions = images.shape[1]

    def late(query_TE: np.ndarray) -> np.ndarray:
        query_TE = query_TE[query_TE.any(1)]  # without padding
        return _best((rows @ query_TE.T).reshape(-1, positions, len(query_TE)).max(1).sum(1))

    return rows.nbytes, late


def _best(score_N: np.ndarray) -> np.ndarray:
    best = min(_HITS, len(score_N))
    return np.argpartition(-score_N, best - 1)[:best]

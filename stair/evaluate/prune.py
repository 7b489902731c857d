"""What sparsity buys: recall of pruned embeddings, bytes of an index, time of a search.

N images, C captions, V terms (or the width of a dense embedding).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from stair.ranking import SparseRows, retrieval_figures

_QUERIES, _HITS = 200, 10


def curve(
    images: SparseRows,
    texts: SparseRows,
    owner: torch.Tensor,
    similarity: str,
    most: Sequence[int] = (8, 16, 32, 64, 128, 256, 512),
    shares: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
) -> list[dict[str, Any]]:
    """Recall when both sides keep only their heaviest terms, and when images alone do, as in an index.

    Args:
        images, texts: weights as the model gives them. For `cosine` they are normalised after pruning.
        owner: (C,) int64, the image of each caption.
        similarity: `dot` or `cosine`.
        most, shares: cuts: terms to keep of each embedding, and shares of its heaviest term below which terms go.

    Returns:
        A row for each cut, the first without one: `kept`, pruned `side` (`both` or `images`), mean active terms of `images`
        and `texts`, `i2t` and `t2i` recall@1, `index_bytes` of the images.
    """
    longest = {"images": int(images.entries.max()) if len(images.entries) else 0}
    longest["both"] = max(longest["images"], int(texts.entries.max()) if len(texts.entries) else 0)
    cuts: list[tuple[str, str, Callable[[SparseRows], SparseRows]]] = [("all", "both", lambda rows: rows)]
    for side in ("both", "images"):
        cuts += [(f"top {k}", side, partial(SparseRows.largest, k=k)) for k in most if k < longest[side]]
    cuts += [(f"≥ {share:g} of the heaviest", "both", partial(SparseRows.above, share=share)) for share in shares]
    rows = []
    for kept, side, prune in cuts:
        pruned = prune(images), prune(texts) if side == "both" else texts
        pair = tuple(each.unit() for each in pruned) if similarity == "cosine" else pruned
        figures = retrieval_figures(pair[0], pair[1], owner, (1,))
        rows.append(
            {
                "kept": kept,
                "side": side,
                "images": float(pruned[0].entries.float().mean()),
                "texts": float(pruned[1].entries.float().mean()),
                "i2t": float(figures["i2t/recall@1"]),
                "t2i": float(figures["t2i/recall@1"]),
                "index_bytes": index_bytes(pruned[0]),
            }
        )
    return rows


def index_bytes(rows: SparseRows) -> int:
    """Bytes of an uncompressed inverted index: 8 for each entry (row and weight), 8 for each term in use."""
    return 8 * len(rows.column) + 8 * len(rows.column.unique())


def cost(images: SparseRows, texts: SparseRows, width: int, sparse: bool) -> dict[str, float]:
    """What an exact search of the ten best images costs, by one text at a time, on one thread.

    A sparse model is searched through inverted lists (scipy), a dense one by a matrix-vector product.

    Returns:
        `index_bytes`, and over at most 200 texts `search_ms_p50` and `search_ms_p95`.
    """
    gallery = images.scipy(width)
    lists = gallery.T.tocsr() if sparse else gallery.toarray()
    seconds = []
    with threadpool_limits(1):
        for query in texts.scipy(width)[:_QUERIES]:
            full_V = query.toarray()[0]
            start = time.perf_counter()
            score_N = query.data @ lists[query.indices] if sparse else lists @ full_V
            best = min(_HITS, len(score_N))
            np.argpartition(-score_N, best - 1)[:best]
            seconds.append(time.perf_counter() - start)
    times = {f"search_ms_p{q}": 1000 * float(np.percentile(seconds, q)) for q in ((50, 95) if seconds else ())}
    return {"index_bytes": float(index_bytes(images) if sparse else lists.nbytes), **times}

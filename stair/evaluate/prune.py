"""What sparsity buys: recall against size when embeddings are pruned, the bytes of an index, the time of a search.

N images, C captions, V words (or the width of a dense embedding).
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from stair.ranking import SparseRows, retrieval_figures

_SEARCHES = 200
_FOUND = 10


def curve(
    images: SparseRows,
    texts: SparseRows,
    owner: torch.Tensor,
    similarity: str,
    most: Sequence[int],
    shares: Sequence[float],
) -> list[dict[str, Any]]:
    """Recall when both sides keep only their heaviest words, and when images alone do, as in an index asked by whole texts.

    Args:
        images, texts: weights as the model gives them. With `cosine` they are brought to length 1 after pruning.
        owner: (C,) int64, the image of each caption.
        similarity: `dot` or `cosine`.
        most: keep so many words of each embedding at most.
        shares: keep words of at least this share of the embedding's heaviest.

    Returns:
        A line each: `kept`, whose words were cut (`side`: `both` or `images`), mean active terms of `images` and `texts`,
        `i2t` and `t2i` recall@1, `index_bytes` of the images. The first line is of everything.
    """
    longest, longest_text = (int(rows.entries.max()) if len(rows.entries) else 0 for rows in (images, texts))

    def cuts() -> Iterator[tuple[str, str, SparseRows, SparseRows]]:  # one at a time in memory
        yield "all", "both", images, texts
        for k in most:
            if k < max(longest, longest_text):
                yield f"top {k}", "both", images.largest(k), texts.largest(k)
        for k in most:
            if k < longest:
                yield f"top {k}", "images", images.largest(k), texts
        for share in shares:
            yield f"≥ {share:g} of the heaviest", "both", images.above(share), texts.above(share)

    lines = []
    for kept, side, some_images, some_texts in cuts():
        pair = (some_images.unit(), some_texts.unit()) if similarity == "cosine" else (some_images, some_texts)
        figures = retrieval_figures(*pair, owner, (1,))
        lines.append(
            {
                "kept": kept,
                "side": side,
                "images": float(some_images.entries.float().mean()),
                "texts": float(some_texts.entries.float().mean()),
                "i2t": float(figures["i2t/recall@1"]),
                "t2i": float(figures["t2i/recall@1"]),
                "index_bytes": index_bytes(some_images),
            }
        )
    return lines


def index_bytes(rows: SparseRows) -> int:
    """Bytes of an inverted index without compression: 4 for the row and 4 for the weight of every entry, 8 for the start
    of each list (as many lists as there are words in use)."""
    return 8 * len(rows.column) + 8 * len(rows.column.unique())


def cost(images: SparseRows, texts: SparseRows, width: int, sparse: bool) -> dict[str, float]:
    """What searching the images costs, by texts one at a time on one thread: exact, ten best.

    A sparse model is searched through its inverted lists (scipy), a dense one by a matrix-vector product.

    Returns:
        `index_bytes`, and `search_ms_p50`, `search_ms_p95`, over at most 200 searches, none left out.
    """
    gallery = images.scipy(width)
    lists = gallery.T.tocsr() if sparse else gallery.toarray()
    seconds = []
    with threadpool_limits(1):
        for query in texts.scipy(width)[:_SEARCHES]:
            full_V = query.toarray()[0]
            clock = time.perf_counter()
            score_N = query.data @ lists[query.indices] if sparse else lists @ full_V
            best = min(_FOUND, len(score_N))
            np.argpartition(-score_N, best - 1)[:best]
            seconds.append(time.perf_counter() - clock)
    found = {"index_bytes": float(index_bytes(images) if sparse else lists.nbytes)}
    for q in (50, 95) if seconds else ():
        found[f"search_ms_p{q}"] = 1000 * float(np.percentile(seconds, q))
    return found

"""A folder that any static host serves: search in the browser, which fetches only the byte ranges that a query needs.

All numbers are little-endian; N documents, V terms. stair/pages/static.js reads:

`terms.bin`       `TERM` for each term, which states where its layers end in `postings.bin`
`postings.bin`    the documents of a term, heaviest first, in layers that double in size. A layer is float32 `lowest` and
                  `step`, then bytes q: a weight is at most `lowest + q · step`; then gaps of ascending document numbers, of
                  7 bits a byte, the last byte of each below 128
`places.bin`      N + 1 pairs of float64: where each document begins in `documents.bin` and in `thumbnails.bin`
`documents.bin`   of each, uint32 count, its terms (uint32, ascending), its weights (float32), JSON of id and metadata
`thumbnails.bin`  JPEG files; of 0 bytes where a document has no picture
`lookup.bin`      `EXPANSION` uint32 terms, then as many float32 weights, for each token; only with a model
"""

import json
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import sparse

from stair.data.items import picture_bytes
from stair.errors import SettingError
from stair.export.target import Row, batches, new_target, opened, rows
from stair.files import write_json, write_text
from stair.images import decode_image
from stair.index import SparseIndex
from stair.model import Stair
from stair.pages import search_page
from stair.vocabulary import Vocabulary

FIRST, LAYERS = 1024, 14  # postings of the first layer; layers of a term, the last one of any size
TERM = np.dtype([("start", "<f8"), ("count", "<u4"), ("most", "<f4"), ("ends", "<u4", LAYERS)])
EXPANSION = 32
_SIDE = 192
_POSTINGS = 1 << 24  # sorted at a time; bounds the memory


def web(index: Path, out: Path, model: str | None = None, pictures: Path | None = None) -> None:
    """Writes a folder with a search page that needs no server, only a host that answers `Range` requests.

    Args:
        index: folder of the index.
        out: a new folder.
        model: folder or hub name of the index's model, to expand the tokens of queries; without it, tokens are weighted
            by their rarity.
        pictures: folder of the images, as for `stair serve`; without it, the page shows no images.
    """
    documents = opened(index, "the page")
    if pictures is not None and not pictures.is_dir():
        raise FileNotFoundError(f"{pictures}: no such folder of images")
    stair = Stair.from_pretrained(model) if model is not None else None
    if stair is not None:
        documents.use(stair)
    with new_target(out, folder=True) as part:
        write_text(part / "vocab.txt", "\n".join(documents.space.tokens) + "\n")
        vocabulary = stair.vocabulary if stair is not None else Vocabulary(part / "vocab.txt")
        if stair is not None:
            _write_lookup(part / "lookup.bin", stair)
        _write_terms(part, documents)
        _write_documents(part, documents, pictures)
        facts = {
            "documents": len(documents),
            "similarity": documents.space.similarity,
            "first": FIRST,
            "layers": LAYERS,
            "expansion": EXPANSION if stair is not None else 0,
            "max_tokens": stair.config.text.max_tokens if stair is not None else 512,
            "never": vocabulary.never_active,
            **vocabulary.normalisation,
        }
        write_json(part / "about.json", facts)
        write_text(part / "index.html", search_page("static.js")[0])


def _write_terms(part: Path, index: SparseIndex) -> None:
    parts = [embeddings.vectors for embeddings in index.content()]
    terms_V = np.zeros(len(index.space.tokens), TERM)
    count_V = np.sum([np.bincount(vectors.indices, minlength=len(terms_V)) for vectors in parts], axis=0)
    # ranges of terms of about as many postings
    cuts = np.unique(np.searchsorted(np.cumsum(count_V), np.arange(_POSTINGS, count_V.sum(), _POSTINGS)))
    with (part / "postings.bin").open("wb") as file:
        for first, end in zip([0, *cuts], [*cuts, len(terms_V)], strict=True):
            columns = sparse.vstack([vectors[:, first:end] for vectors in parts], "csr").tocsc()
            for v in range(first, end):
                column = slice(*columns.indptr[v - first : v - first + 2])
                layers = [*_layers(columns.indices[column], columns.data[column])]
                ends = np.cumsum([len(layer) for layer in layers])
                most = columns.data[column].max(initial=0)
                terms_V[v] = file.tell(), count_V[v], most, np.pad(ends, (0, LAYERS - len(ends)))
                file.write(b"".join(layers))
    terms_V.tofile(part / "terms.bin")


def _layers(documents: NDArray[Any], weights: NDArray[Any]) -> Iterator[bytes]:
    order = np.argsort(-weights, kind="stable")
    ends = [FIRST << layer for layer in range(LAYERS - 1) if FIRST << layer < len(order)]
    for layer, chosen in enumerate(np.split(order, ends) if len(order) else ()):
        chosen = np.sort(chosen)  # by document
        lowest = weights[chosen].min()
        step = np.float32((weights[chosen].max() - lowest) * (1 + 1e-5) / (15 if layer else 255))
        q = np.ceil((weights[chosen] - lowest) / (step or 1)).astype(np.uint8)
        content = q.tobytes() + _varint(np.diff(documents[chosen], prepend=0))
        yield np.array([lowest, step], "<f4").tobytes() + (zlib.compress(content) if layer else content)


def _varint(gaps: NDArray[Any]) -> bytes:
    """Numbers below 2^35, 7 bits a byte, the lowest first; all bytes of a number but its last have 128 added."""
    shifted = gaps.astype(np.int64)[:, None] >> np.arange(0, 35, 7)
    used = shifted > 0
    used[:, 0] = True
    more = np.append(used[:, 1:], np.zeros((len(gaps), 1), bool), axis=1)
    return bytes(((shifted & 127) + 128 * more).astype(np.uint8)[used])


def _write_documents(part: Path, index: SparseIndex, root: Path | None) -> None:
    pictures, places = 0, np.zeros((len(index) + 1, 2), "<f8")
    names = (part / name for name in ("documents.bin", "thumbnails.bin"))
    documents, thumbnails = (path.open("wb") for path in names)
    with documents, thumbnails, ThreadPoolExecutor() as pool:
        each = pool.map if root is not None else map
        parts = (zip(batch, each(partial(_thumbnail, root), batch), strict=True) for batch in batches(rows(index)))
        for n, (row, thumbnail) in enumerate(chain.from_iterable(parts), 1):
            head = np.array([len(row.terms), *row.terms], "<u4").tobytes() + np.array(row.weights, "<f4").tobytes()
            documents.write(head + json.dumps({"id": row.id, **row.fields}, ensure_ascii=False).encode())
            thumbnails.write(thumbnail)
            pictures += len(thumbnail) > 0
            places[n] = documents.tell(), thumbnails.tell()
    places.tofile(part / "places.bin")
    if root is not None and not pictures:
        raise SettingError(f"{root} has none of the images; give the folder passed to `stair embed`", "pictures")
    if root is not None and pictures < len(index):
        print(f"{len(index) - pictures} of {len(index)} documents have no image in {root}")


def _thumbnail(root: Path | None, row: Row) -> bytes:
    if root is None:
        return b""
    try:
        picture = decode_image(picture_bytes(root, row.fields["source"]), enough=_SIDE)
    except (ValueError, OSError):
        return b""
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _write_lookup(path: Path, stair: Stair) -> None:
    """The heaviest terms that the text side gives each token alone, of length 1: else few tokens decide a query."""
    vocabulary = stair.vocabulary
    [[first, last]] = vocabulary.encode([""])
    with path.open("wb") as file, torch.no_grad():
        for batch in torch.arange(len(vocabulary)).split(64):
            ids_BT = torch.stack([torch.full_like(batch, first), batch, torch.full_like(batch, last)], 1)
            embedding_BV = stair.embed_tokens(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)).float()
            embedding_BV[np.isin(batch, vocabulary.never_active)] = 0
            weights_BE, terms_BE = embedding_BV.topk(min(EXPANSION, len(vocabulary)))
            record = np.zeros(len(batch), [("terms", "<u4", EXPANSION), ("weights", "<f4", EXPANSION)])
            record["terms"][:, : terms_BE.shape[1]] = terms_BE.numpy()
            record["weights"][:, : terms_BE.shape[1]] = torch.nn.functional.normalize(weights_BE).numpy()
            file.write(record.tobytes())

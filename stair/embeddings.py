"""Sparse embeddings with their ids, metadata and model: what `stair embed` writes and an index takes.

A weight has a meaning only for the model that gave it, so vectors never travel without their `EmbeddingSpace`.
N rows, V terms. CSR: `indptr` (N+1,), `indices` and `data` (non-zeros,).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy import sparse
from torch import Tensor

from stair.errors import FileError, SettingError
from stair.files import atomic_write, read_json

FORMAT = "stair-embeddings-2"
PLAN = "embeddings.json"  # the settings of `stair embed`, beside its parts
SUFFIXES = (".safetensors", ".parquet")


@dataclass(frozen=True)
class EmbeddingSpace:
    """What makes two embeddings comparable."""

    model: str  # fingerprint of the weights that made them (`Stair.fingerprint`)
    similarity: str  # `dot`, or `cosine`: then the dot product is taken of rows of length 1
    tokens: tuple[str, ...] = field(repr=False)  # the V terms

    @cached_property
    def vocabulary(self) -> str:
        """Fingerprint of the terms, as `Vocabulary.fingerprint`."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @cached_property
    def term_ids(self) -> dict[str, int]:
        """The dimension of each term."""
        return {token: v for v, token in enumerate(self.tokens)}

    def check_same(self, other: "EmbeddingSpace", what: str) -> None:
        """Raises a SettingError that begins with `what` if model, vocabulary or similarity of the other space differ."""
        for name in ("model", "vocabulary", "similarity"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                different = f"{what}: {name} is {theirs[:12]}, it must be {ours[:12]}"
                raise SettingError(f"{different}. Embed everything, queries too, with one model", "model")

    def comparable(self, vectors: sparse.csr_matrix) -> sparse.csr_matrix:
        """Rows ready for the dot product, as `Stair.comparable` gives them: of length 1 for `cosine` (empty stay empty)."""
        if self.similarity == "dot":
            return vectors
        squares = np.append(vectors.data.astype(np.float64) ** 2, 0)
        # reduceat gives an empty slice the element at its start, which no weight is divided by
        length_N = np.sqrt(np.add.reduceat(squares, vectors.indptr[:-1])) if vectors.shape[0] else np.empty(0)
        scaled = vectors.data / np.repeat(length_N.astype(np.float32), np.diff(vectors.indptr))
        return sparse.csr_matrix((scaled, vectors.indices, vectors.indptr), shape=vectors.shape)


@dataclass(frozen=True)
class Embeddings:
    """N sparse embeddings of one model. ValueError if lengths differ."""

    vectors: sparse.csr_matrix  # (N, V), float32, the weights as the model gave them, not normalised
    ids: Sequence[str]
    space: EmbeddingSpace
    metadata: Sequence[dict[str, Any]] = ()  # plain values that the user gave, or none at all
    source: Sequence[dict[str, Any]] = ()  # where each item came from (`stair.data.items.Item.source`), or none at all

    def __post_init__(self) -> None:
        count = len(self.ids)
        lengths = {len(self.metadata) or count, len(self.source) or count, count}
        if self.vectors.shape != (count, len(self.space.tokens)) or len(lengths) > 1:
            sizes = (
                f"{count} ids, {len(self.metadata)} metadata, {len(self.source)} source, {len(self.space.tokens)} terms"
            )
            raise ValueError(f"{self.vectors.shape} vectors, {sizes} do not fit together")

    def __len__(self) -> int:
        return len(self.ids)

    def heaviest(self, most: int) -> "Embeddings":
        """The embeddings with at most `most` terms in each row, as `to_csr` keeps them."""
        csr = self.vectors.sorted_indices()
        row_P = np.repeat(np.arange(len(self)), np.diff(csr.indptr))
        order_P = np.lexsort((-csr.data, row_P))  # stable: equal weights stay in the order of the vocabulary
        first = np.sort(order_P[np.arange(len(row_P)) - csr.indptr[row_P] < most])
        indptr = np.append(0, np.bincount(row_P[first], minlength=len(self)).cumsum())
        return replace(self, vectors=sparse.csr_matrix((csr.data[first], csr.indices[first], indptr), shape=csr.shape))

    def save(self, path: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes one file, `.safetensors` or `.parquet`, whole or not at all; `facts` are kept in its header.

        Raises:
            FileError: for another ending.
            SettingError: for metadata that are no plain values.
        """
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise FileError(f"{path} ends in {path.suffix!r}; allowed: {', '.join(SUFFIXES)}", path)
        header = {"format": FORMAT, "model": self.space.model, "similarity": self.space.similarity}
        header |= {"tokens": "\n".join(self.space.tokens), "facts": json.dumps(facts or {})}
        rows = {"metadata": self._json_rows(self.metadata), "source": self._json_rows(self.source)}
        indptr, indices = self.vectors.indptr.astype(np.int64), self.vectors.indices.astype(np.int32)
        data = self.vectors.data.astype(np.float32)
        with atomic_write(path) as part:
            if path.suffix == ".safetensors":
                texts = {"ids": json.dumps(list(self.ids))} | {n: f"[{', '.join(each)}]" for n, each in rows.items()}
                coded = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
                save_file({"indptr": indptr, "indices": indices, "data": data, **coded}, str(part), header)
            else:
                lists = {"terms": indices, "weights": data}
                columns = {name: pa.LargeListArray.from_arrays(indptr, values) for name, values in lists.items()}
                table = pa.table({"id": pa.array(list(self.ids), pa.string()), **columns, **rows})
                parquet.write_table(table.replace_schema_metadata(header), part, compression="zstd")

    def _json_rows(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """NaN is an error: strict JSON readers reject it."""
        rows = []
        for name, row in zip(self.ids, records or [{}] * len(self), strict=True):
            try:
                rows.append(json.dumps(row, allow_nan=False))
            except (TypeError, ValueError) as error:
                allowed = "texts, finite numbers, true or false, or lists of these"
                raise SettingError(f"metadata of {name!r}: {error}; give {allowed}", "metadata") from error
        return rows

    @classmethod
    def load(cls, path: str | Path) -> "Embeddings":
        """Reads a file, or all parts of a folder that `stair embed` wrote.

        Raises:
            FileNotFoundError: if there is none.
            FileError: if a file is not ours.
            SettingError: if parts are of different models.
        """
        parts = list(cls.parts(path))
        for part in parts[1:]:
            parts[0].space.check_same(part.space, f"{path} mixes models")
        return cls(
            sparse.vstack([part.vectors for part in parts], format="csr"),
            [name for part in parts for name in part.ids],
            parts[0].space,
            [row for part in parts for row in part.metadata or [{}] * len(part)],
            [row for part in parts for row in part.source or [{}] * len(part)],
        )

    @classmethod
    def parts(cls, path: str | Path) -> Iterator["Embeddings"]:
        """The parts of a folder one after another (or the one file), so that not all need be in memory."""
        for file in part_files(path):
            header = read_header(file)
            space = EmbeddingSpace(header["model"], header["similarity"], tuple(header["tokens"].split("\n")))
            read = _read_safetensors if file.suffix == SUFFIXES[0] else _read_parquet
            try:
                columns, ids, metadata, source = read(file)
                vectors = sparse.csr_matrix(columns, shape=(len(ids), len(space.tokens)))
                vectors.check_format(full_check=True)  # else a number out of range is read out of memory later
            except OSError:
                raise
            except Exception as error:  # each format has errors of its own
                raise FileError(f"{file} is damaged: {type(error).__name__}: {error}", file) from error
            yield cls(vectors, ids, space, metadata, source)


def _read_safetensors(path: Path) -> Any:
    """Columns of CSR, ids, metadata, source."""
    part = load_file(str(path))
    ids, metadata, source = (json.loads(part[name].tobytes()) for name in ("ids", "metadata", "source"))
    return (part["data"], part["indices"], part["indptr"]), ids, metadata, source


def _read_parquet(path: Path) -> Any:
    table = parquet.read_table(path).combine_chunks()
    lists = [table[name].combine_chunks() for name in ("weights", "terms")]
    indptr = lists[0].offsets.to_numpy() - lists[0].offsets[0].as_py()
    metadata, source = ([json.loads(row) for row in table[name].to_pylist()] for name in ("metadata", "source"))
    return (*(column.flatten().to_numpy() for column in lists), indptr), table["id"].to_pylist(), metadata, source


def part_files(path: str | Path) -> list[Path]:
    """The files of embeddings at a path, in order; FileNotFoundError if there is none, FileError if some are missing."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.glob("part-*") if f.suffix in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"{path}: no embeddings there; `stair embed` writes them")
    if (path / PLAN).is_file() and len(files) < (parts := read_json(path / PLAN)["parts"]):
        raise FileError(f"{path} has {len(files)} of {parts} parts; give the same `stair embed` again", path)
    return files


def read_header(path: Path) -> dict[str, str]:
    """The header of a file of embeddings: keys `model`, `similarity`, `tokens`, `facts` (json); FileError if not ours."""
    header: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "numpy") as file:
                header = file.metadata() or {}
        elif path.suffix == ".parquet":
            header = {k.decode(): v.decode() for k, v in (parquet.read_schema(path).metadata or {}).items()}
    except OSError:
        raise
    except Exception as error:  # each format has errors of its own
        raise FileError(f"{path} cannot be read: {type(error).__name__}: {error}", path) from error
    if header.get("format") != FORMAT:
        raise FileError(
            f"{path} contains no STAIR embeddings ({header.get('format')!r}); `stair embed` writes them", path
        )
    if missing := {"model", "similarity", "tokens", "facts"} - header.keys():
        raise FileError(f"{path} is damaged: it does not state its {', '.join(sorted(missing))}; embed again", path)
    return header


def to_csr(embedding: Tensor, budget: int | None = None, threshold: float = 0.0) -> sparse.csr_matrix:
    """The non-zeros of dense embeddings.

    Args:
        embedding: (N, V), not negative.
        budget: keep at most this many terms of a row, the heaviest; equal ones in the order of the vocabulary.
        threshold: keep only weights above it.

    Returns:
        (N, V) CSR, float32, terms in ascending order.
    """
    embedding = embedding.detach().float()
    keep = embedding > threshold
    if budget is not None and budget < embedding.shape[1]:
        heaviest = embedding.sort(dim=1, descending=True, stable=True).indices[:, :budget]
        keep &= torch.zeros_like(keep).scatter_(1, heaviest, True)
    row, term = keep.nonzero(as_tuple=True)
    indptr = torch.zeros(len(embedding) + 1, dtype=torch.int64)
    indptr[1:] = keep.sum(dim=1).cumsum(0).cpu()
    parts = embedding[row, term].cpu().numpy(), term.cpu().numpy().astype(np.int32), indptr.numpy()
    return sparse.csr_matrix(parts, shape=tuple(embedding.shape))

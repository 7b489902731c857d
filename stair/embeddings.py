"""Sparse embeddings with whose they are and which model made them: what `stair embed` writes and an index takes.

A weight means something only to the model that gave it, so vectors never travel without their `EmbeddingSpace`.

N rows, V words. CSR: `indptr` (N+1,), `indices` and `data` (non-zeros,).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from scipy import sparse
from torch import Tensor

from stair.files import atomic_write, read_json

FORMAT = "stair-embeddings-2"
PLAN = "embeddings.json"  # what `stair embed` meant to do, beside its parts


@dataclass(frozen=True)
class EmbeddingSpace:
    """What makes two embeddings comparable.

    Attributes:
        model: fingerprint of the weights that made them (`Stair.fingerprint`).
        similarity: `dot`, or `cosine`: then the dot product is taken of rows of length 1.
        tokens: the V words.
    """

    model: str
    similarity: Literal["dot", "cosine"]
    tokens: tuple[str, ...] = field(repr=False)

    @cached_property
    def vocabulary(self) -> str:
        """Fingerprint of the words, as `Vocabulary.fingerprint`."""
        return hashlib.sha256("\n".join(self.tokens).encode()).hexdigest()

    @cached_property
    def place(self) -> dict[str, int]:
        """The dimension of each word."""
        return {token: v for v, token in enumerate(self.tokens)}

    def demand(self, other: "EmbeddingSpace", what: str) -> None:
        """Refuses embeddings of another space.

        Args:
            other: the space of what is to be added or compared.
            what: how to call it in the message.

        Raises:
            ValueError: if model, vocabulary or similarity differ.
        """
        for name in ("model", "vocabulary", "similarity"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(
                    f"{what}: {name} is {theirs[:12]}, wanted {ours[:12]}. Weights of different models cannot be "
                    "compared: embed everything, queries too, with one model"
                )

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
    """N sparse embeddings of one model.

    Attributes:
        vectors: (N, V) CSR, float32, the weights as the model gave them, not normalised.
        ids: N strings.
        space: what they are comparable with.
        metadata: N dictionaries of plain values that the user gave (columns of a table), or none at all.
        source: N dictionaries that say where each item came from (see `stair.data.items.Item.source`), or none at all.
            They are stored apart from `metadata`, so that a column of the user's may have any name.
    """

    vectors: sparse.csr_matrix
    ids: Sequence[str]
    space: EmbeddingSpace
    metadata: Sequence[dict[str, Any]] = ()
    source: Sequence[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        """Refuses parts of different lengths.

        Raises:
            ValueError: naming the lengths.
        """
        count = len(self.ids)
        lengths = {len(self.metadata) or count, len(self.source) or count, count}
        if self.vectors.shape != (count, len(self.space.tokens)) or len(lengths) > 1:
            raise ValueError(
                f"{self.vectors.shape} vectors, {count} ids, {len(self.metadata)} metadata, {len(self.source)} source, "
                f"{len(self.space.tokens)} words do not fit together"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, path: str | Path, facts: dict[str, Any] | None = None) -> None:
        """Writes one file, whole or not at all.

        Args:
            path: ends in `.safetensors` or `.parquet`.
            facts: plain values to keep in the file's header.

        Raises:
            ValueError: for another ending, or metadata that are no plain values.
        """
        path = Path(path)
        if path.suffix not in _WRITERS:
            raise ValueError(f"{path} ends in {path.suffix!r}; wanted one of {sorted(_WRITERS)}")
        header = {
            "format": FORMAT,
            "model": self.space.model,
            "similarity": self.space.similarity,
            "tokens": "\n".join(self.space.tokens),
            "facts": json.dumps(facts or {}),
        }
        with atomic_write(path) as part:
            _WRITERS[path.suffix](self, header, part)

    @classmethod
    def load(cls, path: str | Path) -> "Embeddings":
        """Reads a file, or all parts of a folder that `stair embed` wrote.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if a file is not ours, or parts are of different models.
        """
        parts = list(cls.parts(path))
        for part in parts[1:]:
            parts[0].space.demand(part.space, f"{path} mixes models")
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
            yield cls._read(file)

    @classmethod
    def _read(cls, path: Path) -> "Embeddings":
        header = read_header(path)
        space = EmbeddingSpace(header["model"], header["similarity"], tuple(header["tokens"].split("\n")))  # type: ignore[arg-type]
        try:
            vectors, ids, metadata, source = _READERS[path.suffix](path, len(space.tokens))
            vectors.check_format(full_check=True)  # else a number out of range is read out of memory later
        except OSError:
            raise
        except Exception as error:  # each format has errors of its own
            raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return cls(vectors, ids, space, metadata, source)


def part_files(path: str | Path) -> list[Path]:
    """The files of embeddings at a path, in order.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if parts are missing.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.glob("part-*") if f.suffix in _READERS)
    if not files:
        raise FileNotFoundError(f"{path}: no embeddings there; `stair embed` writes them")
    if (path / PLAN).is_file() and len(files) < (parts := read_json(path / PLAN)["parts"]):
        raise ValueError(f"{path} has {len(files)} of {parts} parts; give the same `stair embed` again, it goes on")
    return files


def read_header(path: Path) -> dict[str, str]:
    """What a file of embeddings says of itself: keys `model`, `similarity`, `tokens`, `facts` (json).

    Raises:
        ValueError: if it is not ours.
    """
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
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} holds no STAIR embeddings ({header.get('format')!r}); `stair embed` writes them")
    if missing := {"model", "similarity", "tokens", "facts"} - header.keys():
        raise ValueError(f"{path} is damaged: it does not say its {', '.join(sorted(missing))}; embed again")
    return header


def to_csr(embedding: Tensor, top: int | None = None, threshold: float = 0.0) -> sparse.csr_matrix:
    """The non-zeros of dense embeddings.

    Args:
        embedding: (N, V), not negative.
        top: keep only so many words of a row, the heaviest; equal ones in the order of the vocabulary.
        threshold: keep only weights above it.

    Returns:
        (N, V) CSR, float32, words in ascending order.
    """
    embedding = embedding.detach().float()
    keep = embedding > threshold
    if top is not None and top < embedding.shape[1]:
        heaviest = embedding.sort(dim=1, descending=True, stable=True).indices[:, :top]
        keep &= torch.zeros_like(keep).scatter_(1, heaviest, True)
    row, word = keep.nonzero(as_tuple=True)
    indptr = torch.zeros(len(embedding) + 1, dtype=torch.int64)
    indptr[1:] = keep.sum(dim=1).cumsum(0).cpu()
    parts = embedding[row, word].cpu().numpy(), word.cpu().numpy().astype(np.int32), indptr.numpy()
    return sparse.csr_matrix(parts, shape=tuple(embedding.shape))


def _json_rows(embeddings: Embeddings, records: Sequence[dict[str, Any]]) -> list[str]:
    """Metadata or source of each row, `{}` if there is none. NaN is an error: strict JSON readers reject it."""
    encode = json.JSONEncoder(allow_nan=False).encode
    rows = []
    for name, row in zip(embeddings.ids, records or [{}] * len(embeddings), strict=True):
        try:
            rows.append(encode(row))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"metadata of {name!r}: {error}; give texts, finite numbers, true or false, or lists of these"
            ) from error
    return rows


def _write_safetensors(embeddings: Embeddings, header: dict[str, str], path: Path) -> None:
    vectors = embeddings.vectors
    tensors = {
        "indptr": vectors.indptr.astype(np.int64),
        "indices": vectors.indices.astype(np.int32),
        "data": vectors.data.astype(np.float32),
        "ids": np.frombuffer(json.dumps(list(embeddings.ids)).encode(), np.uint8),
        **{
            name: np.frombuffer(f"[{', '.join(_json_rows(embeddings, records))}]".encode(), np.uint8)
            for name, records in (("metadata", embeddings.metadata), ("source", embeddings.source))
        },
    }
    save_file(tensors, str(path), header)


Read = tuple[sparse.csr_matrix, list[str], list[dict[str, Any]], list[dict[str, Any]]]


def _read_safetensors(path: Path, words: int) -> Read:
    part = load_file(str(path))
    ids, metadata, source = (json.loads(part[name].tobytes()) for name in ("ids", "metadata", "source"))
    vectors = sparse.csr_matrix((part["data"], part["indices"], part["indptr"]), shape=(len(ids), words))
    return vectors, ids, metadata, source


def _write_parquet(embeddings: Embeddings, header: dict[str, str], path: Path) -> None:
    vectors, offsets = embeddings.vectors, pa.array(embeddings.vectors.indptr.astype(np.int64))
    columns: dict[str, Any] = {
        "id": pa.array(list(embeddings.ids), pa.string()),
        "words": pa.LargeListArray.from_arrays(offsets, pa.array(vectors.indices.astype(np.int32))),
        "weights": pa.LargeListArray.from_arrays(offsets, pa.array(vectors.data.astype(np.float32))),
        "metadata": pa.array(_json_rows(embeddings, embeddings.metadata), pa.string()),
        "source": pa.array(_json_rows(embeddings, embeddings.source), pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata(header)
    parquet.write_table(table, path, compression="zstd")


def _read_parquet(path: Path, words: int) -> Read:
    table = parquet.read_table(path).combine_chunks()
    lists = [table[name].combine_chunks() for name in ("words", "weights")]
    offsets = lists[0].offsets.to_numpy() - lists[0].offsets[0].as_py()
    indices, data = (column.flatten().to_numpy() for column in lists)
    vectors = sparse.csr_matrix((data, indices, offsets), shape=(len(table), words))
    metadata, source = ([json.loads(row) for row in table[name].to_pylist()] for name in ("metadata", "source"))
    return vectors, table["id"].to_pylist(), metadata, source


_WRITERS = {".safetensors": _write_safetensors, ".parquet": _write_parquet}
_READERS = {".safetensors": _read_safetensors, ".parquet": _read_parquet}

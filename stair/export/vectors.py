"""Vector databases: Qdrant, Milvus, Seismic. Each takes word ids and weights as they are, and scores by dot product."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stair.index import SparseIndex
from stair.index.scoring import Query

_NAMES = uuid.UUID(
    "6d2ab1f2-6f0f-5a53-9d0c-2f0f5b1f5a11"
)  # ours: Qdrant's ids are numbers or UUIDs, so ids become UUIDs
_BATCH = 256


def qdrant(index: Path, out: str, collection: str = "stair") -> None:
    """Fills a Qdrant collection, or writes what its server takes.

    Args:
        index: folder of the index.
        out: `http://host:6333` of a server; a folder for the client's local mode; or a file ending in .jsonl: one body of
            `PUT /collections/NAME/points` a line, the first being that of `PUT /collections/NAME`.
        collection: its name.
    """
    opened = SparseIndex.open(index)
    if out.endswith(".jsonl"):
        with open(out, "w", encoding="utf-8") as file:
            file.write(json.dumps({"sparse_vectors": {"words": {}}}) + "\n")
            file.writelines(json.dumps({"points": points}) + "\n" for points in qdrant_points(opened))
        return
    from_qdrant, models = _needs("qdrant_client", "qdrant-client")
    client = from_qdrant.QdrantClient(url=out) if "://" in out else from_qdrant.QdrantClient(path=out)
    fill_qdrant(client, models, opened, collection)
    client.close()


def fill_qdrant(client: Any, models: Any, index: SparseIndex, collection: str) -> None:
    """Makes a collection with one sparse vector, `words`, and puts all documents into it."""
    client.create_collection(collection, {}, sparse_vectors_config={"words": models.SparseVectorParams()})
    for points in qdrant_points(index):
        structs = [
            models.PointStruct(
                id=p["id"], vector={"words": models.SparseVector(**p["vector"]["words"])}, payload=p["payload"]
            )
            for p in points
        ]
        client.upsert(collection, structs)


def qdrant_points(index: SparseIndex) -> Iterator[list[dict[str, Any]]]:
    """Points in Qdrant's json, some hundred at a time: sparse vector `words`, payload `id` and the metadata."""
    batch: list[dict[str, Any]] = []
    for name, words, weights, metadata in _rows(index):
        vector = {"indices": words, "values": weights}
        batch.append(
            {
                "id": str(uuid.uuid5(_NAMES, name)),
                "vector": {"words": vector},
                "payload": {"metadata": metadata, "id": name},
            }
        )
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def qdrant_search(client: Any, query: Query, k: int, collection: str = "stair") -> list[tuple[str, float]]:
    """The k best ids and scores of an exported collection."""
    _, models = _needs("qdrant_client", "qdrant-client")
    vector = models.SparseVector(indices=query.words.tolist(), values=query.weights.tolist())
    found = client.query_points(collection, query=vector, using="words", limit=k).points
    return [(point.payload["id"], point.score) for point in found]


def milvus(index: Path, out: str, collection: str = "stair") -> None:
    """Fills a Milvus collection: field `words`, a sparse vector under an inner-product index; `id` and `metadata`.

    Args:
        index: folder of the index.
        out: `http://host:19530` of a server, or a file ending in .db for Milvus Lite.
        collection: its name.
    """
    pymilvus, _ = _needs("pymilvus", "pymilvus milvus-lite")
    client = pymilvus.MilvusClient(out)
    kind = pymilvus.DataType
    schema = client.create_schema(auto_id=False)
    schema.add_field("id", kind.VARCHAR, is_primary=True, max_length=1024)
    schema.add_field("words", kind.SPARSE_FLOAT_VECTOR)
    schema.add_field("metadata", kind.JSON)
    indexes = client.prepare_index_params()
    indexes.add_index("words", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
    client.create_collection(collection, schema=schema, index_params=indexes)
    batch: list[dict[str, Any]] = []
    for name, words, weights, metadata in _rows(SparseIndex.open(index)):
        if not words:
            continue  # Milvus takes no empty vector, and it can be no hit
        batch.append({"id": name, "words": dict(zip(words, weights, strict=True)), "metadata": metadata})
        if len(batch) == _BATCH:
            client.insert(collection, batch)
            batch = []
    if batch:
        client.insert(collection, batch)
    client.close()


def milvus_search(client: Any, query: Query, k: int, collection: str = "stair") -> list[tuple[str, float]]:
    """The k best ids and scores of an exported collection."""
    vector = dict(zip(query.words.tolist(), query.weights.tolist(), strict=True))
    found = client.search(collection, [vector], anns_field="words", limit=k, search_params={"metric_type": "IP"})[0]
    return [(hit["id"], hit["distance"]) for hit in found]


def seismic(index: Path, out: Path) -> None:
    """Builds a Seismic index (approximate; it keeps weights in 16-bit floats) and saves it.

    Args:
        index: folder of the index.
        out: path of the saved index, to which Seismic adds its own ending.
    """
    library, _ = _needs("seismic", "pyseismic-lsr")
    import numpy as np

    dataset, text = library.SeismicDataset(), library.get_seismic_string()
    for name, words, weights, _ in _rows(SparseIndex.open(index)):
        dataset.add_document(name, np.array(words).astype(text), np.array(weights, np.float32))
    library.SeismicIndex.build_from_dataset(dataset).save(str(out))


def seismic_search(index: Any, query: Query, k: int) -> list[tuple[str, float]]:
    """The k best ids and scores of a Seismic index, with settings that favour recall over speed."""
    library, _ = _needs("seismic", "pyseismic-lsr")
    words = query.words.astype(library.get_seismic_string())
    found = index.search("", words, query.weights, k, query_cut=len(words), heap_factor=0.0)
    return [(name, score) for _, score, name in found]


def _rows(index: SparseIndex) -> Iterator[tuple[str, list[int], list[float], dict[str, Any]]]:
    for part in index.content():
        for n, name in enumerate(part.ids):
            row = slice(part.vectors.indptr[n], part.vectors.indptr[n + 1])
            metadata = part.metadata[n] if part.metadata else {}
            yield name, part.vectors.indices[row].tolist(), part.vectors.data[row].tolist(), metadata


def _needs(module: str, package: str) -> tuple[Any, Any]:
    """A package that this format alone needs, and its `models` where it has them."""
    import importlib

    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"needs {module}: `pip install {package}`") from error
    return loaded, getattr(loaded, "models", None)

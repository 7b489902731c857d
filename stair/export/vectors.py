"""Vector databases: Qdrant and Milvus. Both take term ids and weights as they are, and score by dot product."""

import json
import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from stair.errors import SettingError, import_extra
from stair.export.target import Row, batches, engine_errors, new_target, opened, rows

_NAMES = uuid.UUID("6d2ab1f2-6f0f-5a53-9d0c-2f0f5b1f5a11")  # Qdrant's ids are numbers or UUIDs, so ids become UUIDs


def qdrant(index: Path, out: str, collection: str = "stair") -> None:
    """Fills a new Qdrant collection, or writes the request bodies for a server to a file.

    Args:
        index: folder of the index.
        out: `http://host:6333`; a folder for the client's local mode; or a .jsonl file, whose first line is the body of
            `PUT /collections/NAME`, each further line one of `PUT /collections/NAME/points`.
        collection: name of the collection.
    """
    requests = batches(map(_qdrant_point, rows(opened(index, "Qdrant", int64=True))))
    if out.endswith(".jsonl"):
        with new_target(Path(out)) as part, part.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"sparse_vectors": {"terms": {}}}) + "\n")
            file.writelines(json.dumps({"points": points}) + "\n" for points in requests)
        return
    library = import_extra("qdrant_client", "qdrant-client", "export")
    with engine_errors("Qdrant"), _database(out) as address:
        client = library.QdrantClient(**{"url" if "://" in out else "path": str(address)}, check_compatibility=False)
        with closing(client), _new_collection(out, collection, client.collection_exists, client.delete_collection):
            client.create_collection(collection, {}, {"terms": library.models.SparseVectorParams()})
            for points in requests:
                client.upsert(collection, [library.models.PointStruct(**point) for point in points])


def _qdrant_point(row: Row) -> dict[str, Any]:
    vector = {"terms": {"indices": row.terms, "values": row.weights}}
    return {"id": str(uuid.uuid5(_NAMES, row.id)), "vector": vector, "payload": {**row.fields, "id": row.id}}


def milvus(index: Path, out: str, collection: str = "stair") -> None:
    """Fills a new Milvus collection: sparse vectors in `terms` with an inner-product index, `id`, and JSON fields.

    Args:
        index: folder of the index.
        out: `http://host:19530` of a server, or a path ending in .db for Milvus Lite.
        collection: name of the collection.
    """
    documents = opened(index, "Milvus", longest_id=65_535, int64=True)
    library = import_extra("pymilvus", "pymilvus", "export")
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs a trace of each error that it raises
    with engine_errors("Milvus"), _database(out) as address, ExitStack() as server:
        if "://" not in out:
            lite = import_extra("milvus_lite.server_manager", "milvus-lite", "export").server_manager_instance
            server.callback(lite.release_server, str(address))
        client = library.MilvusClient(str(address))
        with closing(client), _new_collection(out, collection, client.has_collection, client.drop_collection):
            schema, indexes = client.create_schema(auto_id=False), client.prepare_index_params()
            schema.add_field("id", library.DataType.VARCHAR, is_primary=True, max_length=65_535)
            schema.add_field("terms", library.DataType.SPARSE_FLOAT_VECTOR)
            for owner in ("metadata", "source"):
                schema.add_field(owner, library.DataType.JSON)
            indexes.add_index("terms", index_type="SPARSE_INVERTED_INDEX", metric_type="IP")
            client.create_collection(collection, schema=schema, index_params=indexes)
            weighted = (row for row in rows(documents) if row.terms)
            points = ({"id": r.id, "terms": dict(zip(r.terms, r.weights, strict=True)), **r.fields} for r in weighted)
            written = sum(client.insert(collection, batch)["insert_count"] for batch in batches(points))
    if written < len(documents):
        print(
            f"{len(documents) - written} documents without active terms are skipped: Milvus cannot store empty vectors"
        )


def _database(out: str) -> AbstractContextManager[Any]:
    """A server, or a database that exists, as it is; a new database appears when it is complete."""
    return nullcontext(out) if "://" in out or Path(out).exists() else new_target(Path(out))


@contextmanager
def _new_collection(out: str, collection: str, exists: Callable[..., bool], drop: Callable[..., Any]) -> Iterator[None]:
    if exists(collection):
        raise SettingError(f"{out} has a collection {collection!r}; drop it, or give another name", "collection")
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the server may be gone
            drop(collection)
        raise

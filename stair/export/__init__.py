"""From an index, or a model, to what other software takes; every format has a test that compares its scores."""

from stair.export.onnx import onnx
from stair.export.sentence_transformers import sentence_transformers
from stair.export.sql import duckdb, postgres, sqlite
from stair.export.vectors import milvus, qdrant
from stair.export.web import web

FORMATS = {  # the second words of `stair export`; stair/cli.py reads this without importing
    "sqlite": sqlite,
    "duckdb": duckdb,
    "postgres": postgres,
    "qdrant": qdrant,
    "milvus": milvus,
    "web": web,
    "onnx": onnx,
    "sentence-transformers": sentence_transformers,
}

"""From an index, or a model, to what other software takes; every format has a test that compares its scores."""

from stair.export.onnx import onnx
from stair.export.sentence_transformers import sentence_transformers
from stair.export.sql import duckdb, sqlite
from stair.export.vectors import milvus, qdrant, seismic

#: the second words of `stair export`
FORMATS = {
    function.__name__.replace("_", "-"): function
    for function in (sqlite, duckdb, qdrant, milvus, seismic, onnx, sentence_transformers)
}

"""STAIR: sparse, readable image and text embeddings (Chen et al., EMNLP 2023, arXiv 2301.13081).

Importing this package is cheap: torch is loaded when a name below is first used, so `stair --help` answers at once.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["Embeddings", "SparseIndex", "Stair", "StairConfig", "Vocabulary", "__version__"]

_HOME = {
    "Embeddings": "stair.embeddings",
    "SparseIndex": "stair.index",
    "Stair": "stair.model",
    "StairConfig": "stair.model",
    "Vocabulary": "stair.vocabulary",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'stair' has no attribute {name!r}")

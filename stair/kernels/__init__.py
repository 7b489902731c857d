"""Project, mask, max, log(1 + ReLU): the vocabulary head's hot path, all forms behind one function.

`vocabulary_max` is what the model calls; `vocabulary_max_reference` is the slow obvious oracle for tests and benchmarks.
"""

from stair.kernels.fused import vocabulary_max
from stair.kernels.reference import vocabulary_max_reference

__all__ = ["vocabulary_max", "vocabulary_max_reference"]

"""Measuring a trained model: retrieval, classification, sparsity, search cost, and what its terms mean.

`stair evaluate` reads tars and folders (stair/evaluate/open_set.py). `evaluate` takes any samples:

    from stair.evaluate import EvaluationSet, Sample, evaluate, open_model

    mine = EvaluationSet("mine", [Sample(picture, ["a red boat"]), ...])
    result, _ = evaluate(open_model("runs/mine/stage3/stair"), [mine])
"""

from stair.evaluate.models import EvaluatedModel, open_model
from stair.evaluate.output import model_card, show, write
from stair.evaluate.run import evaluate
from stair.evaluate.sets import EvaluationSet, Sample

__all__ = ["EvaluatedModel", "EvaluationSet", "Sample", "evaluate", "model_card", "open_model", "show", "write"]

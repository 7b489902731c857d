"""An index as Anserini's JsonVectorCollection, which it indexes with `-impact -pretokenized` (and passes to PISA as CIFF).

    python examples/anserini.py photos.index photos.anserini

Features are term ids, as tokens hold characters that analysers remove. Weights are whole numbers.
"""

import json
import sys
from pathlib import Path

import numpy as np

from stair.export.target import new_target, opened, rows


def anserini(index: Path, out: Path, steps: int = 255) -> None:
    """Writes documents.jsonl, vocab.txt with the term of each id on its line, and quantisation.json with the error.

    Args:
        index: folder of the index.
        out: a new folder.
        steps: whole numbers that the heaviest weight of all is divided into.
    """
    documents = opened(index, "Anserini", longest_id=32_766)
    step = max((max(row.weights) for row in rows(documents) if row.weights), default=1.0) / steps
    with new_target(out, folder=True) as part:
        with (part / "documents.jsonl").open("w", encoding="utf-8") as file:
            for row in rows(documents):
                whole = np.rint(np.array(row.weights) / step).astype(int).tolist()
                vector = {str(term): weight for term, weight in zip(row.terms, whole, strict=True) if weight > 0}
                file.write(json.dumps({"id": row.id, "contents": "", "vector": vector}) + "\n")
        (part / "vocab.txt").write_text("\n".join(documents.space.tokens) + "\n", encoding="utf-8")
        facts = {"step": step, "largest_error_of_a_weight": step / 2, "steps": steps, "model": documents.space.model}
        (part / "quantisation.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    anserini(Path(sys.argv[1]), Path(sys.argv[2]))

"""Entry point of the demo: all three stages on generated scenes, then a page with what was learned. `make demo` runs it.

    python demo.py [OPTION ...]   options go to each stage: --trainer.max_steps 40 --trainer.val_check_interval 40

Works in `runs/demo` of the current folder: stages of an earlier run are removed, the data kept.
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.scenes import SHAPES
from datamodules.synthetic import write_scenes
from stair.data.pairs import EvaluationPairs
from stair.embed import embed
from stair.images import MAX_PIXELS
from stair.index.commands import index
from stair.model import Stair
from stair.report.page import Picture, StageRow, write_model_page
from stair.towers import read_description

HOME = Path(__file__).parent
RUN = Path("runs/demo")
STAGES = {1: "stage 1, grounding", 2: "stage 2, expansion", 3: "stage 3, fine-tuning"}
# the metrics shown, without `val/scenes/` and `sparsity/`, and their columns in a terminal of 80 columns
METRICS = {
    **{f"{way}/recall@{k}": f"{arrow}\n@{k}" for way, arrow in (("t2i", "t→i"), ("i2t", "i→t")) for k in (1, 10)},
    "image/active_terms": "image\nterms",
    "text/active_terms": "text\nterms",
    "grounding@10": "gr.\n@10",
    "shapes@10": "shapes\n@10",
}
# typed, not drawn: rarer names of things, so that expansions have something to do
QUERIES = ("a scarlet ball", "tiny jewels at night", "a huge toadstool in a meadow")


def main() -> None:
    """Draws, trains, tabulates, writes the page."""
    start, console = time.perf_counter(), Console()
    write_scenes(RUN / "data")
    for folder in (*(f"stage{stage}" for stage in STAGES), "embeddings", "index"):
        shutil.rmtree(RUN / folder, ignore_errors=True)
    held_out = EvaluationPairs(str(RUN / "data" / "val-*.tar"), image_size=64, max_pixels=MAX_PIXELS)
    rows: list[StageRow] = []
    for stage, name in STAGES.items():
        console.rule(f"{name} ({stage} of {len(STAGES)})")
        _train(stage, sys.argv[1:])
        figures = _figures(stage) | {"shapes@10": _shapes(stage, held_out)}
        rows = [*(rows or [_baseline(held_out, figures)]), StageRow(name, {m: figures[m] for m in METRICS})]
        console.print(_table(rows))
    steps = " + ".join(str(_steps(stage)) for stage in STAGES)
    lead = f"{len(held_out)} held-out scenes, none of which occurs in training; {steps} steps from scratch, one seed."
    model = Stair.from_pretrained(RUN / "stage3" / "stair")
    write_model_page(RUN / "report.html", "STAIR on generated scenes", model, held_out, rows, QUERIES, lead)
    embed(str(RUN / "stage3" / "stair"), str(RUN / "data" / "val-*.tar"), RUN / "embeddings")
    index([str(RUN / "index"), str(RUN / "embeddings")])
    bin = Path(sys.prefix) / "bin"
    print(f"What it learned:  {(RUN / 'report.html').resolve().as_uri()}")
    print(f"Its curves:       {bin}/tensorboard --logdir {RUN}")
    print(f"Search yourself:  {bin}/stair serve {RUN}/index {RUN}/stage3/stair --pictures {RUN}/data")
    print(f"Took {(time.perf_counter() - start) / 60:.1f} minutes.")


def _train(stage: int, options: Sequence[str]) -> None:
    """Runs a stage by main.py; ends the demo if it fails."""
    files = (f"stage{stage}", f"paper/stage{stage}", "model/tiny", "demo/scenes", f"demo/stage{stage}")
    given = [f"--config={HOME}/configs/{file}.yaml" for file in files]
    status = subprocess.run([sys.executable, f"{HOME}/main.py", "fit", *given, "--run", str(RUN), *options]).returncode
    if status != 0:
        sys.exit(f"demo: stage {stage} ended with exit status {status}; the reason stands above")


def _steps(stage: int) -> int:
    return int(read_description(RUN / f"stage{stage}" / "stair")["training"]["steps"])


def _figures(stage: int) -> dict[str, float]:
    """What the stage's last validation logged of the held-out scenes."""
    events, prefix = EventAccumulator(f"{RUN}/stage{stage}/tensorboard", size_guidance={"scalars": 0}), "val/scenes/"
    events.Reload()
    last = {tag.removeprefix(prefix): events.Scalars(tag)[-1] for tag in events.Tags()["scalars"] if prefix in tag}
    if not last or max(event.step for event in last.values()) + 1 != _steps(stage):
        sys.exit(
            f"demo: stage {stage} was not validated after its last step {_steps(stage)}; make trainer.max_steps a "
            "multiple of trainer.val_check_interval (configs/demo), so that the table is about the exported weights"
        )
    return {name.removeprefix("sparsity/"): event.value for name, event in last.items()}


def _shapes(stage: int, held_out: EvaluationPairs) -> float:
    """Share of the scenes that have a shape of their captions among their ten heaviest terms."""
    model, named = Stair.from_pretrained(RUN / f"stage{stage}" / "stair"), 0
    nouns = {noun for shape in SHAPES.values() for forms in shape.nouns for noun in forms}
    for pair in (held_out[n] for n in range(len(held_out))):
        scene = Picture.of(b"", pair.captions, model.encode_image(pair.pixels[None])[0], model.vocabulary)
        named += any(term in nouns & scene.in_caption for term, _ in scene.terms)
    return named / len(held_out)


def _baseline(held_out: EvaluationPairs, figures: dict[str, float]) -> StageRow:
    """Random order, and the commonest caption words for every image."""
    images, own = len(held_out), len(held_out[0].captions)  # as many of every scene
    captions = own * images
    metrics = {f"t2i/recall@{k}": k / images for k in (1, 10)}
    metrics |= {f"i2t/recall@{k}": 1 - math.comb(captions - own, k) / math.comb(captions, k) for k in (1, 10)}
    return StageRow("frequency baseline", metrics | {"grounding@10": figures["grounding@10_baseline"]})


def _table(rows: Sequence[StageRow]) -> Table:
    title = "Held-out scenes: recall, grounding, named shapes in %; active terms"
    heads = [Column(head, justify="right") for head in METRICS.values()]
    table = Table(Column(no_wrap=True), *heads, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for row in rows:
        figures = {m: row.metrics.get(m, math.nan) * (1 if "terms" in m else 100) for m in METRICS}
        table.add_row(row.name, *("–" if math.isnan(figure) else f"{figure:.1f}" for figure in figures.values()))
    return table


if __name__ == "__main__":
    main()

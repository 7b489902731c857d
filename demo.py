"""The roof's second door: all three stages on drawn scenes, then a page to read what was learned. `make demo` runs it.

    python demo.py [OPTION ...]      options go to each stage, after its files:
                                     --trainer.max_steps 40 --trainer.val_check_interval 40

Draws the scenes once, runs `main.py fit` for each stage as anybody would, and reads the figures from the event files
that TensorBoard shows. Works in `runs/demo` of the current folder: stages of an earlier run are removed, the data kept.
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from datamodules.synthetic import write_scenes
from stair.data.pairs import EvaluationPairs, Pair
from stair.embed import embed
from stair.images import MAX_PIXELS
from stair.index.commands import index
from stair.model import Stair
from stair.report import Hit, Picture, Search, StageRow, encode_png, shared_words, top_words, write_page
from stair.towers import read_description
from stair.vocabulary import Vocabulary

HOME = Path(__file__).parent
RUN = Path("runs/demo")
STAGES = {1: "stage 1, grounding", 2: "stage 2, expansion", 3: "stage 3, fine-tuning"}
METRICS = (
    *(f"{direction}/recall@{k}" for direction in ("t2i", "i2t") for k in (1, 5, 10)),
    "sparsity/image/active_words",
    "sparsity/text/active_words",
    "grounding@10",
)
# typed, not drawn: rarer names of things, so that expansions have something to do
QUERIES = ("a scarlet ball", "tiny jewels at night", "a huge toadstool in a meadow")
SHOWN_IMAGES, SHOWN_WORDS, SHOWN_HITS = 24, 10, 5


def main() -> None:
    """Draws, trains, tabulates, writes the page."""
    start, console = time.perf_counter(), Console()
    write_scenes(RUN / "data")
    for stage in STAGES:
        shutil.rmtree(RUN / f"stage{stage}", ignore_errors=True)
    rows: list[StageRow] = []
    for stage, name in STAGES.items():
        console.rule(f"{name} ({stage} of {len(STAGES)})")
        _train(stage, sys.argv[1:])
        figures = _figures(stage)
        rows = [*(rows or [_chance(figures)]), StageRow(name, {_short(m): figures[m] for m in METRICS})]
        console.print(_table(rows))
    page = RUN / "report.html"
    _write_page(page, rows)
    _write_index()
    commands = Path(sys.prefix) / "bin"
    console.print(f"What it learned:  {page.resolve().as_uri()}", soft_wrap=True)
    console.print(f"Its curves:       {commands / 'tensorboard'} --logdir {RUN}", soft_wrap=True)
    served = f"{RUN / 'index'} {RUN / 'stage3' / 'stair'} --pictures {RUN / 'data'}"
    console.print(f"Search yourself:  {commands / 'stair'} serve {served}", soft_wrap=True)
    console.print(f"Took {(time.perf_counter() - start) / 60:.1f} minutes.")


def _train(stage: int, options: Sequence[str]) -> None:
    """Runs a stage through the front door; ends the demo if it fails."""
    files = (f"stage{stage}", f"paper/stage{stage}", "model/tiny", "demo/scenes", f"demo/stage{stage}")
    command = [sys.executable, str(HOME / "main.py"), "fit"]
    for file in files:
        command += ["--config", str(HOME / "configs" / f"{file}.yaml")]
    if not sys.stdout.isatty():
        command += ["--trainer.enable_progress_bar", "false"]
    status = subprocess.run([*command, "--run", str(RUN), *options]).returncode
    if status != 0:
        sys.exit(f"demo: stage {stage} ended with exit status {status}; the reason stands above")


# Figures


def _figures(stage: int) -> dict[str, float]:
    """What the stage's last validation logged of the held-out scenes, by the name after `val/scenes/`."""
    folder = RUN / f"stage{stage}"
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    prefix = "val/scenes/"
    last = {tag.removeprefix(prefix): events.Scalars(tag)[-1] for tag in events.Tags()["scalars"] if prefix in tag}
    done = read_description(folder / "stair")["training"]["steps"]
    if not last or max(event.step for event in last.values()) + 1 != done:
        sys.exit(
            f"demo: stage {stage} handed over after {done} steps without validating there; make trainer.max_steps a "
            "multiple of trainer.val_check_interval (configs/demo), so that the table is about the weights kept"
        )
    return {name: event.value for name, event in last.items()}


def _short(metric: str) -> str:
    return metric.removeprefix("sparsity/")


def _chance(figures: dict[str, float]) -> StageRow:
    """What a model gets that never looks: random order, and the commonest caption words for every image."""
    pairs = _held_out()
    images, captions = len(pairs), sum(len(pair.captions) for pair in pairs)
    own = captions // images
    metrics = {f"t2i/recall@{k}": k / images for k in (1, 5, 10)}
    metrics |= {f"i2t/recall@{k}": 1 - math.comb(captions - own, k) / math.comb(captions, k) for k in (1, 5, 10)}
    return StageRow("without looking", metrics | {"grounding@10": figures["grounding@10_frequent"]})


def _table(rows: Sequence[StageRow]) -> Table:
    """Narrow enough for a terminal of 80 columns: recall of text → image, of image → text, words, grounding."""
    table = Table(
        title="Held-out scenes: recall and grounding in %, active words", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    for head in ("t→i\n@1", "t→i\n@5", "t→i\n@10", "i→t\n@1", "i→t\n@5", "i→t\n@10", "image\nwords", "text\nwords"):
        table.add_column(head, justify="right")
    table.add_column("gr.\n@10", justify="right")
    for row in rows:
        table.add_row(row.name, *(_cell(metric, row.metrics.get(metric)) for metric in map(_short, METRICS)))
    return table


def _cell(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if metric.endswith("active_words") else f"{100 * value:.1f}"


# The index, as `stair embed` and `stair index` make it


def _write_index() -> None:
    for folder in ("embeddings", "index"):
        shutil.rmtree(RUN / folder, ignore_errors=True)
    embed(str(RUN / "stage3" / "stair"), str(RUN / "data" / "val-*.tar"), RUN / "embeddings")
    index([str(RUN / "index"), str(RUN / "embeddings")])


# The page


def _held_out() -> list[Pair]:
    pairs = EvaluationPairs(str(RUN / "data" / "val-*.tar"), image_size=64, max_pixels=MAX_PIXELS)
    return [pairs[i] for i in range(len(pairs))]


def _write_page(path: Path, rows: Sequence[StageRow]) -> None:
    model = Stair.from_pretrained(RUN / "stage3" / "stair")
    pairs = _held_out()
    image_NV = torch.cat([model.encode_image(part) for part in torch.stack([p.pixels for p in pairs]).split(100)])
    described = [len(pairs) * part // 3 for part in range(3)]
    searches = [
        *(_search(model, pairs[i].captions[0], image_NV, pairs, wanted=i) for i in described),
        *(_search(model, text, image_NV, pairs) for text in QUERIES),
    ]
    steps = [read_description(RUN / f"stage{stage}" / "stair")["training"]["steps"] for stage in STAGES]
    write_page(
        path,
        title="STAIR on drawn scenes",
        stages=[StageRow(r.name, {m: v for m, v in r.metrics.items() if not m.endswith("@5")}) for r in rows],
        pictures=[_picture(model.vocabulary, p, e) for p, e in zip(pairs, image_NV[:SHOWN_IMAGES], strict=False)],
        searches=searches,
        notes=(
            f"{len(pairs)} held-out scenes, none of which occurs in training, with {len(pairs[0].captions)} captions "
            f"each; {' + '.join(map(str, steps))} training steps from scratch, one seed, no pretrained weights.",
            "Most captions leave out most of a scene, so several images fit: text → image cannot reach 100%.",
            f"Few words describe every scene, so always naming the {SHOWN_WORDS} commonest caption words gives the "
            "grounding of the first line: compare with that, not with 0.",
            f"The vocabulary has {len(model.vocabulary)} pieces: the words of the training captions, and letters. The "
            "pictures below are the first of the held-out set, not chosen.",
        ),
    )


def _picture(vocabulary: Vocabulary, pair: Pair, embedding_V: Tensor) -> Picture:
    words = top_words(embedding_V, vocabulary, SHOWN_WORDS)
    return Picture(encode_png(pair.pixels), pair.captions, words, _pieces(vocabulary, pair.captions))


def _pieces(vocabulary: Vocabulary, texts: Sequence[str]) -> frozenset[str]:
    return frozenset(vocabulary.words(i for text in texts for i in vocabulary.pieces(text)))


def _search(model: Stair, text: str, image_NV: Tensor, pairs: Sequence[Pair], wanted: int | None = None) -> Search:
    """Ranks all held-out images for a text; `wanted` is the image that the text describes, if it is one's caption."""
    text_1V, vocabulary = model.encode_text([text]), model.vocabulary
    query_V, gallery_NV = model.comparable(text_1V)[0], model.comparable(image_NV)
    score_N = gallery_NV @ query_V
    hits = [
        Hit(
            encode_png(pairs[i].pixels),
            float(score_N[i]),
            shared_words(gallery_NV[i], query_V, vocabulary, SHOWN_WORDS // 2),
            pairs[i].captions[0],
            i == wanted,
        )
        for i in score_N.topk(SHOWN_HITS).indices.tolist()
    ]
    return Search(text, top_words(text_1V[0], vocabulary, SHOWN_WORDS), _pieces(vocabulary, [text]), hits)


if __name__ == "__main__":
    main()

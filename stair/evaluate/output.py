"""Where an evaluation goes: the terminal, `evaluation.json`, `report.html` with plots and examples, `model_card.md`."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as TerminalTable

from stair import __version__
from stair.evaluate.models import EvaluatedModel
from stair.evaluate.run import EmbeddedSet
from stair.evaluate.sets import EvaluationSet
from stair.files import write_json, write_text
from stair.pages import render, write_html
from stair.plain import one_line
from stair.report.page import Picture
from stair.report.tables import DIRECTIONS, Table, protocol, tables
from stair.report.terms import encode_png

_EXAMPLES = 12


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables to the terminal."""
    for table in tables(result):
        print_table(table)


def print_table(table: Table) -> None:
    """Prints a table and its notes to the terminal."""
    console = Console(markup=False, emoji=False)  # names come from data
    printed = TerminalTable(title=table.title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for i, head in enumerate(table.heads):
        printed.add_column(head, justify="right" if i else "left")
    for row in table.rows:
        printed.add_row(*map(one_line, row))
    console.print(printed)
    for note in table.notes:
        console.print(one_line(note), style="dim")


def write(
    folder: Path,
    result: Mapping[str, Any],
    evaluated: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    embedded: Mapping[str, EmbeddedSet],
) -> None:
    """Writes `evaluation.json`, `report.html` and `model_card.md` into a folder, each atomically."""
    values = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN is no JSON
    write_json(folder / "evaluation.json", values)
    write_text(folder / "model_card.md", model_card(result))
    examples = (pictures for what in sets if (pictures := _examples(evaluated, what, embedded[what.name])))
    content = render("evaluation.html", tables=list(tables(result)), plots=_plots(result), pictures=next(examples, []))
    model = result["model"]
    head = f"{model['kind']} model, compared by {model['similarity']}, evaluated by stair {__version__}"
    notes = [head, *(protocol(name, figures) for name, figures in result["sets"].items())]
    write_html(folder / "report.html", f"Evaluation of {evaluated.name}", notes, [content])


def model_card(result: Mapping[str, Any]) -> str:
    """Markdown: what the model is, how it was measured, the results."""
    model = result["model"]
    values = {key: model[key] for key in ("name", "similarity", "training")}
    values |= {"protocols": [protocol(*each) for each in result["sets"].items()], "tables": list(tables(result))}
    return render("card.md", **values, sparse=model["kind"] == "sparse", licence="", data="", model=None) + "\n"


def _plots(result: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Recall against active terms of each pruned set, and accuracy of each class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    plots = []
    for name, figures in result["sets"].items():
        figure = Figure(figsize=(7, 3.4), dpi=110, layout="constrained")
        if "pruned" in figures:
            _plot_recall(figure.subplots(), figures["pruned"])
            plots.append((f"Recall against active terms: {name}", figure))
        per_class = [each for each in figures.get("zero_shot", {}).get("per_class", []) if each["images"]]
        if 1 < len(per_class) <= 50:
            figure = Figure(figsize=(7, 0.6 + 0.22 * len(per_class)), dpi=110, layout="constrained")
            axis = figure.subplots()
            per_class.sort(key=lambda each: each["top1"])
            axis.barh(range(len(per_class)), [100 * each["top1"] for each in per_class])
            axis.set_yticks(range(len(per_class)), [each["name"] for each in per_class], fontsize=7, parse_math=False)
            axis.set_xlabel("zero-shot top-1, %")
            plots.append((f"Accuracy of each class: {name}", figure))
    drawn = []
    for title, figure in plots:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
        drawn.append((title, buffer.getvalue()))
    return drawn


def _plot_recall(axis: Any, pruned: Sequence[Mapping[str, Any]]) -> None:
    for way, direction in DIRECTIONS.items():
        for cut, side, style in (("top", "both", "o-"), ("top", "images", "^:"), ("≥", "both", "s--")):
            points = sorted(
                (row["images"], 100 * row[way])
                for row in pruned
                if row["kept"] == "all" or (row["side"] == side and row["kept"].startswith(cut))
            )
            label = f"{direction}, {cut}" + (", images only" if side == "images" else "")
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="active terms of an image", ylabel="R@1, %")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)


def _examples(evaluated: EvaluatedModel, what: EvaluationSet, rows: EmbeddedSet) -> list[Picture]:
    """The first images of a set with their terms; nothing for dense models."""
    pictures: list[Picture] = []
    if evaluated.terms is None:
        return pictures
    for i in range(min(_EXAMPLES, len(what.samples))):
        sample = what.samples[i]
        captions = list(sample.captions) or ([what.classes[sample.label]] if sample.label is not None else [])
        thumbnail = sample.image.copy()
        thumbnail.thumbnail((208, 208))
        weight_V = rows.images.columns(i, i + 1, rows.width)[:, 0]
        pictures.append(Picture.of(encode_png(thumbnail), captions, weight_V, evaluated.terms))
    return pictures

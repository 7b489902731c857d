"""Where an evaluation goes: the terminal, `evaluation.json`, `report.html` with plots and examples, `model_card.md`."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stair import __version__
from stair.evaluate.embed import Embedded
from stair.evaluate.models import EvaluatedModel
from stair.evaluate.sets import EvaluationSet
from stair.files import write_text
from stair.pages import render
from stair.plain import one_line
from stair.report import Picture, top_words, write_html
from stair.report.tables import measured, protocol, tables

_EXAMPLES, _WORDS = 12, 10


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables to the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console(markup=False, emoji=False)  # names come from data
    for found in tables(result):
        drawn = Drawn(title=found.title, box=SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
        for place, head in enumerate(found.heads):
            drawn.add_column(head, justify="right" if place else "left")
        for line in found.lines:
            drawn.add_row(*map(one_line, line))
        console.print(drawn)
        for note in found.notes:
            console.print(one_line(note), style="dim")


def write(
    folder: Path,
    result: Mapping[str, Any],
    evaluated: EvaluatedModel,
    sets: Sequence[EvaluationSet],
    embedded: Mapping[str, Embedded],
) -> None:
    """Writes `evaluation.json`, `report.html` and `model_card.md` into a folder, each whole or not at all."""
    write_text(folder / "evaluation.json", json.dumps(_without_nan(result), indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "model_card.md", model_card(result))
    examples = [pictures for what in sets if (pictures := _examples(evaluated, what, embedded[what.name]))]
    content = render(
        "evaluation.html", tables=list(tables(result)), plots=_plots(result), pictures=(examples or [[]])[0]
    )
    notes = [protocol(name, figures) for name, figures in result["sets"].items()]
    model = result["model"]
    head = f"{model['kind']} model, compared by {model['similarity']}, evaluated by stair {__version__}"
    write_html(folder / "report.html", f"Evaluation of {evaluated.name}", [head, *notes], [content])


def model_card(result: Mapping[str, Any]) -> str:
    """Markdown that says what the model is, how it was measured and what came out."""
    model = result["model"]
    values = {key: model[key] for key in ("name", "similarity", "training")}
    card = render(
        "card.md", **values, sparse=model["kind"] == "sparse", results=measured(result), licence="", data="", model=None
    )
    return f"{card}\n"


def _plots(result: Mapping[str, Any]) -> list[tuple[str, bytes]]:
    """Recall against active terms of each set that was pruned, and accuracy of each class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def png(figure: Figure) -> bytes:
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer)  # type: ignore[no-untyped-call]
        return buffer.getvalue()

    plots = []
    for name, figures in result["sets"].items():
        if "pruned" in figures:
            figure = Figure(figsize=(7, 3.4), dpi=110, layout="constrained")
            axis = figure.subplots()
            for way, spoken in (("t2i", "text → image"), ("i2t", "image → text")):
                for marks, side, style in (("top", "both", "o-"), ("top", "images", "^:"), ("≥", "both", "s--")):
                    points = sorted(
                        (p["images"], 100 * p[way])
                        for p in figures["pruned"]
                        if p["kept"] == "all" or (p["side"] == side and p["kept"].startswith(marks))
                    )
                    label = f"{spoken}, {marks}" + (", images only" if side == "images" else "")
                    if points:
                        axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set(xlabel="active terms an image", ylabel="R@1, %")
            axis.legend(fontsize=8)
            axis.grid(alpha=0.3)
            plots.append((f"Recall against active terms: {name}", png(figure)))
        per_class = [found for found in figures.get("zero_shot", {}).get("per_class", []) if found["images"]]
        if 1 < len(per_class) <= 50:
            figure = Figure(figsize=(7, 0.6 + 0.22 * len(per_class)), dpi=110, layout="constrained")
            axis = figure.subplots()
            per_class.sort(key=lambda found: found["top1"])
            axis.barh(range(len(per_class)), [100 * found["top1"] for found in per_class])
            axis.set_yticks(range(len(per_class)), [found["name"] for found in per_class], fontsize=7, parse_math=False)
            axis.set_xlabel("zero-shot top-1, %")
            plots.append((f"Accuracy of each class: {name}", png(figure)))
    return plots


def _examples(evaluated: EvaluatedModel, what: EvaluationSet, embedded: Embedded) -> list[Picture]:
    """The first images of a set, not chosen, with their words; nothing for dense models."""
    vocabulary = evaluated.words
    if vocabulary is None:
        return []
    pictures = []
    for place in range(min(_EXAMPLES, len(what.samples))):
        sample = what.samples[place]
        told = list(sample.captions) or ([what.classes[sample.label]] if sample.label is not None else [])
        own = frozenset(vocabulary.words(i for text in told for i in vocabulary.pieces(text)))
        weight_V = embedded.images.columns(place, place + 1, embedded.width)[:, 0]
        buffer = io.BytesIO()
        thumbnail = sample.image.copy()
        thumbnail.thumbnail((208, 208))
        thumbnail.save(buffer, "PNG")
        pictures.append(Picture(buffer.getvalue(), told, top_words(weight_V, vocabulary, _WORDS), own))
    return pictures


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: what was not measured is null."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and value != value else value

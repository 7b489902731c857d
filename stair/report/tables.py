"""The figures of an evaluation as tables of text, whatever draws them: terminal, page or model card."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stair.set_counts import sentences

_WAYS = {"t2i": "text → image", "i2t": "image → text"}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: heading.
        heads: of the columns, the first names the lines.
        lines: cells.
        notes: what one must know to read it.
    """

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """Every table that an evaluation fills, in the order to be read.

    Args:
        result: of `stair.evaluate.run.evaluate`.
    """
    sets: Mapping[str, Any] = result["sets"]
    makers = (_retrieval, _classification, _vocabulary_probe, _words, _cost)
    yield from (table for maker in makers if (table := maker(sets)).lines)
    for name, figures in sets.items():
        if "pruned" in figures:
            yield _pruned(name, figures["pruned"])


def measured(result: Mapping[str, Any]) -> list[str]:
    """Markdown of an evaluation for a card: how each set was taken, then the tables."""
    protocols = "\n".join(f"- {protocol(name, figures)}" for name, figures in result["sets"].items())
    return [protocols, *map(_markdown, tables(result))]


def markdown_table(heads: Sequence[object], lines: Sequence[Sequence[object]]) -> str:
    """A table; numbers with four digits, to the right, and the first column to the left."""
    rule = ["---", *("--:" for _ in heads[1:])]
    return "\n".join("| " + " | ".join(map(_cell, row)) + " |" for row in [heads, rule, *lines])


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(found: Table) -> str:
    notes = [note for note in found.notes if found.title != "Retrieval"]
    return "\n\n".join([f"### {found.title}", markdown_table(found.heads, found.lines), *notes])


def protocol(name: str, figures: Mapping[str, Any]) -> str:
    """One sentence that says how a set's figures were taken."""
    p = figures["protocol"]
    least, most = p["captions_an_image"]["least"], p["captions_an_image"]["most"]
    captions = f"{least}" if least == most else f"{least} to {most}"
    memory = sum(p["memory_bytes"].values()) / 2**20
    unfair = "".join(f"; {sentence}" for sentence in sentences(p, p["recall_at"] if "retrieval" in figures else ()))
    return (
        f"{name}: split {p['split']}, {p['images']} images with {captions} captions each ({p['captions']}){unfair}; "
        f"compared by {p['similarity']}; {p['truncation']}; {p['queries']}; {p['ties']}; {memory:.0f} MiB held"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _retrieval(sets: Mapping[str, Any]) -> Table:
    lines, ks, notes = [], [], []
    for name, figures in sets.items():
        if "retrieval" not in figures:
            continue
        ks = figures["protocol"]["recall_at"]
        notes.append(protocol(name, figures))
        for way, spoken in _WAYS.items():
            found = {key.partition("/")[2]: value for key, value in figures["retrieval"].items() if key.startswith(way)}
            recalls = [_percent(found[f"recall@{k}"]) for k in ks]
            rest = [_percent(found["mrr"]), _percent(found["ndcg@10"]), _number(found["median_rank"])]
            lines.append([f"{name}, {spoken}", *recalls, *rest])
    heads = ["retrieval, %", *(f"R@{k}" for k in ks), "MRR", "nDCG@10", "median rank"]
    return Table("Retrieval", heads, lines, notes)


def _classification(sets: Mapping[str, Any]) -> Table:
    lines = []
    for name, figures in sets.items():
        if "zero_shot" in figures:
            shot, probe = figures["zero_shot"], figures.get("linear_probe", {})
            accuracies = [_percent(shot[key]) for key in ("top1", "top5", "mean_class_top1")]
            sizes = [str(shot["images"]), str(shot["classes"])]
            lines.append([name, *accuracies, _percent(probe.get("top1")), *sizes])
    heads = ["accuracy, %", "top-1", "top-5", "mean of classes", "linear probe", "images", "classes"]
    note = (
        "Zero-shot: a class is the mean of its templates' embeddings, taken word by word; the JSON lists the templates. "
        "Linear probe: logistic regression, its penalty chosen on validation."
    )
    return Table("Classification", heads, lines, [note])


def _vocabulary_probe(sets: Mapping[str, Any]) -> Table:
    lines = []
    for name, figures in sets.items():
        for kind, found in figures.get("vocabulary_probe", {}).items():
            what = f"{name}, {'class name' if kind == 'class' else 'caption words'}"
            size = [f"{found['images']:.0f}", f"{found['skipped']:.0f}"]
            lines.append([what, *_tops(found, ""), _number(found["median_rank"]), *size])
            lines.append([f"{what}: the commonest", *_tops(found, "frequency_baseline/"), "", *size])
    heads = ["right word among all, %", "top-1", "top-5", "top-10", "median rank", "images", "left out"]
    note = (
        "Every word of the vocabulary competes: a sparse model's weights are read straight off, a dense one embeds each "
        "word alone. Right are whole words, no stop words; images without one are left out. The commonest: what saying the "
        "same words of every image gets, this set's own commonest first; a model that is not above it has named a habit."
    )
    return Table("Vocabulary test", heads, lines, [note])


def _tops(found: Mapping[str, float], of: str) -> list[str]:
    return [_percent(found[f"{of}top{k}"]) for k in (1, 5, 10)]


def _words(sets: Mapping[str, Any]) -> Table:
    found = {name: figures["words"] for name, figures in sets.items() if figures.get("words")}
    rows = list(dict.fromkeys(key for words in found.values() for key in words))
    shares = ("grounding/", "share", "confirmed")
    lines = [
        [key.removeprefix("sparsity/").removeprefix("grounding/").replace("_", " ")]
        + [
            (_percent if any(mark in key for mark in shares) else _number)(words.get(key))
            + (" %" if any(mark in key for mark in shares) else "")
            for words in found.values()
        ]
        for key in rows
    ]
    note = (
        "Words are word pieces. grounding@K: share of an image's K heaviest words that its captions hold; `frequent` is "
        "what the K commonest caption words get. added: active terms of a text that are not its own; confirmed: held by "
        "another caption of its image (`any`: by those of any image of the set)."
    )
    return Table("Words", ["", *found], lines if found else [], [note])


def _cost(sets: Mapping[str, Any]) -> Table:
    lines = [
        [
            name,
            f"{figures['cost']['index_bytes']:,.0f}",
            *(f"{figures['cost'].get(f'search_ms_{p}', float('nan')):.3f}" for p in ("p50", "p95")),
        ]
        for name, figures in sets.items()
        if "cost" in figures
    ]
    note = (
        "Exact search for the ten best images by one text, one thread; an index of 8 bytes an entry, uncompressed; of a "
        "dense model 4 a number."
    )
    return Table("Cost", ["", "index bytes", "search ms p50", "p95"], lines, [note])


def _pruned(name: str, lines: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            line["kept"],
            line["side"],
            _number(line["images"]),
            _number(line["texts"]),
            _percent(line["t2i"]),
            _percent(line["i2t"]),
            f"{line['index_bytes']:,.0f}",
        ]
        for line in lines
    ]
    heads = ["words kept", "of", "an image", "a text", "t→i R@1", "i→t R@1", "index bytes"]
    note = "`images`: only images are pruned, as in an index that whole texts ask."
    return Table(f"Quality against size: {name}", heads, cells, [note])

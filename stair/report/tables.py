"""The figures of an evaluation as tables of text, for the terminal, the page and the model card."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from stair.set_counts import sentences

DIRECTIONS = {"t2i": "text → image", "i2t": "image → text"}
_CLASSIFICATION_NOTE = (
    "Zero-shot: a class is the mean of its templates' embeddings, term by term; the JSON lists the templates. Linear "
    "probe: logistic regression, its penalty chosen on validation."
)
_PROBE_NOTE = (
    "All terms of the vocabulary compete: a sparse model's weights are ranked, a dense model embeds each word as a text. "
    "Correct terms are whole words, no stop words; images without one are skipped. Frequency baseline: the most common "
    "correct terms of this set for every image."
)
_TERMS_NOTE = (
    "Terms are tokens. grounding@K: share of an image's K heaviest terms that its captions contain; `baseline`: the same "
    "for the K most common caption tokens. added: active terms of a text outside the caption; confirmed: contained in "
    "another caption of its image (`baseline`: of a random image of the set)."
)
_COST_NOTE = (
    "Exact search for the ten best images by one text, one thread. Index: 8 bytes per entry, uncompressed; 4 bytes per "
    "value for a dense model."
)


class Table(NamedTuple):
    """A table of text: title, column heads, rows of cells, notes below."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The tables that a result of `stair.evaluate.evaluate` fills, in reading order."""
    sets: Mapping[str, Any] = result["sets"]
    yield from (table for make in (_retrieval, _classification, _probe, _terms, _cost) if (table := make(sets)).rows)
    heads = ["terms kept", "side", "terms per image", "per text", "t→i R@1", "i→t R@1", "index bytes"]
    for name, figures in sets.items():
        if "pruned" in figures:
            rows = [
                [row["kept"], row["side"]]
                + [_number(row[key]) for key in ("images", "texts")]
                + [_percent(row[key]) for key in ("t2i", "i2t")]
                + [f"{row['index_bytes']:,.0f}"]
                for row in figures["pruned"]
            ]
            note = "`images`: only images are pruned, as in an index."
            yield Table(f"Quality against size: {name}", heads, rows, [note])


def protocol(name: str, figures: Mapping[str, Any]) -> str:
    """One sentence: how a set was measured."""
    p = figures["protocol"]
    least, most = p["captions_per_image"]["min"], p["captions_per_image"]["max"]
    captions = f"{least}" if least == most else f"{least} to {most}"
    memory = sum(p["memory_bytes"].values()) / 2**20
    unfair = "".join(f"; {sentence}" for sentence in sentences(p, p["recall_at"] if "retrieval" in figures else ()))
    return (
        f"{name}: split {p['split']}, {p['images']} images with {captions} captions each ({p['captions']}){unfair}; "
        f"compared by {p['similarity']}; {p['truncation']}; {p['queries']}; {p['ties']}; {memory:.0f} MiB of memory"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _retrieval(sets: Mapping[str, Any]) -> Table:
    ranked = {name: figures for name, figures in sets.items() if "retrieval" in figures}
    ks: Sequence[int] = next((figures["protocol"]["recall_at"] for figures in ranked.values()), ())
    rows = [
        [f"{name}, {direction}"]
        + [_percent(figures["retrieval"][f"{way}/{key}"]) for key in (*(f"recall@{k}" for k in ks), "mrr", "ndcg@10")]
        + [_number(figures["retrieval"][f"{way}/median_rank"])]
        for name, figures in ranked.items()
        for way, direction in DIRECTIONS.items()
    ]
    heads = ["retrieval, %", *(f"R@{k}" for k in ks), "MRR", "nDCG@10", "median rank"]
    return Table("Retrieval", heads, rows, [protocol(name, figures) for name, figures in ranked.items()])


def _classification(sets: Mapping[str, Any]) -> Table:
    rows = [
        [name]
        + [_percent(shot[key]) for key in ("top1", "top5", "mean_class_top1")]
        + [_percent(figures.get("linear_probe", {}).get("top1")), str(shot["images"]), str(shot["classes"])]
        for name, figures in sets.items()
        if (shot := figures.get("zero_shot"))
    ]
    heads = ["accuracy, %", "top-1", "top-5", "mean of classes", "linear probe", "images", "classes"]
    return Table("Classification", heads, rows, [_CLASSIFICATION_NOTE])


def _probe(sets: Mapping[str, Any]) -> Table:
    rows = []
    for name, figures in sets.items():
        for source, probe in figures.get("vocabulary_probe", {}).items():
            title = f"{name}, {'class name' if source == 'class' else 'caption terms'}"
            size = [f"{probe['images']:.0f}", f"{probe['skipped']:.0f}"]
            for label, prefix in (("", ""), (": frequency baseline", "frequency_baseline/")):
                shares = [_percent(probe[f"{prefix}top{k}"]) for k in (1, 5, 10)]
                rows.append([title + label, *shares, "" if label else _number(probe["median_rank"]), *size])
    heads = ["correct term, %", "top-1", "top-5", "top-10", "median rank", "images", "skipped"]
    return Table("Vocabulary probe", heads, rows, [_PROBE_NOTE])


def _terms(sets: Mapping[str, Any]) -> Table:
    figures_of = {name: figures["terms"] for name, figures in sets.items() if figures.get("terms")}
    rows = []
    for key in dict.fromkeys(key for figures in figures_of.values() for key in figures):
        title = key.removeprefix("sparsity/").removeprefix("grounding/").replace("_", " ")
        if any(part in key for part in ("grounding/", "share", "confirmed")):
            rows.append([title, *(f"{_percent(figures.get(key))} %" for figures in figures_of.values())])
        else:
            rows.append([title, *(_number(figures.get(key)) for figures in figures_of.values())])
    return Table("Terms", ["", *figures_of], rows, [_TERMS_NOTE])


def _cost(sets: Mapping[str, Any]) -> Table:
    rows = [
        [name, f"{cost['index_bytes']:,.0f}"]
        + [f"{cost.get(f'search_ms_{p}', float('nan')):.3f}" for p in ("p50", "p95")]
        for name, figures in sets.items()
        if (cost := figures.get("cost"))
    ]
    return Table("Cost", ["", "index bytes", "search ms p50", "p95"], rows, [_COST_NOTE])


def dictionary_table(result: Mapping[str, Any]) -> Table:
    """The summary of what `stair dictionary` writes as dictionary.json."""
    rows = []
    for name, figures in result["summary"].items():
        heaviest = [term["term"] for term in result["terms"] if term["class"] == name][:8]
        shares = [_percent(figures[side]) for side in ("images", "texts")]
        rows.append([name, f"{figures['terms']:,}", *shares, ", ".join(heaviest)])
    notes = [f"{name}: {about}." for name, about in result["classes"].items()]
    return Table("Dictionary", ["", "terms", "% of image weight", "of text weight", "heaviest"], rows, notes)

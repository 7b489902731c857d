"""The table and the plots of a plan's finished runs, from their records: `table.md`, `table.json` and pictures.

    python benchmarks/paper_table/table.py PLAN OUT [SEED ...]      # of these seeds alone; of all that are there

Mean ± standard deviation over seeds (of the sample, so it needs two). Lines are ordered as in the plan; the best sparse
and the best dense line by recall on *validation* are marked, and the targets are judged by these two alone.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "t→i R@1": ("retrieval", "t2i/recall@1"),
    "i→t R@1": ("retrieval", "i2t/recall@1"),
    "t→i R@10": ("retrieval", "t2i/recall@10"),
    "i→t R@10": ("retrieval", "i2t/recall@10"),
    "terms an image": ("terms", "sparsity/image/active_terms"),
    "terms a text": ("terms", "sparsity/text/active_terms"),
    "FLOPs a pair": ("terms", "sparsity/flops_per_pair"),
    "grounding@10": ("terms", "grounding/grounding@10"),
    "caption word 1st": ("vocabulary_probe", "captions", "top1"),
    "class word 1st": ("vocabulary_probe", "class", "top1"),
    "zero-shot": ("zero_shot", "top1"),
}
_PLAIN = ("terms an image", "terms a text", "FLOPs a pair")
#: how many times that of dense CLIP a measure should be: the paper's ratios
WANTED = {"t→i R@1": 1.13, "i→t R@1": 1.08, "class word 1st": 2.4, "caption word 1st": 2.4}
WAYS = {"t→i R@1": "t2i", "i→t R@1": "i2t"}
WANTED_AT_64 = 0.98
#: what is cut to 64 words: an image and a text, or the image alone
SIDES = {"both": "on both sides", "images": "an image"}


def write_table(plan: dict[str, Any], out: Path, seeds: Sequence[str] = ("*",)) -> None:
    """Writes the table of whatever is finished, of these seeds."""
    found = {name: _records(out / name, seeds) for name in plan["variants"]}
    found = {name: records for name, records in found.items() if records}
    if not found:
        print("nothing is finished yet")
        return
    sets = [*plan["val"], *plan.get("test", {})]
    selected, baseline = (select(plan, found, kind) for kind in ("sparse", "dense"))
    lines = [f"# {plan['title']}", "", _preamble(plan, found), ""]
    numbers: dict[str, Any] = {}
    for name in sets:
        kind = "validation" if name in plan["val"] else "test, not used to choose"
        heads = [head for head in COLUMNS if any(_values(records, name, head) for records in found.values())]
        if not heads:
            continue
        lines += [f"## {name} ({kind})", "", f"| run (seeds) | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for variant, records in found.items():
            mark = " ←" if variant in (selected, baseline) else ""
            cells = [_cell(head, _values(records, name, head)) for head in heads]
            lines.append(f"| {plan['variants'][variant]['title']}{mark} ({len(records)}) | {' | '.join(cells)} |")
            numbers.setdefault(name, {})[variant] = {head: _values(records, name, head) for head in heads}
        lines += [*_frequency_baseline(found, name), ""]
    if selected and baseline:
        lines += _targets(plan, found, selected, baseline)
    (out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "table.json").write_text(
        json.dumps({"selected": selected, "baseline": baseline, "sets": numbers}, indent=2) + "\n"
    )
    _plot(plan, found, out, baseline)
    print(f"Written: {out}/table.md")


def select(plan: dict[str, Any], found: dict[str, list[dict[str, Any]]], kind: str) -> str | None:
    """The variant of a kind, `sparse` or `dense`, with the best mean R@1 of both directions on the first validation set.

    Only those with as many seeds as any are compared: a lucky single run is no choice.
    """
    first = next(iter(plan["val"]))

    def recall(variant: str) -> float:
        return statistics.mean(
            value for head in ("t→i R@1", "i→t R@1") for value in _values(found[variant], first, head)
        )

    those = [name for name, records in found.items() if records[0]["model"]["kind"] == kind]
    most = max((len(found[name]) for name in those), default=0)
    return max((name for name in those if len(found[name]) == most), key=recall, default=None)


def _records(folder: Path, seeds: Sequence[str]) -> list[dict[str, Any]]:
    paths = sorted(path for seed in seeds for path in folder.glob(f"seed{seed}/evaluation/evaluation.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def _frequency_baseline(found: dict[str, list[dict[str, Any]]], name: str) -> list[str]:
    """What the vocabulary test gives to one who looks at no image: the same for every run."""
    sets = [record["sets"].get(name, {}) for records in found.values() for record in records]
    naming = [item for figures in sets for item in figures.get("vocabulary_probe", {}).items()]
    key = "frequency_baseline/top1"
    output = {kind: f"{kind} {100 * of[key]:.1f}" for kind, of in naming if key in of}
    return (
        ["", f"Frequency baseline (the most frequent term for every image): {', '.join(output.values())}."]
        if output
        else []
    )


def _values(records: list[dict[str, Any]], name: str, head: str) -> list[float]:
    values = []
    for record in records:
        value: Any = record["sets"].get(name, {})
        for key in COLUMNS[head]:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    return values


def _cell(head: str, values: list[float]) -> str:
    if not values:
        return "–"
    factor = 1 if head in _PLAIN else 100
    mean = f"{factor * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {factor * statistics.stdev(values):.1f}"


def _preamble(plan: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> str:
    seeds = sorted({len(records) for records in found.values()})
    return (
        f"{plan['steps']} optimiser steps each, however many stages; seeds a run: {', '.join(map(str, seeds))}. "
        "Percent, mean ± standard deviation over seeds. ← are the best of the sparse and of the dense runs on validation."
    )


def _targets(plan: dict[str, Any], found: dict[str, list[dict[str, Any]]], selected: str, baseline: str) -> list[str]:
    """What the paper's ratios ask for, against the best dense run, on every set with captions."""
    lines = [
        "## Targets",
        "",
        f"{plan['variants'][selected]['title']} against {plan['variants'][baseline]['title']}:",
        "",
    ]
    for name in [*plan["val"], *plan.get("test", {})]:
        for head, ratio in WANTED.items():
            if (got := _of_dense(found, selected, baseline, name, head)) is not None:
                lines.append(
                    f"- {name}, {head}: {got:.2f} × dense, wanted {ratio}: {'met' if got >= ratio else 'not met'}"
                )
        for head, way in WAYS.items():
            for side, spoken in SIDES.items():
                if (left := _at_64(found[selected], name, way, side)) is not None:
                    lines.append(
                        f"- {name}, {head} at 64 terms {spoken}: {left[0]:.3f} of its best cut, {left[1]:.3f} of all "
                        f"terms, wanted {WANTED_AT_64}"
                    )
    lines += [
        "",
        "All runs, as multiples of dense; and what is left at 64 terms of a run's R@1 at its best cut / of all terms. The "
        "best of a dozen cuts lies above the truth where few images make them differ.",
        "",
    ]
    heads = [f"{head}, wanted {ratio}" for head, ratio in WANTED.items()]
    heads += [f"{head} at 64 terms {spoken}, wanted {WANTED_AT_64}" for spoken in SIDES.values() for head in WAYS]
    lines += [f"| set | run (seeds) | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for name in [*plan["val"], *plan.get("test", {})]:
        for variant, records in found.items():
            got_H = [_of_dense(found, variant, baseline, name, head) for head in WANTED]
            left_W = [_at_64(records, name, way, side) for side in SIDES for way in WAYS.values()]
            if variant != baseline and any(got is not None for got in got_H):
                cells = " | ".join(
                    ["–" if got is None else f"{got:.2f}" for got in got_H]
                    + ["–" if left is None else f"{left[0]:.3f} / {left[1]:.3f}" for left in left_W]
                )
                lines.append(f"| {name} | {plan['variants'][variant]['title']} ({len(records)}) | {cells} |")
    return [*lines, ""]


def _of_dense(
    found: dict[str, list[dict[str, Any]]], variant: str, baseline: str, name: str, head: str
) -> float | None:
    """A variant's mean over the baseline's; None where one of them has no value, or the baseline's is 0."""
    ours, theirs = (_values(found[each], name, head) for each in (variant, baseline))
    return statistics.mean(ours) / statistics.mean(theirs) if ours and theirs and statistics.mean(theirs) > 0 else None


def _at_64(records: list[dict[str, Any]], name: str, way: str, side: str) -> tuple[float, float] | None:
    """R@1 with 64 terms over the best R@1 of any cut, and over that of all terms, means over seeds; None if not cut."""
    cuts = [
        # before 2026-11-28 both sides alone were cut
        {(line.get("side", "both"), line["kept"]): line[way] for line in record["sets"].get(name, {}).get("pruned", [])}
        for record in records
    ]
    expected, whole = (side, "top 64"), ("both", "all")
    if not all({expected, whole} <= of.keys() for of in cuts):
        return None
    means = {cut: statistics.mean(of[cut] for of in cuts) for cut in cuts[0] if all(cut in of for of in cuts)}
    best, all_terms = (means[expected] / than if than else 0.0 for than in (max(means.values()), means[whole]))
    return best, all_terms


def _plot(plan: dict[str, Any], found: dict[str, list[dict[str, Any]]], out: Path, baseline: str | None) -> None:
    """Recall of every run against its active terms, on the first validation set; the best dense run as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    first = next(iter(plan["val"]))
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, head in zip(figure.subplots(1, 2), ("t→i R@1", "i→t R@1"), strict=True):
        for place, (name, records) in enumerate(found.items()):
            recall = [100 * value for value in _values(records, first, head)]
            words = _values(records, first, "terms an image")
            if name == baseline:
                axis.axhline(
                    statistics.mean(recall), linestyle="--", color="gray", label=plan["variants"][name]["title"]
                )
            elif words:
                spread = statistics.stdev(recall) if len(recall) > 1 else 0
                shape = "os^D"[place // 10 % 4]  # colours come back after ten
                title = plan["variants"][name]["title"]
                axis.errorbar(statistics.mean(words), statistics.mean(recall), spread, fmt=shape, label=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set(xlabel="active terms per image", ylabel=f"{head}, %", title=first)
        axis.grid(alpha=0.3)
    figure.axes[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "recall_against_terms.png")


if __name__ == "__main__":
    from run import read_plan

    if len(sys.argv) < 3:
        sys.exit(__doc__)
    write_table(read_plan(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3:] or ["*"])

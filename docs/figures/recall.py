"""Draws R@1 on validation against active terms or index bytes of an image, every run of a record.

python docs/figures/recall.py
"""

import runpy
from itertools import accumulate
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]
TABLES = runpy.run_path(str(DOCS / "figures" / "tables.py"))
TERMS, BYTES = "words an image", "bytes an image"
LABELS = {TERMS: "active terms of an image", BYTES: "index bytes of an image"}


def main() -> None:
    """Writes the pictures of docs/results/index.md and benchmarks/real_encoders/README.md."""
    for name in ("emoji", "flickr8k"):
        rows = TABLES["_rows"](f"paper_table_{name}_2026-11-28")
        runs = {row["run (seeds)"]: row for heading, _, row in rows if heading == name}
        draw(runs, TERMS, DOCS / "results" / f"recall_{name}.png")
    draw(sized("real_encoders_flickr8k_2026-12-01"), BYTES, DOCS / "results" / "recall_bytes.png")


def sized(record: str) -> dict[str, dict[str, str]]:
    """Rows of a record of benchmarks/real_encoders: R@1 on validation, and bytes of the index of the first seed."""
    sizes = {row["variant"]: row[BYTES] for _, _, row in TABLES["_rows"](record) if BYTES in row}
    runs = {}
    for heading, _, row in TABLES["_rows"](record):
        if heading == "val" and row["variant (seeds)"] != "BM25 on captions":  # human captions are no model's embedding
            runs[row["variant (seeds)"]] = {BYTES: sizes[row["variant (seeds)"]]} | {
                f"{way} R@1": row[f"{way} R@1 / 5 / 10"].split(" / ")[0].replace("±", " ± ") for way in ("t→i", "i→t")
            }
    return runs


def draw(runs: dict[str, dict[str, str]], axis: str, path: Path) -> None:
    """A panel for each direction; means and standard deviations over seeds.

    Dense CLIP is a line if it has no place on the axis, else the line is the best R@1 up to there (Pareto front).
    """
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, way in zip(panels, ("t→i", "i→t"), strict=True):
        placed = {name: row for name, row in runs.items() if row[axis] != "–"}
        if "dense CLIP" in placed:
            front = sorted((value(row[axis])[0], value(row[f"{way} R@1"])[0]) for row in placed.values())
            best = list(accumulate((mean for _, mean in front), max))
            panel.step([size for size, _ in front], best, where="post", color="grey", linestyle="--")
        else:
            panel.axhline(value(runs["dense CLIP"][f"{way} R@1"])[0], color="grey", linestyle="--", label="dense CLIP")
        for n, (name, row) in enumerate(placed.items()):
            mean, deviation = value(row[f"{way} R@1"])
            style = {"color": f"C{n % 10}", "marker": "os^"[n // 10]}
            panel.errorbar(value(row[axis])[0], mean, deviation, linestyle="", label=name.replace("`", ""), **style)
        panel.set(xscale="log", xlabel=LABELS[axis], ylabel=f"{way} R@1, %")
        panel.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def value(cell: str) -> tuple[float, float]:
    """Mean and standard deviation of a cell; 0 for one seed."""
    mean, _, deviation = cell.partition(" ± ")
    return float(mean), float(deviation or 0)


if __name__ == "__main__":
    main()

"""Draws R@1 against active terms of an image, every run of a record of benchmarks/paper_table on its validation set.

python docs/figures/recall.py
"""

import runpy
from pathlib import Path

import matplotlib.pyplot as plt

DOCS = Path(__file__).parents[1]
TABLES = runpy.run_path(str(DOCS / "figures" / "tables.py"))
TERMS = "words an image"


def main() -> None:
    """Writes the pictures of docs/results/index.md."""
    for name in ("emoji", "flickr8k"):
        rows = TABLES["_rows"](f"paper_table_{name}_2026-11-28")
        runs = {row["run (seeds)"]: row for heading, _, row in rows if heading == name}
        draw(runs, DOCS / "results" / f"recall_{name}.png")


def draw(runs: dict[str, dict[str, str]], path: Path) -> None:
    """A panel for each direction; means and standard deviations over seeds, dense CLIP as a line."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, way in zip(panels, ("t→i", "i→t"), strict=True):
        dense, _ = value(runs["dense CLIP"][f"{way} R@1"])
        panel.axhline(dense, color="grey", linestyle="--", label="dense CLIP")
        for n, (name, row) in enumerate((name, row) for name, row in runs.items() if row[TERMS] != "–"):
            mean, deviation = value(row[f"{way} R@1"])
            style = {"color": f"C{n % 10}", "marker": "os^"[n // 10]}
            panel.errorbar(value(row[TERMS])[0], mean, deviation, linestyle="", label=name.replace("`", ""), **style)
        panel.set(xscale="log", xlabel="active terms of an image", ylabel=f"{way} R@1, %")
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

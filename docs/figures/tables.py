"""Fills the figures of README.md, docs/ and benchmarks/*/README.md from the records in benchmarks/results.

python docs/figures/tables.py

A table, sentence or number stands between `<!-- figures: NAME -->` and `<!-- /figures -->`. The section `## NAME` of
tables.jinja makes it from cells of the records and from benchmarks/scaling.py, so that text and records cannot disagree.
"""

import functools
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*/README.md")]
BLOCK = re.compile(r"(<!-- figures: (\S+) -->\n?).*?(\n?<!-- /figures -->)", re.DOTALL)
#: names in the records, which are not rewritten, and in the docs
NAMES = {
    " in all stages|, in the paper's form": "",
    "a quarter of the loss on own words": "masked loss weight 0.25",
    "stages 2 and 3 without own words in the loss": "no masked loss in stages 2 and 3",
    "own words lead by 3": "margin 3",
    "; the ViT": ", ViT",
    "no leak": "negative slope 0",
    "one word matrix for both sides": "shared vocabulary matrix (removed)",
    "words from the class token": "class token (removed)",
    "^(L1|DF-FLOPS|overuse penalty) in stage 3": r"\1 in stage 3 (removed)",
    "λ adapted to 64 and 16 words": "`target`: 64 and 16 terms",
    " of (images|texts)": r" \1",
}


def main() -> None:
    """Writes the figures of every page anew."""
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page's text with its figures as the records have them."""
    return BLOCK.sub(lambda block: block[1] + _sections()[block[2]] + block[3], text)


@functools.cache
def _sections() -> dict[str, str]:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["mean"] = lambda value: re.sub(r" ?± ?[\d.]+", "", value)
    environment.globals |= {"row": row, "rows": names, "cell": cell, "text": text, "load": load, "plan": plan}
    template = (Path(__file__).parent / "tables.jinja").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (\S+)\n", environment.from_string(template).render(), flags=re.MULTILINE)
    return {name: re.sub(r"\n{3,}", "\n\n", body.strip()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def row(record: str, section: str, *labels: str) -> dict[str, str]:
    """The first row with these first cells, by column, in a record's tables below a heading or the start of a line."""
    for heading, line, cells in _rows(record):
        if (heading.split(":")[0] == section or line.startswith(section)) and tuple(cells.values())[
            : len(labels)
        ] == labels:
            return cells
    raise KeyError(f"{record}: no row {labels} below {section!r}")


def names(record: str, section: str) -> list[str]:
    """The first cells of the rows below a heading."""
    return [next(iter(cells.values())) for heading, _, cells in _rows(record) if heading == section]


@functools.cache
def _rows(record: str) -> list[tuple[str, str, dict[str, str]]]:
    """Heading, last line before the table, and cells of each row; a repeated column has the name of the one before too."""
    rows, heading, above, heads = [], "", "", []
    for line in text(record, "(?s).*").splitlines():
        cells = [cell.strip() for cell in re.split(r" ?\|(?: |$)", line)[1:-1]]
        if line.startswith("## "):
            heading, above, heads = line[3:].split(" (")[0], "", []
        elif not line.startswith("|"):
            above, heads = line or above, []
        elif not heads:
            heads = [head if head not in cells[:n] else f"{cells[n - 1]} {head}" for n, head in enumerate(cells)]
        elif cells:
            rows.append((heading, above, _named(dict(zip(heads, cells, strict=True)))))
    return rows


def _named(cells: dict[str, str]) -> dict[str, str]:
    """A row whose name, if it ends with its number of seeds, is that of the docs."""
    for head in ("run (seeds)", "variant (seeds)"):
        if head in cells:
            cells[head], seeds = re.fullmatch(r"(.*?)(?: ←)? \((\d+)\)", cells[head]).groups()  # type: ignore[union-attr]
            for old, new in NAMES.items():
                cells[head] = re.sub(old, new, cells[head])
            cells["seeds"] = seeds
    return cells


def cell(record: str, part: str, run: str, measure: str) -> str:
    """Of a run of benchmarks/paper_table: `R@K` t→i / i→t, `terms` image / text, `times` R@1 ÷ dense, or a column."""
    if measure == "times":
        found = row(record, "Targets", part, run) if run != "dense CLIP" else {}
        return " / ".join(found.get(head, "–") for head in ("t→i R@1, wanted 1.13", "i→t R@1, wanted 1.08"))
    found = row(record, part, run)
    if measure == "terms":
        values = [found[head].split(" ±")[0] for head in ("words an image", "words a text")]
        return "–" if values[0] == "–" else " / ".join(f"{float(value):.0f}" for value in values)
    if measure.startswith("R@"):
        return f"{found[f't→i {measure}']} / {found[f'i→t {measure}']}".replace(" ± ", "±")
    return found[measure].split(" ±")[0]


def text(record: str, pattern: str) -> str:
    """The first group, or all, of what a pattern finds in a record."""
    match = re.search(pattern, (RECORDS / f"{record}.md").read_text(encoding="utf-8"))
    if match is None:
        raise KeyError(f"{record}: nothing matches {pattern!r}")
    return match[match.re.groups and 1]


def load(record: str) -> Any:
    """A record in JSON."""
    return json.loads((RECORDS / f"{record}.json").read_text(encoding="utf-8"))


def plan(towers: str, pairs: int, gpus: int, micro: int, strategy: str = "ddp", recompute: bool = False) -> Any:
    """Memory (GiB), bytes received and seconds of a step with `pairs` a GPU, as benchmarks/scaling.py computes them."""
    scaling = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    planned = scaling["Plan"](pairs * gpus, gpus, micro, 30522, 300, 1.1, strategy == "fsdp2", recompute, 2)
    pair = scaling["towers"](30522)[towers]
    memory = planned.memory(*pair)
    fresh = memory.pop("the same while all terms are active")
    parts = list(memory.values())  # weights, gradients, optimiser, gathered; activations; embeddings, entries, ...
    seconds = planned.seconds(*pair, 400e12, 50e12, 50e9)
    sums = (sum(parts[:4]), parts[4], sum(parts[5:]), sum(parts), sum(parts) + fresh - parts[6])
    step = sum(value for key, value in seconds.items() if key not in ("embeddings, dense", "embeddings, columns"))
    return SimpleNamespace(gib=[part / 2**30 for part in sums], received=planned.received(), seconds=seconds, step=step)


if __name__ == "__main__":
    main()

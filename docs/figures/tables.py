"""Fills the tables of docs/*.md from the records in benchmarks/results, so that text and figures cannot disagree.

python docs/figures/tables.py

A table stands between `<!-- table: RECORD | COLUMNS | ROWS -->` and `<!-- /table -->`. RECORD is a file of that folder
without its ending. A column is `SET MEASURE`: `R@K` shows t→i / i→t, `terms` image / text, `times` R@1 ÷ dense CLIP's.
ROWS, separated by `;`, are optional. `<!-- table: summary -->` is the table of `SUMMARY`.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1]
RECORDS = DOCS.parent / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- /table -->)", re.DOTALL)
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
PAIRS = {"terms": ("terms an image", "terms a text"), "times": ("t→i R@1, wanted 1.13", "i→t R@1, wanted 1.08")}
#: of the summary: what was trained, record, run, validation set
SUMMARY = (
    ("Emoji, λ 1e-4", "paper_table_emoji_2026-11-28", "three stages", "emoji"),
    ("Emoji, λ 1e-2", "paper_table_emoji_2026-11-28", "λ 1e-2", "emoji"),
    ("Flickr8k, λ 1e-4", "paper_table_flickr8k_2026-11-28", "three stages", "flickr8k"),
    ("Flickr8k, λ 1e-3", "paper_table_flickr8k_2026-11-28", "λ 1e-3", "flickr8k"),
    ("same, seeds 3 to 5", "paper_table_flickr8k_seeds_3_to_5_2026-11-29", "λ 1e-3", "flickr8k"),
    ("Flickr8k, λ 1e-2 / 1e-3", "paper_table_flickr8k_six_seeds_2026-11-29", "λ 1e-2 images, 1e-3 texts", "flickr8k"),
    ("Flickr8k, ViT-S, 128 px", "paper_table_flickr8k_gpu_2026-11-28", "three stages", "flickr8k"),
)


def main() -> None:
    """Writes the tables of every page anew."""
    for page in DOCS.glob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page's text with its tables as the records have them."""
    return BLOCK.sub(lambda block: block[1] + "\n".join(_table(block[2])) + "\n" + block[3], text)


def _table(spec: str) -> list[str]:
    if spec == "summary":
        return _summary()
    record, columns, *rows = spec.split(" | ")
    runs = _read(record)
    heads = columns.split(", ")
    shown = rows[0].split("; ") if rows else list(runs)
    lines = [
        [f"{name} ({runs[name]['seeds']})", *(_cell(runs[name], *head.split(" ", 1)) for head in heads)]
        for name in shown
    ]
    return _rows(["Run (seeds)", *(head.replace("word 1st", "term 1st") for head in heads)], lines)


def _summary() -> list[str]:
    lines = []
    for label, record, run, validation in SUMMARY:
        runs = _read(record)
        for part in (validation, f"{validation}-test"):
            means = [re.sub(r"±[\d.]+", "", _cell(runs[name], part, "R@1")) for name in ("dense CLIP", run)]
            values = [*means, _cell(runs[run], part, "times"), _cell(runs[run], part, "terms"), runs[run]["seeds"]]
            lines.append([label, "test" if part.endswith("-test") else "val", *values])
    titles = ["Data, λ image / text", "Set", "Dense CLIP", "STAIR", "STAIR ÷ dense", "Active terms", "Seeds"]
    return _rows(titles, lines)


def _rows(titles: list[str], lines: list[list[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(line)} |" for line in (titles, *lines)]
    return [head, "|" + "---|" * len(titles), *body]


def _cell(run: dict[str, str], part: str, measure: str) -> str:
    pair = PAIRS.get(measure, (f"t→i {measure}", f"i→t {measure}") if measure.startswith("R@") else (measure,))
    values = [run.get(f"{part} {head}", "–").replace(" ± ", "±") for head in pair]
    if not measure.startswith("R@"):
        values = [value.split("±")[0] for value in values]
    if measure == "terms" and "–" not in values:
        values = [f"{float(value):.0f}" for value in values]
    return values[0] if len(set(values)) == 1 and values[0] == "–" else " / ".join(values)


def _read(record: str) -> dict[str, dict[str, str]]:
    """Every run of a record by its name: its figures by `SET HEAD`, and `seeds`."""
    runs: dict[str, dict[str, str]] = {}
    part, heads = "", [""]
    text = (RECORDS / f"{record}.md").read_text(encoding="utf-8").split("\n## Seeds")[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("## "):
            part, heads = line[3:].split(" (")[0], [""]
        elif line.startswith("| ") and "run (seeds)" in cells:
            heads = [re.sub("^words a", "terms a", cell) for cell in cells]
        elif line.startswith("| "):
            at = heads.index("run (seeds)")
            name, seeds = re.fullmatch(r"(.*?)(?: ←)? \((\d+)\)", cells[at]).groups()  # type: ignore[union-attr]
            for old, new in NAMES.items():
                name = re.sub(old, new, name)
            where = part if at == 0 else cells[0]
            run = runs.setdefault(name, {"seeds": seeds})
            run |= {f"{where} {head}": cell for head, cell in zip(heads[at + 1 :], cells[at + 1 :], strict=True)}
    return runs


if __name__ == "__main__":
    main()

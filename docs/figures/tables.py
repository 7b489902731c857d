"""Fills the tables of the pages in docs/ from the records in benchmarks/results, so that text and figures cannot disagree.

python docs/figures/tables.py

A table stands between `<!-- table: RECORD | COLUMNS | ROWS -->` and `<!-- /table -->`. RECORD is a file of that folder
without its ending. A column is `SET MEASURE`: `R@K` shows t→i / i→t, `terms` image / text, `times` R@1 ÷ dense CLIP's.
ROWS, separated by `;`, are optional. A specification may have several lines. `<!-- table: summary -->` is the table of
`SUMMARY`, `<!-- table: resources -->` that of `PLANS`, which benchmarks/scaling.py computes.
"""

import re
import runpy
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
    ("Flickr8k, λ 1e-3, seeds 3 to 5", "paper_table_flickr8k_seeds_3_to_5_2026-11-29", "λ 1e-3", "flickr8k"),
    ("Flickr8k, λ 1e-2 / 1e-3", "paper_table_flickr8k_six_seeds_2026-11-29", "λ 1e-2 images, 1e-3 texts", "flickr8k"),
    ("Flickr8k, ViT-S, 128 px", "paper_table_flickr8k_gpu_2026-11-28", "three stages", "flickr8k"),
)

#: encoders, pairs of a GPU, GPUs, pairs encoded at a time, strategy, recompute
PLANS = (
    ("small", 256, 1, 256, "ddp", False),
    ("base", 256, 1, 256, "ddp", False),
    ("base", 1024, 1, 128, "ddp", False),
    ("base", 1024, 1, 128, "ddp", True),
    ("base", 128, 8, 128, "ddp", False),
    ("base", 128, 8, 128, "fsdp2", False),
    ("base", 128, 128, 128, "ddp", False),
    ("large", 128, 8, 128, "ddp", False),
    ("large", 128, 8, 32, "fsdp2", True),
)
ENCODERS = {"small": "ViT-S/16, text width 384", "base": "ViT-B/16, BERT-base", "large": "ViT-L/14, BERT-large"}


def main() -> None:
    """Writes the tables of every page anew."""
    for page in DOCS.rglob("*.md"):
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")


def filled(text: str) -> str:
    """A page's text with its tables as the records have them."""
    return BLOCK.sub(lambda block: block[1] + "\n".join(_table(" ".join(block[2].split()))) + "\n" + block[3], text)


def _table(spec: str) -> list[str]:
    if spec in ("summary", "resources"):
        return _summary() if spec == "summary" else _resources()
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


def _resources() -> list[str]:
    """Memory and time of a step: computed for `PLANS`, measured on one H200."""
    scaling = runpy.run_path(str(RECORDS.parent / "scaling.py"))
    lines = []
    for name, pairs, gpus, micro, strategy, recompute in PLANS:
        plan = scaling["Plan"](pairs * gpus, gpus, micro, 30522, 300, 1.1, strategy == "fsdp2", recompute, 2)
        pair = scaling["towers"](30522)[name]
        parts = list(
            plan.memory(*pair).values()
        )  # weights, gradients, optimizer, gathered; activations; embeddings ...
        fresh = parts.pop(7)  # of all terms active, in place of the entries
        seconds = plan.seconds(*pair, 400e12, 50e12, 50e9)
        step = sum(value for key, value in seconds.items() if key not in ("embeddings, dense", "embeddings, columns"))
        gib = [sum(part) / 2**30 for part in (parts[:4], parts[4:5], parts[5:], parts, [*parts, fresh - parts[6]])]
        how = f"{strategy}{', recompute' if recompute else ''}"
        setup = [ENCODERS[name], f"{pairs}{f', micro-batches of {micro}' if micro < pairs else ''}", str(gpus), how]
        lines.append([*setup, *(f"{value:.1f}" for value in gib), f"{step:.2f} s", "computed"])
    record = (RECORDS / "gpu_step_h200_2026-11-29.md").read_text(encoding="utf-8")
    first, all_active = (
        [float(cell.split()[0]) for cell in re.findall(rf"\| STAIR \| {share}% \| (.*?) \| .*? \| (.*?) \|", record)[0]]
        for share in (1, 100)
    )
    peaks = [f"{megabytes * 1e6 / 2**30:.1f}" for megabytes in (first[1], all_active[1])]
    lines.insert(
        2, [ENCODERS["base"], "256", "1 H200", "ddp", "", "", "", *peaks, f"{first[0] / 1000:.2f} s", "measured"]
    )
    titles = ["Encoders", "Pairs a GPU", "GPUs", "Strategy", "Weights, optimizer", "Activations", "Embeddings, loss"]
    return _rows([*titles, "Sum, GiB", "All terms active", "Step", "Source"], lines)


def _rows(titles: list[str], lines: list[list[str]]) -> list[str]:
    head, *body = [f"|{'|'.join(line)}|" for line in (titles, *lines)]
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

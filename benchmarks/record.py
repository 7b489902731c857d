"""Prints a finished run of the three stages as Markdown, from its own event files: as in benchmarks/results/small_runs_*.

python benchmarks/record.py runs/emoji
"""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

COLUMNS = {
    "i→t R@1/5/10": ("i2t/recall@1", "i2t/recall@5", "i2t/recall@10"),
    "t→i R@1/5/10": ("t2i/recall@1", "t2i/recall@5", "t2i/recall@10"),
    "median rank i→t / t→i": ("i2t/median_rank", "t2i/median_rank"),
    "active terms image / text": ("sparsity/image/active_terms", "sparsity/text/active_terms"),
    "FLOPs a pair": ("sparsity/flops_per_pair",),
    "grounding @10, @1": ("grounding@10", "grounding@1"),
    "the commonest 10": ("grounding@10_baseline",),
}
PERCENT = ("recall", "grounding")


def main(run: Path) -> None:
    """Prints a table with a row for each stage and validation set."""
    print("| stage (steps, minutes) | set | " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * (len(COLUMNS) + 2))
    for folder in sorted(run.glob("stage?")):
        # a resumed stage has several event files, read in order
        log = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        log.Reload()
        tags = set(log.Tags()["scalars"])
        steps = log.Scalars("train/loss")
        minutes = (steps[-1].wall_time - log.FirstEventTimestamp()) / 60
        last = {tag: log.Scalars(tag)[-1] for tag in tags if tag.startswith("val/") and tag.count("/") >= 2}
        head = f"{folder.name} ({steps[-1].step + 1}, {minutes:.0f})"
        for name in dict.fromkeys(tag.split("/")[1] for tag in sorted(last)):
            cells = [_cell([last.get(f"val/{name}/{key}") for key in keys], keys) for keys in COLUMNS.values()]
            print(f"| {head} | {name} | " + " | ".join(cells) + " |")


def _cell(events: list, keys: tuple[str, ...]) -> str:
    if None in events:
        return "–"
    percent = any(word in keys[0] for word in PERCENT)
    return " / ".join(f"{100 * event.value:.1f}" if percent else f"{event.value:.1f}" for event in events)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

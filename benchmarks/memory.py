"""Resident memory of a small training over many steps and a hundred validations.

python -m benchmarks.memory FOLDER --steps 10000     # by quarter, in MiB, and FOLDER/memory.json
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.faults import SMALL, stage_args
from datamodules.synthetic import write_scenes
from lightning_modules.stage import StairStage
from main import main as train


def memory(folder: Path, steps: int) -> dict[str, Any]:
    """Mean resident memory in each quarter of a training of stage 1 that reads its own data."""
    torch.set_num_threads(1)
    data, found = folder / "data", list[tuple[int, float]]()
    write_scenes(data, train=64, val=12, image_size=32)
    (data / "small.yaml").write_text(SMALL)
    step, page = StairStage.training_step, os.sysconf("SC_PAGE_SIZE")

    def noted(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step % max(1, steps // 200) == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            found.append((self.trainer.global_step, resident / 2**20))
        return step(self, batch, batch_idx)

    StairStage.training_step = noted  # type: ignore[method-assign]
    interval = max(1, steps // 100)
    more = ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(interval), "--data.workers", "0"]
    train([*stage_args(data, folder / "run", 1, 1), *more])
    quarters = [np.mean([mib for at, mib in found if q <= 4 * at / steps < q + 1]) for q in range(4)]
    return {"steps": steps, "validations": steps // interval, "mib_by_quarter": [round(float(q), 1) for q in quarters]}


def main() -> None:
    """Trains, prints the memory and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for data and runs; must not exist")
    parser.add_argument("--steps", type=int, default=10_000)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    result = memory(asked.folder, asked.steps)
    print(result)
    (asked.folder / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

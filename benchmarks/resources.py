"""Memory and time of a training step by encoders, batch and devices, as one table.

    python benchmarks/resources.py > benchmarks/results/resources_DATE.md

Cells are computed by `benchmarks/scaling.py` (c) or measured (m). The measured cell and the speed of the computed ones come
from the record of `benchmarks/gpu_check.py --section step`: one H200, 256 pairs, captions of up to 37 tokens.
"""

import re
from dataclasses import replace
from pathlib import Path

from scaling import Plan, Tower, towers

RECORD = Path(__file__).parent / "results" / "gpu_step_h200_2026-11-29.md"
NAMES = {"small": "ViT-S/16, BERT 384", "base": "ViT-B/16, BERT-base", "large": "ViT-L/14, BERT-large"}
SIZES = [(256, 1), (1024, 1), (1024, 8), (4096, 8), (16384, 128)]
VOCABULARY, TOKENS, GB = 30522, 37, 1e9
LOSS_SPEED, BANDWIDTH = 50e12, 50e9  # assumed: FLOP/s of the loss, bytes a second between devices
ROOM = 0.9  # of a device's memory; the rest is CUDA's own, the allocator's and the input's


def measured() -> tuple[float, float]:
    """Seconds of a step and its peak in bytes, 1 % active terms."""
    row = re.search(r"\| STAIR \| 1% \| ([\d.]+) .* \| (\d+) \|", RECORD.read_text(encoding="utf-8"))
    return float(row[1]) / 1e3, float(row[2]) * 1e6  # type: ignore[index]


def encoders(name: str) -> tuple[Tower, Tower]:
    """Image and text tower, the text side at the captions' length."""
    image, text = towers(VOCABULARY)[name]
    return image, replace(text, positions=TOKENS)


def plan(pairs: int, devices: int, micro: int) -> Plan:
    """A step with DDP, 300 active terms and both forms of a text."""
    return Plan(pairs, devices, micro, VOCABULARY, 300, 1.1, sharded=False, recompute=False, forms=2)


def parts(name: str, step: Plan) -> dict[str, float]:
    """Bytes on a device: model, activations, embeddings; their sum, and the sum while all terms are active."""
    memory = step.memory(*encoders(name))
    while_dense = memory.pop("the same while all terms are on")
    model = sum(memory[key] for key in ("parameters (fp32)", "gradients (fp32)", "optimiser (AdamW)"))
    total = sum(memory.values())
    start = total - memory["received entries"] + while_dense
    return {
        "model": model,
        "activations": memory["activations"],
        "embeddings": total - model - memory["activations"],
        "sum": total,
        "start": start,
    }


def largest_micro(name: str, pairs: int, devices: int, memory: float) -> int:
    """The largest power of two of pairs at a time that fits into a device's memory; 0 if none does."""
    micro = pairs // devices
    while micro and parts(name, plan(pairs, devices, micro))["start"] > ROOM * memory:
        micro //= 2
    return micro


def rows() -> list[list[str]]:
    """The cells of the table."""
    seconds, peak = measured()
    base = encoders("base")
    speed = 3 * 256 * sum(tower.flops(VOCABULARY) for tower in base) / seconds
    lines = []
    for name, label in NAMES.items():
        for pairs, devices in SIZES:
            large, small = (largest_micro(name, pairs, devices, memory * GB) for memory in (80, 24))
            step = plan(pairs, devices, large or 1)
            memory = parts(name, step)
            time = step.seconds(*encoders(name), speed, LOSS_SPEED, BANDWIDTH)
            total = sum(value for key, value in time.items() if not key.endswith((", dense", ", columns")))
            cells = [f"{memory[key] / GB:.1f} c" for key in ("model", "activations", "embeddings", "sum", "start")]
            cells.append(f"{total:.2g} c")
            if (name, pairs, devices) == ("base", 256, 1):
                cells[3] += f", {peak / GB:.1f} m"
                cells[5] = f"{seconds:.2g} m"
            whole = pairs // devices
            lines.append([label, str(pairs), str(devices), *(_micro(of, whole) for of in (large, small)), *cells])
    return lines


def _micro(micro: int, whole: int) -> str:
    return "all" if micro == whole else str(micro or "none")


def main() -> None:
    """Prints the table as Markdown."""
    heads = [
        "Encoders", "Pairs", "Devices", "Micro-batch, 80 GB", "24 GB", "Model, GB", "Activations, GB", "Embeddings, GB",
        "Sum, GB", "All terms active, GB", "Seconds a step",
    ]  # fmt: skip
    for line in (heads, ["---"] * len(heads), *rows()):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()

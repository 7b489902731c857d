"""How the benchmarks here measure: variants in turn in one process, medians, peaks in fresh processes, and what it ran on.

On the CPU time is CPU time of one thread, which other processes on the machine disturb least; on a GPU it is the clock.
"""

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def interleaved(variants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after one round to warm up; a round runs every variant once."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for at in range(rounds + 1):
        for name, run in variants.items():
            _wait(device)
            started = _clock(device)
            run()
            _wait(device)
            if at:
                seconds[name].append(_clock(device) - started)
    return seconds


def _clock(device: torch.device) -> float:
    return time.perf_counter() if device.type == "cuda" else time.process_time()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How much memory a run adds at its highest; to be asked once in a process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest mark so far; of Linux, as the next line
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def in_fresh_process(*args: str) -> int:
    """The last line that this script, called with these further words, prints: a number."""
    done = subprocess.run([sys.executable, *sys.argv, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(json.loads(done.stdout.splitlines()[-1]))


def header(title: str, device: torch.device) -> str:
    """Title, command, machine, versions, date: what a record needs to be repeated."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
    today, spec = datetime.date.today().isoformat(), sys.modules["__main__"].__spec__
    command = " ".join([f"-m {spec.name}" if spec else sys.argv[0], *sys.argv[1:]])
    return f"# {title}\n\n`python {command}`\n{chip}; {versions}; {today}\n"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def table(seconds: dict[str, list[float]], base: str, peaks: dict[str, int] | None = None) -> str:
    """Medians, their ratios to `base`, the range over rounds, and peaks where given."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    lines = [
        f"| variant | s, median of {len(seconds[base])} (range) | to {base} | peak MB | to {base} |",
        "|---|---|---|---|---|",
    ]
    for name, values in seconds.items():
        peak = ["–", "–"]
        if peaks:
            peak = [f"{peaks[name] / 1e6:.0f}", f"{peaks[name] / max(1, peaks[base]):.3f}"]
        span = f"{middle[name]:.4g} ({min(values):.4g}–{max(values):.4g})"
        lines.append(f"| {name} | {span} | {middle[name] / middle[base]:.3f} | {peak[0]} | {peak[1]} |")
    return "\n".join(lines) + "\n"

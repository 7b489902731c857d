"""Every figure of a GPU in one command: tests, forms of the head, profile and time of whole steps, open_clip beside them.

python benchmarks/gpu_check.py --output benchmarks/results       under 8 minutes on an H200; writes SECTION_CHIP_DATE.md
python benchmarks/gpu_check.py --sections head --seconds 200     one section, stopped after 200 s
python benchmarks/gpu_check.py --rehearse                        the same code at tiny sizes on the CPU, without the tests
Each section runs in a process of its own, so that a fault in one leaves the others. `openclip` needs `open_clip_torch`.
"""

import argparse
import collections
import datetime
import importlib.util
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import head
import step
import torch
from ratios import header

from lightning_modules.parallel import blocks, compile_blocks
from stair.kernels import vocabulary_max

SECTIONS = ("step", "openclip", "head", "profile", "tests")
FULL = {"batch": 256, "positions": 196, "width": 768, "num_terms": 30_522, "towers": "base", "repeats": 10, "steps": 5}
TINY = {"batch": 4, "positions": 5, "width": 32, "num_terms": 200, "towers": "demo", "repeats": 2, "steps": 1}
# words, positions, rows of a tile; warps and stages
TILES = [(128, 256, 32, 8, 3), (128, 256, 32, 8, 4), (128, 256, 16, 8, 3), (128, 128, 16, 4, 3)]
# entries read at a time and warps of the products of compressed rows; words sorted at a time and warps of the list
PRODUCTS = [(4, 1, 1024, 4), (8, 1, 1024, 4), (16, 1, 1024, 4), (8, 1, 512, 4), (8, 1, 1024, 8), (8, 1, 2048, 8)]
SHARES = (0.01, 0.1, 1.0)


def median(run, args, repeats=None):
    """Seconds of a run. On a GPU of several in a row, launched while the device is still busy, so that no gap counts."""
    for _ in range(3):
        run()
    return statistics.median(once(run, args) for _ in range(repeats or args.repeats))


def once(run, args, runs=3):
    if args.device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(20_000_000)  # clock cycles: some 10 ms in which the host gets ahead
    begin.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / runs


def row(name, *cells):
    print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def rows_head(*names):
    row("", *names)
    print("|---" * (len(names) + 1) + "|")


# ------------------------------------------------------------------ the head


def tests(args):
    """All tests that need a device: exactness of head and loss, stages in bf16 and fp16, ranks, resuming, serving."""
    run_tests(args, ["-m", "gpu", *(["-n", "8"] if importlib.util.find_spec("xdist") else [])])


def run_tests(args, words):
    command = [sys.executable, "-m", "pytest", "-q", "-x" if args.device == "cpu" else "--maxfail=9", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    print(f"`{' '.join(['pytest', *args])}`\n\n```\n{done.stdout[-6000:]}\n```")


def forward(args):
    """Products of the head's size, and the forward kernel in several sizes of its tiles."""
    hidden, mask, weight, bias = (value.detach() for value in head.inputs(args, 0.01))
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    flops = 2 * args.batch * args.positions * args.num_terms * args.width
    aligned = torch.nn.functional.pad(weight, (0, 0, 0, -args.num_terms % 64))
    flat = hidden.flatten(0, 1)
    rows_head("ms", "TFLOP/s", "to the aligned product")
    base = None
    runs = {"aligned product": lambda: flat @ aligned.T, "product": lambda: flat @ weight.T}
    runs["head, forward"] = lambda: vocabulary_max(hidden, mask, weight, bias)
    for name, run in runs.items():
        took = median(run, args)
        base = base or took
        row(name, f"{took * 1e3:.3f}", f"{flops / took / 1e12:.0f}", f"{took / base:.3f}")
    if args.device == "cpu":
        return
    import stair.kernels.triton_head as triton_head

    want = vocabulary_max(hidden, mask, weight, bias)
    for words, tile, rows, warps, stages in TILES if args.forms else ():
        sizes = {"BLOCKS": {**triton_head.BLOCKS, "BLOCK_V": words}, "TILE": tile, "ROWS": rows}
        name = f"words {words}, positions {tile}, rows {rows}, warps {warps}, stages {stages}"
        with patch.multiple(triton_head, **sizes, OPTIONS={"num_warps": warps, "num_stages": stages}):
            try:
                equal = torch.equal(vocabulary_max(hidden, mask, weight, bias), want)
                took = median(runs["head, forward"], args)
                row(name, f"{took * 1e3:.3f}", f"{flops / took / 1e12:.0f}", f"{took / base:.3f}, same bits: {equal}")
            except Exception as error:  # too much shared memory, say
                row(name, repr(error)[:100], "", "")


def backward(args):
    """The backward pass at several shares of active terms, in all sizes of its product."""
    forms = [None]
    if args.device == "cuda" and args.forms:
        import stair.kernels.triton_head as triton_head

        forms += PRODUCTS
    rows_head(*(f"{share:.0%} active, ms" for share in SHARES))
    given = {share: head.inputs(args, share) for share in SHARES}
    for form in forms:
        cells = []
        for leaves in given.values():
            with torch.autocast(args.device, torch.bfloat16):
                out = vocabulary_max(*leaves)
            seed = torch.randn_like(out)
            expected = leaves[0], *leaves[2:]

            def run(out=out, expected=expected, seed=seed):
                torch.autograd.grad(out, expected, seed, retain_graph=True)

            if form is None:
                cells.append(f"{median(run, args) * 1e3:.3f}")
            else:
                product = {"BLOCK_A": form[0], "num_warps": form[1]}
                listed = {"BLOCK_V": form[2], "num_warps": form[3]}
                with patch.multiple(triton_head, PRODUCT=product, LIST=listed):
                    cells.append(f"{median(run, args) * 1e3:.3f}")
        name = f"entries {form[0]}, warps {form[1]}; words {form[2]}, warps {form[3]}" if form else "backward"
        row(name, *cells)
    if args.device == "cuda":
        print()
        kernels = collections.defaultdict(list)
        for share, leaves in given.items():
            with torch.autocast(args.device, torch.bfloat16):
                run = head.step(vocabulary_max, leaves, True)
            for name, ms in by_kernel(traced(run, args)).most_common(12):
                kernels[name].append(f"{share:.0%}: {ms:.3f}")
        rows_head("ms of a forward and backward pass, by share")
        for name, cells in kernels.items():
            row(f"`{name[:80]}`", ", ".join(cells))


def whole(args):
    """Forward and backward against other forms, time and peak memory."""
    rows_head("share", "ms", "to plain", "peak MB", "to plain")
    for share in (0.01, 1.0):
        given, base = head.inputs(args, share), None
        for name, form in head.variants(torch.device(args.device), args.device == "cuda").items():
            run = head.step(form, given, True)
            took = median(run, args, 5)
            at = peak(run, args)
            base = base or (took, at)
            cells = f"{took * 1e3:.2f}", f"{took / base[0]:.3f}", f"{at / 1e6:.0f}", f"{at / max(1, base[1]):.3f}"
            row(name, f"{share:.0%}", *cells)


def peak(run, args):
    if args.device == "cpu":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def head_section(args):
    for title, part in (("Forward", forward), ("Backward", backward), ("Forward and backward", whole)):
        print(f"\n## {title}\n")
        part(args)


# ------------------------------------------------------------------ whole steps


def traced(run, args, steps=2):
    """Events of a Chrome trace of some runs, times in ms divided by their number."""
    for _ in range(3):
        run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            run()
        if args.device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if "dur" in event]
    for event in events:
        event["ms"] = event["dur"] / 1e3 / steps
    return events


ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def by_kernel(events):
    total = collections.Counter()
    for event in events:
        if event.get("cat") in ON_DEVICE:
            total[event["name"]] += event["ms"]
    return total


def idle(events):
    """Share of the time between the first and the last kernel in which none runs."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_DEVICE)
    if not spans:
        return 0.0
    busy, reached = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1 - busy / (reached - spans[0][0])


def profile(args):
    """Kernels, gaps and host waits of a step, and what STAIR has more of than dense CLIP."""
    device = torch.device(args.device)
    stair, clip = step.models(args, device)
    parts = step.batch(args, stair, device)
    time_by_part(args, stair, clip, parts)
    kernels = {}
    traced(step.step(clip, parts, False, True), args)  # the first trace also measures how the profiler starts
    for share in (0.01, 1.0):
        step.activate(stair, parts, share)
        runs = {f"STAIR, {share:.0%}": step.step(stair, parts, True, True)}
        if share == 0.01:
            runs["dense CLIP"] = step.step(clip, parts, False, True)
        for name, run in runs.items():
            events = traced(run, args)
            kernels[name] = by_kernel(events)
            print(
                f"\n## {name}\n\ndevice idle between kernels {idle(events):.1%}, {kernels[name].total():.1f} ms busy\n"
            )
            calls = collections.Counter(e["name"] for e in events if e.get("cat") == "cuda_runtime")
            copies = collections.Counter(e["name"] for e in events if e.get("cat") == "gpu_memcpy")
            waits = {name: count for name, count in calls.items() if "Synchronize" in name or name == "cudaMemcpyAsync"}
            print(
                f"in two steps: {calls['cudaLaunchKernel']} launches; host waits and copies {waits}, {dict(copies)}\n"
            )
    for name in [name for name in kernels if name != "dense CLIP"]:
        more = collections.Counter(kernels[name])
        more.subtract(kernels["dense CLIP"])
        print(f"\n## {name}: kernels with the largest difference to dense CLIP\n")
        rows_head("ms a step", "more than dense CLIP")
        for kernel, ms in sorted(more.items(), key=lambda item: -abs(item[1]))[:40]:
            row(f"`{kernel[:110]}`", f"{kernels[name][kernel]:.3f}", f"{ms:+.3f}")


def time_by_part(args, stair, clip, parts):
    """Milliseconds of the parts of a step, as a table and as a picture."""
    shares = {}
    for share in (0.01, 1.0):
        step.activate(stair, parts, share)
        shares[f"STAIR, {share:.0%} active"] = marked(lambda mark: step.step(stair, parts, True, True, mark), args)
    shares["dense CLIP"] = marked(lambda mark: step.step(clip, parts, False, True, mark), args)
    names = list(shares["dense CLIP"])
    print("\n## Time by part\n")
    rows_head(*(f"{name}, ms" for name in names))
    for model, spent in shares.items():
        row(model, *(f"{spent[name]:.1f}" for name in names))
    if args.output:
        draw(shares, names, args.output / f"gpu_parts_{datetime.date.today()}.png")


def marked(build, args):
    """Median milliseconds between marks."""
    marks, spent = [], collections.defaultdict(list)

    def mark(part):
        marks.append((part, torch.cuda.Event(enable_timing=True) if args.device == "cuda" else time.perf_counter()))
        if args.device == "cuda":
            marks[-1][1].record()

    run = build(mark)
    for _ in range(args.steps + 3):
        run()
    synchronize(args)
    for (_, before), (part, after) in itertools.pairwise(marks[3 * 5 - 1 :]):
        ms = before.elapsed_time(after) if args.device == "cuda" else (after - before) * 1e3
        spent[part].append(ms)
    return {part: statistics.median(values) for part, values in spent.items()}


def draw(shares, names, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.2), layout="constrained")
    begin = dict.fromkeys(shares, 0.0)
    for name in names:
        axes.barh(list(shares), [spent[name] for spent in shares.values()], left=list(begin.values()), label=name)
        begin = {model: begin[model] + spent[name] for model, spent in shares.items()}
    axes.set_xlabel("ms of a training step")
    axes.legend(ncols=len(names), loc="lower center", bbox_to_anchor=(0.4, 1), frameon=False)
    figure.savefig(path, dpi=120)


def timed_steps(runs, args):
    """Seconds of a step of each variant in each round: several steps without a wait between them."""
    seconds = collections.defaultdict(list)
    for at in range(args.repeats // 2 + 1):
        for name, run in runs.items():
            synchronize(args)
            started = time.perf_counter()
            for _ in range(args.steps):
                run()
            synchronize(args)
            if at >= 1:
                seconds[name].append((time.perf_counter() - started) / args.steps)
    return seconds


def synchronize(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def step_section(args):
    """STAIR against dense CLIP, eager and compiled."""
    device = torch.device(args.device)
    stair, clip = step.models(args, device)
    parts = step.batch(args, stair, device)
    for compiled in (False, True):
        if compiled:
            for model in (stair, clip):
                compile_blocks(model, "inductor" if args.device == "cuda" else "eager")
        print(f"\n## {'compiled blocks' if compiled else 'eager'}\n")
        rows_head("active", "ms (range)", "to dense CLIP", "peak MB")
        for share in SHARES:
            step.activate(stair, parts, share)
            runs = {"dense CLIP": step.step(clip, parts, False, True), "STAIR": step.step(stair, parts, True, True)}
            show_steps(runs, f"{share:.0%}", args)


def show_steps(runs, share, args):
    seconds, base = timed_steps(runs, args), None
    for name, values in seconds.items():
        middle = statistics.median(values)
        base = base or middle
        span = f"{middle * 1e3:.1f} ({min(values) * 1e3:.1f}–{max(values) * 1e3:.1f})"
        row(name, share, span, f"{middle / base:.3f}", f"{peak(runs[name], args) / 1e6:.0f}")


def openclip_section(args):
    """Pairs a second, STAIR with 1 % of its terms active against open_clip with its own towers of the same size."""
    import openclip_step

    device = torch.device(args.device)
    stair, _ = step.models(args, device)
    parts = step.batch(args, stair, device)
    step.activate(stair, parts, 0.01)
    if args.rehearse:
        openclip_step.VISION.update(image_size=parts[0].shape[-1], layers=1, width=64, patch_size=8)
        openclip_step.TEXT.update(layers=1, width=64, heads=1)
    model, run = openclip_step.open_clip_step(args, parts[0])
    for compiled in (False, True):
        if compiled:
            backend = "inductor" if args.device == "cuda" else "eager"
            compile_blocks(stair, backend)
            for block in [*blocks(model.visual), *blocks(model.transformer)]:
                block.forward = torch.compile(block.forward, backend=backend)
        print(f"\n## {'compiled blocks' if compiled else 'eager'}\n")
        rows_head("pairs a second, median (range)", "to open_clip")
        seconds = timed_steps({"open_clip": run, "STAIR": step.step(stair, parts, True, True)}, args)
        for name, values in seconds.items():
            rate = sorted(args.batch / value for value in values)
            ratio = statistics.median(seconds["open_clip"]) / statistics.median(values)
            row(name, f"{statistics.median(rate):.0f} ({rate[0]:.0f}–{rate[-1]:.0f})", f"{ratio:.3f}")


RUN = dict(zip(SECTIONS, (step_section, openclip_section, head_section, profile, tests), strict=True))


def section(args):
    vars(args).update(TINY if args.rehearse else FULL)
    args.half, args.lengths = True, (8, 37)
    if args.device == "cpu":
        torch.set_num_threads(1)
    title = f"{args.section}, B={args.batch} T={args.positions} D={args.width} V={args.num_terms}, bf16"
    print(header(title, torch.device(args.device)), flush=True)
    RUN[args.section](args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--output", type=Path, help="folder of the records")
    parser.add_argument("--seconds", type=float, default=200, help="longest time of a section")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--forms", action="store_true", help="the head's kernels in other sizes of their tiles as well")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.device = "cpu" if args.rehearse else "cuda"
    if args.section:
        return section(args)
    failed, options = [], ["--rehearse"] * args.rehearse + ["--forms"] * args.forms
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        options += ["--output", str(args.output)]
    for name in args.sections:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--section", name, *options]
        with tempfile.TemporaryFile("w+") as printed:
            try:
                code = subprocess.run(command, stdout=printed, text=True, timeout=args.seconds).returncode
            except subprocess.TimeoutExpired:
                code = "stopped"
            printed.seek(0)
            text = printed.read()
        print(text, f"\n[{name}: {time.perf_counter() - started:.0f} s, exit code {code}]\n", flush=True)
        failed += [name] if code else []
        if args.output:
            chip = "cpu" if args.rehearse else torch.cuda.get_device_name().split()[-1].lower()
            (args.output / f"gpu_{name}_{chip}_{datetime.date.today()}.md").write_text(text)
    return f"failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(main())

"""Kills small trainings of three stages at random moments, lets them go on, and compares with one that was left alone.

python -m benchmarks.faults FOLDER --kills 100 --seed 0          # a table by moment and signal, and FOLDER/faults.json

A kill happens inside the process that is meant, at a moment of its own choice: while it starts, in a step, in a
validation, with part of a checkpoint or of a export written, before it is renamed, at a wait for the disk while an index
is written; or from outside, at any time. Runs are forked from one process that has everything imported.
"""

import argparse
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lightning_modules.run_folder as run_folder
import stair.files as files
import stair.towers as towers
from datamodules.synthetic import write_scenes
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.stage import StairStage
from main import main as train
from stair import SparseIndex, Stair
from tests.support.runs import stage_args as args_of_stage

ROOT = Path(__file__).parents[1]
SMALL = """
model:
  init_args:
    stair:
      image: {image_size: 32, options: {patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}}
      text: {options: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
    optimizer: {warmup_steps: 1}
data: {global_batch_size: 16, workers: 1, eval_batch_size: 8}
trainer: {max_steps: 8, val_check_interval: 2, log_every_n_steps: 4, enable_progress_bar: false, accelerator: cpu,
  enable_model_summary: false}
"""
STEPS, LONGEST = 8, 600  # steps of a stage; seconds an attempt may take before it counts as hanging
STRUCK = multiprocessing.get_context("fork").Value("b", 0, lock=False)  # shared with the processes that are killed
MOMENTS = ("start", "step", "validation", "checkpoint", "rename", "export", "index", "any")
SIGNALS = ("KILL all", "KILL one rank", "KILL a worker", "TERM", "USR1")


@dataclass
class Kill:
    """What is done to a process, and where.

    Attributes:
        moment: one of `MOMENTS`.
        signal: one of `SIGNALS`.
        stage: in which stage (0: while the index is written).
        count: at which time the moment comes.
        share: of the bytes that are written by then; of the usual time, for `any`.
        rank: which rank does it.
        struck: whether the moment came; what was meant for a fourth checkpoint may find only three.
        survived: whether the run went on to the very same end; None before that is known.
    """

    moment: str
    signal: str
    stage: int
    count: int
    share: float
    rank: int
    struck: bool = False
    survived: bool | None = None


def chosen(rng: random.Random, ranks: int) -> Kill:
    """A random kill that is possible."""
    moment = rng.choice(MOMENTS)
    asked = rng.choice(SIGNALS if moment in ("step", "validation") else SIGNALS[:2] if moment != "any" else SIGNALS[:1])
    count = rng.randrange(1, STEPS) if moment == "step" else rng.randrange(1, 4) if moment != "start" else 1
    stage = 0 if moment == "index" else rng.randrange(1, 4)
    # rank 0 alone writes
    writes = moment in ("checkpoint", "rename", "export", "index")
    return Kill(moment, asked, stage, count, rng.random(), 0 if writes else rng.randrange(ranks))


# ------------------------------------------------------------------ inside a run


def strike(kill: Kill) -> None:
    """Sends the signal, and says so first."""
    STRUCK.value = 1
    if kill.signal == "KILL all":
        os.killpg(0, signal.SIGKILL)
    elif kill.signal == "KILL one rank":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kill.signal == "KILL a worker":
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
    else:
        os.kill(os.getpid(), signal.SIGTERM if kill.signal == "TERM" else signal.SIGUSR1)


def _when(owner: Any, name: str, kill: Kill, act: Callable[..., None] | None = None) -> None:
    """Has a function strike when it is called for the n-th time."""
    inner, calls = getattr(owner, name), [0]

    def outer(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == kill.count and int(os.environ.get("LOCAL_RANK", 0)) == kill.rank:
            if act is not None:
                act(*arguments, **more)
            strike(kill)
        return inner(*arguments, **more)

    setattr(owner, name, outer)


def _half_written(kill: Kill) -> Callable[..., None]:
    save = torch.save

    def act(content: Any, file: Any, *_: Any, **__: Any) -> None:
        save(content, file)
        file.flush()
        os.ftruncate(file.fileno(), int(kill.share * file.tell()))

    return act


def _half_exported(model: Any, path: str) -> None:
    Path(path).write_bytes(bytes(1000))


def arm(kill: Kill) -> None:
    """Puts the kill in its place, in the process that is to suffer it."""
    if kill.moment in ("checkpoint", "rename", "export") and kill.signal == "KILL one rank":
        kill.rank = 0
    owners: dict[str, tuple[Any, str]] = {
        "start": (ContrastiveModule, "configure_optimizers"),
        "step": (StairStage, "training_step"),
        "validation": (ContrastiveModule, "validation_step"),
        "checkpoint": (run_folder.torch, "save"),
        "rename": (files.Path, "replace"),
        "export": (towers, "save_model"),
        "index": (files.os, "fsync"),
    }
    if kill.moment == "any":
        return
    if kill.moment == "export":
        kill.count = 1
    acts = {"checkpoint": _half_written(kill), "export": _half_exported}
    _when(*owners[kill.moment], kill, acts.get(kill.moment))


def _note_keys(log: Path) -> None:
    step = StairStage.training_step

    def noted(self: Any, batch: Any, batch_idx: int) -> Any:
        digest = hashlib.sha256("\n".join(batch["key"]).encode()).hexdigest()[:16]
        with log.open("a") as file:
            file.write(f"{self.stage} {self.trainer.global_step} {self.trainer.global_rank} {digest}\n")
        return step(self, batch, batch_idx)

    StairStage.training_step = noted  # type: ignore[method-assign]


# ------------------------------------------------------------------ a run, from outside


def attempt(work: Callable[[], Any], log: Path, kill: Kill | None, usual: float) -> int:
    """Runs something in a process of its own; its exit status, negative for a signal, 124 if it hung."""
    STRUCK.value = 0
    child = os.fork()
    if child == 0:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            if kill is not None:
                arm(kill)
            work()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    return _awaited(child, kill.share * usual if kill is not None and kill.moment == "any" else None)


def _awaited(child: int, strike_after: float | None) -> int:
    start = time.monotonic()
    while True:
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            status = os.waitstatus_to_exitcode(code)
            break
        passed = time.monotonic() - start
        if passed > LONGEST or (strike_after is not None and passed > strike_after):
            STRUCK.value = 1
            os.killpg(child, signal.SIGKILL)
            code = os.waitpid(child, 0)[1]
            status = 124 if passed > LONGEST else os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # readers and ranks that outlived it
    return status


def stage_args(data: Path, run: Path, stage: int, ranks: int) -> list[str]:
    """The command of a stage, which resumes it."""
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork") if ranks == 2 else ()
    return args_of_stage(data, stage, run, "--ckpt_path", "last", *two)


def write_index(run: Path) -> None:
    """An index of the release's embeddings of some texts, or nothing where it is there."""
    if not (run / "i" / "index.arrow").exists():
        model = Stair.from_pretrained(run / "stage3" / "stair")
        texts = [f"a {colour} circle" for colour in ("red", "blue", "green", "yellow")]
        SparseIndex.build(run / "i", model.encode(texts=texts), texts, model=model)


def train_through(data: Path, run: Path, ranks: int, kills: list[Kill], usual: float) -> list[str]:
    """All stages and the index, through kills that are each met once; what went wrong."""
    wrong, left = [], list(kills)
    for stage in (1, 2, 3, 0):
        for _ in range(len(kills) + 1):
            kill = next((kill for kill in left if kill.stage == stage), None)
            if kill:
                left.remove(kill)

            def work(stage: int = stage) -> None:
                _note_keys(run / "keys.txt")
                write_index(run) if stage == 0 else train(stage_args(data, run, stage, ranks))

            status = attempt(work, run / "log.txt", kill, usual)
            if kill:
                kill.struck = bool(STRUCK.value)
            wrong += [f"{kill}: hung"] if status == 124 else torn(run)
            if status == 0:
                break
            if kill is None:
                wrong.append(f"stage {stage} ended with {status} and nobody had killed it")
    return wrong


def torn(run: Path) -> list[str]:
    """The files that a next attempt would load, and cannot."""
    wrong = []
    for path in run.glob("stage*/checkpoints/[!.]*.ckpt"):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            wrong.append(f"{path}: {error}")
    for path in run.glob("stage*/stair/model.safetensors"):
        try:
            safe_open(str(path), "pt")
        except Exception as error:
            wrong.append(f"{path}: {error}")
    return wrong


def keys_seen(run: Path) -> dict[str, set[str]]:
    """By stage, step and rank: the digests of the batches that were trained on there."""
    seen: dict[str, set[str]] = {}
    for line in (run / "keys.txt").read_text().splitlines():
        place, _, digest = line.rpartition(" ")
        seen.setdefault(place, set()).add(digest)
    return seen


def differences(run: Path, whole: Path) -> list[str]:
    """What is not as in the run that was left alone."""
    wrong = [f"{place}: {got}" for place, got in keys_seen(run).items() if got != keys_seen(whole).get(place)]
    wrong += [f"never trained on: {place}" for place in keys_seen(whole).keys() - keys_seen(run).keys()]
    for stage in (1, 2, 3):
        a, b = (load_file(r / f"stage{stage}" / "stair" / "model.safetensors") for r in (run, whole))
        wrong += [f"stage {stage}: {name}" for name in b if name not in a or not torch.equal(a[name], b[name])]
    indices = [SparseIndex.open(r / "i") for r in (run, whole)]
    for index in indices:
        index.verify()
    found = [[(h.id, h.score) for h in index.search(like="a red circle", k=4)] for index in indices]
    return wrong + (["the index answers otherwise"] if found[0] != found[1] else [])


def campaign(folder: Path, count: int, seed: int, each: int = 4, minutes: float = 1e9) -> dict[str, Any]:
    """Kills, some to a run, on one process and on two ranks by turns.

    Args:
        folder: for the data and the runs.
        count: of kills.
        seed: of the choice.
        each: kills of one run.
        minutes: after which no further run is begun.
    """
    torch.set_num_threads(1)
    data, rng, start = folder / "data", random.Random(seed), time.monotonic()
    write_scenes(data, train=64, val=12, image_size=32)
    (data / "small.yaml").write_text(SMALL)
    usual, kills, wrong = {}, [], list[str]()
    for turn in itertools.count():
        if len(kills) >= count or time.monotonic() - start >= 60 * minutes:
            break
        ranks = 1 + turn % 2
        whole = folder / f"whole{ranks}"
        if ranks not in usual:
            whole.mkdir()
            begun = time.monotonic()
            wrong += train_through(data, whole, ranks, [], 0)
            usual[ranks] = (time.monotonic() - begun) / 3
        run = folder / f"run{turn}"
        run.mkdir()
        now = [chosen(rng, ranks) for _ in range(min(each, count - len(kills)))]
        found = train_through(data, run, ranks, now, usual[ranks])
        found += differences(run, whole) if not found else []
        for kill in now:
            kill.survived = not found
        kills += [kill for kill in now if kill.struck]
        wrong += [f"{run.name}: {what}" for what in found]
        print(f"{len(kills)} kills, {len(wrong)} wrong, {time.monotonic() - start:.0f} s", flush=True)
    survived = sum(bool(kill.survived) for kill in kills)
    return {"seed": seed, "kills": len(kills), "survived": survived, "wrong": wrong, "each": [asdict(k) for k in kills]}


def table(result: dict[str, Any]) -> str:
    """Markdown: survived of tried, by moment and signal."""
    tried = Counter((k["moment"], k["signal"]) for k in result["each"])
    lived = Counter((k["moment"], k["signal"]) for k in result["each"] if k["survived"])
    lines = ["| moment | " + " | ".join(SIGNALS) + " |", "|---" * (len(SIGNALS) + 1) + "|"]
    for moment in MOMENTS:
        cells = [f"{lived[moment, s]} of {tried[moment, s]}" if tried[moment, s] else "–" for s in SIGNALS]
        lines.append(f"| {moment} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs what the words say, prints it and writes it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for data and runs; must not exist")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="after which no further run is begun")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    result = campaign(asked.folder, asked.kills, asked.seed, minutes=asked.minutes)
    print(table(result), *result["wrong"], sep="\n")
    (asked.folder / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["wrong"]))


if __name__ == "__main__":
    main()

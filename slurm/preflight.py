"""What a stage's job checks before its tasks start; each of these would otherwise fail on every rank.

`run_stage.sh` runs it in the checkout: `preflight.py STAGE RUN DATA_TRAIN DATA_VAL [words of the command]`. It ends with
status 2 where it refuses. Imports that take seconds stand where they are needed: the quick checks come first.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
GROUPS = ("data", "transition")


def settings(words: list[str]) -> dict[str, Any]:
    """What base.yaml, files and words say of GROUPS, as {"data.workers": 8}; of two the later one, as in the command.

    The command's own `--print_config` would be exact, but imports for 10 s and more while the nodes wait.

    Raises:
        ValueError: if a file or a word is none that can be read here (yaml.YAMLError or OSError, likewise).
    """
    found = _flat(str(ROOT / "configs" / "base.yaml"))
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, joined, value = word.partition("=")
        value = value if joined else following
        if word.startswith("-c") and word != "-c":  # -cFILE
            option, value = "-c", word[2:].removeprefix("=")
        name = option.removeprefix("--")
        if option in ("--config", "-c"):
            found |= _flat(value)
        elif name in GROUPS:
            found |= _flat({name: value})
        elif name.startswith(tuple(f"{group}." for group in GROUPS)):
            found[name] = _plain(value)
    return found


def _flat(given: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in _mapping(given).items():
        group, dot, _ = str(key).partition(".")
        if group in GROUPS:
            found |= {key: value} if dot else {f"{group}.{name}": inner for name, inner in _mapping(value).items()}
    return found


def _mapping(given: Any) -> dict[str, Any]:
    """A mapping, or that of a file or of YAML between quotes: a group and `--config` take all three."""
    if isinstance(given, str):
        given = yaml.safe_load(Path(given).read_text() if Path(given).is_file() else given)
    if not isinstance(given, dict):
        raise ValueError(f"no mapping: {given!r}")
    return given


def _plain(word: str) -> Any:
    try:
        return int(word)
    except ValueError:
        pass
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word  # as a shard pattern may be


def check_hand_over(stage: int, run: Path, start_from: Any, after: Any) -> None:
    """Refuses a stage whose predecessor has not handed over; which one that is, `--transition.after` says."""
    if start_from is not None:  # a folder of the user's own, which the program looks into
        return
    previous = stage - 1 if after is None else after
    if not isinstance(previous, int):
        return  # nothing the program takes, as it says itself
    if not 0 <= previous < stage:
        refuse(stage, f"--transition.after is {after}: stage {stage} can start from 0 (nothing) to {stage - 1}")
    before = run / f"stage{previous}" / "stair"
    if previous > 0 and not (before / "config.json").is_file():
        refuse(
            stage,
            f"no hand-over of stage {previous} at {before}: it is written when that stage has finished its planned "
            f"steps. Finish it, or correct RUN={run}; all three in turn: slurm/pipeline.sh",
        )


def check_batch(stage: int, batch: Any, nodes: int, tasks: int) -> None:
    """Refuses a number of ranks that the global batch does not share among."""
    ranks = nodes * tasks
    if not isinstance(batch, int) or batch % ranks == 0:  # none that can be known here: the program checks it as well
        return
    fitting = [n for n in range(1, batch // tasks + 1) if batch % (n * tasks) == 0]
    near = [*[n for n in fitting if n < nodes][-1:], *[n for n in fitting if n > nodes][:1]]
    sizes = [size for size in (batch // ranks * ranks, batch // ranks * ranks + ranks) if size > 1]
    give = f"--nodes={' or '.join(map(str, near))} to sbatch, or " if near else ""
    refuse(
        stage,
        f"data.global_batch_size={batch} cannot be shared by {ranks} ranks ({nodes} nodes of {tasks} tasks): wanted a "
        f"multiple of {ranks}. Give {give}--data.global_batch_size {' or '.join(map(str, sizes))} after the script",
    )


def check_writable(stage: int, home: Path) -> None:
    """Refuses a folder that the stage cannot write to."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        refuse(stage, f"cannot write to {home}: correct RUN, or its rights ({error})")


def count_shards(stage: int, train: str, val: str) -> int:
    """How many training shards there are, in all sources of a mixture; refuses data of which some are not there."""
    from argparse import ArgumentError

    from jsonargparse import auto_cli

    from stair.data.specs import Shards, mixture
    from stair.data.tars import expand

    # typed as in ImageTextShards and parsed as in main.py, so that every spec means here what it means there
    def given(
        train: str | list[str] | dict[str, str | list[str] | Shards] | None, val: dict[str, str]
    ) -> tuple[dict[str, Shards], dict[str, str]]:
        return mixture(train), val

    words = [f"--train={train}", f"--val={val}"]
    try:
        sources, sets = auto_cli(given, args=words, as_positional=False, exit_on_error=False, parser_mode="omegaconf+")
    except (ArgumentError, ValueError) as error:
        hint = "In a mapping, patterns with brackets or braces stand between quotes: {name: 'data/{00..09}.tar'}"
        refuse(stage, f"{error}\nGiven are DATA_TRAIN={train}, DATA_VAL={val}. {hint}")
    if not sources:
        refuse(stage, f"DATA_TRAIN={train}: no training shards in it")
    shards = 0
    for name, source in sources.items():
        try:
            shards += len(expand(source.shards))
        except (FileNotFoundError, ValueError) as error:
            refuse(stage, f"{error}. This is {f'source {name!r} of ' if name else ''}DATA_TRAIN={train}")
    for name, spec in sets.items():
        try:
            expand(spec)
        except (FileNotFoundError, ValueError) as error:
            refuse(stage, f"{error}. This is set {name!r} of DATA_VAL={val}")
    return shards


def refuse(stage: int, message: str) -> NoReturn:
    """Says why the job does not start, and ends."""
    print(f"stair, stage {stage}: {message}", file=sys.stderr)
    raise SystemExit(2)


def main() -> None:
    """Checks in turn, and prints how many shards there are for how many readers."""
    stage, run, train, val, *words = sys.argv[1:]
    nodes, tasks = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    workers = None
    try:
        said = settings(words)
    except (ValueError, OSError, yaml.YAMLError):
        pass  # what cannot be read here is left to the program, which refuses it or understands more
    else:
        check_hand_over(int(stage), Path(run), said.get("transition.start_from"), said.get("transition.after"))
        check_batch(int(stage), said.get("data.global_batch_size"), nodes, tasks)
        workers = said.get("data.workers")
    check_writable(int(stage), Path(run) / f"stage{stage}")
    shards = count_shards(int(stage), train, val)
    readers = nodes * tasks * max(1, workers) if isinstance(workers, int) else None
    few = ": some read parts of one" if readers and shards < readers else ""
    print(f"{shards} training shards" + (f" for {readers} readers{few}" if readers else ""))


if __name__ == "__main__":
    main()

"""Jobs in parallel processes, each recorded when it is done, so that a killed command continues; and `index.json`.

Records and the lock are in `.prepare` of the folder that is written.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from tqdm import tqdm

from stair.data.remote import LOCAL
from stair.data.samples import Skipped, count_causes
from stair.data.shard_index import MANIFEST, MANIFEST_FORMAT, read_manifest
from stair.errors import FileError, StairError
from stair.files import lock, read_json, write_json

STATE = ".prepare"
_ENOUGH = 200  # inputs; among fewer, the share of skipped ones is checked only at the end


def known_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    try:
        return read_json(path)
    except (OSError, FileError):
        return {}


@contextlib.contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """Locks a folder; yields that of its records. FileError if another process or another tool writes there."""
    check_index(folder)
    state = folder / STATE
    busy = f"another `stair prepare` writes to {folder}; wait for it or give another folder"
    try:
        with lock(state / "lock", busy):
            yield state
    finally:
        with contextlib.suppress(OSError):  # records of what is unfinished stay
            state.rmdir()


def run(
    jobs: dict[str, tuple[Any, ...]],
    work: Callable[..., dict[str, Any]],
    state: Path,
    is_current: Callable[[str, dict[str, Any]], bool],
    workers: int,
    max_bad_share: float = 0.0,
    skipped: Sequence[Skipped] = (),
) -> tuple[dict[str, dict[str, Any]], list[Skipped]]:
    """Does the jobs that have no current record yet.

    Args:
        jobs: arguments of each, by the name of its record.
        work: a function of a module that does one job and returns its record, with `inputs` and `left_out`.
        state: folder of the records.
        is_current: whether a record, given with the job's name, still counts.
        workers: processes; 0 is one for each core.
        max_bad_share: greatest share of inputs that may be skipped; beyond it, StairError. The records stay.
        skipped: inputs that are known to be bad without a job.

    Returns:
        All records by the jobs' names, and all skipped inputs.
    """
    found = {name: known_json(state / f"{name}.json") for name in jobs}
    records = {name: record for name, record in found.items() if record and is_current(name, record)}
    left = {name: arguments for name, arguments in jobs.items() if name not in records}
    bad, seen = list(skipped), len(skipped)
    results = zip(left, _results(list(left.values()), work, workers), strict=True)
    for name, record in tqdm(itertools.chain(list(records.items()), results), "shards", len(jobs), disable=None):
        if name in left:
            write_json(state / f"{name}.json", record)
        records[name] = record
        seen += record["inputs"]
        bad += [Skipped(*one) for one in record["left_out"]]
        if seen >= _ENOUGH:
            _check_share(bad, seen, max_bad_share, state)
    _check_share(bad, seen, max_bad_share, state)
    return {name: records[name] for name in jobs}, bad


def _check_share(bad: Sequence[Skipped], seen: int, max_bad_share: float, state: Path) -> None:
    if len(bad) > max_bad_share * seen:
        write_json(state / "left_out.json", [one.facts() for one in bad])
        raise StairError(
            f"{len(bad)} of {seen} inputs cannot be used, more than max_bad_share={max_bad_share}: {summary(bad)}. "
            f"All of them: {state / 'left_out.json'}. Correct the source, or run again with a higher --max_bad_share: "
            "finished shards are kept"
        )


def summary(bad: Sequence[Skipped]) -> str:
    """Causes with their counts, and the first inputs."""
    return f"{listed(count_causes(bad))}. The first: {'; '.join(f'{one.place}: {one.reason}' for one in bad[:3])}"


def listed(counts: dict[str, int]) -> str:
    """Counts as text, the largest first."""
    return ", ".join(f"{number} {what}" for what, number in sorted(counts.items(), key=lambda pair: -pair[1]))


def _results(
    jobs: Sequence[tuple[Any, ...]], work: Callable[..., dict[str, Any]], workers: int
) -> Iterator[dict[str, Any]]:
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1 or not jobs:
        yield from (work(*arguments) for arguments in jobs)
        return
    with ProcessPoolExecutor(min(workers, len(jobs)), initializer=_end_with_parent) as pool:
        try:
            yield from pool.map(work, *zip(*jobs, strict=True))
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a process died, most likely because the machine ran out of memory; run the same command again with "
                "fewer --workers: finished shards are kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A process whose parent is killed would wait for ever, and hold the lock."""
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def check_index(folder: Path) -> None:
    """Checks that `index.json` may be written: that of another tool stays."""
    path = folder / MANIFEST
    try:
        stated = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(stated, dict) or "format" not in stated:
        raise FileError(
            f"{path} is another tool's (it names no `format`), and ours would take its place: move it away, or the tars "
            "to a folder of their own",
            path,
        )


def index_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """`samples`, `bytes` and `sha256` of each shard by its name, as `index.json` states; empty if there is none of ours.

    Raises:
        FileError: if it is damaged, or of another format.
    """
    known = read_manifest(str(folder), LOCAL)
    stated = read_json(folder / MANIFEST)["shards"] if known else {}
    return {name: {**stated[name], "samples": samples, "bytes": size} for name, (samples, size) in known.items()}


def write_index(
    folder: Path, records: dict[str, dict[str, Any]], is_replaced: Callable[[str], bool] = lambda name: False
) -> None:
    """Writes `index.json`: shards that have records, and others that it stated before and that are not replaced."""
    try:
        kept = {name: entry for name, entry in index_entries(folder).items() if not is_replaced(name)}
    except FileError:  # damaged: it is written again
        kept = {}
    made = {name: {key: record[key] for key in ("samples", "bytes", "sha256")} for name, record in records.items()}
    write_json(folder / MANIFEST, {"format": MANIFEST_FORMAT, "shards": {**kept, **made}})

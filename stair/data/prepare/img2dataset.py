"""Shards that img2dataset made (CC3M, CC12M, LAION, ...): they are what training reads, so they are checked and indexed.

Nothing is rewritten but, where asked for, shards with samples that cannot be read.
"""

import io
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from pyarrow import parquet

from stair.data.prepare.jobs import STATE, Job, alone_in, cores, read_json, run
from stair.data.prepare.shard import Hashed, add_member
from stair.data.prepare.shards import REPORT, Tally, listed, refuse_foreign_index, write_index
from stair.data.samples import Skipped, caption_lines, captions, image_bytes, skipped_lines, types_of
from stair.data.shard_index import BrokenShardError, index_shard
from stair.data.tars import stream
from stair.files import removed_on_failure, sha256, write_json


def index_folder(folder: Path, mend: bool, max_bad_share: float, workers: int) -> None:
    """Checks each shard, writes `index.json` and a report.

    Raises:
        ValueError: if it is no such folder, or too much of it is bad.
    """
    if folder.is_file():
        raise ValueError(_command_for(folder))
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; wanted the one that img2dataset wrote to")
    shards = sorted(folder.glob("*.tar"))
    if not shards or not any(_stats_of(shard).is_file() for shard in shards):
        raise ValueError(
            f"{folder} holds {len(shards)} tars and no NNNNN_stats.json: img2dataset writes both with "
            "--output_format webdataset. Shards of other origin: `stair doctor --write_index`"
        )
    refuse_foreign_index(folder)
    with alone_in(folder) as state:
        jobs = [Job(shard.name, _stated(shard), (shard, mend)) for shard in shards]
        for job, shard in zip(jobs, shards, strict=True):
            known = read_json(state / f"{job.name}.json")
            if known.get("mtime") != shard.stat().st_mtime_ns or (mend and known.get("left_out")):
                (state / f"{job.name}.json").unlink(missing_ok=True)
        tally = Tally(max_bad_share, sum(job.inputs for job in jobs), state / "left_out.json")
        records = run(jobs, check_shard, state, workers or cores(), folder.name, tally.add)
        tally.judge(0)
        kept = {name: record for name, record in records.items() if record["samples"]}
        write_index(folder, {n: {key: r[key] for key in ("samples", "bytes", "sha256")} for n, r in kept.items()})
        report = {
            "source": "img2dataset",
            "samples": sum(record["samples"] for record in kept.values()),
            "mended": [name for name, record in records.items() if record["mended"]],
            "left_out" if mend else "bad": dict(tally.causes),
            "left_out_inputs" if mend else "bad_inputs": [bad.facts() for bad in tally.left_out],
        }
        write_json(folder / REPORT, {"format": 1, "splits": {"all": report}})
        for name in (*(f"{name}.json" for name in records), "left_out.json"):
            (state / name).unlink(missing_ok=True)
    print(
        f"{folder}: {len(kept)} shards with {report['samples']} samples, indexed; {len(report['mended'])} written anew"
    )
    if tally.causes:
        todo = "" if mend else "; training skips them, `--mend` rewrites their shards without them"
        print(*skipped_lines(tally.left_out), sep="\n")
        print(f"  bad: {listed(tally.causes)}{todo}; which ones: {REPORT}")


def _command_for(table: Path) -> str:
    with open(table, encoding="utf-8", errors="replace") as file:
        first = file.readline().split("\t")
    if any(cell.strip() == "url" for cell in first):
        header = ""
    else:
        order = r"url\tcaption" if first[0].startswith("http") else r"caption\turl"
        header = f"sed -i '1s/^/{order}\\n/' {table} && "
    return (
        f"{table} lists addresses of images. Fetch them first, then give the folder of the result:\n  {header}img2dataset "
        f"--url_list {table} --input_format tsv --url_col url --caption_col caption --output_format webdataset "
        f"--output_folder {table.with_suffix('')} --image_size 256 --processes_count 16 --thread_count 64"
    )


def _stats_of(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def _stated(shard: Path) -> int:
    stated = read_json(_stats_of(shard)).get("successes")
    return stated if isinstance(stated, int) else 0


def check_shard(shard: Path, mend: bool) -> dict[str, Any]:
    """Reads a shard from front to end.

    Args:
        shard: the tar; `NNNNN_stats.json` and `NNNNN.parquet` beside it say what it should hold.
        mend: write it anew if it has bad samples or is cut short.

    Returns:
        `inputs`, `samples`, `bytes`, `sha256`, `mtime`, `mended`, `left_out`.
    """
    errors: list[Exception] = []
    lines = caption_lines(str(shard))
    bad: dict[str, Skipped] = {}
    keys: list[str] = []
    for sample in stream(str(shard), errors.append):
        key = str(sample["__key__"])
        keys.append(key)
        try:
            if sample["__wrong__"]:
                raise ValueError(sample["__wrong__"])
            captions(sample, lines)
            _check_header(image_bytes(sample))
        except ValueError as error:
            bad[key] = Skipped(f"{shard.name}:{key}", str(error)[:300])
    left_out = [*bad.values()]
    left_out += [Skipped(shard.name, f"shard cut short: {error}"[:300]) for error in errors]
    if not _stats_of(shard).is_file():
        left_out.append(Skipped(shard.name, f"shard unfinished: no {_stats_of(shard).name}, img2dataset stopped in it"))
    elif errors or len(keys) != _stated(shard):
        left_out += [Skipped(f"{shard.name}:{key}", f"sample missing: {why}") for key, why in _missing(shard, keys)]
    mended = mend and bool(bad or errors) and len(bad) < len(keys)
    if mended:
        _rewrite(shard, set(bad))
    with suppress(BrokenShardError):  # training indexes what there is of it
        index_shard(shard)
    digest = sha256(shard)
    there = shard.stat()
    return {
        "inputs": max(len(keys), _stated(shard)),
        "samples": len(keys) - len(bad) * mended,
        "bytes": there.st_size,
        "sha256": digest,
        "mtime": there.st_mtime_ns,
        "mended": mended,
        "left_out": left_out,
    }


def _check_header(data: bytes) -> None:
    # img2dataset has decoded and encoded each image itself; what can be wrong came later
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            image.size  # noqa: B018
    except UnidentifiedImageError as error:
        raise ValueError("image undecodable: by its content no readable JPEG, PNG, WEBP") from error
    except Exception as error:  # as in stair.images: a decoder raises whatever its parser met
        raise ValueError(f"image undecodable: {type(error).__name__}: {error}") from error


def _missing(shard: Path, keys: list[str]) -> list[tuple[str, str]]:
    """Samples that were fetched, as the files beside a shard say, and are not in it."""
    table = shard.with_suffix(".parquet")
    if table.is_file():
        rows = parquet.read_table(table, columns=["key", "status"]).to_pylist()
        wanted = [row["key"] for row in rows if row["status"] == "success"]
        return [(key, f"{table.name} lists it as fetched") for key in wanted if key not in set(keys)]
    lost = _stated(shard) - len(keys)
    return [
        (f"{i}", f"{_stats_of(shard).name} counts {_stated(shard)}, the tar holds {len(keys)}") for i in range(lost)
    ]


def _rewrite(shard: Path, bad: set[str]) -> None:
    temporary = shard.parent / STATE / f"{shard.name}.{os.getpid()}.part"
    samples = 0
    with removed_on_failure(shard, temporary), open(temporary, "wb") as file:
        hashed: Any = Hashed(file)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for sample in stream(str(shard), lambda error: True):
                if sample["__key__"] not in bad:
                    samples += 1
                    for kind in types_of(sample):
                        add_member(tar, f"{sample['__key__']}.{kind}", sample[kind])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(shard)
    write_json(_stats_of(shard), {**read_json(_stats_of(shard)), "successes": samples})

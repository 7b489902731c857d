"""Shards that img2dataset made (CC3M, CC12M, LAION, ...): training reads them, so they are checked and indexed in place.

Nothing is rewritten but, with `--mend`, shards with samples that cannot be read.
"""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from pyarrow import parquet

from stair.data.prepare.jobs import known_json, listed, preparing, run, write_index
from stair.data.prepare.writer import REPORT, open_tar
from stair.data.samples import Skipped, caption_lines, captions, count_causes, image_bytes, skipped_lines
from stair.data.shard_index import BrokenShardError, index_shard
from stair.data.tars import stream
from stair.errors import FileError
from stair.files import atomic_write, sha256, write_json


def cc(folder: Path, mend: bool = False, max_bad_share: float = 0.05, workers: int = 0) -> None:
    """CC3M, CC12M, LAION, ... as img2dataset fetched them: checked and indexed where they are.

    Args:
        folder: img2dataset's output folder (webdataset format). For a .tsv of addresses, prints how to fetch it.
        mend: write shards with bad samples anew without these; else nothing is rewritten.
        max_bad_share: greatest share of samples that are bad or missing.
        workers: processes; 0 is one for each core.
    """
    if folder.is_file():
        raise FileError(_command_for(folder), folder)
    shards = {path.name: path for path in sorted(folder.glob("*.tar"))}
    if not any(_stats_of(shard).is_file() for shard in shards.values()):
        raise FileError(
            f"{folder} holds {len(shards)} tars and no NNNNN_stats.json: img2dataset writes both with "
            "--output_format webdataset. Shards of other origin: `stair doctor --write_index`",
            folder,
        )

    def is_current(name: str, record: dict[str, Any]) -> bool:
        return record.get("mtime") == shards[name].stat().st_mtime_ns and not (mend and record["left_out"])

    with preparing(folder) as state:
        jobs = {name: (shard, mend) for name, shard in shards.items()}
        records, bad = run(jobs, check_shard, state, is_current, workers, max_bad_share)
        kept = {name: record for name, record in records.items() if record["samples"]}
        write_index(folder, kept, is_replaced=lambda name: True)
        report = {
            "source": "img2dataset",
            "samples": sum(record["samples"] for record in kept.values()),
            "mended": [name for name, record in records.items() if record["mended"]],
            "left_out" if mend else "bad": count_causes(bad),
            "left_out_inputs" if mend else "bad_inputs": [one.facts() for one in bad],
        }
        write_json(folder / REPORT, {"format": 1, "splits": {"all": report}})
        for name in (*records, "left_out"):
            (state / f"{name}.json").unlink(missing_ok=True)
    counts = f"{len(kept)} shards with {report['samples']} samples"
    print(*skipped_lines(bad), f"{folder}: {counts}, indexed; {len(report['mended'])} written anew", sep="\n")
    if bad:
        todo = "" if mend else "; training skips them, `--mend` rewrites their shards without them"
        print(f"  bad: {listed(count_causes(bad))}{todo}; which ones: {REPORT}")


def _command_for(table: Path) -> str:
    with open(table, encoding="utf-8", errors="replace") as file:
        first = file.readline().split("\t")
    header = ""
    if not any(cell.strip() == "url" for cell in first):
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
    stated = known_json(_stats_of(shard)).get("successes")
    return stated if isinstance(stated, int) else 0


def check_shard(shard: Path, mend: bool) -> dict[str, Any]:
    """Reads a shard, compares it with `NNNNN_stats.json` and `NNNNN.parquet` beside it, and returns its record."""
    errors: list[Exception] = []
    lines = caption_lines(str(shard))
    bad: dict[str, str] = {}
    keys: list[str] = []
    for sample in stream(str(shard), errors.append):
        keys.append(sample["__key__"])
        try:
            if sample["__wrong__"]:
                raise ValueError(sample["__wrong__"])
            captions(sample, lines)
            _check_header(image_bytes(sample))
        except ValueError as error:
            bad[keys[-1]] = str(error)[:300]
    left_out = [Skipped(f"{shard.name}:{key}", reason) for key, reason in bad.items()]
    left_out += [Skipped(shard.name, f"shard cut short: {error}"[:300]) for error in errors]
    if not _stats_of(shard).is_file():
        left_out.append(Skipped(shard.name, f"shard unfinished: no {_stats_of(shard).name}, img2dataset stopped in it"))
    elif errors or len(keys) != _stated(shard):
        left_out += _missing(shard, keys)
    inputs = max(len(keys), _stated(shard))
    mended = mend and bool(bad or errors) and len(bad) < len(keys)
    if mended:
        _rewrite(shard, bad)
    with suppress(BrokenShardError):  # training indexes what there is of it
        index_shard(shard)
    about = {"bytes": shard.stat().st_size, "sha256": sha256(shard), "mtime": shard.stat().st_mtime_ns}
    counts = {"inputs": inputs, "samples": len(keys) - len(bad) * mended, "mended": mended}
    return {**counts, **about, "left_out": left_out}


def _check_header(data: bytes) -> None:
    # img2dataset has decoded and encoded each image itself; what can be wrong came later
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            image.size  # noqa: B018
    except UnidentifiedImageError as error:
        raise ValueError("image undecodable: by its content no readable JPEG, PNG, WEBP") from error
    except Exception as error:  # as in stair.images: a decoder raises whatever its parser met
        raise ValueError(f"image undecodable: {type(error).__name__}: {error}") from error


def _missing(shard: Path, keys: list[str]) -> list[Skipped]:
    """Samples that were fetched, as the files beside a shard say, and are not in it."""
    table = shard.with_suffix(".parquet")
    if table.is_file():
        rows = parquet.read_table(table, columns=["key", "status"]).to_pylist()
        lost = [row["key"] for row in rows if row["status"] == "success" and row["key"] not in set(keys)]
        why = f"{table.name} lists it as fetched"
    else:
        lost = [str(i) for i in range(_stated(shard) - len(keys))]
        why = f"{_stats_of(shard).name} counts {_stated(shard)}, the tar holds {len(keys)}"
    return [Skipped(f"{shard.name}:{key}", f"sample missing: {why}") for key in lost]


def _rewrite(shard: Path, bad: dict[str, str]) -> None:
    samples = 0
    with atomic_write(shard) as part, part.open("wb") as file, open_tar(file) as tar:
        for sample in stream(str(shard), lambda error: None):
            if sample["__key__"] not in bad:
                samples += 1
                tar.write(sample)  # fields that begin with two underscores are left out
    write_json(_stats_of(shard), {**known_json(_stats_of(shard)), "successes": samples})

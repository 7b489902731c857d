"""Shards that img2dataset made (CC3M, CC12M, LAION, ...): training reads them, so they are checked and indexed in place.

Nothing is rewritten but, with `--mend`, shards with samples that cannot be read.
"""

from contextlib import suppress
from pathlib import Path

from pyarrow import parquet

import stair.data.prepare.writer as writer
from stair.data.samples import Skipped, caption_lines, captions, count_causes, image_bytes, skipped_lines
from stair.data.shard_index import index_shard
from stair.data.tars import read_samples
from stair.errors import FileError
from stair.files import atomic_write, write_json
from stair.images import decode_image


def cc(folder: Path, mend: bool = False, max_bad_share: float = 0.05, workers: int = 0) -> None:
    """Checks and indexes shards that img2dataset downloaded (CC3M, CC12M, LAION, ...), in place.

    Args:
        folder: img2dataset's output folder (webdataset format). For a .tsv of URLs, prints how to download it.
        mend: rewrite shards that have bad samples, without these samples; by default no shard is rewritten.
        max_bad_share: maximum share of samples that are bad or missing.
        workers: number of processes; 0 uses one per core.
    """
    if folder.is_file():
        raise FileError(_command(folder), folder)
    shards = sorted(folder.glob("*.tar"))
    if not any(_stats_file(shard).is_file() for shard in shards):
        what = f"{folder} holds {len(shards)} tars and no NNNNN_stats.json, as img2dataset writes (webdataset format)"
        raise FileError(f"{what}. For other shards, run `stair doctor SHARDS --write_index`", folder)
    with writer.preparing(folder) as state:
        jobs = {shard: (mend,) for shard in shards}
        records, skipped = writer.run(jobs, check_shard, state, f"cc, mend={mend}", workers, max_bad_share)
        samples = sum(record["samples"] for record in records.values())
        mended = [shard.name for shard, record in records.items() if record["mended"]]
        report = {"source": "img2dataset", "samples": samples, "mended": mended}
        report |= writer.skipped_facts(skipped, "skipped" if mend else "bad")
        write_json(folder / writer.REPORT, {"format": 1, "splits": {"all": report}})
        writer.finish(folder, state, records, is_replaced=lambda name: True)
    counts = f"{sum(record['samples'] > 0 for record in records.values())} shards with {samples} samples"
    print(*skipped_lines(skipped), f"{folder}: {counts}, indexed; {len(mended)} rewritten", sep="\n")
    if skipped:
        todo = "" if mend else "; training skips them, `--mend` rewrites their shards without them"
        print(f"  bad: {writer.listed(count_causes(skipped))}{todo}; which ones: {writer.REPORT}")


def _command(table: Path) -> str:
    with open(table, encoding="utf-8", errors="replace") as file:
        first = [cell.strip() for cell in file.readline().split("\t")]
    order = r"url\tcaption" if first[0].startswith("http") else r"caption\turl"
    header = "" if "url" in first else f"sed -i '1s/^/{order}\\n/' {table} && "
    return (
        f"{table} lists addresses of images. Fetch them first, then give the folder of the result:\n  {header}img2dataset "
        f"--url_list {table} --input_format tsv --url_col url --caption_col caption --output_format webdataset "
        f"--output_folder {table.with_suffix('')} --image_size 256 --processes_count 16 --thread_count 64"
    )


def _stats_file(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def check_shard(shard: Path, mend: bool) -> writer.Record:
    """Reads a shard, compares it with `NNNNN_stats.json` and `NNNNN.parquet` beside it, and returns its record."""
    lines, keys, bad, broken = caption_lines(str(shard)), list[str](), dict[str, str](), ""
    try:
        for sample in read_samples(str(shard)):
            keys.append(sample.key)
            try:
                if sample.problems:
                    raise ValueError(sample.problems[0])
                captions(sample.members, lines)
                decode_image(image_bytes(sample.members), enough=1)
            except ValueError as error:
                bad[keys[-1]] = str(error)[:300]
    except FileError as error:
        broken = str(error)
    skipped = [Skipped(f"{shard.name}:{key}", reason) for key, reason in bad.items()]
    skipped += [Skipped(shard.name, f"shard truncated: {broken}"[:300])] if broken else []
    stats = _stats_file(shard)
    stated = writer.known_json(stats).get("successes")
    stated = stated if isinstance(stated, int) else 0
    if not stats.is_file():
        skipped.append(Skipped(shard.name, f"shard unfinished: no {stats.name}, img2dataset stopped in it"))
    elif broken or len(keys) != stated:
        skipped += _missing(shard, keys, stated)
    samples, kept = len(keys), sum(key not in bad for key in keys)
    mended = mend and bool(bad or broken) and kept > 0
    if mended:
        samples = kept
        with atomic_write(shard) as part, part.open("wb") as file, writer.open_tar(file) as tar, suppress(FileError):
            for sample in read_samples(str(shard)):
                if sample.key not in bad:
                    tar.write({"__key__": sample.key, **sample.members})
        write_json(stats, {**writer.known_json(stats), "successes": kept})
    with suppress(FileError):  # training indexes what there is of it
        index_shard(shard)
    return {"inputs": max(len(keys), stated), "samples": samples, "mended": mended, "skipped": skipped}


def _missing(shard: Path, keys: list[str], stated: int) -> list[Skipped]:
    """Samples that img2dataset fetched, as its files say, and that are not in the shard."""
    table, lost = shard.with_suffix(".parquet"), list(map(str, range(stated - len(keys))))
    reason = f"{_stats_file(shard).name} counts {stated}, the tar holds {len(keys)}"
    if table.is_file():
        rows = parquet.read_table(table, columns=["key"], filters=[("status", "=", "success")])
        lost, reason = sorted({*rows["key"].to_pylist()} - {*keys}), f"{table.name} lists it as fetched"
    return [Skipped(f"{shard.name}:{key}", f"sample missing: {reason}") for key in lost]

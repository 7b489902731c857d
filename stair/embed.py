"""`stair embed`: sparse embeddings of many images or texts on disk, in parts, so that it can resume.

`embeddings.json` holds the settings. The same command makes the parts that are missing; other settings are an error.
Processes share parts by their number, without communication. When all parts exist, the file states what was skipped.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from scipy import sparse
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stair.data.items import COLUMNS, Item, Side, list_items
from stair.data.samples import Skipped, count_causes, skipped_lines
from stair.embeddings import PLAN, Embeddings, EmbeddingSpace, read_header, to_csr
from stair.errors import FileError, SettingError, require
from stair.files import read_json, write_json
from stair.images import decode_image, eval_pixels
from stair.model import Stair
from stair.plain import counted


def embed(
    model: str,
    source: Annotated[str, Parameter(allow_leading_hyphen=True)],  # `-`
    out: Path,
    side: Literal["images", "texts"] = "images",
    column: str | None = None,
    id_column: str | None = None,
    budget: int | None = None,
    threshold: float = 0.0,
    batch_size: int = 64,
    workers: int = 0,
    part_size: int = 8192,
    share: str = "0/1",
    device: str = "auto",
    format: Literal["safetensors", "parquet"] = "safetensors",
) -> dict[str, Any]:
    """Embeds images or texts. After an interruption, the same command continues where it stopped.

    Args:
        model: folder of an exported model, or its name on the hub.
        source: a folder of images; tars (a quoted pattern); a csv, tsv, jsonl or parquet table; - for standard input.
        out: folder of the embeddings.
        side: embed the images or the texts of the source.
        column: table column with the paths of images (in parquet also bytes, or Hugging Face's {bytes, path}) or with
            texts; by default `image` or `text`.
        id_column: table column with ids, used unchanged; by default `id`, or row numbers if there is none.
        budget: maximum number of terms per item; the heaviest are kept.
        threshold: keep only weights above this value.
        batch_size: number of items encoded at a time.
        workers: number of processes that read and decode images; 0 uses the main process.
        part_size: number of items per file.
        share: R/N: this is process R (from 0) of N; it writes every N-th part.
        device: cpu, cuda, cuda:1, ...; auto uses a GPU if there is one.
        format: file format.

    Raises:
        FileNotFoundError: if there is no source or model.
        StairError: if a setting is out of range, or the folder holds embeddings of other settings.
    """
    _check_ranges(threshold, workers, batch_size=batch_size, part_size=part_size, budget=budget)
    rank, ranks = _share(share)
    device = _device(device, rank)
    listing = list_items(source, side, column, id_column)
    for line in [*skipped_lines(listing.skipped), *skipped_lines(listing.notes, word="note:")]:
        print(line)
    items, stair = listing.items, Stair.from_pretrained(model)
    paths = [out / f"part-{number:05}.{format}" for number in range(-(-len(items) // part_size))]
    chosen = {
        "side": side,
        "column": column or COLUMNS[side],
        "budget": budget,
        "threshold": threshold,
        "format": format,
    }
    _check_room(out, items)
    _check_settings(out / PLAN, stair.space, items, {**chosen, "part_size": part_size, "parts": len(paths)})
    own = {path: items[n * part_size : (n + 1) * part_size] for n, path in enumerate(paths) if n % ranks == rank}
    missing = {path: part for path, part in own.items() if not path.exists()}
    stair.to(device)
    with tqdm(total=len(items), desc="embedding", unit=side[:-1], disable=None) as bar:
        bar.update(len(items) - sum(map(len, missing.values())))
        for path, part in missing.items():
            inputs = _Inputs(part, stair.config.image.image_size)
            loader = DataLoader(inputs, batch_size, num_workers=0 if side == "texts" else workers, collate_fn=list)
            _write_part(path, loader, partial(_encode, stair, side, budget, threshold), stair.space, bar)
    return _report(out, paths, side, len(items), listing.skipped)


def _check_ranges(threshold: float, workers: int, **counts: int | None) -> None:
    for name, value in counts.items():
        require(value is None or value >= 1, name, value, "1 or more")
    require(workers >= 0, "workers", workers, "0 or more")
    require(0 <= threshold < math.inf, "threshold", threshold, "0, which keeps every weight that is not zero, or more")


def _encode(stair: Stair, side: Side, budget: int | None, threshold: float, batch: list[Any]) -> sparse.csr_matrix:
    encoded = stair.encode_text(batch) if side == "texts" else stair.encode_image(torch.stack(batch))
    return to_csr(encoded, budget, threshold)


def _write_part(
    path: Path,
    loader: Iterable[Any],
    encode: Callable[[list[Any]], sparse.csr_matrix],
    space: EmbeddingSpace,
    bar: Any,
) -> None:
    """Encodes the items of a part and writes it, with what was skipped."""
    rows, kept, skipped = [sparse.csr_matrix((0, len(space.tokens)), dtype="float32")], list[Item](), list[Skipped]()
    for batch in loader:
        usable = [(item, content) for item, content in batch if not isinstance(content, ValueError)]
        skipped += [Skipped(i.place or i.id, str(error)) for i, error in batch if isinstance(error, ValueError)]
        if usable:
            rows.append(encode([content for _, content in usable]))
            kept += [item for item, _ in usable]
        bar.update(len(batch))
    records = [item.metadata for item in kept], [item.source for item in kept]
    part = Embeddings(sparse.vstack(rows, format="csr"), [item.id for item in kept], space, *records)
    part.save(path, {"skipped": skipped})
    for line in skipped_lines(skipped):
        tqdm.write(line)


def _report(out: Path, paths: list[Path], side: Side, listed: int, unlisted: list[Skipped]) -> dict[str, Any]:
    """Prints what was taken and skipped by all processes; if nothing is missing, keeps it in `embeddings.json`."""
    existing = [path for path in paths if path.exists()]
    if len(existing) < len(paths):
        print(f"{out}: {len(existing)} of {len(paths)} parts; the same command writes the others")
        return {"out": str(out), "parts": len(existing), "missing": len(paths) - len(existing)}
    undecoded = [Skipped(*one) for path in paths for one in json.loads(read_header(path)["facts"])["skipped"]]
    skipped = [*unlisted, *undecoded]
    causes, taken = count_causes(skipped), listed - len(undecoded)
    result = {"taken": taken, "skipped": causes, "skipped_items": [one.facts() for one in skipped]}
    write_json(out / PLAN, {**read_json(out / PLAN), **result})
    why = f" ({', '.join(f'{count} {cause}' for cause, count in causes.items())})" if causes else ""
    print(f"{out}: {counted(len(paths), 'part')}, {counted(taken, side[:-1])} embedded, {len(skipped)} skipped{why}")
    return {"out": str(out), "parts": len(paths), "missing": 0, **result}


def _digest(items: Sequence[Item]) -> str:
    """Tells items from others that bear the same ids: lines are numbered from 0, pictures keep their names."""

    @cache
    def stamp(path: Path) -> tuple[int, ...]:
        try:
            stat = path.stat()
        except (OSError, ValueError):  # such a picture is skipped when it is read
            return ()
        return stat.st_size, stat.st_mtime_ns

    digest = hashlib.sha256()
    for item in items:
        location = [str(item.path), *stamp(item.path)] if item.path else []
        digest.update(json.dumps([item.id, item.text, location, item.metadata, item.source]).encode() + b"\n")
    return digest.hexdigest()


def _share(share: str) -> tuple[int, int]:
    rank, slash, ranks = share.partition("/")
    is_share = bool(slash and rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks))
    require(is_share, "share", share, "R/N with R from 0 to N-1, such as 0/4")
    return int(rank), int(ranks)


def _device(device: str, rank: int) -> str:
    if device == "auto":
        return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # a name may be known although the machine has no such device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        allowed = "auto, cpu, or a GPU such as cuda:0"
        raise SettingError(f"device is {device!r}; give {allowed} ({why})", "device") from error
    return device


def _check_settings(path: Path, space: EmbeddingSpace, items: Sequence[Item], chosen: dict[str, Any]) -> None:
    """Checks that parts with these settings can be written, and writes the settings."""
    settings = {"model": space.model, "similarity": space.similarity, "items": len(items), "content": _digest(items)}
    settings |= chosen
    earlier = read_json(path) if path.exists() else {}
    if differing := [key for key in settings if earlier and earlier.get(key) != settings[key]]:
        different = f"{path.parent} has embeddings with other settings: {', '.join(differing)} differ"
        raise FileError(f"{different}. Continue with the original command, or use another folder", path.parent)
    if not earlier and (parts := sorted(path.parent.glob("part-*"))):
        raise FileError(f"{path.parent} has {parts[0].name} but no {PLAN}; use another folder", path.parent)
    write_json(path, earlier or settings)  # also when resuming: a folder that cannot be written to is known at once


def _check_room(out: Path, items: Sequence[Item]) -> None:
    """Checks that there is room for what is known of the parts: ids, metadata and sources."""
    needed = sum(len(json.dumps([item.id, item.metadata, item.source])) for item in items)
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise FileError(f"{out}: {free} bytes are free; ids and metadata alone take {needed}. Make room", out)


class _Inputs(Dataset[Any]):
    """Items with their text, or image (3, S, S) uint8, or the `ValueError` that states why an image cannot be read."""

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Item, Any]:
        item = self.items[index]
        try:
            return item, item.text if item.text is not None else eval_pixels(decode_image(item.read()), self.size)
        except ValueError as error:
            return item, error

"""`stair embed`: many pictures or texts to sparse embeddings on disk, part by part, so that it can stop and go on.

`embeddings.json` holds the plan: model, items, pruning, how many parts. The same command finds it, leaves the parts that
are there and makes the others; another plan is an error. Parts are shared between processes by their number, so any number
of devices or machines on one file system work without communication. When all parts are there, the file also says how many
items were taken and skipped, and why.

B items of a batch, V words.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stair.data.items import COLUMNS, Item, Listing, Side, list_items
from stair.data.samples import Skipped, count_causes, skipped_lines
from stair.data.specs import require
from stair.embeddings import PLAN, Embeddings, EmbeddingSpace, read_header, to_csr
from stair.errors import FileError, SettingError
from stair.files import read_json, write_json
from stair.images import decode_image, eval_pixels
from stair.model import Stair


def embed(
    model: str,
    source: str,
    out: Path,
    side: Side = "images",
    column: str | None = None,
    id_column: str | None = None,
    top: int | None = None,
    threshold: float = 0.0,
    batch_size: int = 64,
    workers: int = 0,
    part_size: int = 8192,
    share: str = "0/1",
    device: str = "auto",
    format: Literal["safetensors", "parquet"] = "safetensors",
) -> None:
    """Embeds pictures or texts. Run again after an interruption, it goes on where it stopped.

    Args:
        model: folder of a saved model, or its name on the hub.
        source: a folder of pictures, tars (a pattern in quotes), a csv, tsv, jsonl or parquet table, or - for standard
            input.
        out: folder of the embeddings.
        side: embed the pictures or the texts of the source.
        column: column of a table with paths of pictures (in parquet also bytes, or Hugging Face's {bytes, path}), or
            with texts; `image` or `text` where left out.
        id_column: column of a table with ids, as typed; `id` where left out, or numbers of rows if there is no such column.
        top: keep only so many words of each, the heaviest.
        threshold: keep only weights above this.
        batch_size: how many are encoded at a time.
        workers: processes that read and decode pictures; 0 for none besides this one.
        part_size: items of one file.
        share: R/N: of N processes this is number R, from 0; it makes every N-th part.
        device: cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.
        format: of the files.

    Raises:
        FileNotFoundError: if there is no source or model.
        ValueError: if a setting is out of range, or the folder holds embeddings of another plan.
    """
    require(batch_size >= 1, "batch_size", batch_size, "1 or more")
    require(part_size >= 1, "part_size", part_size, "1 or more")
    require(top is None or top >= 1, "top", top, "1 or more")
    require(workers >= 0, "workers", workers, "0 or more")
    require(0 <= threshold < math.inf, "threshold", threshold, "0, which keeps every weight that is not zero, or more")
    rank, ranks = _share(share)
    device = _device(device, rank)
    listing = list_items(source, side, column, id_column)
    for line in [*skipped_lines(listing.skipped), *skipped_lines(listing.notes, word="note:")]:
        print(line)
    items, stair = listing.items, Stair.from_pretrained(model)
    space = stair.space
    pruning = {"top": top, "threshold": threshold}
    settings = {"side": side, "column": column or COLUMNS[side], **pruning, "part_size": part_size, "format": format}
    paths = [out / f"part-{number:05}.{format}" for number in range(-(-len(items) // part_size))]
    _check_room(out, items)
    _agree(out / PLAN, _plan(space, items, settings | {"parts": len(paths)}))
    missing = [number for number in range(rank, len(paths), ranks) if not paths[number].exists()]
    stair.to(device)
    with tqdm(total=len(items), unit=side[:-1], disable=None) as bar:
        bar.update(len(items) - sum(len(items[n * part_size : (n + 1) * part_size]) for n in missing))
        for number in missing:
            few = items[number * part_size : (number + 1) * part_size]
            vectors, kept, skipped = _encode(stair, few, side, batch_size, workers, top, threshold, bar)
            records = [item.metadata for item in kept], [item.source for item in kept]
            part = Embeddings(vectors, [item.id for item in kept], space, *records)
            part.save(paths[number], {"skipped": skipped})
            for line in skipped_lines(skipped):
                tqdm.write(line)
    _report(out, paths, side, listing)


def _report(out: Path, paths: list[Path], side: Side, listing: Listing) -> None:
    """Prints what was taken and skipped by all processes; if nothing is missing, keeps it in `embeddings.json`."""
    there = [path for path in paths if path.exists()]
    undecoded = [Skipped(*one) for path in there for one in json.loads(read_header(path)["facts"])["skipped"]]
    skipped = [*listing.skipped, *undecoded]
    if len(there) < len(paths):
        print(f"{out}: {len(there)} of {len(paths)} parts; the same command makes the others")
        return
    causes = count_causes(skipped)
    counts = {"taken": len(listing.items) - len(undecoded), "skipped": causes}
    write_json(out / PLAN, {**read_json(out / PLAN), **counts, "skipped_items": [one.facts() for one in skipped]})
    why = f" ({', '.join(f'{count} {cause}' for cause, count in causes.items())})" if causes else ""
    print(f"{out}: {len(paths)} parts, {counts['taken']} {side} taken, {len(skipped)} skipped{why}")


def _plan(space: EmbeddingSpace, items: Sequence[Item], settings: dict[str, Any]) -> dict[str, Any]:
    """What all parts of a folder have in common: another plan would mix vectors that are not comparable."""
    about = {"model": space.model, "similarity": space.similarity, "items": len(items), "content": _digest(items)}
    return about | settings


def _digest(items: Sequence[Item]) -> str:
    """Tells items from others that bear the same ids: lines are numbered from 0, pictures keep their names."""
    digest, stamp = hashlib.sha256(), cache(_stamp)
    for item in items:
        place = [str(item.path), item.offset, item.length, *stamp(item.path)] if item.path else []
        digest.update(json.dumps([item.id, item.text, place, item.metadata, item.source]).encode() + b"\n")
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, ...]:
    """Size and time of a file; nothing of one that cannot be read: its picture is left out when its turn comes."""
    try:
        about = path.stat()
    except (OSError, ValueError):
        return ()
    return about.st_size, about.st_mtime_ns


def _share(share: str) -> tuple[int, int]:
    rank, slash, ranks = share.partition("/")
    is_share = bool(slash and rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks))
    require(is_share, "share", share, "R/N with R from 0 to N-1, such as 0/4")
    return int(rank), int(ranks)


def _device(device: str, rank: int) -> str:
    if device == "auto":
        return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).cpu()  # there and back: a name may be known and its device not be here
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        wanted = f"auto, cpu, or a GPU of this machine, such as cuda:0 ({why})"
        raise SettingError(f"device is {device!r}; give {wanted}", "device") from error
    return device


def _agree(path: Path, plan: dict[str, Any]) -> None:
    """Checks that the parts of a plan can be written, and writes the plan."""
    there = read_json(path) if path.exists() else {}
    if there:
        if differing := [key for key in plan if there.get(key) != plan[key]]:
            raise FileError(
                f"{path.parent} holds embeddings made otherwise: {', '.join(differing)} differ. Give the command that "
                "made them to go on, or another folder",
                path.parent,
            )
    elif parts := sorted(path.parent.glob("part-*")):
        raise FileError(f"{path.parent} holds {parts[0].name} and no {PLAN}; give another folder", path.parent)
    write_json(path, there or plan)  # also when resuming: a folder that cannot be written to is known at once


def _check_room(out: Path, items: Sequence[Item]) -> None:
    """Checks that there is room for what is known of the parts: ids, metadata and sources."""
    needed = sum(len(json.dumps([item.id, item.metadata, item.source])) for item in items)
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise FileError(f"{out}: {free} bytes are free; ids and metadata alone take {needed}. Make room", out)


def _encode(
    stair: Stair,
    items: Sequence[Item],
    side: Side,
    batch_size: int,
    workers: int,
    top: int | None,
    threshold: float,
    bar: Any,
) -> tuple[sparse.csr_matrix, list[Item], list[Skipped]]:
    """Vectors, the items they are of, and the others."""
    rows, kept, skipped = (
        [sparse.csr_matrix((0, len(stair.vocabulary)), dtype="float32")],
        list[Item](),
        list[Skipped](),
    )
    inputs: DataLoader[Any] = DataLoader(
        Inputs(items, stair.config.image.image_size),
        batch_size=batch_size,
        num_workers=0 if side == "texts" else workers,
        collate_fn=list,
    )
    for first, content in zip(range(0, len(items), batch_size), inputs, strict=True):
        few = items[first : first + batch_size]
        good = [n for n, one in enumerate(content) if not isinstance(one, ValueError)]
        wrong = [(few[n], one) for n, one in enumerate(content) if isinstance(one, ValueError)]
        skipped += [Skipped(item.place or item.id, str(error)) for item, error in wrong]
        if good:
            chosen = [content[n] for n in good]
            embedding_BV = stair.encode_text(chosen) if side == "texts" else stair.encode_image(torch.stack(chosen))
            rows.append(to_csr(embedding_BV, top, threshold))
            kept += [few[n] for n in good]
        bar.update(len(few))
    return sparse.vstack(rows, format="csr"), kept, skipped


class Inputs(Dataset[Any]):
    """Texts, or images as (3, S, S) uint8, or the `ValueError` that states why an image cannot be read."""

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> str | Tensor | ValueError:
        if (text := self.items[index].text) is not None:
            return text
        try:
            return eval_pixels(decode_image(self.items[index].read()), self.size)
        except ValueError as error:
            return error

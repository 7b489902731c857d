"""`stair embed`: many pictures or texts to sparse embeddings on disk, part by part, so that it can stop and go on.

`embeddings.json` holds the plan: model, source, pruning, how many parts. The same command finds it, skips the parts that
are there and makes the others; another plan is refused. Parts are shared between processes by their number, so any number
of devices or machines on one file system work without talking to each other.

B items of a batch, V words.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from stair.embeddings import PLAN, Embeddings, Space, to_csr
from stair.images import decode_image, eval_pixels
from stair.model import Stair
from stair.plain import one_line
from stair.sources import Item, Side, items_of


def embed(
    model: str,
    source: str,
    out: Path,
    side: Side = "images",
    column: str | None = None,
    id_column: str = "id",
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
        source: a folder of pictures, tars (a glob in quotes), a csv, tsv or parquet table, or - for standard input.
        out: folder of the embeddings.
        side: embed the pictures or the texts of the source.
        column: column of a table with paths of pictures, or with texts; `image` or `text` where left out.
        id_column: column of a table with ids.
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
        ValueError: if the folder holds embeddings of another plan.
    """
    rank, ranks = _share(share)
    items, stair = items_of(source, side, column, id_column), Stair.from_pretrained(model)
    space = stair.space
    settings = {"side": side, "top": top, "threshold": threshold, "part_size": part_size, "format": format}
    paths = [out / f"part-{number:05}.{format}" for number in range(-(-len(items) // part_size))]
    _agree(out / PLAN, _plan(space, [item.id for item in items], settings | {"parts": len(paths)}))
    missing = [number for number in range(rank, len(paths), ranks) if not paths[number].exists()]
    stair.to(_device(device, rank))
    skipped = 0
    with tqdm(total=len(items), unit=side[:-1], disable=None) as bar:
        bar.update(len(items) - sum(len(items[n * part_size : (n + 1) * part_size]) for n in missing))
        for number in missing:
            few = items[number * part_size : (number + 1) * part_size]
            vectors, kept, complaints = _encode(stair, few, side, batch_size, workers, top, threshold, bar)
            part = Embeddings(vectors, [item.id for item in kept], space, [item.metadata for item in kept])
            part.save(paths[number], {"skipped": complaints})
            for complaint in complaints:
                tqdm.write(f"skipped {one_line(complaint)}")
            skipped += len(complaints)
    there = sum(path.exists() for path in paths)
    print(f"{out}: {there} of {len(paths)} parts, {len(items)} {side} in all, {skipped} skipped now")


def _plan(space: Space, ids: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What all parts of a folder have in common: another plan would mix vectors that are not comparable."""
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"model": space.model, "similarity": space.similarity, "items": len(ids), "ids": digest, **settings}


def _share(share: str) -> tuple[int, int]:
    rank, slash, ranks = share.partition("/")
    if not (slash and rank.isdigit() and ranks.isdigit() and int(rank) < int(ranks)):
        raise ValueError(f"share is {share!r}; give R/N with R from 0 to N-1, such as 0/4")
    return int(rank), int(ranks)


def _device(device: str, rank: int) -> str:
    if device != "auto":
        return device
    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"


def _agree(path: Path, plan: dict[str, Any]) -> None:
    if path.exists():
        there = json.loads(path.read_text())
        if differing := [key for key in plan if there.get(key) != plan[key]]:
            raise ValueError(
                f"{path.parent} holds embeddings made otherwise: {', '.join(differing)} differ. Give the command that "
                "made them to go on, or another folder"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(plan, indent=2) + "\n")
    fresh.replace(path)


def _encode(
    stair: Stair,
    items: Sequence[Item],
    side: Side,
    batch_size: int,
    workers: int,
    top: int | None,
    threshold: float,
    bar: Any,
) -> tuple[sparse.csr_matrix, list[Item], list[str]]:
    """Vectors, the items they are of, and complaints about the others."""
    rows, kept, complaints = [sparse.csr_matrix((0, len(stair.vocabulary)), dtype="float32")], list[Item](), list[str]()
    for few, content in _batches(stair, items, side, batch_size, workers):
        good = [n for n, one in enumerate(content) if not isinstance(one, ValueError)]
        complaints += [f"{few[n].id}: {one}" for n, one in enumerate(content) if isinstance(one, ValueError)]
        if good:
            chosen = [content[n] for n in good]
            embedding_BV = stair.encode_text(chosen) if side == "texts" else stair.encode_image(torch.stack(chosen))
            rows.append(to_csr(embedding_BV, top, threshold))
            kept += [few[n] for n in good]
        bar.update(len(few))
    return sparse.vstack(rows, format="csr"), kept, complaints


def _batches(
    stair: Stair, items: Sequence[Item], side: Side, batch_size: int, workers: int
) -> Iterator[tuple[Sequence[Item], list[Any]]]:
    pieces = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    if side == "texts":
        yield from ((piece, [item.text for item in piece]) for piece in pieces)
        return
    pictures = Pictures(items, stair.config.image.image_size)
    loader: DataLoader[Any] = DataLoader(pictures, batch_size=batch_size, num_workers=workers, collate_fn=list)
    yield from zip(pieces, loader, strict=True)


class Pictures(Dataset[Any]):
    """Pictures as pixels of the model's size, or the `ValueError` that says why not.

    Args:
        items: whose pictures.
        size: side of the square, in pixels.
    """

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self.items, self.size = items, size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        try:
            return eval_pixels(decode_image(self.items[index].read()), self.size)
        except (ValueError, OSError) as error:
            return ValueError(str(error))

"""Where pictures and texts to embed come from: a folder, tar shards, a table, the lines of standard input.

A source is turned into a list of items first, none of them read: so the work can be counted, divided into parts, shared
and taken up again where it stopped.
"""

import csv
import glob
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Side = Literal["images", "texts"]
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Item:
    """One picture or text.

    Attributes:
        id: unique in its source.
        path: file of a picture.
        offset: where the picture begins in the file, in bytes.
        length: bytes of the picture; None for the whole file.
        text: a text, where it is one.
        metadata: what is known of it. For pictures `file`, and in tars `offset` and `length`, say where it lies.
    """

    id: str
    path: Path | None = None
    offset: int = 0
    length: int | None = None
    text: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def read(self) -> bytes:
        """The bytes of a picture."""
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read() if self.length is None else file.read(self.length)


def items_of(source: str, side: Side, column: str | None = None, id_column: str = "id") -> list[Item]:
    """Lists a source.

    Args:
        source: a folder of pictures; tars (`a.tar`, or a glob such as `shards/*.tar`) of KEY.jpg beside KEY.json or
            KEY.txt; a `.csv`, `.tsv` or `.parquet` table; `-` for lines of standard input (paths, or texts).
        side: whether its pictures or its texts are wanted. Texts of tars are the captions.
        column: of a table: paths of pictures (relative to the table), or texts. `image` or `text` where left out.
        id_column: of a table: ids; numbers of rows where there is none.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it is none of these, or two items have one id.
    """
    items = list(_items(source, side, column, id_column))
    if not items:
        raise FileNotFoundError(f"{source!r} holds no {side}")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{source!r}: id {item.id!r} occurs twice")
        seen.add(item.id)
    return items


def _items(source: str, side: Side, column: str | None, id_column: str) -> Iterator[Item]:
    path = Path(source)
    if source == "-":
        return _lines(sys.stdin.read().splitlines(), side)
    if path.is_dir():
        if side == "texts":
            raise ValueError(f"{source} is a folder: it gives images. Texts come from tars, tables or standard input")
        return _folder(path)
    files = [path] if path.is_file() else [Path(name) for name in sorted(glob.glob(source))]
    if not files:
        raise FileNotFoundError(f"no such file or folder: {source!r}")
    if all(file.suffix == ".tar" for file in files):
        return (item for file in files for item in _tar(file, side))
    if len(files) == 1 and path.suffix in (".csv", ".tsv", ".parquet"):
        return _table(path, side, column or {"images": "image", "texts": "text"}[side], id_column)
    raise ValueError(f"{source!r} is no folder, tar, csv, tsv or parquet file, nor `-` for standard input")


def _lines(lines: Sequence[str], side: Side) -> Iterator[Item]:
    for number, line in enumerate(line for line in lines if line.strip()):
        if side == "texts":
            yield Item(str(number), text=line, metadata={"text": line})
        else:
            yield Item(line, Path(line), metadata={"file": line})


def _folder(folder: Path) -> Iterator[Item]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in IMAGE_ENDINGS and path.is_file():
            name = path.relative_to(folder).as_posix()
            yield Item(name, path, metadata={"file": name})


def _table(path: Path, side: Side, column: str, id_column: str) -> Iterator[Item]:
    for number, row in enumerate(_rows(path)):
        if row.get(column) is None:
            raise ValueError(
                f"{path}, row {number}: no column {column!r}; there are {sorted(row)}. Choose with --column"
            )
        name = str(row.get(id_column) if row.get(id_column) is not None else number)
        metadata = {key: value for key, value in row.items() if key not in (column, id_column) and value is not None}
        value = str(row[column])
        if side == "texts":
            yield Item(name, text=value, metadata={"text": value, **metadata})
        else:
            yield Item(name, path.parent / value, metadata={"file": value, **metadata})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError("parquet needs pyarrow: `pip install 'stair-embeddings[search]'`") from error
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    else:
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


def _tar(path: Path, side: Side) -> Iterator[Item]:
    for key, members in _samples(path):
        picture = next((info for kind, info in members.items() if f".{kind}" in IMAGE_ENDINGS), None)
        captions = _captions(path, key, members)
        if side == "texts":
            for number, caption in enumerate(captions):
                yield Item(f"{path.stem}/{key}#{number}", text=caption, metadata={"text": caption, "key": key})
        elif picture is not None:
            place = {"file": path.name, "offset": picture.offset_data, "length": picture.size}
            metadata = {"captions": captions, **place} if captions else place
            yield Item(f"{path.stem}/{key}", path, picture.offset_data, picture.size, metadata=metadata)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """The members of each sample by type: names up to the first dot of the last part make a key."""
    key, members = "", dict[str, tarfile.TarInfo]()
    try:
        # `r:` refuses compressed tars, in which places mean nothing
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, name = info.name.rpartition("/")
                stem, _, kind = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if not info.isreg() or not stem:
                    continue
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                members.setdefault(kind.lower(), info)
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no uncompressed tar, or cut short: {error}") from error
    if members:
        yield key, members


def _captions(path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> list[str]:
    def read(kind: str) -> str:
        return Item("", path, members[kind].offset_data, members[kind].size).read().decode()

    try:
        fields = json.loads(read("json")) if "json" in members else {}
        found = fields.get("captions") or [fields[key] for key in ("caption",) if fields.get(key)]
        if not found and "txt" in members:
            found = [read("txt")]
        return [caption.strip() for caption in found if caption.strip()]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: captions of {key!r} cannot be read: {error}") from error

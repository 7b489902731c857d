"""`stair prepare`: makes shards of what a user has. Each source is a second word of the command.

A source becomes a list of inputs (tables, arrow, classes, emoji); `shards.py` writes them, `shard.py` makes one tar of
them, `jobs.py` runs and records the work. `img2dataset.py` checks and indexes shards that are there already.
"""

from pathlib import Path
from typing import Any

from stair.data.prepare.arrow import arrow_source
from stair.data.prepare.classes import class_source
from stair.data.prepare.emoji import emoji_source
from stair.data.prepare.img2dataset import index_folder
from stair.data.prepare.shards import write_shards
from stair.data.prepare.tables import karpathy_source, table_source


def folder(
    captions: Path,
    images: Path,
    out: Path,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    delimiter: str | None = None,
    **settings: Any,
) -> None:
    """Images in a folder and a table of their captions.

    Args:
        captions: table with a line for each caption or each image: .csv, .tsv, .jsonl or .parquet.
        images: folder in which the table's paths are found; none may lead out of it.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        image_column: of paths; told by its name if not given.
        caption_column: of captions, or lists of them; told by its name if not given.
        delimiter: of cells; a comma in .csv and .txt, a tab in .tsv, if not given.
        settings: of the writer.
    """
    write_shards(table_source(captions, images, split, image_column, caption_column, delimiter), out, **settings)


def karpathy(captions: Path, images: Path, out: Path, **settings: Any) -> None:
    """COCO, Flickr8k or Flickr30k with Karpathy's splits: train (with restval), val, test.

    Args:
        captions: dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json.
        images: folder of the images; COCO's in train2014 and val2014 below it or all in it.
        out: folder of the shards.
        settings: of the writer.
    """
    write_shards(karpathy_source(captions, images), out, **settings)


def cc(folder: Path, mend: bool = False, max_bad_share: float = 0.05, workers: int = 0) -> None:
    """CC3M, CC12M, LAION, ... as img2dataset fetched them: checked and indexed where they are.

    Args:
        folder: img2dataset's output folder (webdataset format). For a .tsv of addresses, says how to fetch it.
        mend: write shards with bad samples anew without these; else nothing is rewritten.
        max_bad_share: greatest share of samples that are bad or missing.
        workers: processes; 0 is one for each core.
    """
    index_folder(folder, mend, max_bad_share, workers)


def datasets(
    data: Path, out: Path, image_column: str | None = None, caption_column: str | None = None, **settings: Any
) -> None:
    """A Hugging Face data set on disk: what `save_to_disk` wrote, or parquet files. Its order is kept.

    Args:
        data: its folder.
        out: folder of the shards.
        image_column: of images; told by its type if not given.
        caption_column: of captions; told by its name if not given. Without one, names of classes are the captions.
        settings: of the writer.
    """
    write_shards(arrow_source(data, image_column, caption_column), out, **settings)


def classes(
    images: Path, out: Path, split: str = "test", names: Path | None = None, template: str = "{}", **settings: Any
) -> None:
    """A folder of images for each class, for zero-shot evaluation; writes classnames.json too.

    Args:
        images: folder of the classes' folders.
        out: folder of the shards.
        split: shards are named SPLIT-00000.tar, ...
        names: names of the classes: JSON or lines `folder name`. Without, the folders' names.
        template: of the caption, {} is the class's name.
        settings: of the writer.
    """
    write_shards(class_source(images, split, names, template), out, **settings)


def emoji(
    out: Path, font: Path | list[Path] | None = None, image_size: int = 64, views: int = 8, **settings: Any
) -> None:
    """Emoji of fonts on this machine with their Unicode names: a data set without a network.

    Args:
        out: folder of the shards.
        font: font files; without, all on this machine that have emoji, as fontconfig knows them.
        image_size: side of the images, in pixels.
        views: drawings of each emoji in each font; one is kept for validation.
        settings: of the writer.
    """
    write_shards(emoji_source([font] if isinstance(font, Path) else font, image_size, views), out, **settings)


SOURCES = {
    "folder": folder,
    "coco": karpathy,
    "flickr": karpathy,
    "cc": cc,
    "datasets": datasets,
    "classes": classes,
    "emoji": emoji,
}

"""Many different pictures from few: random crops of the pictures of some tars, for a search benchmark at size.

    python benchmarks/crops.py 'flickr8k/*.tar' OUT --count 100000

A picture repeated as it is would tie all its copies at one score; crops of it, some mirrored, are related as photographs of
one scene are, and each has an embedding of its own. OUT gets tars of JPEG files, for `stair embed`.
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stair.data.items import Item, list_items
from stair.images import decode_image


def crop(image: Image.Image, generator: np.random.Generator, size: int) -> bytes:
    """A rectangle of 30 to 100 % of the area, at most 4:3 either way, mirrored half of the time, scaled to a square."""
    area, ratio = generator.uniform(0.3, 1.0), np.exp(generator.uniform(-1, 1) * np.log(4 / 3))
    wide = min(1.0, np.sqrt(area * ratio)) * image.width
    high = min(1.0, np.sqrt(area / ratio)) * image.height
    left, top = generator.uniform(0, image.width - wide), generator.uniform(0, image.height - high)
    piece = image.resize(
        (size, size),
        Image.Resampling.BICUBIC,
        box=(left, top, min(left + wide, image.width), min(top + high, image.height)),
    )
    buffer = io.BytesIO()
    (ImageOps.mirror(piece) if generator.random() < 0.5 else piece).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(path: Path, items: list[Item], count: int, size: int, seed: int) -> None:
    """One tar: `count` crops of each picture."""
    generator = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for place, item in enumerate(items):
            image = decode_image(item.read())
            for number in range(count):
                content = crop(image, generator, size)
                info = tarfile.TarInfo(f"{place:06}-{number:03}.jpg")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tars", help="as for `stair embed`: a tar, or a glob in quotes")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=100_000, help="crops at least")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    options = parser.parse_args()
    items = list_items(options.tars, "images").items
    options.out.mkdir(parents=True)
    each = -(-options.count // len(items))
    for shard, first in enumerate(range(0, len(items), 500)):
        write(options.out / f"{shard:04}.tar", items[first : first + 500], each, options.size, shard)
    print(f"{options.out}: {each} crops of each of {len(items)} pictures")


if __name__ == "__main__":
    main()

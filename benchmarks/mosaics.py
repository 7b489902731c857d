"""Writes pictures of the size of photographs for `loader_speed`: mosaics of 500 x 375 pixels, made of the images of shards.

    python -m benchmarks.mosaics 'flickr8k/train-*.tar' photographs --count 1000

What they show does not matter, only that decoding them costs what decoding a photograph does.
"""

import argparse
import io
import itertools
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image, ImageOps

from stair.data.samples import captions, image_bytes
from stair.data.tars import expand, read_samples
from stair.images import decode_image

_WIDTH, _HEIGHT, _TILE = 500, 375, 125


def mosaic(tiles: list[dict[str, Any]], quality: int) -> bytes:
    picture = Image.new("RGB", (_WIDTH, _HEIGHT))
    places = itertools.product(range(0, _WIDTH, _TILE), range(0, _HEIGHT, _TILE))
    for place, tile in zip(places, tiles, strict=True):
        picture.paste(ImageOps.fit(decode_image(image_bytes(tile)), (_TILE, _TILE)), place)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="local shard spec of images of about 125 pixels a side")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    shards = expand(args.shards)
    samples = (sample.members for shard in itertools.cycle(shards) for sample in read_samples(shard))
    pattern = str(args.folder / "mosaics-%05d.tar")
    tiles = (_WIDTH // _TILE) * (_HEIGHT // _TILE)
    with webdataset.ShardWriter(pattern, maxcount=250, verbose=0) as writer:
        for number in range(args.count):
            chosen = list(itertools.islice(samples, tiles))
            image, text = mosaic(chosen, args.quality), captions(chosen[0])[0]
            writer.write({"__key__": f"{number:06d}", "jpg": image, "txt": text})


if __name__ == "__main__":
    main()

"""Hidden states of a frozen image encoder, computed once for several augmented views and kept on disk.

N images, P positions of an image, row by row from the top left, D width, L views; view 0 is the plain image.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from stair.data.pairs import entries, opened, whole_captions
from stair.data.samples import CAPTION_TYPES, image_bytes
from stair.encoders import ImageEncoder, ImageTower
from stair.files import atomic_write
from stair.images import decode_image, eval_pixels

_BATCH = 64


class Split(NamedTuple):
    """Images of a set as hidden states, with their captions."""

    maps: np.ndarray  # (L, N, P, D) fp16
    captions: list[list[str]]


def split(cache: Path, name: str, spec: str, size: int, views: int) -> Split:
    """A set from the cache, or computed; view v > 0 of an image always has the same crop, flip and colours.

    Args:
        cache: folder; an entry's name is a fingerprint of encoder, data and settings.
        name: of a pretrained encoder, as `ImageTower.name`.
        spec: tars.
        size: side in pixels.
        views: L.
    """
    found = entries(spec, CAPTION_TYPES)
    encoder = ImageEncoder(ImageTower(name, image_size=size)).eval().to(memory_format=torch.channels_last)
    digest = hashlib.sha256(json.dumps([size, views, torch.__version__]).encode())
    for _, value in sorted(encoder.state_dict().items()):
        digest.update(value.contiguous().numpy().tobytes())
    for shard in sorted({span.shard for span in found}):
        digest.update(Path(shard).read_bytes())
    home = cache / digest.hexdigest()[:16]
    if not (home / "captions.json").is_file():
        home.mkdir(parents=True, exist_ok=True)
        captions = _compute(encoder, found, home / "maps.npy", size, views)
        with atomic_write(home / "captions.json") as part:
            part.write_text(json.dumps(captions))
    return Split(np.load(home / "maps.npy", mmap_mode="r"), json.loads((home / "captions.json").read_text()))


def _compute(encoder: ImageEncoder, found: list[Any], path: Path, size: int, views: int) -> list[list[str]]:
    shape = (views, len(found), math.prod(encoder.grid), encoder.width)
    maps = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    captions: list[list[str]] = []
    for first in range(0, len(found), _BATCH):
        images = []
        for span in found[first : first + _BATCH]:
            with opened(span) as sample:
                images.append(decode_image(image_bytes(sample.members)))
                captions.append(whole_captions(sample.members, span.lines))
        for view in range(views):
            torch.manual_seed(view * len(found) + first)
            pixels = torch.stack([_view(image, size) if view else eval_pixels(image, size) for image in images])
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                hidden_BPD = encoder(pixels.contiguous(memory_format=torch.channels_last))
            maps[view, first : first + len(images)] = hidden_BPD.half().numpy()
        if first % (20 * _BATCH) == 0:
            print(f"maps: {first + len(images)} of {len(found)} images, {views} views", file=sys.stderr, flush=True)
    maps.flush()
    return captions


def _view(image: Any, size: int) -> Tensor:
    crop = v2.RandomResizedCrop(size, (0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    change = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), v2.PILToTensor()])
    pixels: Tensor = change(image)
    return pixels

"""Feature maps of a frozen convolutional encoder, computed once for several augmented views and kept on disk.

N images, P positions of the map, row by row from the top left, C channels, L views; view 0 is the plain image.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torchvision.transforms import v2

from stair.data.pairs import entries, opened, whole_captions
from stair.data.samples import CAPTION_TYPES, image_bytes
from stair.files import atomic_write
from stair.images import decode_image, eval_pixels

_BATCH = 64


class Split(NamedTuple):
    """Images of a set as maps, with their captions."""

    maps: np.ndarray  # (L, N, P, C) fp16
    captions: list[list[str]]


def split(cache: Path, name: str, spec: str, size: int, views: int) -> Split:
    """The maps of a set, from the cache or computed; view v > 0 of an image always has the same crop, flip and colours.

    Args:
        cache: folder; an entry's name holds a fingerprint of encoder, data and settings.
        name: a pretrained convolutional network of timm: `local-dir:PATH`, `hf-hub:NAME` or a name.
        spec: tars.
        size: side in pixels.
        views: L.
    """
    found = entries(spec, CAPTION_TYPES)
    net: Any = timm.create_model(name, pretrained=True, num_classes=0).eval().to(memory_format=torch.channels_last)
    digest = hashlib.sha256(json.dumps([size, views, torch.__version__]).encode())
    for _, value in sorted(net.state_dict().items()):
        digest.update(value.contiguous().numpy().tobytes())
    for shard in sorted({entry.span.shard for entry in found}):
        digest.update(Path(shard).read_bytes())
    home = cache / digest.hexdigest()[:16]
    texts = home / "captions.json"
    if not texts.is_file():
        home.mkdir(parents=True, exist_ok=True)
        captions = _compute(net, found, home / "maps.npy", size, views)
        with atomic_write(texts) as part:
            part.write_text(json.dumps(captions))
    return Split(np.load(home / "maps.npy", mmap_mode="r"), json.loads(texts.read_text()))


def _compute(net: Any, found: list[Any], path: Path, size: int, views: int) -> list[list[str]]:
    config = resolve_model_data_config(net)
    normalise = v2.Normalize(config["mean"], config["std"])
    shape = (views, len(found), (size // net.feature_info[-1]["reduction"]) ** 2, net.num_features)
    maps = np.lib.format.open_memmap(path, "w+", np.float16, shape)
    captions: list[list[str]] = []
    for first in range(0, len(found), _BATCH):
        images = []
        for entry in found[first : first + _BATCH]:
            with opened(entry) as sample:
                images.append(decode_image(image_bytes(sample.members)))
                captions.append(whole_captions(sample.members, entry.lines))
        for view in range(views):
            torch.manual_seed(view * len(found) + first)
            pixels = torch.stack([_view(image, size) if view else eval_pixels(image, size) for image in images])
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                x = normalise(pixels.float() / 255).contiguous(memory_format=torch.channels_last)
                hidden_BPC = net.forward_features(x).permute(0, 2, 3, 1).flatten(1, 2)
            maps[view, first : first + len(images)] = hidden_BPC.half().numpy()
        if first % (20 * _BATCH) == 0:
            print(f"maps: {first + len(images)} of {len(found)} images, {views} views", file=sys.stderr, flush=True)
    maps.flush()
    return captions


def _view(image: Any, size: int) -> Tensor:
    crop = v2.RandomResizedCrop(size, (0.4, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    change = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ColorJitter(0.3, 0.3, 0.3), v2.PILToTensor()])
    pixels: Tensor = change(image)
    return pixels

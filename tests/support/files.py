"""Images and tars."""

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image


def plain_image(colour="red", kind: str = "JPEG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    """An image of one colour, as a file of that kind."""
    return encoded(Image.new("RGB", size, colour).convert(mode), kind)


def noise_png(seed: int, size: tuple[int, int] = (36, 40)) -> bytes:
    """An image of random pixels."""
    return encoded(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def members_of(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    """The members of samples that are given by key and type."""
    return [(f"{key}.{kind}", content) for key, members in samples.items() for kind, content in members.items()]


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    """Members by name and content; missing folders are made. With mode `a`, they are added."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user whom permissions bind, also where tests run as root; in the working directory, by relative paths."""
    if is_root := os.geteuid() == 0:
        Path().chmod(0o755)
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u200e\u200f]")

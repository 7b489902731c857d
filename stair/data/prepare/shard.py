"""Makes one tar of samples: KEY.jpg|png|webp, KEY.json with `captions`, KEY.txt with the first of them.

Original bytes of images are kept where training can read them; each is decoded once here, so that it can be. Tars carry
no time and no owner.
"""

import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from stair.data.prepare.jobs import STATE
from stair.data.samples import Skipped, check_caption, printable
from stair.data.shard_index import index_shard
from stair.files import removed_on_failure
from stair.images import decode_image, image_format


class Raw(NamedTuple):
    """An input as a source gives it: bytes of an image file, captions, and what else goes into the JSON."""

    image: bytes
    captions: list[str]
    fields: dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """What is kept as it is: images of at most `max_side` pixels (0: any), decoded only up to `max_pixels`."""

    max_side: int
    max_pixels: int


def make_shard(path: Path, keyed: list[tuple[str, Any]], read: Callable[[Any], Raw], limits: Limits) -> dict[str, Any]:
    """Writes one shard beside its place and renames it.

    Args:
        path: the tar.
        keyed: key and reference of each input.
        read: of the source.
        limits: of images.

    Returns:
        `inputs`, `samples`, `captions`, `bytes`, `sha256`, `written_anew` by reason, `left_out`. Without a sample, there
        is no tar.
    """
    temporary = path.parent / STATE / f"{path.name}.{os.getpid()}.part"
    left_out: list[Skipped] = []
    anew: Counter[str] = Counter()
    samples = captions = 0
    try:
        with removed_on_failure(path, temporary), open(temporary, "wb") as file:
            hashed: Any = Hashed(file)
            with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for key, reference in keyed:
                    try:
                        raw, kind, image, why = _made(read, reference, limits)
                    except ValueError as error:
                        left_out.append(Skipped(_place(reference), printable(str(error))[:300]))
                    else:
                        _add(tar, key, raw, kind, image)
                        samples, captions, anew[why] = samples + 1, captions + len(raw.captions), anew[why] + 1
            file.flush()
            os.fsync(file.fileno())
        if samples:
            temporary.replace(path)
            index_shard(path)
    finally:
        temporary.unlink(missing_ok=True)
    del anew[""]
    made = {"samples": samples, "captions": captions, "bytes": hashed.bytes, "sha256": hashed.digest.hexdigest()}
    return {"inputs": len(keyed), **made, "written_anew": dict(anew), "left_out": left_out}


def _place(reference: Any) -> str:
    """What a user knows an input by: the names of its file, or a file and a row of it."""
    names, sign = (reference[0], " or ") if isinstance(reference[0], tuple) else (reference, ":")
    return printable(sign.join(map(str, names)))[:300]


class Hashed:
    """A file to write to that knows its length and checksum."""

    def __init__(self, file: Any) -> None:
        self.file, self.bytes, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Writes on."""
        self.digest.update(data)
        self.bytes += len(data)
        return int(self.file.write(data))


def _made(read: Callable[[Any], Raw], reference: Any, limits: Limits) -> tuple[Raw, str, bytes, str]:
    raw = read(reference)
    if not raw.captions:
        raise ValueError("caption empty: the input has no caption")
    texts = [check_caption(text) for text in raw.captions]
    return (raw._replace(captions=texts), *stored(raw.image, limits))


def stored(data: bytes, limits: Limits) -> tuple[str, bytes, str]:
    """How an image goes into a shard: as it is where it is a JPEG, PNG or WebP within the limits.

    Returns:
        Its type, its bytes, and why they are not the original ones (empty if they are).

    Raises:
        ValueError: as `decode_image`, which is what training will do.
    """
    image = decode_image(data, limits.max_pixels)
    kind = image_format(data)
    if limits.max_side and max(image.size) > limits.max_side:
        image.thumbnail((limits.max_side, limits.max_side), Image.Resampling.LANCZOS)
        why = f"with more than {limits.max_side} pixels a side"
    elif kind:
        return kind, data, ""
    else:
        why = "of another format than JPEG, PNG, WebP"
    buffer = io.BytesIO()
    if kind in ("jpg", "webp"):  # lossy already
        image.save(buffer, "JPEG", quality=95)
        return "jpg", buffer.getvalue(), why
    image.save(buffer, "PNG")
    return "png", buffer.getvalue(), why


def _add(tar: tarfile.TarFile, key: str, raw: Raw, kind: str, image: bytes) -> None:
    facts = json.dumps({**raw.fields, "captions": raw.captions}, ensure_ascii=False, sort_keys=True)
    add_member(tar, f"{key}.{kind}", image)
    add_member(tar, f"{key}.json", facts.encode())
    add_member(tar, f"{key}.txt", raw.captions[0].encode())


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file with nothing in its header that changes from one run to the next."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))

"""Shards that were damaged in every way: no hang, no crash, no wrong pairing, and nothing left out unseen."""

import gzip
import io
import json
import random
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.augment import Augment
from stair.data.samples import captions, image_bytes
from stair.data.tars import BrokenTarError, read_samples, walk
from stair.data.tars import members as members_of
from stair.errors import FileError
from tests.support.fuzzing import COLOURS, WHOLE, coloured, tar_of
from tests.support.shards import encode, good, keys, picture, shards, write_shards, write_tar

AUGMENT = Augment(8, (0.5, 1.0), True, 1_000_000)


def read_all(path: Path) -> tuple[list[tuple[str, str, np.ndarray]], Counter[str]]:
    """What training would see of a shard, and what it would count."""
    pairs, causes = [], Counter()
    samples, broken = whole_samples(path)
    for sample in samples:
        try:
            if sample.problems:
                raise ValueError(sample.problems[0])
            texts = captions(sample.members)
            pixels = AUGMENT(image_bytes(sample.members), random.Random(0))
            pairs.append((sample.key, texts[0], pixels.numpy()))
        except ValueError as error:
            causes[str(error).partition(":")[0]] += 1
    causes["shard broken"] += broken
    return pairs, causes


def whole_samples(path: Path) -> tuple[list, bool]:
    """The samples before what breaks the shard, and whether something does."""
    samples = []
    try:
        samples.extend(read_samples(str(path)))
    except FileError:
        return samples, True
    return samples, False


#: the blocks of each sample
UNTOUCHED = [tar_of({k: v for k, v in coloured(9).items() if k.startswith(f"{n:03d}")})[:2_048] for n in range(9)]
KNOWN = {"image empty", "image undecodable", "image too large", "no image", "no caption", "caption unreadable"} | {
    "caption too long", "duplicate member", "unsafe name", "shard broken"
}  # fmt: skip


@st.composite
def damaged(draw) -> bytes:
    """The shard with bytes overwritten, blocks dropped, doubled or swapped, its end cut off, or rubbish put in."""
    data = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 8, 100, 512, 1024, 5000]))
        how = draw(st.sampled_from(["set", "zero", "drop", "cut", "double", "insert", "swap"]))
        if draw(st.booleans()):  # on a block's edge, where it looks most like a tar
            at -= at % 512
        part = data[at : at + length]
        if how == "set":
            data[at : at + length] = draw(st.binary(min_size=len(part), max_size=len(part)))
        elif how == "zero":
            data[at : at + length] = bytes(len(part))
        elif how == "drop":
            del data[at : at + length]
        elif how == "cut":
            del data[at:]
        elif how == "double":
            data[at:at] = part
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=600))
        else:
            other = draw(st.integers(0, max(len(data) - 1, 0)))
            data[at : at + length], data[other : other + length] = data[other : other + length], part
    return bytes(data)


def check_damaged(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    start = time.monotonic()
    pairs, causes = read_all(path)
    assert time.monotonic() - start < 20
    assert set(causes) <= KNOWN
    for sample in whole_samples(path)[0]:
        for kind, content in sample.members.items():
            name = f"{sample.key}.{kind}".encode("utf-8", "surrogateescape")
            assert _stands_in(data, name, content), name
    for key, caption, pixels in pairs:  # what nobody touched is paired as it was
        if key.isdigit() and UNTOUCHED[int(key) % 9] in data and data.count(key.encode()) == 2:
            assert caption == f"colour {int(key) % 6}"
            assert abs(pixels.mean((1, 2)) - COLOURS[int(key) % 6]).max() < 2
    try:
        counted = sum(1 for _ in walk(str(path)))
    except ValueError:
        counted = None  # what is broken is named by both
        assert causes["shard broken"]
    if counted is not None and not causes["shard broken"]:
        assert counted == len(pairs) + sum(causes.values())


def _stands_in(data: bytes, name: bytes, content: bytes) -> bool:
    """Whether somewhere in the archive a header of this name has this content behind it."""
    return any(
        _name(data[at : at + 512]).lower() == name.lower() and data[at + 512 :].startswith(content)
        for at in range(0, len(data), 512)
    )


def _name(header: bytes) -> bytes:
    """The name in a header: a second field has the folders of long ones, which tarfile adds whatever the format's mark."""
    name, folders = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    return folders + b"/" + name if folders else name


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=damaged())
def test_damaged_shards_neither_hang_nor_crash_nor_pair_wrongly(tmp_path_factory, data):
    check_damaged(tmp_path_factory.getbasetemp() / "damaged.tar", data)


@pytest.mark.slow
@settings(max_examples=6_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=damaged())
def test_thousands_of_damaged_shards_neither_hang_nor_crash_nor_pair_wrongly(tmp_path_factory, data):
    check_damaged(tmp_path_factory.getbasetemp() / "damaged.tar", data)


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=120)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    members=st.dictionaries(NAMES.filter(lambda name: not name.endswith("/")), st.binary(max_size=1500), max_size=6),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    packed=st.booleans(),
)
def test_our_reader_and_the_standard_librarys_read_the_same_members(members, form, packed):
    try:
        data = tar_of(members, form)
    except ValueError:  # a name too long for the oldest form
        return
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]
    file = io.BytesIO(gzip.compress(data) if packed else data)
    assert [(member.name, member.read()) for member in members_of(file, "r|*")] == expected
    if not packed:
        found = list(members_of(io.BytesIO(data)))
        assert [(each.name, data[each.offset : each.offset + each.size]) for each in found] == expected


def test_a_folder_in_the_second_name_field_is_part_of_the_key(tmp_path):
    data = bytearray(WHOLE)
    data[100], data[345] = data[345], data[100]  # two bytes of a header change places, which its checksum does not see
    data = bytes(data)
    (tmp_path / "a.tar").write_bytes(data)
    check_damaged(tmp_path / "b.tar", data)
    assert next(read_samples(str(tmp_path / "a.tar"))).key == "0/000"


def test_links_folders_and_devices_are_passed_over(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("l.png", tarfile.SYMTYPE),
            ("h.txt", tarfile.LNKTYPE),
            ("f", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [(member.name, member.read()) for member in members_of(io.BytesIO(out.getvalue()))] == [("a.txt", b"abc")]


def test_a_damaged_header_in_the_middle_is_an_error_and_not_the_end():
    at = WHOLE.index(b"004.png")
    data = WHOLE[:at] + b"x" + WHOLE[at + 1 :]
    for mode in ("r:", "r|*"):
        found = []
        with pytest.raises(BrokenTarError, match=f"at byte {at}: no header"):
            found.extend(member.name for member in members_of(io.BytesIO(data), mode))
        assert found[-1] == "003.json"
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # alone it takes that for the end
        assert len(tar.getnames()) == 8


def test_a_header_that_promises_more_than_memory_is_an_error(tmp_path):
    info = tarfile.TarInfo("a.png")
    info.size = 1 << 50
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    assert read_all(path)[1] == {"shard broken": 1}
    packed = tmp_path / "b.tar"
    packed.write_bytes(gzip.compress(data))
    assert read_all(packed)[1] == {"shard broken": 1}


def test_a_sample_that_the_end_cuts_in_two_is_not_handed_out_with_half_its_members(tmp_path):
    members = {
        "0.png": picture(0),
        "0.txt": b"the wrong words",
        "0.json": json.dumps({"caption": "the right ones"}).encode(),
    }
    data = tar_of(members, tarfile.USTAR_FORMAT)
    path = tmp_path / "a.tar"
    path.write_bytes(data[: data.index(b"0.json") + 100])
    assert read_all(path) == ([], Counter({"shard broken": 1}))


# ---- each kind of bad data, by its cause

BOMB = bytearray(encode(Image.new("L", (1, 1))))
BOMB[16:24] = (50_000).to_bytes(4, "big") * 2
BOMB[29:33] = __import__("zlib").crc32(BOMB[12:29]).to_bytes(4, "big")

GONE = {"0.png": None, "0.json": None}
KINDS = {
    "zero bytes": ({"0.png": b""}, "image empty"),
    "huge pixels": ({"0.png": bytes(BOMB)}, "image too large"),
    "no image": ({"0.png": b"GIF89a"}, "image undecodable"),
    "half an image": ({"0.png": picture(1, (40, 40))[:900]}, "image undecodable"),
    "another extension": ({"0.png": None, "0.avif": picture(1)}, "no image"),
    "no caption": ({"0.json": None}, "no caption"),
    "blank caption": ({"0.json": b'{"caption": "  "}'}, "no caption"),
    "long caption": ({"0.json": json.dumps({"caption": "word " * 20_000}).encode()}, "caption too long"),
    "invalid utf-8": ({"0.json": None, "0.txt": b"caf\xe9"}, "caption unreadable"),
    "half a character": ({"0.json": b'{"caption": "\\ud800"}'}, "caption unreadable"),
    "captions as one string": ({"0.json": b'{"captions": "a dog"}'}, "caption unreadable"),
    "a number": ({"0.json": b'{"caption": 7}'}, "caption unreadable"),
    "deep json": ({"0.json": b"[" * 100_000}, "caption unreadable"),
    "leaves its folder": ({"../e/0.png": picture(1), "../e/0.json": b'{"caption": "x"}', **GONE}, "unsafe name"),
    "absolute": ({"/etc/0.png": picture(1), "/etc/0.json": b'{"caption": "x"}', **GONE}, "unsafe name"),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_bad_data_are_left_out_and_counted_by_cause_and_source(tmp_path, vocab, name):
    changes, cause = KINDS[name]
    members = {"0.png": picture(0), "0.json": b'{"caption": "word1"}', **changes}
    members = {k: v for k, v in members.items() if v is not None}
    for n in range(1, 40):
        members |= good(n)
    spec = {"web": str(write_tar(tmp_path / "a.tar", members))}
    data = shards(spec, vocab, max_pixels=1_000_000)
    data.setup("fit")
    seen = keys(data.train_dataloader())
    assert not {key for key in seen if key.rpartition("/")[2] == "0"}
    count = data.skipped_by_source["web"]
    assert count >= 1 and data.skipped == {cause: count, f"web/{cause}": count} and len(data.skipped_by_source) == 1


@pytest.mark.parametrize(
    "content", [WHOLE[:-9_000], b"no tar" * 999, b"", tar_of({})], ids=["cut", "no tar", "0", "empty"]
)
def test_a_broken_shard_beside_a_sound_one_is_counted_by_cause_and_source(tmp_path, vocab, content):
    (tmp_path / "b.tar").write_bytes(content)
    for name in "ac":
        write_tar(tmp_path / f"{name}.tar", {k: v for n in range(20) for k, v in good(n).items()})
    data = shards({"web": str(tmp_path / "[ab].tar"), "coco": str(tmp_path / "c.tar")}, vocab, max_bad_share=0.5)
    data.setup("fit")
    assert len(keys(data.train_dataloader())) >= 40
    assert data.skipped == {"shard broken": 1, "web/shard broken": 1}


@pytest.mark.parametrize(
    ("data", "mode"),
    [
        (encode(Image.new("CMYK", (9, 9)), "JPEG"), "CMYK"),
        (encode(Image.fromarray(np.full((9, 9), 30_000, dtype=np.uint16))), "I;16"),
        (encode(Image.new("P", (9, 9), 3)), "P"),
        (
            encode(Image.new("RGB", (9, 9)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")]),
            "RGB",
        ),
        (encode(Image.new("RGB", (9, 9), "red"), "JPEG"), "RGB"),
    ],
    ids=["cmyk", "16 bits", "palette", "animated", "jpeg called png"],
)
def test_unusual_images_that_decode_are_trained_on(tmp_path, vocab, data, mode):
    assert Image.open(io.BytesIO(data)).mode == mode
    spec = write_shards(tmp_path, [12], {"00003.png": data})
    found = shards(spec, vocab)
    found.setup("fit")
    assert len(set(keys(found.train_dataloader()))) == 12 and found.skipped == {}


def test_pickles_are_counted_and_the_samples_beside_them_kept(tmp_path, vocab):
    members = {
        "00000.pyd": b"cos\nsystem\n(S'false'\ntR.",
        **good(0),
        "00001.pth": b"\x80\x04",
        **good(1),
        **good(2),
        **good(3),
    }
    data = shards({"web": str(write_tar(tmp_path / "a.tar", members))}, vocab)
    data.setup("fit")
    assert len(set(keys(data.train_dataloader()))) == 4
    assert data.skipped["pickle ignored"] == data.skipped["web/pickle ignored"] >= 1 and data.skipped_by_source == {}


def test_the_worst_shards_are_named_when_a_run_stops(tmp_path, vocab):
    bad = {f"{n:05d}.png": b"x" for n in (*range(25, 36), *range(52, 59))}
    spec = write_shards(tmp_path, [25, 25, 25, 25], bad)
    data = shards(spec, vocab, global_batch_size=100, max_bad_share=0.1)
    data.setup("fit")
    with pytest.raises(RuntimeError, match=r"worst shards: .*train-0001.tar with 1\d, .*train-0002.tar with \d"):
        list(data.train_dataloader())

"""The data road: what reaches the model, in which order, on which rank, and what happens to what cannot be read."""

import io
import itertools
import json
import os
import random
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import simplejpeg
import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image, ImageOps
from torchvision.transforms import v2

from datamodules.augment import Augment, scaled, upright_jpeg
from datamodules.dataset import CollatePairs
from datamodules.reading import evaluation_loader
from datamodules.sources import find
from stair.data.pairs import EvaluationPairs
from stair.data.remote import Remote, open_shard
from stair.data.shard_index import build
from stair.data.tars import Shards, expand, mixture, read_samples, walk
from stair.errors import FileError, SettingError
from stair.images import box_pixels, decode_image, eval_pixels
from stair.vocabulary import Vocabulary
from tests.support.files import unprivileged
from tests.support.shards import (
    digest,
    encode,
    good,
    keys,
    loader,
    picture,
    shards,
    write_shards,
    write_tar,
    write_words,
)


def test_each_stage_draws_for_itself_and_the_same_when_begun_again(tmp_path, vocab):
    spec = write_shards(tmp_path, [12, 9, 7])

    def drawn(stage):
        data = shards(spec, vocab, flip=True, crop_scale=(0.3, 1.0))
        module = SimpleNamespace(stage=stage)
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, limit_train_batches=1.0)
        data.setup("fit")
        batches = list(data.train_dataloader())
        return [row for batch in batches for row in digest(batch)], keys(batches)

    stages = {stage: drawn(stage) for stage in (None, 1, 2, 3)}
    assert stages[None] == stages[1] == drawn(1) and stages[2] == drawn(2)
    for one, other in ((1, 2), (2, 3), (1, 3)):
        assert sorted(stages[one][1]) == sorted(stages[other][1])
        assert stages[one][1] != stages[other][1] and len(set(stages[one][0]) & set(stages[other][0])) < 14


# ---- what reaches the model


def test_a_training_batch_is_what_the_contract_says(tmp_path, vocab):
    batch = next(iter(loader(write_shards(tmp_path, [10]), vocab)))
    assert batch["pixels"].shape == (4, 3, 8, 8) and batch["pixels"].dtype == torch.uint8
    assert batch["ids"].shape == batch["mask"].shape == (4, 4) and batch["mask"].dtype == torch.bool
    assert batch["image_id"].tolist() == batch["caption_image"].tolist() == [0, 1, 2, 3]
    word = Vocabulary(vocab).tokens[int(batch["ids"][0, 1])]
    assert batch["key"][0] == f"train-0000/{int(word.removeprefix('word')):05d}"


def test_evaluation_pixels_agree_with_torchvisions_resize_and_centre_crop():
    ramp = np.linspace(0, 255, 90, dtype=np.uint8)
    image = Image.fromarray(np.stack([np.tile(ramp, (50, 1))] * 3, -1))
    oracle = v2.Compose(
        [v2.Resize(25, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(25), v2.PILToTensor()]
    )
    difference = (eval_pixels(image, 25).int() - oracle(image).int()).abs()
    assert difference.max() <= 3


def test_an_image_of_extreme_shape_costs_no_more_than_its_square():
    assert eval_pixels(Image.new("RGB", (60_000, 1), "red"), 8)[:, 4, 4].tolist() == [255, 0, 0]


GRAY_16 = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
EXIF_TURNED = Image.Exif()
EXIF_TURNED[0x0112] = 6
HALF_RED = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
PALETTE = Image.new("P", (4, 4), 1)
PALETTE.putpalette([0, 0, 0, 0, 0, 255])


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encode(GRAY_16), (128, 128, 128)),
        (encode(HALF_RED), (255, 255, 255)),
        (encode(PALETTE), (0, 0, 255)),
        (encode(PALETTE, transparency=1), (255, 255, 255)),
        (encode(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
        (encode(Image.new("RGB", (4, 4), (9, 9, 9)), "WEBP", lossless=True), (9, 9, 9)),
    ],
    ids=["gray", "gray16", "rgba over white", "palette", "transparent palette", "cmyk", "one bit", "webp"],
)
def test_every_kind_of_image_becomes_the_rgb_a_viewer_shows(data, colour):
    assert decode_image(data).getpixel((1, 1)) == colour


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_that_its_camera_marked_as_turned_is_turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data, converted = encode(photo(32, 24), "JPEG", exif=exif), []
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_image(data, converted=converted).tobytes() == upright.tobytes()
    assert converted == ["EXIF orientation"] * (orientation > 1)
    # training turns it before it crops
    crop = Augment(16, (0.999, 1.0), False, 10_000)(data, random.Random(0))
    whole = box_pixels(upright, (0, 0, *upright.size), 16)
    assert (crop.int() - whole.int()).abs().float().mean() < 6


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Noise with the smoothness of a photograph."""
    noise = np.random.default_rng(width * height).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def test_colours_are_torchvisions_by_factors_around_one_and_off_draws_nothing():
    data, least, most = encode(photo(32, 24), "PNG"), [9.0] * 3, [0.0] * 3
    still = random.Random(3)
    plain = Augment(16, (0.5, 1.0), True, 10_000)(data, still)
    for seed in range(60):
        rng, again = random.Random(seed), random.Random(seed)
        pixels = Augment(16, (0.5, 1.0), True, 10_000, 0.4, 0.3)(data, rng)
        expected = Augment(16, (0.5, 1.0), True, 10_000)(data, again)
        factors = [again.uniform(0.6, 1.4) for _ in range(3)]
        for name, factor in zip(("brightness", "contrast", "saturation"), factors, strict=True):
            expected = getattr(v2.functional, f"adjust_{name}")(expected, factor)
        if again.random() < 0.3:
            expected = v2.functional.rgb_to_grayscale(expected, 3)
        assert torch.equal(pixels, expected) and rng.random() == again.random()
        least, most = [*map(min, least, factors)], [*map(max, most, factors)]
    assert max(least) < 0.7 and min(most) > 1.3
    gray = Augment(16, (0.5, 1.0), True, 10_000, grayscale=1.0)(data, random.Random(3))
    assert (gray == gray[:1]).all() and not (plain == plain[:1]).all()


def test_16_bits_are_scaled_and_not_cut_off_in_gray_and_in_colour():
    deep = np.linspace(0, 65_535, 12, dtype=np.uint16).reshape(3, 4)
    for form in ("PNG", "TIFF"):
        converted = []
        gray = np.asarray(decode_image(encode(Image.fromarray(deep), form), converted=converted))
        assert np.abs(gray[..., 0].astype(int) - deep / 257).max() <= 1 and converted == ["16 bits"]
    rows = b"".join(b"\0" + np.stack([row] * 3, -1).astype(">u2").tobytes() for row in deep)
    parts = {b"IHDR": bytes([0, 0, 0, 4, 0, 0, 0, 3, 16, 2, 0, 0, 0]), b"IDAT": zlib.compress(rows), b"IEND": b""}
    png = b"".join(len(d).to_bytes(4, "big") + n + d + zlib.crc32(n + d).to_bytes(4, "big") for n, d in parts.items())
    colour = np.asarray(decode_image(b"\x89PNG\r\n\x1a\n" + png, converted=converted))
    assert np.abs(colour.astype(int) - deep[..., None] / 257).max() <= 1 and converted == ["16 bits"] * 2


def test_numbers_without_a_white_are_refused_rather_than_shown_black():
    for pixels in (np.ones((4, 4), np.float32), np.full((4, 4), 9, np.int32)):
        with pytest.raises(ValueError, match=r"image undecodable: .*without a defined white"):
            decode_image(encode(Image.fromarray(pixels), "TIFF"))


def test_cmyk_as_photoshop_writes_it_keeps_its_colours():
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[:, 4:] = (0, 255, 255, 0)  # magenta and yellow make red, beside bare paper
    converted = []
    # Adobe's programs write what is left of the light, not the ink
    seen = np.asarray(decode_image(simplejpeg.encode_jpeg(255 - inks, 100, "CMYK", "444"), converted=converted))
    assert converted == ["CMYK"] and seen[0, 0].min() > 250 and seen[0, 7, 0] > 250 and seen[0, 7, 1:].max() < 5


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(form):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    converted = []
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    assert decode_image(data, converted=converted).getpixel((4, 4))[2] < 10 and "animation" in converted


def test_converted_images_are_trained_on_and_counted_by_kind_and_source(tmp_path, vocab, caplog):
    odd = {
        "00001.png": encode(photo(20, 16, "CMYK"), "JPEG"),
        "00002.png": encode(photo(20, 16, "P")),
        "00003.png": encode(photo(20, 16), "JPEG", exif=EXIF_TURNED),
        "00004.png": encode(Image.fromarray(np.full((9, 9), 30_000, dtype=np.uint16))),
        "00005.png": encode(photo(20, 16), "WEBP", save_all=True, append_images=[photo(20, 16, "L").convert("RGB")]),
    }
    data = shards({"web": write_shards(tmp_path, [8], odd)}, vocab, workers=1)
    data.setup("fit")
    assert len(set(keys(data.train_dataloader()))) == 8
    kinds = dict.fromkeys(("CMYK", "palette", "EXIF orientation", "16 bits", "animation"), 1)
    assert data.converted == {**kinds, **{f"web/{kind}": 1 for kind in kinds}} and data.skipped == {}
    assert data.converted_by_source == {"web": 5} and caplog.text.count("of source 'web': converted") == 5


# ---- the faster road of upright JPEGs


PLAIN = {
    "420": {}, "444": {"subsampling": 0}, "422": {"subsampling": 1}, "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3}, "profile": {"icc_profile": b"x" * 70_000}, "comment": {"comment": b"c"},
}  # fmt: skip


@pytest.mark.parametrize("size", [(61, 47), (1, 1), (300, 17), (640, 400)], ids=str)
@pytest.mark.parametrize("name", [*PLAIN, "gray"])
def test_upright_jpegs_have_the_very_pixels_of_the_common_road(name, size):
    data = encode(photo(*size, "L" if name == "gray" else "RGB"), "JPEG", **PLAIN.get(name, {}))
    for enough in (1, 40, 99, 10_000):
        assert np.array_equal(upright_jpeg(data, 10**6, enough), np.asarray(decode_image(data, 10**6, enough)))


def test_what_is_no_whole_upright_jpeg_goes_the_common_road():
    whole = encode(photo(64, 48), "JPEG")
    xmp = whole[:2] + b"\xff\xe1\x00\x20http://ns.adobe.com/xap/1.0/\0" + b" " + whole[2:]
    turned, cmyk = encode(photo(8, 8), "JPEG", exif=EXIF_TURNED), encode(photo(8, 8, "CMYK"), "JPEG")
    for data in (b"", b"\xff\xd8", b"\xff\xd8\xff\xda", whole[:100], whole[:-2], xmp, turned, cmyk, picture(1)):
        assert upright_jpeg(data, 10**6, 1) is None
    assert upright_jpeg(whole, 64 * 48 - 1, 1) is None


@pytest.mark.parametrize("size", [(1, 1), (30, 90), (90, 50), (400, 300)], ids=str)
def test_training_images_are_scaled_as_those_of_evaluation_but_for_rounding(size):
    image = photo(*size)
    for side in (8, 64):
        difference = (scaled(np.array(image), side).int() - box_pixels(image, (0, 0, *size), side).int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.5


def test_an_image_over_the_limit_is_refused_before_it_is_decoded():
    header = bytearray(encode(Image.new("L", (1, 1))))
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(ValueError, match="image too large"):
        decode_image(bytes(header))
    with pytest.raises(ValueError, match=r"image too large: 4 x 4 pixels, the limit is 15"):
        decode_image(encode(Image.new("L", (4, 4))), max_pixels=15)


def test_all_captions_of_an_image_are_drawn_in_time(tmp_path, vocab):
    train = loader(write_shards(tmp_path, [4]), vocab)
    drawn = {caption for _ in range(20) for batch in train for _, caption, _ in digest(batch)}
    assert len(drawn) == 4 * 3


@pytest.mark.parametrize(("joined", "count"), [(2, 2), (3, 3), (9, 3)])
def test_a_text_joins_different_captions_of_one_image_in_changing_order(tmp_path, vocab, joined, count):
    train = loader(write_shards(tmp_path, [8]), vocab, join_captions=joined, max_tokens=20)
    orders = set()
    for batch in [batch for _ in range(6) for batch in train]:
        for key, ids, mask in zip(batch["key"], batch["ids"], batch["mask"], strict=True):
            tokens = [int(i) - 5 for i in ids[mask][1:-1]]  # numbers of the words; five special tokens precede them
            own = int(key.rpartition("/")[2]) % 64
            assert tokens[::2] == [own] * count and len(set(tokens[1::2])) == count  # each caption is two words
            orders.add(tuple(tokens[1::2]))
    assert len(orders) > 2


def test_a_resumed_run_must_join_as_many_captions(tmp_path, vocab):
    train = write_shards(tmp_path, [8])
    state = loader(train, vocab).state_dict()
    with pytest.raises(SettingError, match="join_captions"):
        loader(train, vocab, join_captions=2).load_state_dict(state)


def test_fields_give_captions_by_their_weights_and_the_share_of_a_missing_one_goes_to_the_others(tmp_path, vocab):
    weights, texts = (
        {"caption": 0.7, "alt": 0.3, "txt": 0.5},
        {"caption": "word1", "alt": ["word2", ""], "txt": "word3"},
    )
    kinds = [{"caption", "alt", "txt"}, {"caption", "alt"}, {"alt", "txt"}, {"caption"}]
    members = {}
    for kind, n in itertools.product(range(len(kinds)), range(100)):
        fields = {field: texts[field] for field in sorted(kinds[kind])} | {"other": "word4"}
        members |= {f"{kind}-{n}.png": picture(0), f"{kind}-{n}.txt": fields.pop("txt", "").encode()}
        members[f"{kind}-{n}.json"] = json.dumps(fields).encode()
    spec = str(write_tar(tmp_path / "a.tar", members))
    train = loader(spec, vocab, global_batch_size=80, caption_fields=weights)
    rows = [row for _ in range(8) for batch in train for row in zip(batch["key"], batch["ids"].tolist(), strict=True)]
    drawn = Counter((key[2], ids[1]) for key, ids in rows)
    for kind, fields in enumerate(kinds):
        for number, field in enumerate(weights, 6):
            share = weights[field] / sum(weights[each] for each in fields) if field in fields else 0
            error = 4 * (share * (1 - share) / 800) ** 0.5
            assert drawn[str(kind), number] / 800 == pytest.approx(share, abs=error), (fields, field)


def test_img2dataset_members_are_read(tmp_path, vocab):
    members = {}
    for n in range(4):
        members |= {f"{n}.jpg": encode(Image.new("RGB", (9, 9)), "JPEG"), f"{n}.txt": b"word1 word2"}
        members |= {f"{n}.json": json.dumps({"caption": "word1 word2", "width": 9}).encode()}
    (batch,) = loader(str(write_tar(tmp_path / "00000.tar", members)), vocab)
    assert batch["ids"].tolist() == [[2, 6, 7, 3]] * 4


# ---- who sees what


@pytest.mark.parametrize("sizes", [[40], [30, 10], [7, 1, 12, 0, 5, 15]], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_no_sample_comes_twice_in_an_epoch_and_all_ranks_step_alike(tmp_path, vocab, sizes, ranks):
    spec = write_shards(tmp_path, sizes)
    seen = []
    for rank in range(ranks):
        found = keys(loader(spec, vocab, rank, ranks))
        assert len(found) == 40 // ranks
        seen += found
    assert len(set(seen)) == 40


@pytest.mark.parametrize("ranks", [1, 2])
def test_worker_processes_hand_out_each_sample_of_one_shard_once(tmp_path, vocab, ranks):
    spec = write_shards(tmp_path, [24])
    found = [keys(loader(spec, vocab, rank, ranks, workers=2)) for rank in range(ranks)]
    assert [len(k) for k in found] == [24 // ranks] * ranks
    assert len({key for k in found for key in k}) == 24


def test_epochs_differ_and_the_same_epoch_is_the_same_whatever_the_global_state(tmp_path, vocab):
    spec = write_shards(tmp_path, [9, 9])
    torch.manual_seed(1)
    one = loader(spec, vocab, flip=True, crop_scale=(0.3, 1.0))
    first, second = ([row for batch in one for row in digest(batch)] for _ in range(2))
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    other = loader(spec, vocab, flip=True, crop_scale=(0.3, 1.0))
    other.set_epoch(1)
    assert [row for batch in other for row in digest(batch)] == second != first
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {row[0] for row in first} != set() and [row[0] for row in first] != [row[0] for row in second]


def test_readers_live_on_from_epoch_to_epoch_also_after_one_that_was_left_early(tmp_path, vocab):
    train = write_shards(tmp_path, [7, 9, 8])
    here = loader(train, vocab, workers=2)
    seen, pids = [], set()
    for epoch in range(4):
        batches = itertools.islice(iter(here), 2 if epoch == 1 else None)
        seen.append([digest(batch) for batch in batches])
        pids |= {process.pid for process in here._iterator._workers}
    assert len(pids) == 2
    for epoch, digests in enumerate(seen):
        fresh = loader(train, vocab)
        fresh.set_epoch(epoch)
        assert digests == [digest(batch) for batch in fresh][: len(digests)]
    assert len(seen[3]) == len(here) > len(seen[1]) == 2


def test_readers_that_were_shut_down_between_epochs_are_replaced(tmp_path, vocab):
    here, fresh = (loader(write_shards(tmp_path, [7, 9, 8]), vocab, workers=workers) for workers in (2, 0))
    list(here)
    here._iterator._shutdown_workers()  # as Lightning does at the end of a fit
    here._iterator = None
    fresh.set_epoch(1)
    assert [digest(batch) for batch in here] == [digest(batch) for batch in fresh]


def test_a_pipe_is_drawn_from_and_wants_resampling_and_a_length(tmp_path, vocab, caplog):
    write_shards(tmp_path, [6, 6])
    spec = f"pipe:cat {tmp_path}/train-{{0000..0001}}.tar"
    for options in ({}, {"resample": True}):
        with pytest.raises(SettingError) as refused:
            loader(spec, vocab, **options)
        assert refused.value.setting == "data.resample"
    for workers in (0, 2):
        data = loader(spec, vocab, resample=True, train_samples=48, workers=workers)
        assert len(data) == 12 and len(set(keys(data))) == 12 and "resumed run continues with new draws" in caplog.text


def test_the_length_of_an_epoch_is_a_setting_of_resampled_ones_only(tmp_path, vocab):
    with pytest.raises(SettingError) as refused:
        loader(write_shards(tmp_path, [12]), vocab, train_samples=8)
    assert refused.value.setting == "data.train_samples"


def test_a_mixture_of_pipes_has_its_shares_in_every_batch_on_every_rank(tmp_path, vocab):
    write_shards(tmp_path, [6, 6])
    mixed = {
        name: Shards(f"pipe:cat {tmp_path}/train-000{i}.tar", weight)
        for i, (name, weight) in enumerate((("a", 3), ("b", 1)))
    }
    options = {"resample": True, "train_samples": 40, "global_batch_size": 8}
    found = [list(loader(mixed, vocab, rank, 2, **options)) for rank in range(2)]
    for batches in zip(*found, strict=True):
        assert [len(batch["key"]) for batch in batches] == [4, 4]
        assert sum(batch["source"].count("a") for batch in batches) == 6


# ---- ranks whose machines hold their own copies


def find_on_a_machine(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        sources, _ = find(mixture(f"{folder}/{rank}/*.tar"), False, Remote(), rank, 2)
        text = f"{sources[0].counts}"
    except (ValueError, OSError) as error:
        text = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.txt").write_text(text)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (([4, 5, 3], [4, 5, 3]), None),
        (([4, 5, 3], [4, 5]), ["rank 0 found 3 shards", "rank 1 found 2 shards"]),
        (([4, 5, 3], []), ["rank 0 found 3 shards", "rank 1 stopped (no shard matches"]),
        (([], []), ["no shard matches"]),
    ],
    ids=str,
)
def test_ranks_that_find_different_shards_all_stop_and_name_each_ranks_shards(tmp_path, sizes, expected):
    for rank, held in enumerate(sizes):  # folders of other names, as two machines may have
        (tmp_path / str(rank)).mkdir()
        write_shards(tmp_path / str(rank), held)
    mp.start_processes(find_on_a_machine, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        text = (tmp_path / f"{rank}.txt").read_text()
        if expected is None:
            assert text == "(4, 5, 3)"
        else:
            assert text.startswith("FileNotFoundError" if sizes == ([], []) else "SettingError")
            assert all(part in text for part in expected), text


# ---- where a run goes on


class Recorder(pl.LightningModule):
    """Writes down what it was given; stops with an error at a step, as a lost node would."""

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at, self.rows = stop_at, []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise InterruptedError
        self.rows.append((self.global_step, digest(batch)))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.weight.detach())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(folder: Path, spec, vocab, stop_at=-1, ckpt=None, workers=0, checkpoint=None, trainer=None, **options):
    module = Recorder(stop_at)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **(checkpoint or {"every_n_train_steps": 1}))
    runs = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[saver],
        num_sanity_val_steps=0, default_root_dir=folder, **{"max_epochs": 3, **(trainer or {})},
    )  # fmt: skip
    data = shards(spec, vocab, workers=workers, global_batch_size=4, **options)
    try:
        runs.fit(module, datamodule=data, ckpt_path=ckpt)
    except InterruptedError:
        assert stop_at >= 0
    return module.rows


EVERY_STEP = {"every_n_train_steps": 1}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AFTER_VALIDATION = {"every_n_epochs": 1, "save_on_train_epoch_end": False}


@pytest.mark.parametrize(
    ("saved_at", "checkpoint", "trainer", "workers"),
    [
        (3, EVERY_STEP, {}, 0),
        (3, EVERY_STEP, {}, 2),
        (5, EVERY_STEP, {}, 0),
        (7, EVERY_STEP, {"max_steps": 12, "max_epochs": -1}, 2),
        (10, EVERY_STEP, {"max_steps": 14, "max_epochs": -1}, 0),
        (5, EPOCH_END, {}, 0),
        (10, EPOCH_END, {}, 2),
        (10, EPOCH_END, {"max_steps": 14, "max_epochs": -1}, 0),
        (5, AFTER_VALIDATION, {}, 0),
        (10, AFTER_VALIDATION, {"max_steps": 14, "max_epochs": -1}, 0),
        (3, EVERY_STEP, {"limit_train_batches": 3}, 0),
        (4, EVERY_STEP, {"limit_train_batches": 3, "max_steps": 8, "max_epochs": -1}, 0),
        (3, EPOCH_END, {"limit_train_batches": 0.6}, 0),
        (7, EVERY_STEP, {"reload_dataloaders_every_n_epochs": 1}, 0),
    ],
    ids=lambda value: str(value).replace(" ", ""),
)
def test_a_resumed_run_sees_what_the_uninterrupted_run_sees(tmp_path, vocab, saved_at, checkpoint, trainer, workers):
    spec = write_shards(tmp_path, [9, 12], bad={"00005.png": b"no picture"})
    val = {"val": str(tmp_path / "train-0001.tar")} if checkpoint == AFTER_VALIDATION else None
    common = {"workers": workers, "checkpoint": checkpoint, "trainer": trainer, "val": val, "max_bad_share": 0.5}
    whole = fit(tmp_path / "a", spec, vocab, **common)
    fit(tmp_path / "b", spec, vocab, stop_at=saved_at + 1, **common)
    again = fit(tmp_path / "b2", spec, vocab, ckpt=str(tmp_path / "b" / f"step={saved_at}.ckpt"), **common)
    assert again == whole[saved_at:] and len(again) > 1


def test_a_state_from_other_batches_shards_or_shuffling_is_refused_by_both_its_sides(tmp_path, vocab):
    spec = write_shards(tmp_path, [16])
    state = loader(spec, vocab).state_dict()
    with pytest.raises(ValueError, match=r"'global_batch_size': \(4, 8\).*'shuffle': \(8, 9\).*resume with"):
        loader(spec, vocab, global_batch_size=8, shuffle=9).load_state_dict(state)
    (tmp_path / "train-0000.tar").rename(tmp_path / "train-0009.tar")
    with pytest.raises(ValueError, match=r"shards"):
        loader(spec, vocab).load_state_dict(state)


# ---- what cannot be read


BAD = {
    "00001.png": b"",
    "00002.png": b"no picture",
    "00003.png": picture(3)[:200],
    "00004.json": b"{}",
    "00005.json": b'{"captions": ["  "]}',
    "00006.json": b"\xff\xfe",
    "00007.json": b"[" * 100_000,
    "00008.json": b'{"captions": [1]}',
}
CAUSES = {"image empty": 1, "image undecodable": 2, "no caption": 2, "caption unreadable": 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_counted_by_cause_across_processes(tmp_path, vocab, caplog, workers):
    data = shards(write_shards(tmp_path, [40], BAD), vocab, workers=workers, max_bad_share=0.5)
    data.setup("fit")
    train = data.train_dataloader()
    batches = list(train)
    assert len(batches) == len(train) == 10 and all(len(b["key"]) == 4 for b in batches)
    assert not {f"train-0000/0000{i}" for i in range(1, 9)} & set(keys(batches))
    assert data.skipped == CAUSES  # one that is tried in the place of another bad one is not counted there
    assert (
        "'00001' in" in caplog.text and f"skipped {sum(data.skipped.values())} samples: {data.skipped}" in caplog.text
    )


def test_too_many_bad_samples_stop_the_run_and_name_the_worst_shard(tmp_path, vocab):
    spec = write_shards(tmp_path, [40], BAD)
    with pytest.raises(RuntimeError, match=r"max_bad_share=0.1.*worst shards: .*train-0000.tar with"):
        list(loader(spec, vocab))


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_one_usable_sample_stop_the_run(tmp_path, vocab, workers):
    good = loader(write_shards(tmp_path, [8, 20]), vocab, workers=workers, max_bad_share=0.99)
    spec = write_shards(tmp_path, [8, 20], {f"{n:05d}.png": b"x" * len(picture(n)) for n in range(28)})
    with pytest.raises(ValueError, match=r"28 of 28 samples are bad: 28 image undecodable"):
        loader(spec, vocab, workers=workers, max_bad_share=0.99)
    with pytest.raises(FileError, match="image undecodable"):  # they went bad after the first look
        list(good)


def test_a_bad_sample_is_replaced_by_the_next_good_one_of_its_shard(tmp_path, vocab):
    spec = write_shards(tmp_path, [6, 6], {"00002.png": b"x", "00003.png": b"x", "00011.png": b"x"})
    found = keys(loader(spec, vocab, max_bad_share=0.5, shuffle=0))
    assert len(found) == 12 and sorted(set(found)) == sorted(
        {f"train-000{n // 6}/{n:05d}" for n in range(12) if n not in (2, 3, 11)}
    )
    assert found.count("train-0000/00004") == 3 and found.count("train-0001/00006") == 2


def test_a_shard_that_is_cut_short_is_counted_and_the_rest_of_the_epoch_still_comes(tmp_path, vocab, caplog):
    spec = write_shards(tmp_path, [10, 10])
    path = tmp_path / "train-0000.tar"
    os.truncate(path, 9_000)
    data = shards(spec, vocab, max_bad_share=0.5)
    data.setup("fit")
    assert len(keys(data.train_dataloader())) == 4 * len(data.train_dataloader()) >= 12
    assert data.skipped["shard broken"] >= 1 and "train-0000.tar is truncated" in caplog.text


def test_a_file_that_is_no_tar_is_counted_while_others_hold_samples(tmp_path, vocab):
    spec = write_shards(tmp_path, [8])
    (tmp_path / "train-0001.tar").write_bytes(b"not a tar" * 200)
    (tmp_path / "train-0002.tar").write_bytes(b"")
    data = shards(spec, vocab)
    data.setup("fit")
    assert len(set(keys(data.train_dataloader()))) == 8
    assert data.skipped == {"shard broken": 2}


@pytest.mark.parametrize("content", [b"", b"not a tar" * 200, None], ids=["zero bytes", "no tar", "empty tar"])
def test_training_shards_without_samples_are_refused_before_the_first_step(tmp_path, vocab, content):
    path = write_tar(tmp_path / "a.tar", {}) if content is None else tmp_path / "a.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"none of 1 training shards holds a sample.*a\.tar"):
        loader(str(path), vocab)


@pytest.mark.parametrize(("closed", "indexed"), [(".tar", False), (".tar", True), (".tar.idx", True)])
def test_a_file_that_the_user_may_not_read_is_an_error_with_path_and_remedy(tmp_path, monkeypatch, closed, indexed):
    monkeypatch.chdir(tmp_path)
    vocab = write_words(Path())
    write_shards(tmp_path, [8, 8])
    if indexed:
        loader("train-*.tar", vocab)
    Path(f"train-0001{closed}").chmod(0)
    with unprivileged(), pytest.raises(FileError, match="chmod") as refused:
        loader("train-*.tar", vocab)
    assert str(refused.value.path) == f"train-0001{closed}"


def test_members_of_other_names_are_an_error_with_given_and_allowed_names(tmp_path, vocab):
    names = {f"{n}.{kind}": b"word1" for n in range(8) for kind in ("avif", "txt")}
    with pytest.raises(ValueError, match=r"'jpg', 'jpeg', 'png', 'webp'.*members seen: \['0.avif', '0.txt'"):
        loader(str(write_tar(tmp_path / "a.tar", names)), vocab)
    images = {f"{n}.png": picture(n) for n in range(8)}
    with pytest.raises(ValueError, match=r"'json', 'txt'.*members seen: \['0.png'"):
        loader(str(write_tar(tmp_path / "b.tar", images)), vocab)


def test_a_spec_that_matches_nothing_and_a_set_below_one_batch_are_refused(tmp_path, vocab):
    with pytest.raises(FileNotFoundError, match=r"nothing-\*\.tar"):
        loader(str(tmp_path / "nothing-*.tar"), vocab)
    spec = write_shards(tmp_path, [3])
    with pytest.raises(FileNotFoundError, match=r"train-0001.tar"):
        loader(str(tmp_path / "train-{0000..0001}.tar"), vocab)
    with pytest.raises(FileNotFoundError, match=rf"is a folder, not a shard: give '{tmp_path}/\*.tar'"):
        loader(str(tmp_path), vocab)
    with pytest.raises(ValueError, match=r"has a brace without its counterpart"):
        loader(str(tmp_path / "train-{0000..0001.tar"), vocab)
    with pytest.raises(SettingError, match=r"3 pairs .*fewer than global_batch_size=4"):
        loader(spec, vocab)
    with pytest.raises(ValueError, match=r"global_batch_size=4 is not a multiple of 3 ranks"):
        loader(spec, vocab, 0, 3)
    with pytest.raises(ValueError, match="crop_scale"):
        shards(spec, vocab, crop_scale=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"color_jitter is 1.5. Allowed: 0 to 1"):
        shards(spec, vocab, color_jitter=1.5)
    with pytest.raises(ValueError, match="grayscale"):
        shards(spec, vocab, grayscale=-0.1)


def test_pickles_in_a_shard_are_never_opened(tmp_path, vocab):
    members = {k: v for n in range(4) for k, v in ({f"{n:05d}.pyd": b"cos\nsystem\n(S'false'\ntR."} | good(n)).items()}
    assert len(keys(loader(str(write_tar(tmp_path / "a.tar", members)), vocab))) == 4


# ---- evaluation


@pytest.mark.parametrize(("images", "ranks"), [(7, 1), (7, 2), (9, 4), (1, 3)])
def test_evaluation_sees_each_image_once_and_all_ranks_make_the_same_batches(tmp_path, vocab, images, ranks):
    write_shards(tmp_path, [images])
    pairs = EvaluationPairs(str(tmp_path / "*.tar"), 8, 10_000)
    collate = CollatePairs(Vocabulary(vocab), 8)
    found = [list(evaluation_loader(pairs, collate, 2, 0, rank, ranks)) for rank in range(ranks)]
    assert len({tuple(len(batch["pixels"]) for batch in batches) for batches in found}) == 1
    ids = torch.cat([batch["image_id"] for batches in found for batch in batches])
    owners = torch.cat([batch["caption_image"] for batches in found for batch in batches])
    assert sorted(ids[ids >= 0].tolist()) == list(range(images))
    assert sorted(owners[owners >= 0].tolist()) == [i for i in range(images) for _ in range(3)]
    assert all(
        i % ranks == rank for rank in range(ranks) for b in found[rank] for i in b["image_id"].tolist() if i >= 0
    )


def test_evaluation_pixels_are_those_of_the_public_function(tmp_path, vocab):
    write_shards(tmp_path, [3])
    data = shards(None, vocab, val={"a": str(tmp_path / "*.tar"), "b": str(tmp_path / "*.tar")}, workers=2)
    data.setup("validate")
    assert data.val_names == ["a", "b"] and len(data.val_dataloader()) == 2
    (batch,) = data.val_dataloader()[1]
    assert batch["key"] == [f"train-0000/0000{n}" for n in range(3)]
    assert torch.equal(batch["pixels"][1], eval_pixels(decode_image(picture(1)), 8))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"00001.png": b"no picture"}, "image undecodable"),
        ({"00001.json": b'{"captions": ["word1", " "]}'}, "one of the 2 is blank"),
        ({"00001.json": b"{}"}, "no caption"),
    ],
    ids=["image", "one caption", "captions"],
)
def test_a_bad_evaluation_sample_stops_the_run_by_file_and_key(tmp_path, vocab, bad, reason):
    write_shards(tmp_path, [3], bad)
    with pytest.raises(ValueError, match=rf"evaluation sample '00001' of .*train-0000.tar: .*{reason}"):
        EvaluationPairs(str(tmp_path / "*.tar"), 8, 10_000)[1]


def test_an_evaluation_tar_that_cannot_be_indexed_in_full_is_refused(tmp_path):
    with pytest.raises(FileError, match="is a command"):
        EvaluationPairs("pipe:cat a.tar", 8, 10_000)
    path = write_tar(tmp_path / "a.tar", good(1) | {"00002.png": picture(2)})
    with pytest.raises(ValueError, match=r"'00002' of .*a.tar: no caption: members are \['png'\]"):
        EvaluationPairs(str(path), 8, 10_000)
    whole = write_tar(tmp_path / "b.tar", good(1) | good(2)).read_bytes()
    for length in (len(whole) // 10, 4_096, 3_000):
        (tmp_path / "c.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            EvaluationPairs(str(tmp_path / "c.tar"), 8, 10_000)


def test_the_trainer_runs_validation_test_and_prediction_loaders(tmp_path, vocab):
    class Counts(Recorder):
        seen = ()

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.seen += ((dataloader_idx, len(batch["image_id"])),)

        test_step = predict_step = validation_step

    write_shards(tmp_path, [5])
    spec = str(tmp_path / "*.tar")
    data = shards(None, vocab, val={"a": spec, "b": spec}, test={"c": spec}, eval_batch_size=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module = Counts()
    trainer.validate(module, datamodule=data)
    trainer.test(module, datamodule=data)
    trainer.predict(module, datamodule=data)
    assert module.seen == ((0, 3), (0, 2), (1, 3), (1, 2), (0, 3), (0, 2), (0, 3), (0, 2))


@pytest.mark.shared
def test_flickr8k_streams_in_full_without_a_bad_sample(vocab):
    root = Path(os.environ.get("STAIR_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "flickr8k").is_dir():
        pytest.skip(f"no real images under {root}")
    data = shards(str(root / "flickr8k" / "train-{0000..0004}.tar"), vocab, global_batch_size=500, workers=2)
    data.setup("fit")
    assert len(set(keys(data.train_dataloader()))) == 6_000 and data.skipped == {}


def dotted(number: int) -> dict[str, bytes]:
    return {name.replace(".", "_v1.5."): data for name, data in good(number).items()}


def test_keys_with_dots_are_left_out_and_counted_in_training_and_refused_in_evaluation(tmp_path, vocab):
    for name, shown in (("a", 0), ("b", 30)):
        members = {}
        for i in range(shown, shown + 30):
            members |= dotted(i) if i % 3 == 0 else good(i)
        write_tar(tmp_path / f"{name}.tar", members)
    spec = str(tmp_path / "?.tar")
    assert len(build(tmp_path / "a.tar")[0]) == 30
    data = shards(spec, vocab, global_batch_size=10, max_bad_share=0.5)
    data.setup("fit")
    assert {key[-5:] for key in keys(data.train_dataloader())} <= {f"{i:05d}" for i in range(60) if i % 3}
    assert set(data.skipped) == {"dotted key"} and data.skipped["dotted key"] == 20
    expected = r"'00000_v1.5.png' belongs to key '00000_v1' as type '5.png'; rename"
    with pytest.raises(ValueError, match=f"evaluation sample '00000_v1.5' of .*a.tar: dotted key: {expected}"):
        EvaluationPairs(spec, 8, 10_000)
    write_tar(tmp_path / "c.tar", {name: data for i in range(8) for name, data in dotted(i).items()})
    with pytest.raises(ValueError, match=f"none of the first 8 samples .*dotted key: {expected}"):
        shards(str(tmp_path / "c.tar"), vocab, global_batch_size=4).setup("fit")
    # each is one, though to WebDataset all are one key
    write_tar(tmp_path / "d.tar", {f"2024.01.0{i}.{kind}": b"x" for i in range(4) for kind in ("png", "txt")})
    streamed = [sample.key for sample in read_samples(str(tmp_path / "d.tar"))]
    assert streamed == [sample.key for sample in walk(str(tmp_path / "d.tar"))] == [f"2024.01.0{i}" for i in range(4)]


def test_further_members_with_dots_beside_an_image_are_no_samples_and_move_none(tmp_path):
    members, plain = {}, {}
    for i in range(4):
        image, text = good(i).items()
        plain |= dict([image, text])
        key = image[0].partition(".")[0]
        members |= {
            f"{key}.0.png": b"x",
            image[0]: image[1],
            f"{key}.seg.png": b"x",
            text[0]: text[1],
            f"d/._{i}.png": b"x",
        }
    write_tar(tmp_path / "a.tar", plain)
    write_tar(tmp_path / "b.tar", members)
    streamed = [[(s.key, s.members) for s in read_samples(str(tmp_path / name))] for name in ("a.tar", "b.tar")]
    assert streamed[0] == streamed[1] and len(streamed[0]) == 4


def test_a_command_keeps_its_backslashes_and_a_brace_is_itself_behind_one():
    assert expand(r"pipe:tr '\n\t' ' ' < a\ b-{0..1}.tar \\ c") == [
        rf"pipe:tr '\n\t' ' ' < a\ b-{i}.tar \\ c" for i in range(2)
    ]
    assert expand(r"pipe:awk '\{print $1\, $2\}' {a,b}\t") == [rf"pipe:awk '{{print $1, $2}}' {i}\t" for i in "ab"]
    with open_shard(expand(r"pipe:printf 'a\nb'")[0], Remote()) as file:
        assert file.read() == b"a\nb"

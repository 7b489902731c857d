"""`stair doctor`, and the same look before every fit: what is wrong is named, with the setting that mends it."""

import hashlib
import io
import json
import logging
import re
import sys
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ImageTextShards
from stair.cli import main
from stair.data.diagnostics import first_samples
from stair.data.doctor import doctor
from stair.data.remote import Remote
from stair.errors import FileError, SettingError
from tests.support.files import encoded, write_tar

WORDS = [f"word{n}" for n in range(700)]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return str(path)


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST))


def members(numbers: range, texts=lambda n: [f"word{n} word1"], image=picture) -> list[tuple[str, bytes]]:
    return [
        (f"k{n:04d}.{kind}", content)
        for n in numbers
        for kind, content in (("png", image(n)), ("json", json.dumps({"captions": texts(n)}).encode()))
    ]


def run_doctor(capsys, *args: str, **settings) -> tuple[dict, int]:
    """The report as JSON has it, and the exit status."""
    settings = {"global_batch_size": 8, "image_size": 20, "max_tokens": 8, "workers": 1} | settings
    report = doctor(list(args), **settings)
    capsys.readouterr()
    return json.loads(json.dumps(report)), int(report["stops"])


def mends(report: dict, severity: str) -> str:
    return "\n".join(f"{f['what']} -> {f['mend']}" for f in report["findings"] if f["severity"] == severity)


def test_sound_data_are_described_truly_and_nothing_is_complained_of(tmp_path, vocab, capsys):
    texts = {n: [" ".join(WORDS[n : n + 1 + n % 5]), f"word{n}"] for n in range(60)}
    for shard in range(3):
        write_tar(tmp_path / f"a-{shard}.tar", members(range(20 * shard, 20 * shard + 20), texts.__getitem__))
    report, status = run_doctor(capsys, str(tmp_path / "a-*.tar"), vocabulary=vocab, samples=60)
    assert status == 0 and report["findings"] == []
    (source,) = report["sources"].values()
    lengths = sorted(len(text.split()) + 2 for group in texts.values() for text in group)
    assert source["shards"] == 3 and source["samples"] == source["read"] == 60
    assert source["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))
    assert source["formats"] == {"png": 60} and source["short_side"] == {"p50": 20, "p95": 20, "max": 20}
    assert source["tokens"]["max"] == lengths[-1] and source["tokens"]["p50"] == int(np.percentile(lengths, 50))
    assert source["truncated_share"] == 0 and source["images_per_second"] > 0
    assert source["caption_fields"] == {"json: captions": 60}


STOPS = {
    "nothing matches": (lambda p: None, {}, r"no shard matches .* -> .*--data.train"),
    "no tar": (
        lambda p: (p / "a.tar").write_bytes(b"hello" * 999),
        {},
        r"no sample could be read .* -> .*--data.train",
    ),
    "other names": (
        lambda p: write_tar(p / "a.tar", [(f"{n}.{kind}", b"x") for n in range(20) for kind in ("avif", "txt")]),
        {},
        r"none of the first 20 samples has a usable member of \['jpg'.*'0.avif', '0.txt'.* -> .*KEY.jpg",
    ),
    "torn apart": (
        lambda p: write_tar(p / "a.tar", sorted(members(range(20)), key=lambda member: member[0][-3:])),
        {},
        r"20 keys occur again later in the same shard.* -> .*--sort=name",
    ),
    "many bad": (
        lambda p: write_tar(p / "a.tar", members(range(240), image=lambda n: picture(n) if n % 2 else b"no picture")),
        {},
        r"120 of 240 samples are bad: 120 image undecodable.* -> .*--data.max_bad_share",
    ),
    "too few": (
        lambda p: write_tar(p / "a.tar", members(range(5))),
        {},
        r"5 pairs, fewer than global_batch_size=8.* -> .*--data.global_batch_size",
    ),
    "ranks": (
        lambda p: write_tar(p / "a.tar", members(range(20))),
        {"ranks": 3},
        r"global_batch_size=8 is not a multiple of 3 ranks -> .*--data.global_batch_size",
    ),
}


@pytest.mark.parametrize(("make", "settings", "output"), STOPS.values(), ids=STOPS)
def test_what_stops_a_run_is_named_with_its_remedy_and_the_status_is_1(tmp_path, capsys, make, settings, output):
    make(tmp_path)
    report, status = run_doctor(capsys, str(tmp_path / "*.tar"), **settings)
    assert status == 1
    assert re.search(output, mends(report, "stops")), report["findings"]


WARNS = {
    "long captions": (
        lambda n: [" ".join(WORDS[n : n + 12])],
        picture,
        {},
        r"100.0% of captions are longer than 8 tokens.*at most 14 -> --model.init_args.stair.text.max_tokens 16",
    ),
    "another language": (
        lambda n: [f"mot{n} chat{n}"],
        picture,
        {},
        r"100.0% of tokens are not in the vocabulary",
    ),
    "small images": (
        lambda n: [f"word{n}"],
        picture,
        {"image_size": 64},
        r"100% of images have a short side below the model's 64 px \(median 20\).* -> .*image.image_size 20",
    ),
    "large images": (
        lambda n: [f"word{n}"],
        lambda n: picture(n, (90, 88)),
        {},
        r"median short side is 88 px.* -> .*--max_side 40.*--data.workers",
    ),
    "the same image": (
        lambda n: [f"word{n}"],
        lambda n: picture(n // 2),
        {},
        r"40 of 40 samples have the same image as another",
    ),
    "the same caption": (lambda n: [f"word{n % 4}"], picture, {}, r"10 of 40 samples have the caption 'word0'"),
    "a blank caption": (
        lambda n: [f"word{n}", " "],
        picture,
        {},
        r"40 of 40 samples have a blank caption among others",
    ),
    "few bad": (
        lambda n: [f"word{n}"] if n else [],
        picture,
        {},
        r"1 of 40 samples are bad: 1 no caption .* -> .*--data.max_bad_share",
    ),
    "idle workers": (lambda n: [f"word{n}"], picture, {"workers": 9}, r"an epoch has 5 steps.* -> --data.workers 5"),
}


@pytest.mark.parametrize(("texts", "image", "settings", "output"), WARNS.values(), ids=WARNS)
def test_what_makes_a_run_worse_is_named_with_what_mends_it_and_the_status_is_0(
    tmp_path, vocab, capsys, texts, image, settings, output
):
    write_tar(tmp_path / "a.tar", members(range(40), texts, image))
    report, status = run_doctor(capsys, str(tmp_path / "a.tar"), vocabulary=vocab, **settings)
    assert status == 0 and re.search(output, mends(report, "warns")), report["findings"]


def test_samples_in_two_shards_are_distinguished_from_keys_in_two_shards(tmp_path, capsys):
    write_tar(tmp_path / "a-0.tar", members(range(20)))
    write_tar(tmp_path / "a-1.tar", members(range(12, 32)))
    report, status = run_doctor(capsys, str(tmp_path / "a-*.tar"))
    assert status == 0 and re.search(
        r"8 samples also occur in an earlier shard.*8 of them in .*a-1", mends(report, "warns")
    )
    write_tar(tmp_path / "a-1.tar", members(range(12, 32), texts=lambda n: [f"another sentence {n}"]))
    report, _ = run_doctor(capsys, str(tmp_path / "a-*.tar"))
    assert "earlier shard" not in mends(report, "warns")


def test_left_and_right_are_seen_where_the_runs_files_say_flip(tmp_path, vocab, capsys):
    write_tar(tmp_path / "a.tar", members(range(40), lambda n: [f"word{n} to the left of word1"]))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data: {{flip: true, global_batch_size: 4}}\nmodel: {{init_args: {{stair: {{vocabulary: {vocab}, "
        "text: {max_tokens: 5}, image: {image_size: 20}}}}\n"
    )
    report, _ = run_doctor(
        capsys, str(tmp_path / "a.tar"), configs=[str(recipe)], global_batch_size=None, image_size=None, max_tokens=None
    )
    assert "40 of 40 samples mention left or right, but data.flip mirrors images -> --data.flip false" in mends(
        report, "warns"
    )
    assert "longer than 5 tokens" in mends(report, "warns")
    recipe.write_text(recipe.read_text().replace("flip: true", "flip: false"))
    report, _ = run_doctor(capsys, str(tmp_path / "a.tar"), configs=[str(recipe)], image_size=None, max_tokens=None)
    assert "left or right" not in mends(report, "warns")


def test_a_broken_shard_among_sound_ones_is_named_and_the_others_are_counted(tmp_path, capsys):
    for shard in range(3):
        write_tar(tmp_path / f"a-{shard}.tar", members(range(20 * shard, 20 * shard + 20)))
    whole = (tmp_path / "a-1.tar").read_bytes()
    (tmp_path / "a-1.tar").write_bytes(whole[: len(whole) // 2])
    report, status = run_doctor(capsys, str(tmp_path / "a-*.tar"))
    assert status == 0 and "1 of 3 shards that were read are broken; the first error: " in mends(report, "warns")
    assert "a-1.tar" in mends(report, "warns")
    (source,) = report["sources"].values()
    assert 40 < source["samples"] < 60


def test_files_of_a_shells_glob_are_one_source_and_a_mapping_is_several(tmp_path, capsys):
    for name in ("a-0", "a-1", "b-0"):
        write_tar(tmp_path / f"{name}.tar", members(range(20)))
    report, _ = run_doctor(capsys, str(tmp_path / "a-0.tar"), str(tmp_path / "a-1.tar"))
    assert [source["shards"] for source in report["sources"].values()] == [2]
    for one, two in (("one", "two"), ("on", "2024"), ("on", "yes")):  # names as typed
        report, _ = run_doctor(capsys, f"{{{one}: {tmp_path}/a-*.tar, {two}: {{shards: {tmp_path}/b-0.tar}}}}")
        assert {name: source["samples"] for name, source in report["sources"].items()} == {one: 40, two: 20}
    with pytest.raises(SettingError) as refused:
        doctor(["{one: {shardz: x}}"])
    assert refused.value.setting == "data"


def test_shards_on_a_server_are_counted_by_their_index_and_asked_for_without_one(tmp_path, capsys):
    write_tar(tmp_path / "a-0.tar", members(range(20)))
    write_tar(tmp_path / "a-1.tar", members(range(20, 50)))

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        spec = f"http://127.0.0.1:{server.server_port}/a-{{0..1}}.tar"
        report, status = run_doctor(capsys, spec)
        assert status == 1 and "have no index.json" in mends(report, "stops")
        assert report["sources"][spec]["read"] == 50
        report, status = run_doctor(capsys, spec, train_samples=50)
        assert status == 0
        run_doctor(capsys, str(tmp_path / "a-*.tar"), write_index=True)
        report, status = run_doctor(capsys, spec)
        assert status == 0 and report["sources"][spec]["samples"] == 50
        server.shutdown()


def test_the_index_it_writes_is_true_and_a_shard_that_changed_since_is_named(tmp_path, capsys):
    for shard in range(2):
        write_tar(tmp_path / f"a-{shard}.tar", members(range(20 * shard, 20 * shard + 20 + shard)))
    spec = str(tmp_path / "a-*.tar")
    report, status = run_doctor(capsys, spec, write_index=True)
    assert status == 0 and mends(report, "warns") == ""
    tars = {path.name: path.read_bytes() for path in tmp_path.glob("*.tar")}
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "format": 1,
        "shards": {
            f"a-{n}.tar": {
                "samples": 20 + n,
                "bytes": len(tars[f"a-{n}.tar"]),
                "sha256": hashlib.sha256(tars[f"a-{n}.tar"]).hexdigest(),
            }
            for n in range(2)
        },
    }
    changed = bytearray(tars["a-1.tar"])
    changed[600] ^= 1  # inside an image
    (tmp_path / "a-1.tar").write_bytes(changed)
    report, status = run_doctor(capsys, spec)
    assert status == 0 and "a-1.tar: other content than index.json says (sha256) -> " in mends(report, "warns")
    (tmp_path / "a-1.tar").write_bytes(tars["a-1.tar"] + bytes(512))
    report, status = run_doctor(capsys, spec)
    assert status == 1 and "--write_index" in mends(report, "stops")
    report, status = run_doctor(capsys, spec, write_index=True)
    assert status == 0


def test_an_index_is_not_written_for_a_shard_that_cannot_be_read(tmp_path):
    whole = write_tar(tmp_path / "a.tar", members(range(20))).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:5000])
    with pytest.raises(FileError) as refused:
        doctor([str(tmp_path / "a.tar")], write_index=True)
    assert refused.value.path == tmp_path / "a.tar"
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_headers_are_read_only_for_the_time_given_and_the_rest_is_an_estimate(tmp_path, capsys):
    for shard in range(6):
        write_tar(tmp_path / f"a-{shard}.tar", members(range(20)))
    report, _ = run_doctor(capsys, str(tmp_path / "a-*.tar"), seconds=0.0)
    (source,) = report["sources"].values()
    assert (source["samples"], source["samples_are"]) == (120, "estimated")
    assert "1 of 6 shards were counted within the time limit" in mends(report, "notes")


def test_the_command_prints_the_findings_and_ends_with_the_status(tmp_path, monkeypatch, capsys):
    write_tar(tmp_path / "a.tar", members(range(20)))
    args = ["stair", "doctor", str(tmp_path / "a.tar"), "--image_size", "20", "--global_batch_size"]
    monkeypatch.setattr(sys, "argv", [*args, "32", "--workers", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    output = capsys.readouterr().out
    assert "samples: 20" in output and "samples_are: counted" in output and "STOPS  there are 20 pairs" in output
    monkeypatch.setattr(sys, "argv", [*args, "4", "--workers", "1", "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["sources"]


def shards(spec: str, vocab: str, **settings) -> ImageTextShards:
    return ImageTextShards(
        spec, vocabulary=vocab, **({"image_size": 20, "max_tokens": 8, "global_batch_size": 4} | settings)
    )


def test_a_fit_is_refused_or_warned_before_its_first_step_as_the_doctor_would(tmp_path, vocab, caplog):
    write_tar(tmp_path / "a.tar", members(range(20)))
    with caplog.at_level(logging.WARNING):
        shards(str(tmp_path / "a.tar"), vocab).setup("fit")
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        shards(str(tmp_path / "a.tar"), vocab, max_tokens=3).setup("fit")
    assert any("longer than 3 tokens" in text and "stair.text.max_tokens 8" in text for text in caplog.messages)
    write_tar(tmp_path / "b.tar", members(range(20), image=lambda n: b"no picture"))
    with pytest.raises(ValueError, match=r"20 of 20 samples are bad: 20 image undecodable"):
        shards(str(tmp_path / "b.tar"), vocab).setup("fit")
    # a bad first shard alone does not say so
    write_tar(tmp_path / "c.tar", members(range(20)))
    with caplog.at_level(logging.WARNING):
        shards(str(tmp_path / "[bc].tar"), vocab, max_bad_share=0.9).setup("fit")
    assert "20 of 40 samples are bad" in caplog.text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", r"index.json is not an index of shards"),
        ('{"format": 7, "shards": {}}', r"its format is 7, expected 1"),
        ('{"format": 1, "shards": [{}]}', r"index.json is not an index of shards"),
        ('{"format": 1, "shards": {"a.tar": {"samples": 3}}}', r"index.json is not an index of shards"),
    ],
)
def test_a_damaged_index_stops_the_doctor_as_it_stops_a_fit_and_can_be_made_again(
    tmp_path, vocab, capsys, content, reason
):
    spec = str(write_tar(tmp_path / "a.tar", members(range(20))))
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        shards(spec, vocab).setup("fit")
    report, status = run_doctor(capsys, spec)
    assert status == 1 and re.search(reason, mends(report, "stops"))
    report, status = run_doctor(capsys, spec, write_index=True)
    assert status == 0 and json.loads((tmp_path / "index.json").read_text())["shards"]["a.tar"]["samples"] == 20


@pytest.mark.parametrize("content", ['{"version": 2, "shards": [{"column_names": []}]}', "[]"])
def test_another_tools_index_is_passed_over_and_never_overwritten(tmp_path, vocab, capsys, content):
    spec = str(write_tar(tmp_path / "a.tar", members(range(20))))
    (tmp_path / "index.json").write_text(content)
    shards(spec, vocab).setup("fit")
    report, status = run_doctor(capsys, spec)
    assert status == 0 and report["sources"][spec]["samples"] == 20
    with pytest.raises(FileError) as refused:
        doctor([spec], write_index=True)
    assert refused.value.path == tmp_path / "index.json"
    assert (tmp_path / "index.json").read_text() == content and not (tmp_path / ".prepare").exists()


class Zeros(io.RawIOBase):
    def __init__(self, left: int) -> None:
        self.left = left

    def read(self, size: int = -1) -> bytes:
        size = min(size, self.left) if size >= 0 else self.left
        self.left -= size
        return bytes(size)


def test_a_member_that_training_passes_over_stops_no_fit_however_large_it_is(tmp_path, vocab, monkeypatch):
    monkeypatch.setattr("stair.data.tars.LARGEST", 1 << 20)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members(range(8)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            if name.endswith(".json"):
                info = tarfile.TarInfo(name.replace(".json", ".mp4"))
                info.size = (1 << 20) + 1
                tar.addfile(info, Zeros(info.size))
    data = shards(str(tmp_path / "a.tar"), vocab, workers=0)
    data.setup("fit")
    assert sum(len(batch["key"]) for batch in data.train_dataloader()) == 8
    (seen, reason) = first_samples(str(tmp_path / "a.tar"), 3, Remote())
    assert not reason and [list(sample.members) for sample in seen] == [["png", "json", "mp4"]] * 3


def test_hidden_members_and_types_that_training_passes_over_make_no_sample_bad(tmp_path, vocab):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in members(range(8)):
            # `tar cf a.tar set` on macOS writes what it knows of a file before the file; the type npy comes twice
            for each, data in (
                (f"set/._{name}", b"x"),
                (f"set/{name}", content),
                (f"set/{name.partition(chr(46))[0]}.npy", b"x"),
            ):
                info = tarfile.TarInfo(each)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = shards(str(tmp_path / "a.tar"), vocab, workers=0)
    data.setup("fit")
    assert sum(len(batch["key"]) for batch in data.train_dataloader()) == 8 and not data.skipped
    (source,) = doctor([str(tmp_path / "a.tar")], global_batch_size=8, workers=1)["sources"].values()
    assert source["read"] == source["usable"] == 8

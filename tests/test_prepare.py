"""`stair prepare`: what a user has becomes shards that training reads, whatever happens on the way."""

import csv
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from stair.cli import main
from stair.data.doctor import write_indices
from stair.data.prepare.emoji import emoji
from stair.data.prepare.img2dataset import cc
from stair.data.prepare.sources import classes, datasets, folder, karpathy
from stair.data.prepare.writer import ShardSettings, make_shard
from stair.data.samples import captions, image_bytes
from stair.data.tars import read_samples
from stair.errors import FileError, SettingError, StairError
from tests.support.files import members_of, plain_image, write_tar

ROOT = Path(__file__).parents[1]
ONE = ShardSettings(workers=1)


def picture(colour: int, kind: str = "JPEG", size: tuple[int, int] = (20, 16), mode: str = "RGB") -> bytes:
    return plain_image((colour % 256, 80, 160), kind, size, mode)


def write_images(place: Path, count: int) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (place / f"{i}.jpg").write_bytes(picture(i))
    return place


def write_csv(path: Path, rows: list[tuple[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path


def samples(*tars: Path) -> dict[str, dict]:
    """Members by key, read by the standard library."""
    found: dict[str, dict] = {}
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                found.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return found


def by_file(out: Path, pattern: str = "*.tar") -> dict[str, dict]:
    """JSON of each sample by the name of its image, with the image's bytes."""
    found = {}
    for sample in samples(*sorted(out.glob(pattern))).values():
        facts = json.loads(sample["json"])
        assert sample["txt"].decode() == facts["captions"][0]
        found[facts["file"]] = facts | {
            "image": next(sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
        }
    return found


@contextmanager
def refused(path: Path):
    """What is done here ends with an error that names the path."""
    with pytest.raises(FileError) as wrong:
        yield
    assert wrong.value.path == path


def report(out: Path, split: str = "train") -> dict:
    return json.loads((out / "prepare.json").read_text())["splits"][split]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# ---- tables


def test_a_table_becomes_samples_with_the_original_bytes_and_an_index_that_is_true(tmp_path):
    images = write_images(tmp_path / "images", 7)
    rows = [(f"{i}.jpg", f"{word} {i}") for i in range(7) for word in ("first", "second, quoted")]
    out = tmp_path / "out"
    folder(write_csv(tmp_path / "t.csv", rows), images, out, settings=replace(ONE, shard_samples=3))
    found = by_file(out)
    assert {name: facts["captions"] for name, facts in found.items()} == {
        f"{i}.jpg": [f"first {i}", f"second, quoted {i}"] for i in range(7)
    }
    assert all(facts["image"] == (images / name).read_bytes() for name, facts in found.items())
    index = json.loads((out / "index.json").read_text())
    tars = sorted(out.glob("*.tar"))
    assert index == {
        "format": 1,
        "shards": {
            tar.name: {
                "samples": len(samples(tar)),
                "bytes": tar.stat().st_size,
                "sha256": hashlib.sha256(tar.read_bytes()).hexdigest(),
            }
            for tar in tars
        },
    }
    assert sorted(entry["samples"] for entry in index["shards"].values()) == [2, 2, 3]
    # and training's own reader takes all of it
    read = [sample.members for tar in tars for sample in read_samples(str(tar))]
    assert len(read) == 7 and all(captions(sample) and image_bytes(sample) for sample in read)
    assert not (out / ".prepare").exists()


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet", "txt"])
def test_every_kind_of_table_gives_what_csv_gives(tmp_path, kind):
    images = write_images(tmp_path / "images", 3)
    rows = [(f"{i}.jpg", text) for i in range(3) for text in (f'a "quote {i}', f"Übung {i}")]
    folder(write_csv(tmp_path / "t.csv", rows), images, tmp_path / "csv", settings=ONE)
    table = tmp_path / f"t.{kind}"
    if kind == "tsv":
        table.write_text("filepath\ttitle\n" + "".join(f"{name}\t{text}\n" for name, text in rows))
    elif kind == "jsonl":
        entries = [
            {"file_name": f"{i}.jpg", "captions": [text for name, text in rows if name == f"{i}.jpg"]} for i in range(3)
        ]
        table.write_text("\n".join(map(json.dumps, entries)))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"path": [n for n, _ in rows], "text": [t for _, t in rows]}), table)
    else:  # Flickr30k's results.csv
        table.write_text(
            "image_name| comment_number| comment\n" + "".join(f"{n}| 0| {t}\n" for n, t in rows if '"' not in t)
        )
        rows = [row for row in rows if '"' not in row[1]]
        folder(write_csv(tmp_path / "u.csv", rows), images, tmp_path / "csv2", settings=ONE)
    folder(table, images, tmp_path / "out", delimiter="|" if kind == "txt" else None, settings=ONE)
    assert by_file(tmp_path / "out") == by_file(tmp_path / ("csv2" if kind == "txt" else "csv"))


def test_what_cannot_be_used_is_counted_by_cause_and_listed_and_too_much_of_it_stops(tmp_path, capsys):
    images = write_images(tmp_path / "images", 20)
    whole = (images / "0.jpg").read_bytes()
    (images / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "empty.jpg").touch()
    (tmp_path / "secret.jpg").write_bytes(whole)
    rows = [(f"{i}.jpg", f"number {i}") for i in range(20)]
    bad = [("cut.jpg", "x"), ("empty.jpg", "x"), ("none.jpg", "x"), ("../secret.jpg", "x"), ("/etc/passwd", "x")]
    bad += [("1.jpg", " "), ("", "x"), ("long.jpg", "x"), ("2.jpg", "a,b,c")]
    (images / "long.jpg").write_bytes(picture(3, size=(400, 300)))
    table = write_csv(tmp_path / "t.csv", rows + bad)
    text = table.read_bytes().replace(b'"a,b,c"', b"a,b,c") + b"3.jpg,caf\xe9\n"
    table.write_bytes(text)
    with pytest.raises(StairError):
        folder(table, images, tmp_path / "out", settings=replace(ONE, max_pixels=10_000))
    listed = json.loads((tmp_path / "out" / ".prepare" / "skipped.json").read_text())
    assert sum(entry["cause"] == "path outside" for entry in listed) == 2
    assert not list((tmp_path / "out").glob("index.json"))

    folder(table, images, tmp_path / "out", settings=replace(ONE, max_pixels=10_000, max_bad_share=0.5))
    summary = report(tmp_path / "out")
    assert summary["skipped"] == {
        "image undecodable": 1,
        "image empty": 1,
        "image missing": 1,
        "path outside": 2,
        "caption empty": 1,
        "image unnamed": 1,
        "image too large": 1,
        "line malformed": 1,
        "caption not UTF-8": 1,
    }
    assert summary["samples"] == 20 and summary["inputs"] == 30
    assert {entry["cause"] for entry in summary["skipped_inputs"]} == set(summary["skipped"])
    assert any(entry["place"] == "cut.jpg" for entry in summary["skipped_inputs"])
    assert any("t.csv:30" in entry["place"] for entry in summary["skipped_inputs"])
    assert "skipped 10 of 30 inputs" in capsys.readouterr().out
    assert len(by_file(tmp_path / "out")) == 20


def test_a_quote_that_is_not_closed_costs_its_own_line_alone(tmp_path):
    images = write_images(tmp_path / "images", 9)
    lines = ["image,caption", *(f"{i}.jpg," + '"' * (i == 5) + f"number {i}" for i in range(9))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    folder(tmp_path / "t.csv", images, tmp_path / "out", settings=replace(ONE, max_bad_share=0.9))
    assert report(tmp_path / "out")["skipped"] == {"line malformed": 1}
    assert len(by_file(tmp_path / "out")) == 8


def test_a_table_or_a_template_that_is_none_is_refused_by_name(tmp_path):
    images = write_images(tmp_path / "images" / "cat", 1).parent
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    with refused(tmp_path / "t.parquet"):
        folder(tmp_path / "t.parquet", images, tmp_path / "out", settings=ONE)
    with refused(tmp_path / "t.parquet"):
        datasets(tmp_path, tmp_path / "out", settings=ONE)
    for template in ("a photo", "{x}", "{", "{.x}"):
        with pytest.raises(SettingError) as wrong:
            classes(images, tmp_path / "out", template=template, settings=ONE)
        assert wrong.value.setting == "template"
    with refused(tmp_path / "nowhere"):
        classes(tmp_path / "nowhere", tmp_path / "out", settings=ONE)


def test_ambiguous_columns_must_be_given(tmp_path):
    images = write_images(tmp_path / "images", 1)
    (tmp_path / "t.csv").write_text("a,b\n0.jpg,text\n")
    with pytest.raises(SettingError) as missing:
        folder(tmp_path / "t.csv", images, tmp_path / "out")
    assert missing.value.setting == "image_column"
    folder(
        tmp_path / "t.csv",
        images,
        tmp_path / "out",
        image_column="a",
        caption_column="b",
        settings=ONE,
    )
    assert by_file(tmp_path / "out")["0.jpg"]["captions"] == ["text"]


def test_images_that_training_reads_are_kept_others_are_converted_and_counted(tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    kinds = {
        "a.jpg": "JPEG",
        "png-inside.jpg": "PNG",
        "c.webp": "WEBP",
        "d.gif": "GIF",
        "e.bmp": "BMP",
        "f.tif": "TIFF",
    }
    for n, (name, kind) in enumerate(kinds.items()):
        (images / name).write_bytes(picture(n, kind))
    (images / "big.jpg").write_bytes(picture(9, size=(300, 90)))
    (images / "cmyk.jpg").write_bytes(picture(9, mode="CMYK"))
    table = write_csv(tmp_path / "t.csv", [(path.name, "x") for path in images.iterdir()])
    folder(table, images, tmp_path / "out", settings=replace(ONE, max_side=100))
    found = by_file(tmp_path / "out")
    for name in ("a.jpg", "png-inside.jpg", "c.webp", "cmyk.jpg"):
        assert found[name]["image"] == (images / name).read_bytes()
    for name in ("d.gif", "e.bmp", "f.tif"):
        with Image.open(io.BytesIO(found[name]["image"])) as image, Image.open(images / name) as original:
            assert image.format == "PNG" and image.tobytes() == original.convert("RGB").tobytes()
    with Image.open(io.BytesIO(found["big.jpg"]["image"])) as image:
        assert image.size == (100, 30) and image.format == "JPEG"
    assert report(tmp_path / "out")["written_anew"] == {
        "of another format than JPEG, PNG, WebP": 3,
        "with more than 100 pixels a side": 1,
    }
    assert "images rewritten: 3 of another format" in capsys.readouterr().out
    kind = {key: set(sample) for key, sample in samples(tmp_path / "out" / "train-00000.tar").items()}
    assert sum("png" in kinds for kinds in kind.values()) == 4


# ---- going on, and not going wrong


def command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from stair.cli import main; main()", *map(str, args)]


def _is_free(out: Path) -> bool:
    with open(out / ".prepare" / "lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_a_killed_run_goes_on_keeps_what_is_finished_and_ends_as_one_that_was_not_killed(tmp_path):
    images = write_images(tmp_path / "images", 120)
    (images / "7.jpg").unlink()
    table = write_csv(tmp_path / "t.csv", [(f"{i}.jpg", f"number {i}") for i in range(120)])
    folder(table, images, tmp_path / "calm", settings=replace(ONE, shard_samples=2))
    out = tmp_path / "killed"
    args = ("prepare", "folder", table, images, out, "--shard_samples", 2, "--workers", 2)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(*args), env=environment, start_new_session=True, **quiet)
    while len(list(out.glob("*.tar"))) < 6 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)  # the parent alone: its workers must not live on and hold the folder
    assert process.wait() == -signal.SIGKILL
    assert not (out / "index.json").exists()
    recorded = [path.name.removesuffix(".json") for path in (out / ".prepare").glob("*.tar.json")]
    before = {name: (out / name).stat().st_mtime_ns for name in recorded if (out / name).exists()}
    assert before
    deadline = time.monotonic() + 30
    while not _is_free(out) and time.monotonic() < deadline:  # until the last worker has seen that its parent is gone
        time.sleep(0.05)
    free = _is_free(out)
    if not free:
        os.killpg(process.pid, signal.SIGKILL)  # so that a failure leaves nothing behind
    assert free
    # and a second time, while it goes on
    again = multiprocessing.get_context("fork").Process(
        target=folder, args=(table, images, out), kwargs={"settings": replace(ONE, shard_samples=2)}
    )
    again.start()
    while len(list(out.glob("*.tar"))) < len(before) + 12 and again.is_alive():
        time.sleep(0.001)
    again.kill()
    again.join()
    assert again.exitcode == -signal.SIGKILL and not (out / "index.json").exists()
    folder(table, images, out, settings=replace(ONE, shard_samples=2))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert contents(out) == contents(tmp_path / "calm")


def test_processes_do_not_change_a_byte_and_the_seed_does(tmp_path):
    images = write_images(tmp_path / "images", 11)
    table = write_csv(tmp_path / "t.csv", [(f"{i}.jpg", f"number {i}") for i in range(11)])
    for name, settings in {
        "one": {"workers": 1},
        "two": {"workers": 2},
        "other": {"seed": 1},
        "none": {"keep_order": True},
    }.items():
        folder(table, images, tmp_path / name, settings=ShardSettings(shard_samples=4, **{"workers": 1, **settings}))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    orders = {name: list(samples(*sorted((tmp_path / name).glob("*.tar")))) for name in ("one", "other", "none")}
    assert (
        orders["none"] == sorted(orders["none"]) and orders["one"] != orders["none"] != orders["other"] != orders["one"]
    )


def test_the_same_again_does_nothing_and_something_else_in_its_place_is_refused(tmp_path, capsys):
    images = write_images(tmp_path / "images", 4)
    table = write_csv(tmp_path / "t.csv", [(f"{i}.jpg", f"number {i}") for i in range(4)])
    out = tmp_path / "out"
    folder(table, images, out, settings=ONE)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    folder(table, images, out, settings=ONE)
    assert "nothing done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    other = write_csv(tmp_path / "u.csv", [("1.jpg", "another")])
    with refused(out):
        folder(other, images, out, settings=ONE)
    # another split lies beside it, in the same index
    folder(other, images, out, split="val", settings=ONE)
    assert set(json.loads((out / "index.json").read_text())["shards"]) == {"train-00000.tar", "val-00000.tar"}
    assert report(out)["samples"] == 4 and report(out, "val")["samples"] == 1
    # a shard that was lost is made again
    lost = (out / "train-00000.tar").read_bytes()
    (out / "train-00000.tar").unlink()
    folder(table, images, out, settings=ONE)
    assert (out / "train-00000.tar").read_bytes() == lost


def test_two_at_a_time_in_one_folder_are_refused(tmp_path):
    images = write_images(tmp_path / "images", 1)
    table = write_csv(tmp_path / "t.csv", [("0.jpg", "x")])
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with open(tmp_path / "out" / ".prepare" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with refused(tmp_path / "out" / ".prepare" / "lock"):
            folder(table, images, tmp_path / "out", settings=ONE)


def test_the_command_prepares_and_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    images = write_images(tmp_path / "images", 2)
    table = write_csv(tmp_path / "t.csv", [("0.jpg", "x"), ("1.jpg", "y")])
    args = [
        "stair",
        "prepare",
        "folder",
        str(table),
        str(images),
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--keep_order",
    ]
    monkeypatch.setattr(sys, "argv", args)
    main()
    assert "train: 2 samples with 2 captions" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*args, "--split", "../up"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert str(stopped.value).startswith("stair prepare: split is '../up'")


# ---- COCO and Flickr


def karpathy_entry(name: str, split: str, texts: list[str], **more: object) -> dict:
    sentences = [{"tokens": text.lower().split(), "raw": text, "imgid": 0, "sentid": n} for n, text in enumerate(texts)]
    return {"filename": name, "split": split, "sentences": sentences, "sentids": [0], "imgid": 0, **more}


def test_karpathy_splits_are_kept_and_restval_joins_train(tmp_path):
    images = tmp_path / "images"
    write_images(images / "val2014", 3)
    write_images(images, 5)
    entries = [
        karpathy_entry("0.jpg", "train", ["A cat .", "One."], filepath="val2014", cocoid=17),
        karpathy_entry("1.jpg", "restval", ["B"], filepath="val2014"),
        karpathy_entry("3.jpg", "val", ["C"], filepath="val2014"),  # all images in one folder
        karpathy_entry("4.jpg", "test", ["D"]),  # Flickr has no filepath
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    karpathy(tmp_path / "dataset_coco.json", images, tmp_path / "out", settings=ONE)
    found = {split: by_file(tmp_path / "out", f"{split}-*.tar") for split in ("train", "val", "test")}
    assert {split: sorted(facts["captions"][0] for facts in part.values()) for split, part in found.items()} == {
        "train": ["A cat .", "B"],
        "val": ["C"],
        "test": ["D"],
    }
    first = found["train"]["val2014/0.jpg"]
    assert (first["cocoid"], first["split"], first["captions"]) == (17, "train", ["A cat .", "One."])
    assert first["image"] == (images / "val2014" / "0.jpg").read_bytes()
    with refused(tmp_path / "t.csv"):
        karpathy(write_csv(tmp_path / "t.csv", []), images, tmp_path / "out2")


# ---- img2dataset


def write_img2dataset(out: Path, shards: int = 2, count: int = 6) -> None:
    """A folder as img2dataset's webdataset writer leaves it; every third address failed."""
    out.mkdir()
    for shard in range(shards):
        rows, samples = [], {}
        for i in range(count):
            status = "failed_to_download" if i % 3 == 2 else "success"
            meta = {"key": f"{shard:05d}{i:04d}", "status": status, "caption": f"text {i}", "url": "http://x/y.jpg"}
            rows.append(meta)
            if status == "success":
                texts = {"txt": meta["caption"].encode(), "json": json.dumps(meta, indent=4).encode()}
                samples[meta["key"]] = {"jpg": picture(i), **texts}
        write_tar(out / f"{shard:05d}.tar", members_of(samples))
        successes = sum(row["status"] == "success" for row in rows)
        stats = {"count": count, "successes": successes, "failed_to_download": count - successes, "status_dict": {}}
        (out / f"{shard:05d}_stats.json").write_text(json.dumps(stats))
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), out / f"{shard:05d}.parquet")


def test_img2datasets_shards_are_indexed_where_they_are_and_stay_as_they_are(tmp_path):
    write_img2dataset(tmp_path / "cc")
    before = contents(tmp_path / "cc")
    cc(tmp_path / "cc", workers=1)
    after = contents(tmp_path / "cc")
    assert {name: after[name] for name in before} == before
    index = json.loads(after["index.json"])["shards"]
    assert {name: entry["samples"] for name, entry in index.items()} == {"00000.tar": 4, "00001.tar": 4}
    assert index["00001.tar"]["sha256"] == hashlib.sha256(before["00001.tar"]).hexdigest()
    (tmp_path / "cc" / "00001_stats.json").unlink()
    cc(tmp_path / "cc", workers=1, max_bad_share=0.5)
    assert report(tmp_path / "cc", "all")["bad"] == {"shard unfinished": 1}


def test_bad_samples_of_img2dataset_are_named_and_only_their_shards_are_mended(tmp_path, capsys):
    write_img2dataset(tmp_path / "cc")
    before = contents(tmp_path / "cc")
    whole = samples(tmp_path / "cc" / "00001.tar")
    # the last sample is lost in mid-file
    (tmp_path / "cc" / "00001.tar").write_bytes(before["00001.tar"][: 512 * 2 * 3 * 3 + 600])
    with pytest.raises(ValueError, match=r"sample missing.*00001.parquet lists it as fetched"):
        cc(tmp_path / "cc", workers=1)
    cc(tmp_path / "cc", mend=True, workers=1, max_bad_share=0.5)
    left = samples(tmp_path / "cc" / "00001.tar")
    assert 0 < len(left) < 4 and all(left[key] == whole[key] for key in left)
    assert contents(tmp_path / "cc")["00000.tar"] == before["00000.tar"]
    index = json.loads((tmp_path / "cc" / "index.json").read_text())["shards"]
    assert index["00001.tar"]["samples"] == len(left)
    assert index["00001.tar"]["sha256"] == hashlib.sha256((tmp_path / "cc" / "00001.tar").read_bytes()).hexdigest()
    assert json.loads((tmp_path / "cc" / "00001_stats.json").read_text())["successes"] == len(left)
    assert "1 rewritten" in capsys.readouterr().out


def test_a_table_of_addresses_is_answered_with_the_command_that_fetches_it(tmp_path):
    (tmp_path / "cc3m.tsv").write_text("a dog\thttp://example.org/dog.jpg\n")
    with pytest.raises(ValueError, match=r"sed -i '1s/\^/caption\\turl\\n/'.*img2dataset --url_list .*cc3m.tsv"):
        cc(tmp_path / "cc3m.tsv")
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty"):
        cc(tmp_path / "empty")


# ---- Hugging Face


def hub_table(count: int, start: int = 0):
    pyarrow = pytest.importorskip("pyarrow")
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "image": {"_type": "Image"},
        "caption": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
        "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    schema = pyarrow.schema(
        [("image", image), ("caption", pyarrow.list_(pyarrow.string())), ("label", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [
        {"image": {"bytes": picture(i), "path": None}, "caption": [f"text {i}", "more"], "label": i % 2}
        for i in range(start, start + count)
    ]
    return pyarrow.Table.from_pylist(rows, schema=schema)


def save_to_disk(place: Path, *tables) -> None:
    """As `Dataset.save_to_disk`: Arrow streams, and a state that lists them."""
    ipc = pytest.importorskip("pyarrow.ipc")
    place.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with ipc.new_stream(str(place / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None, "_fingerprint": "x"}
    (place / "state.json").write_text(json.dumps(state))
    (place / "dataset_info.json").write_text("{}")


def rows_of(out: Path, split: str) -> list[tuple]:
    found = samples(*sorted(out.glob(f"{split}-*.tar")))
    facts = [json.loads(sample["json"]) for _, sample in sorted(found.items())]
    return [
        (f["captions"], f["class"], f["label"], s["jpg"])
        for f, (_, s) in zip(facts, sorted(found.items()), strict=True)
    ]


def test_hugging_face_data_on_disk_keep_their_rows_splits_and_classes(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    disk, hub = tmp_path / "disk", tmp_path / "hub"
    save_to_disk(disk / "train", hub_table(3), hub_table(4, 3))
    save_to_disk(disk / "validation", hub_table(2, 50))
    (disk / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    (hub / "data").mkdir(parents=True)
    parquet.write_table(hub_table(7), hub / "data" / "train-00000-of-00001.parquet", row_group_size=3)
    parquet.write_table(hub_table(2, 50), hub / "data" / "validation-00000-of-00001.parquet")
    for place in (disk, hub):
        out = tmp_path / f"{place.name}-out"
        datasets(place, out, settings=replace(ONE, shard_samples=4))
        expected = [([f"text {i}", "more"], ["cat", "dog"][i % 2], i % 2, picture(i)) for i in range(7)]
        assert rows_of(out, "train") == expected
        assert [row[0][0] for row in rows_of(out, "validation")] == ["text 50", "text 51"]
        assert json.loads((out / "classnames.json").read_text()) == {"classes": ["cat", "dog"]}


def test_a_row_that_names_a_file_outside_the_data_set_is_skipped(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    inside = write_images(tmp_path / "data", 3)
    table = pyarrow.table({"image": ["0.jpg", "1.jpg", "../secret.jpg"], "text": ["a", "b", "c"]})
    parquet.write_table(table, inside / "train.parquet")
    datasets(inside, tmp_path / "out", image_column="image", settings=replace(ONE, max_bad_share=0.5))
    assert report(tmp_path / "out")["skipped"] == {"path outside": 1}
    with refused(tmp_path / "out"):
        datasets(tmp_path / "out", tmp_path / "out2")


# ---- classes


def test_folders_of_classes_become_labels_and_names(tmp_path):
    for name, count in {"002.great_white": 2, "001.tench": 1, "003.cup": 1}.items():
        write_images(tmp_path / "images" / name, count)
    (tmp_path / "images" / "001.tench" / "readme.md").touch()
    classes(
        tmp_path / "images",
        tmp_path / "out",
        template="a photo of a {}.",
        settings=replace(ONE, max_bad_share=0.3),
    )
    found = by_file(tmp_path / "out")
    assert found["002.great_white/1.jpg"]["captions"] == ["a photo of a great white."]
    assert {name: (facts["class"], facts["label"]) for name, facts in found.items()} == {
        "001.tench/0.jpg": ("tench", 0),
        "002.great_white/0.jpg": ("great white", 1),
        "002.great_white/1.jpg": ("great white", 1),
        "003.cup/0.jpg": ("cup", 2),
    }
    assert json.loads((tmp_path / "out" / "classnames.json").read_text())["classes"] == ["tench", "great white", "cup"]
    assert report(tmp_path / "out", "test")["skipped"] == {"not an image by its name": 1}

    (tmp_path / "names.txt").write_text("001.tench tench, Tinca tinca\n002.great_white shark\n003.cup cup\n")
    classes(
        tmp_path / "images",
        tmp_path / "named",
        names=tmp_path / "names.txt",
        settings=replace(ONE, max_bad_share=0.3),
    )
    assert json.loads((tmp_path / "named" / "classnames.json").read_text())["classes"] == ["tench", "shark", "cup"]
    with refused(tmp_path / "named" / "classnames.json"):
        classes(tmp_path / "images", tmp_path / "named", split="val", settings=replace(ONE, max_bad_share=0.3))
    (tmp_path / "few.json").write_text('["a", "b"]')
    with refused(tmp_path / "few.json"):
        classes(tmp_path / "images", tmp_path / "x", names=tmp_path / "few.json")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("names.json", '["2", "1"]', ["2", "1"]),  # a list is in the order of the folders, whatever it says
        ("names.json", '{"2": "dog", "1": "cat"}', ["cat", "dog"]),
        ("names.json", '{"classes": ["cat", "dog"]}', ["cat", "dog"]),
        ("names.txt", "2\tdog\n1 cat, puss\n\n", ["cat", "dog"]),
        ("names.txt", "\ufeffcat\ndog\n", ["cat", "dog"]),
        *[("names.json", content, None) for content in ("5", "null", '["", ""]', '{"1": "cat"}', "[", '["cat"]')],
        *[("names.txt", content, None) for content in ("", "cat\n\ndog", "1 cat")],
    ],
)
def test_names_of_classes_are_taken_in_every_form_or_the_file_is_named(tmp_path, name, content, named):
    for number in "12":
        write_images(tmp_path / "images" / number, 1)
    (tmp_path / name).write_text(content, encoding="utf-8")
    if named is None:
        with pytest.raises(FileError) as wrong:
            classes(tmp_path / "images", tmp_path / "out", names=tmp_path / name, settings=ONE)
        assert wrong.value.path == tmp_path / name
    else:
        classes(tmp_path / "images", tmp_path / "out", names=tmp_path / name, settings=ONE)
        assert json.loads((tmp_path / "out" / "classnames.json").read_text())["classes"] == named


# ---- emoji


def test_emoji_carry_their_unicode_names_and_validation_holds_each_once(tmp_path):
    matplotlib, subset = pytest.importorskip("matplotlib"), pytest.importorskip("fontTools.subset")
    whole = subset.load_font(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), subset.Options()
    )
    subsetter = subset.Subsetter()
    subsetter.populate(unicodes=[*range(0x1F600, 0x1F620), *range(0x2654, 0x2660), ord("a")])
    subsetter.subset(whole)
    font = tmp_path / "some.ttf"
    whole.save(font)
    emoji(tmp_path / "out", font=[font], views=2, image_size=32, settings=ONE)
    train = samples(*sorted((tmp_path / "out").glob("train-*.tar")))
    val = samples(*sorted((tmp_path / "out").glob("val-*.tar")))
    classnames = json.loads((tmp_path / "out" / "classnames.json").read_text())["classes"]
    assert len(train) == len(val) == len(classnames) == 32 + 12
    facts = [json.loads(sample["json"]) for sample in val.values()]
    assert sorted(fact["label"] for fact in facts) == list(range(len(classnames)))
    for fact in facts:
        name = unicodedata.name(chr(int(fact["unicode"][2:], 16))).lower()
        assert fact["class"] == name == classnames[fact["label"]] and fact["captions"] == [name, f"{name} on white"]
    for sample in train.values():
        with Image.open(io.BytesIO(sample["png"])) as image:
            assert image.size == (32, 32) and len(image.getcolors(2000)) > 1
            ground = json.loads(sample["json"])["captions"][1].split(" on ")[-1]
            assert (image.getpixel((0, 0)) == (255, 255, 255)) == (ground == "white")
    assert not {sample["png"] for sample in train.values()} & {sample["png"] for sample in val.values()}


def test_colour_glyphs_keep_their_colours_and_blank_ones_are_reported(tmp_path):
    builder = pytest.importorskip("fontTools.fontBuilder")
    pens = pytest.importorskip("fontTools.pens.ttGlyphPen")

    def square(size: int):
        pen = pens.TTGlyphPen(None)
        pen.moveTo((0, 0))
        for corner in ((0, size), (size, size), (size, 0)):
            pen.lineTo(corner)
        pen.closePath()
        return pen.glyph()

    glyphs = {".notdef": square(10), "face": square(500), "layer": square(800), "blank": pens.TTGlyphPen(None).glyph()}
    font = builder.FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({0x1F600: "face", 0x1F601: "blank"})
    font.setupGlyf(glyphs)
    font.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": "Test", "styleName": "Colour"})
    font.setupOS2()
    font.setupPost()
    font.setupCOLR({"face": [("layer", 0)]})
    font.setupCPAL([[(1.0, 0.0, 0.0, 1.0)]])
    font.save(tmp_path / "test.ttf")
    emoji(tmp_path / "out", font=[tmp_path / "test.ttf"], views=2, settings=replace(ONE, max_bad_share=0.6))
    (sample,) = samples(tmp_path / "out" / "val-00000.tar").values()
    with Image.open(io.BytesIO(sample["png"])) as image:
        assert image.getpixel((32, 32)) == (255, 0, 0) and image.getpixel((0, 0)) == (255, 255, 255)
    assert json.loads(sample["json"])["class"] == "grinning face"
    assert report(tmp_path / "out", "val")["skipped"] == {"glyph blank": 1}
    with refused(tmp_path / "no.ttf"):
        (tmp_path / "no.ttf").write_text("no font")
        emoji(tmp_path / "out2", font=[tmp_path / "no.ttf"])


@pytest.mark.parametrize("spelling", ["data", "disk"])
def test_absolute_paths_below_a_folder_that_is_a_link_are_found_in_either_spelling(tmp_path, monkeypatch, spelling):
    write_images(tmp_path / "disk" / "images", 5)
    (tmp_path / "disk" / "secret.jpg").write_bytes(picture(9))
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    table = write_csv(
        tmp_path / "t.csv", [(str(tmp_path / spelling / "images" / f"{i}.jpg"), f"{i}") for i in range(5)]
    )
    folder(table, tmp_path / "data" / "images", tmp_path / "out", settings=replace(ONE, keep_order=True))
    monkeypatch.chdir(tmp_path)
    folder(table, Path("data/images"), tmp_path / "relative", settings=replace(ONE, keep_order=True))
    found = [samples(tmp_path / out / "train-00000.tar").values() for out in ("out", "relative")]
    assert [sample["jpg"] for sample in found[0]] == [picture(i) for i in range(5)] and [*found[0]] == [*found[1]]
    rows = [
        (str(tmp_path / name), "x") for name in ("data/images/../secret.jpg", "disk/secret.jpg", "data2/images/0.jpg")
    ]
    with pytest.raises(ValueError, match="3 path outside"):
        folder(
            write_csv(tmp_path / "u.csv", rows),
            tmp_path / "data" / "images",
            tmp_path / "none",
            settings=ONE,
        )


def test_the_doctor_writes_no_index_into_a_folder_that_is_not_finished_and_leaves_its_records(tmp_path, monkeypatch):
    images = write_images(tmp_path / "images", 12)
    table = write_csv(tmp_path / "t.csv", [(f"{i}.jpg", f"number {i}") for i in range(12)])
    made: list[str] = []

    def dies_at_the_third(path, *more):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        return make_shard(path, *more)

    monkeypatch.setattr("stair.data.prepare.writer.make_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        folder(table, images, tmp_path / "out", settings=replace(ONE, shard_samples=4))
    before = contents(tmp_path / "out")
    with refused(tmp_path / "out"):
        write_indices([str(path) for path in (tmp_path / "out").glob("*.tar")])
    assert contents(tmp_path / "out") == before
    monkeypatch.setattr(
        "stair.data.prepare.writer.make_shard", lambda *all: made.append(all[0].name) or make_shard(*all)
    )
    folder(table, images, tmp_path / "out", settings=replace(ONE, shard_samples=4))
    assert made == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
    write_indices([str(path) for path in (tmp_path / "out").glob("*.tar")])


def test_img2datasets_samples_that_training_skips_by_their_names_are_bad_too(tmp_path):
    write_img2dataset(tmp_path / "cc", 1, 9)
    path = tmp_path / "cc" / "00000.tar"
    with tarfile.open(path) as tar:
        last = next(member.name for member in reversed(tar.getmembers()) if member.name.endswith(".jpg"))
    write_tar(path, [(last, picture(1)), ("photo_v1.5.jpg", picture(1))], "a")
    cc(tmp_path / "cc", workers=1, max_bad_share=0.5)
    streamed = list(read_samples(str(path)))
    wrong = [sample.problems[0].partition(":")[0] for sample in streamed if sample.problems]
    assert wrong == ["duplicate member", "dotted key"]
    assert {cause: report(tmp_path / "cc", "all")["bad"].get(cause) for cause in wrong} == dict.fromkeys(wrong, 1)
    cc(tmp_path / "cc", mend=True, workers=1, max_bad_share=0.5)
    left = list(read_samples(str(path)))
    assert not any(sample.problems for sample in left) and len(left) == len(streamed) - 2

"""One reader for each format: a sample of a tar, a folder or a table is used or skipped for one reason by every command."""

import collections
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from stair.embeddings import Embeddings
from tests.support.files import plain_image, write_tar


def facts(out):
    """What `stair embed` keeps of what it took and skipped: (number, count by cause, causes by place)."""
    plan = json.loads((out / "embeddings.json").read_text())
    places = {one["place"]: one["cause"] for one in plan["skipped_items"]}
    assert collections.Counter(places.values()) == plan["skipped"] and all(plan["skipped_items"])
    return plan["taken"], plan["skipped"], places


# ---- tars

BAD = {
    "dotted key": [("photo_v1.5.jpg", plain_image("pink")), ("photo_v1.5.txt", b"a pink square")],
    "duplicate member": [
        (f"same.{kind}", data) for _ in "ab" for kind, data in (("jpg", plain_image()), ("txt", b"a"))
    ],
    "unsafe name": [("../out.jpg", plain_image()), ("../out.txt", b"a red square")],
    "no image": [("none.avif", b"x"), ("none.txt", b"a red square")],
    "image undecodable": [("cut.jpg", plain_image()[:200]), ("cut.txt", b"a red square")],
    "image empty": [("nothing.jpg", b""), ("nothing.txt", b"a red square")],
    "no caption": [("silent.jpg", plain_image())],
    "caption unreadable": [("latin.jpg", plain_image()), ("latin.txt", b"caf\xe9")],
    "caption too long": [("long.jpg", plain_image()), ("long.txt", b"a " * 9000)],
}
KEYS = {"dotted key": "photo_v1.5", "unsafe name": "../out", "duplicate member": "same"}
KEYS |= {cause: members[0][0].partition(".")[0] for cause, members in BAD.items() if cause not in KEYS}
# an image is embedded without its captions, and a caption without its image
OF_IMAGES = {"no caption", "caption unreadable", "caption too long"}
OF_TEXTS = {"no image", "image undecodable", "image empty"}


@pytest.fixture
def tar(tmp_path):
    good = [(f"{n}.{kind}", data) for n in range(8) for kind, data in (("jpg", plain_image()), ("txt", b"a red ball"))]
    members = good + [member for bad in BAD.values() for member in bad]
    return write_tar(tmp_path / "t" / "a.tar", members)


def test_a_sample_of_a_tar_is_good_or_bad_for_the_same_reason_in_every_command(stair, model, tar, tmp_path, vocab_file):
    from datamodules.shards import ImageTextShards

    stair("embed", model, tar, tmp_path / "i")
    taken, _, places = facts(tmp_path / "i")
    assert taken == 8 + len(OF_IMAGES)
    assert places == {f"a/{KEYS[cause]}": cause for cause in BAD.keys() - OF_IMAGES}
    printed = stair("embed", model, tar, tmp_path / "t2", "--side", "texts")
    assert all(f"skipped a/{KEYS[cause]}: {cause}" in printed for cause in BAD.keys() - OF_TEXTS)
    assert facts(tmp_path / "t2")[:2] == (8 + len(OF_TEXTS), dict.fromkeys(BAD.keys() - OF_TEXTS, 1))

    shards = ImageTextShards(
        train=str(tar),
        vocabulary=str(vocab_file),
        image_size=32,
        max_tokens=12,
        global_batch_size=17,
        workers=0,
        max_bad_share=0.9,
    )
    shards.setup("fit")
    list(shards.train_dataloader())
    assert shards.skipped.keys() == BAD.keys()

    # evaluation measures all or nothing
    with pytest.raises(SystemExit, match="evaluation sample"):
        stair("evaluate", model, tar, "--output", tmp_path / "e")


def test_the_doctor_counts_the_bad_samples_that_training_skips(tar, capsys):
    from stair.data.doctor import doctor

    (source,) = doctor([str(tar)], samples=100, global_batch_size=8, workers=1)["sources"].values()
    assert source["bad"] == dict.fromkeys(BAD, 1)
    assert source["read"] == 8 + len(BAD) and source["usable"] == 8


def test_of_two_images_of_one_key_every_command_takes_the_same(stair, model, tmp_path, vocab_file):
    from datamodules.shards import ImageTextShards
    from stair.data.pairs import EvaluationPairs
    from stair.model import Stair

    for first, second in (("png", "jpg"), ("gif", "png"), ("webp", "jpeg")):
        kinds = {first: ("red", first), second: ("blue", second)}
        members = [
            (f"{n}.{kind}", plain_image(colour, form.upper().replace("JPG", "JPEG")))
            for n in range(4)
            for kind, (colour, form) in kinds.items()
        ]
        members = [m for n in range(4) for m in [*members[2 * n : 2 * n + 2], (f"{n}.txt", b"a ball")]]
        path = write_tar(tmp_path / f"{first}.tar", members)
        stair("embed", model, path, tmp_path / first)
        blue = EvaluationPairs(str(path), 32, 10**6)[0].pixels
        assert (blue[2] > 200).all() and (blue[0] < 60).all()
        shards = ImageTextShards(
            train=str(path), vocabulary=str(vocab_file), image_size=32, max_tokens=12, global_batch_size=4, workers=0
        )
        shards.setup("fit")
        pixels = next(iter(shards.train_dataloader()))["pixels"]
        assert (pixels[:, 2] > 200).all()
        expected = Stair.from_pretrained(model).encode(images=[Image.new("RGB", (40, 30), "blue")])
        got = Embeddings.load(tmp_path / first).vectors
        np.testing.assert_allclose(got[:1].toarray(), expected.toarray(), atol=0.02)


@pytest.mark.parametrize("layout", ["clip_benchmark", "no type"])
def test_a_txt_of_several_lines_has_one_meaning_in_every_command(stair, model, tmp_path, vocab_file, layout, capsys):
    from datamodules.shards import ImageTextShards
    from stair.data.doctor import doctor
    from stair.data.pairs import EvaluationPairs

    texts = [b"a red ball\n a small dog \n\nthe big cat\n", b"a tree\r\na house\r\nthe sea"]
    members = [m for n in range(2) for m in [(f"s{n}.jpg", plain_image()), (f"s{n}.txt", texts[n])]]
    path = write_tar(tmp_path / "set" / "test" / "0.tar", members)
    if layout == "clip_benchmark":
        (tmp_path / "set" / "dataset_type.txt").write_text("retrieval")
        expected = [["a red ball", "a small dog", "the big cat"], ["a tree", "a house", "the sea"]]
    else:
        expected = [[text.decode().strip()] for text in texts]
    pairs = EvaluationPairs(str(path), 32, 10**6)  # lightning validate
    assert [pairs[n].captions for n in range(2)] == expected
    stair("embed", model, path, tmp_path / "t", "--side", "texts")
    assert [row["text"] for row in Embeddings.load(tmp_path / "t").source] == [
        text for texts in expected for text in texts
    ]
    stair("embed", model, path, tmp_path / "i")
    assert [row["captions"] for row in Embeddings.load(tmp_path / "i").source] == expected
    stair("evaluate", model, tmp_path / "set", "--output", tmp_path / "e")
    (measured,) = json.loads((tmp_path / "e" / "evaluation.json").read_text())["sets"].values()
    assert measured["protocol"]["captions"] == sum(map(len, expected))
    (source,) = doctor([str(path)], global_batch_size=2, workers=1)["sources"].values()
    assert source["captions_per_image"]["max"] == len(expected[0])
    shards = ImageTextShards(
        train=str(path), vocabulary=str(vocab_file), image_size=32, max_tokens=20, global_batch_size=2, workers=0
    )
    shards.setup("fit")
    seen = set()
    for _ in range(6):
        seen |= {tuple(ids.tolist()) for ids in next(iter(shards.train_dataloader()))["ids"]}
    assert (len(seen) > 2) == (layout == "clip_benchmark")


# ---- folders


@pytest.fixture
def folder(tmp_path):
    """A folder as people have them, for two classes; (folder, names that are images, causes by name of the others)."""
    home = tmp_path / "f"
    (home / "dog" / "deep").mkdir(parents=True)
    (home / "cat").mkdir()
    good = ["dog/a.JPG", "dog/b.jfif", "dog/deep/c.png", "cat/d.bmp", "cat/e.Tiff", "cat/link.jpg"]
    kinds = ["JPEG", "JPEG", "PNG", "BMP", "TIFF"]
    for name, kind in zip(good, kinds, strict=False):
        (home / name).write_bytes(plain_image(kind=kind))
    (home / "cat" / "link.jpg").symlink_to(home / "dog" / "a.JPG")
    (home / "dog" / "x.avif").write_bytes(b"x")
    (home / "dog" / "notes.txt").write_text("x")
    (home / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    (home / "cat" / "folder.jpg").mkdir()
    (home / "cat" / "loop").symlink_to(home / "cat")
    os.mkfifo(home / "cat" / "pipe.png")
    (home / "cat" / ".hidden.jpg").write_bytes(b"x")
    bad = {"dog/x.avif": "not an image by its name", "dog/notes.txt": "not an image by its name"}
    bad |= {"cat/gone.jpg": "link broken", "cat/folder.jpg": "not a file", "cat/pipe.png": "not a file"}
    return home, good, bad | {"cat/loop/": "link to a folder above it"}


def test_every_entry_of_a_folder_is_taken_or_named_in_every_command(stair, model, folder, tmp_path):
    home, good, bad = folder
    printed = stair("embed", model, home, tmp_path / "i")
    assert sorted(Embeddings.load(tmp_path / "i").ids) == sorted(good)
    assert facts(tmp_path / "i")[2] == bad
    assert all(f"skipped {name}: {cause}" in printed for name, cause in bad.items())
    stair("prepare", "classes", home, tmp_path / "p", "--max_bad_share", "0.9", "--workers", "1")
    report = json.loads((tmp_path / "p" / "prepare.json").read_text())["splits"]["test"]
    assert report["samples"] == len(good)
    assert {one["place"]: one["cause"] for one in report["skipped_inputs"]} == bad
    with pytest.raises(SystemExit, match=r"cat/folder.jpg: not a file"):
        stair("evaluate", model, home, "--output", tmp_path / "e")
    for name in ("loop", "gone.jpg", "pipe.png"):
        (home / "cat" / name).unlink()
    (home / "cat" / "folder.jpg").rmdir()
    printed = stair("evaluate", model, home, "--output", tmp_path / "e")
    assert "skipped dog/x.avif: not an image" in printed and f"{len(good)} images, 2 files skipped" in printed


def test_a_name_that_is_no_utf8_is_used_under_a_printable_id_from_folder_to_search_page(
    stair, model, tmp_path, tiny_stair
):
    from stair.index import SparseIndex

    home = os.fsencode(tmp_path / "n")
    os.makedirs(home)
    for name, colour in ((b"plain.jpg", "red"), (b"caf\xe9.jpg", "green")):
        with open(os.path.join(home, name), "wb") as file:
            file.write(plain_image(colour))
    stair("embed", model, tmp_path / "n", tmp_path / "e")
    assert Embeddings.load(tmp_path / "e").ids == ["caf\\xe9.jpg", "plain.jpg"]
    stair("index", tmp_path / "i", tmp_path / "e")
    assert "caf\\xe9.jpg" in SparseIndex.open(tmp_path / "i")
    write_tar(tmp_path / "a.tar", [("caf\udce9.jpg", plain_image()), ("caf\udce9.txt", b"a dog")])
    stair("embed", model, tmp_path / "a.tar", tmp_path / "t")
    assert Embeddings.load(tmp_path / "t").ids == ["a/caf\\xe9"]
    assert tuple(served(tmp_path / "i", tiny_stair, tmp_path / "n", "caf\\xe9.jpg")) == pytest.approx(
        (0, 128, 0), abs=8
    )


def served(index, model, pictures, name):
    """The colour of a picture of the search page."""
    pytest.importorskip("starlette")
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    from stair.index import SparseIndex
    from stair.serve.app import application

    client = TestClient(application(SparseIndex.open(index), model, pictures, ["testserver"]))
    answer = client.get("/picture", params={"id": name})
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(answer.content)).convert("RGB").getpixel((5, 5))


# ---- tables

TYPE = "cell of the wrong type"
TABLES = {
    # name: content, texts taken, causes of skipped rows by place
    "quotes.csv": (
        'id,text\n1,a dog\n2,"an unclosed quote\n3,a cat\n4,a bird\n5,last\n',
        "1 3 4 5",
        {3: "line malformed"},
    ),
    "two.csv": (
        'id,text\n1,"open\n2,a cat\n3,"shut"\n4,"open\n5,last\n',
        "2 3 5",
        {2: "line malformed", 5: "line malformed"},
    ),
    "after.csv": ('id,text\n1,"the best" dog\n2,a cat\n', "2", {2: "line malformed"}),
    "inner.csv": ('id,text\n1,a "dog" here\n2,"say ""hi"", twice"\n', "1 2", {}),
    "quotes.tsv": ('id\ttext\n1\t"the best" dog\n2\t"an unclosed quote\n3\ta "dog" here\n', "1 2 3", {}),
    "cells.csv": (
        "id,text\n1,a,dog\n2\n3,a cat\n\n4,\n",
        "3",
        {2: "line malformed", 3: "line malformed", 6: "caption empty"},
    ),
    "bytes.csv": (b"id,text\n1,caf\xe9\n2,a cat\n", "2", {2: "caption not UTF-8"}),
    "lines.jsonl": (
        '{"id": "1", "text": "a dog"}\n{"id": "2", "text": \n[1]\n{"id": "4", "text": "a\\ud800"}\n'
        '{"id": "5", "text": "x"}\n',
        "1 5",
        {2: "line malformed", 3: "line malformed", 4: "caption not UTF-8"},
    ),
    "blank.csv": ("\n\nid,text\n\n1,a dog\n\n2,a cat\n", "1 2", {}),
    "mark.txt": ("\ufeffid,text\r\n1,a dog\r\n2,a cat\r\n", "1 2", {}),
    "late.jsonl": ('{"text": "a dog"}\n{"id": "2", "text": "a cat"}\n', "2", {1: "id empty"}),
    "types.jsonl": (
        '{"id": "1", "text": "a"}\n{"id": "2"}\n{"id": "3", "text": 5}\n',
        "1",
        {2: "caption empty", 3: TYPE},
    ),
    "long.csv": ("id,text\n1,a dog\n2," + "a " * 9000 + "\n3,a cat\n", "1 3", {3: "caption too long"}),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_of_a_table_is_taken_or_named_by_its_line_in_every_command(stair, model, tmp_path, name):
    content, ids, causes = TABLES[name]
    table = tmp_path / name
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    printed = stair("embed", model, table, tmp_path / "t", "--side", "texts")
    assert Embeddings.load(tmp_path / "t").ids == ids.split()
    assert facts(tmp_path / "t")[2] == {f"{name}:{line}": cause for line, cause in causes.items()}
    assert all(f"skipped {name}:{line}: {cause}" in printed for line, cause in causes.items())
    # `stair prepare` reads the images of the same table: every id names one
    (tmp_path / "images").mkdir()
    for number in "12345":
        (tmp_path / "images" / number).write_bytes(plain_image())
    options = ["--image_column", "id", "--caption_column", "text", "--max_bad_share", "0.95", "--workers", "1"]
    stair("prepare", "folder", table, tmp_path / "images", tmp_path / "p", *options)
    report = json.loads((tmp_path / "p" / "prepare.json").read_text())["splits"]["train"]
    assert report["captions"] == len(ids.split())
    assert {
        # an id that is missing is a path that is missing here
        one["place"]: one["cause"].replace("image unnamed", "id empty")
        for one in report["skipped_inputs"]
    } == facts(tmp_path / "t")[2]


def test_a_quoted_cell_of_several_lines_is_one_text_and_is_noted(stair, model, tmp_path):
    (tmp_path / "t.csv").write_text('id,text\n1,"a dog\nand a cat"\n2,a bird\n')
    printed = stair("embed", model, tmp_path / "t.csv", tmp_path / "t", "--side", "texts")
    assert "note: t.csv:2-3: row of several lines" in printed and "2 texts embedded, 0 skipped" in printed
    assert Embeddings.load(tmp_path / "t").source[0]["text"] == "a dog\nand a cat"


def test_columns_of_any_name_stay_the_users_and_values_keep_their_types(stair, model, tmp_path, tiny_stair):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(plain_image(name, "PNG", (64, 64)))
    columns = "file offset length text captions key vector row row_group".split()
    lines = [",".join(["id", "image", *columns])]
    lines += [",".join([name, f"{name}.png", *(["blue.png", "7", "12"] + ["007"] * 6)]) for name in ("red", "blue")]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    stair("embed", model, tmp_path / "t.csv", tmp_path / "e")
    got = Embeddings.load(tmp_path / "e")
    assert got.metadata[0] == dict(zip(columns, ["blue.png", "7", "12", *["007"] * 6], strict=True))
    assert [row["file"] for row in got.source] == ["red.png", "blue.png"]
    stair("index", tmp_path / "i", tmp_path / "e")
    assert served(tmp_path / "i", tiny_stair, tmp_path, "red")[0] > 200

    big = 2**62 + 1
    row = {"id": "007", "n": big, "yes": True, "day": datetime.date(2026, 1, 2), "some": [1, 2], "of": {"a": [0.5]}}
    cells = [{"bytes": plain_image("red"), "path": None}, {"bytes": plain_image("blue"), "path": None}]
    rows = [row | {"image": cells[0]}, row | {"id": "7", "image": cells[1]}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=1)
    stair("embed", model, tmp_path / "t.parquet", tmp_path / "p")
    got = Embeddings.load(tmp_path / "p")
    assert got.ids == ["007", "7"]
    expected = {"n": big, "yes": True, "day": "2026-01-02", "some": [1, 2], "of": {"a": [0.5]}}
    assert got.metadata == [expected, expected] and isinstance(got.metadata[0]["yes"], bool)
    assert got.source[1] == {"file": "t.parquet", "row_group": 1, "row": 0, "column": "image"}


def test_images_in_cells_of_parquet_are_shown_by_the_search_page(stair, model, tmp_path, tiny_stair):
    import pyarrow as pa
    from pyarrow import parquet

    cells = [{"bytes": plain_image("red"), "path": None}, {"bytes": plain_image("blue"), "path": None}]
    parquet.write_table(pa.table({"id": ["r", "b"], "image": cells}), tmp_path / "t.parquet")
    stair("embed", model, tmp_path / "t.parquet", tmp_path / "e")
    stair("index", tmp_path / "i", tmp_path / "e")
    assert served(tmp_path / "i", tiny_stair, tmp_path, "b")[2] > 200


def test_keys_and_ids_that_python_spells_otherwise_stay_as_given(stair, model, tmp_path):
    table = tmp_path / "t.jsonl"
    table.write_text('{"id": true, "text": "x"}\n{"id": "007", "text": "x"}\n')
    stair("embed", model, table, tmp_path / "e", "--side", "texts")
    assert Embeddings.load(tmp_path / "e").ids == ["true", "007"]
    table.write_text('{"id": "a", "text": "x"}\n{"id": "b", "text": "x", "m\\ud800": 1}\n')
    with pytest.raises(SystemExit, match="name of column"):
        stair("embed", model, table, tmp_path / "f", "--side", "texts")
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("column, ids", [("ts", ["a"]), ("id", [b"a"])])
def test_a_column_that_cannot_be_kept_is_named(stair, model, tmp_path, column, ids):
    import pyarrow as pa
    from pyarrow import parquet

    from stair.data.items import list_items
    from stair.errors import FileError, SettingError

    moments = pa.array([1_600_000_000_123_456_789], pa.timestamp("ns"))
    parquet.write_table(pa.table({"id": ids, "text": ["x"], "ts": moments}), tmp_path / "t.parquet")
    with pytest.raises((FileError, SettingError), match=f"'{column}'"):
        list_items(str(tmp_path / "t.parquet"), "texts")


def test_a_column_of_32_bit_floats_has_the_values_that_were_written(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    from stair.data.tables import open_table

    values = pa.array([0.1, None, float("inf"), 16777216.0], pa.float32())
    parquet.write_table(pa.table({"price": values}), tmp_path / "t.parquet")
    rows = list(open_table(tmp_path / "t.parquet").rows())
    assert [row.cells["price"] for row in rows] == [0.1, None, float("inf"), 16777216.0]


def test_captions_mean_the_same_with_byte_order_marks_and_values_that_are_false(tmp_path):
    from stair.data.samples import captions

    mark = b"\xef\xbb\xbf"
    assert captions({"txt": mark + b"a dog"}) == captions({"json": mark + b'{"caption": "a dog"}'}) == ["a dog"]
    assert captions({"json": b'{"captions": [], "caption": null}', "txt": b"a dog"}) == ["a dog"]
    for wrong in (b'{"caption": 0}', b'{"caption": false}', b'{"captions": {}}', b'["a"]', b'{"captions": [1]}'):
        with pytest.raises(ValueError, match="caption unreadable") as caught:
            captions({"json": wrong, "txt": b"a dog"})
        assert "Error" not in str(caught.value)


def test_images_outside_of_class_folders_and_behind_links_to_the_root_belong_to_no_class(stair, model, tmp_path):
    home = tmp_path / "c"
    for name, colour in (("cat/a", "red"), ("dog/b", "blue")):
        (home / name).parent.mkdir(parents=True)
        (home / f"{name}.jpg").write_bytes(plain_image(colour))
    (home / "loose.jpg").write_bytes(plain_image())
    os.makedirs(os.fsencode(home) + b"/d\xe9")
    (home / "cat" / "root").symlink_to("..")
    (home / "cat" / "self.jpg").symlink_to("self.jpg")
    stair("prepare", "classes", home, tmp_path / "p", "--max_bad_share", "0.9", "--workers", "1")
    report = json.loads((tmp_path / "p" / "prepare.json").read_text())["splits"]["test"]
    places = {one["place"]: one["cause"] for one in report["skipped_inputs"]}
    links = {"cat/root/": "link to a folder above it", "cat/self.jpg": "link broken"}
    assert report["samples"] == 2
    assert places == links | {"loose.jpg": "no class", "d\\xe9": "class without images"}
    stair("embed", model, home, tmp_path / "i")
    assert facts(tmp_path / "i")[0] == 3 and facts(tmp_path / "i")[2] == links
    for name in ("root", "self.jpg"):
        (home / "cat" / name).unlink()
    printed = stair("evaluate", model, home, "--output", tmp_path / "e")
    assert "skipped loose.jpg: no class" in printed and "2 images, 1 files skipped" in printed


# ---- before the first item is encoded


def jsonl(**row):
    return json.dumps(row)


@pytest.mark.parametrize(
    "name, content, options, named",
    [
        ("t.csv", "id,text\na,x\nb,y\na,z\n", [], r"'a' occurs twice \(t.csv:2 and t.csv:4\)"),
        ("t.jsonl", jsonl(id="a", text="x", n=2**63), [], r"t.jsonl:1: 'n' is 9223372036854775808"),
        ("t.jsonl", '{"id": "a", "text": "x", "n": [NaN]}', [], r"t.jsonl:1: 'n' is nan"),
        ("t.csv", "id,text,text\na,x,y\n", [], r"two columns are called 'text'"),
        ("t.csv", "id,text\na,x\n", ["--id_column", "name"], r"no column 'name'; there are \['id', 'text'\]"),
        ("t.csv", "id,text\na,x\n".encode("utf-16").decode("latin-1"), [], r"UTF-16"),
        ("t.csv", "", [], r"is empty"),
    ],
)
def test_what_can_be_known_of_a_table_is_known_before_the_model_is_loaded(
    stair, tmp_path, name, content, options, named
):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit, match=named):
        stair("embed", tmp_path / "no model", tmp_path / name, tmp_path / "out", "--side", "texts", *options)
    assert not (tmp_path / "out").exists()


def test_ids_that_engines_do_not_take_are_named_before_anything_is_encoded(stair, model, tmp_path):
    (tmp_path / "t.csv").write_text(f"id,text\n{'x' * 600},a dog\n,a cat\n")
    printed = stair("embed", model, tmp_path / "t.csv", tmp_path / "out", "--side", "texts")
    assert "note: t.csv:2: long id: 600 bytes" in printed
    assert "skipped t.csv:3: id empty" in printed


def test_a_target_that_cannot_be_written_or_holds_parts_of_unknown_make_is_an_error_before_encoding(
    stair, model, tmp_path, monkeypatch
):
    (tmp_path / "t.csv").write_text("id,text\n1,a dog\n")
    (tmp_path / "file").touch()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "part-00000.safetensors").touch()
    monkeypatch.setattr("stair.model.Stair.encode_text", pytest.fail)
    for out, named in (("file", "file"), ("parts", "has part-00000.safetensors but no embeddings.json")):
        with pytest.raises(SystemExit, match=named):
            stair("embed", model, tmp_path / "t.csv", tmp_path / out, "--side", "texts")
    monkeypatch.setattr("shutil.disk_usage", lambda path: collections.namedtuple("Usage", "free")(10))
    with pytest.raises(SystemExit, match="10 bytes are free"):
        stair("embed", model, tmp_path / "t.csv", tmp_path / "full", "--side", "texts")
    assert not (tmp_path / "full").exists()

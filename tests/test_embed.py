"""`stair embed`, `stair index`, `stair search`: from pictures to hits, through the command line."""

import csv
import datetime
import io
import json
import math
import os
import sys
import tarfile

import numpy as np
import pytest
import torch

from stair.data.items import list_items
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.errors import FileError, SettingError
from stair.index import SparseIndex
from tests.support.files import members_of, noise_png, write_tar

CAPTIONS = ["a red ball", "two dogs on the sea", "the small cat", "a blue house", "a green tree , a bird"]


def samples_of(captions):
    fields = [json.dumps({"captions": [caption, f"{caption} ."]}).encode() for caption in captions]
    return {f"sub/k{n}": {"png": noise_png(n), "json": about} for n, about in enumerate(fields)}


@pytest.fixture
def shard(tmp_path):
    """Five samples of a picture, a json and, for the first, a text."""
    samples = samples_of(CAPTIONS)
    samples["sub/k0"]["txt"] = b"unused"
    return write_tar(tmp_path / "some-0000.tar", members_of(samples))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "pictures" / ("deep" if n % 2 else ".") / f"p{n}.png").write_bytes(noise_png(n))
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture
def typed(monkeypatch):
    """Puts bytes on standard input, which reads them as the interpreter's own does."""
    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def test_embedded_vectors_are_those_of_the_encoders_in_training(stair, model, shard, tmp_path):
    from datamodules.dataset import CollatePairs
    from stair.data.pairs import EvaluationPairs
    from stair.model import Stair

    stair("embed", model, shard, tmp_path / "images")
    stair("embed", model, shard, tmp_path / "texts", "--side", "texts", "--batch_size", "3")
    loaded = Stair.from_pretrained(model)
    pairs = EvaluationPairs(str(shard), loaded.config.image.image_size, 10**6)
    batch = CollatePairs(loaded.vocabulary, loaded.config.text.max_tokens)([pairs[n] for n in range(len(pairs))])
    with torch.no_grad():
        expected = loaded(batch["pixels"], batch["ids"], batch["mask"])
    images, texts = Embeddings.load(tmp_path / "images"), Embeddings.load(tmp_path / "texts")
    np.testing.assert_allclose(images.vectors.toarray(), expected["image_BV"].numpy(), atol=1e-6)
    np.testing.assert_allclose(texts.vectors.toarray(), expected["text_CV"].numpy(), atol=1e-6)
    assert images.ids == batch["key"] and images.space == texts.space == loaded.space
    assert texts.ids[:3] == ["some-0000/sub/k0#0", "some-0000/sub/k0#1", "some-0000/sub/k1#0"]
    assert images.source[0]["captions"] == [CAPTIONS[0], f"{CAPTIONS[0]} ."]


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_an_interrupted_embedding_goes_on_where_it_stopped(stair, model, folder, tmp_path, format):
    out = tmp_path / "out"
    options = ["--part_size", "2", "--format", format]
    stair("embed", model, folder, out, *options, "--share", "1/2")
    assert sorted(path.stem for path in out.glob("part-*")) == ["part-00001"]
    with pytest.raises(FileError) as error:
        Embeddings.load(out)
    assert error.value.path == out
    done = (out / f"part-00001.{format}").stat().st_mtime_ns
    stair("embed", model, folder, out, *options)
    assert (out / f"part-00001.{format}").stat().st_mtime_ns == done
    assert Embeddings.load(out).ids == ["deep/p1.png", "deep/p3.png", "p0.png", "p2.png"]
    with pytest.raises(SystemExit, match="budget differ"):
        stair("embed", model, folder, out, *options, "--budget", "3")


@pytest.mark.parametrize("source", ["-", "csv", "tar"])
def test_an_interrupted_embedding_of_texts_goes_on_and_takes_no_others(stair, model, tmp_path, typed, source):
    def write(texts):
        typed("\n".join(texts).encode())
        (tmp_path / "t.csv").write_text("\n".join(["text,other", *(f"{text},{text} again" for text in texts)]))
        write_tar(tmp_path / "t.tar", members_of(samples_of(texts)))
        for kind in ("csv", "tar"):  # as of one second, in which file systems may count
            os.utime(tmp_path / f"t.{kind}", (1, 1))
        return "-" if source == "-" else tmp_path / f"t.{source}"

    out, texts = tmp_path / "out", ["a red ball", "two dogs"]
    options = ["--side", "texts", "--part_size", "1"]
    stair("embed", model, write(texts), out, *options, "--share", "1/2")
    for words in (["a red ball", "two cats"], ["two dogs", "a red ball"]):
        with pytest.raises(SystemExit, match="content differ"):
            stair("embed", model, write(words), out, *options)
    stair("embed", model, write(texts), out, *options)
    assert [row["text"] for row in Embeddings.load(out).source][0 :: 2 if source == "tar" else 1] == texts
    with pytest.raises(SystemExit, match="column differ"):
        stair("embed", model, write(texts), out, *options, "--column", "other")


@pytest.mark.parametrize("source", ["folder", "tar"])
def test_another_picture_under_an_old_name_is_not_taken_for_the_old_one(stair, model, folder, tmp_path, source):
    path = folder if source == "folder" else write_tar(tmp_path / "a.tar", [("k0.png", noise_png(0))])
    stair("embed", model, path, tmp_path / "out")
    stair("embed", model, path, tmp_path / "out")
    if source == "folder":
        (folder / "p0.png").write_bytes(noise_png(9))
    else:
        write_tar(path, [("k0.png", noise_png(9))])
    os.utime(folder / "p0.png" if source == "folder" else path, (1, 1))
    with pytest.raises(SystemExit, match="content differ"):
        stair("embed", model, path, tmp_path / "out")


BAD_CAPTIONS = {
    "json": {"json": b'{"captions": ['},
    "letters": {"json": b'{"captions": "a dog"}'},
    "numbers": {"json": b'{"captions": ["a dog", 3]}'},
    "half a character": {"json": b'{"caption": "a \\ud800"}'},
    "list": {"json": b"[1]"},
    "latin-1": {"txt": "caf\u00e9".encode("latin-1")},
}


@pytest.mark.parametrize("bad", BAD_CAPTIONS)
def test_a_caption_that_cannot_be_read_costs_neither_its_picture_nor_other_texts(stair, model, tmp_path, bad):
    samples = {"good": {"png": noise_png(0), "txt": b"a red ball"}, "bad": {"png": noise_png(1), **BAD_CAPTIONS[bad]}}
    path = write_tar(tmp_path / "a.tar", members_of(samples))
    printed = stair("embed", model, path, tmp_path / "images")
    assert "note: a/bad: without captions: caption unreadable" in printed and "2 images embedded, 0 skipped" in printed
    images = Embeddings.load(tmp_path / "images")
    assert images.ids == ["a/good", "a/bad"] and "captions" not in images.source[1]
    printed = stair("embed", model, path, tmp_path / "texts", "--side", "texts")
    assert "skipped a/bad: caption unreadable" in printed and "1 text embedded, 1 skipped" in printed
    assert Embeddings.load(tmp_path / "texts").ids == ["a/good#0"]


def test_a_line_with_too_many_cells_is_named_by_its_number_and_left_out(stair, model, folder, tmp_path):
    for kind, sign in (("csv", ","), ("tsv", "\t")):
        table = folder / f"t.{kind}"
        table.write_text(f"id{sign}text{sign}image\n1{sign}a red{sign} ball{sign}p0.png\n2{sign}a dog{sign}p2.png\n")
        for side in ("texts", "images"):
            out = tmp_path / f"{kind}-{side}"
            printed = stair("embed", model, table, out, "--side", side)
            assert f"skipped t.{kind}:2: line malformed: 4 cells, the first line has 3" in printed
            assert "1 skipped (1 line malformed)" in printed
            assert Embeddings.load(out).ids == ["2"]
    table.write_text("id\ttext\n1\ta\tb\n")
    with pytest.raises(ValueError, match=r"no texts can be used; t\.tsv:2: line malformed: 3 cells"):
        list_items(str(table), "texts")


def test_texts_of_standard_input_end_at_line_ends_only(typed):
    texts = ["a\u2028b", "a\x0cb", "a\x85b", "a\rb", "a\x1eb", "last"]
    typed("\r\n".join(texts[:3]).encode() + b"\n" + "\n".join(texts[3:]).encode())
    assert [item.text for item in list_items("-", "texts").items] == texts
    typed(b"caf\xe9\na dog\n")
    listing = list_items("-", "texts")
    assert [(one.place, one.cause) for one in listing.skipped] == [("standard input:1", "caption not UTF-8")]
    assert [(item.id, item.text) for item in listing.items] == [("1", "a dog")]


@pytest.mark.parametrize("form", ["bytes", "hugging face"])
def test_pictures_inside_parquet_are_embedded_as_files_are(stair, model, folder, tmp_path, form):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ["deep/p1.png", "deep/p3.png", "p0.png", "p2.png"]
    found = [(folder / name).read_bytes() for name in names] + [b"no picture", None]
    cells = found if form == "bytes" else [{"bytes": data, "path": "of its maker.png"} for data in found]
    columns = {"image": cells, "second": cells, "id": [*names, "broken", "none"], "n": list(range(6))}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=4)
    printed = stair("embed", model, tmp_path / "t.parquet", tmp_path / "out", "--batch_size", "3", "--workers", "1")
    assert "skipped t.parquet:5: image undecodable" in printed and "skipped t.parquet:6: image missing" in printed
    stair("embed", model, folder, tmp_path / "wanted")
    got, expected = Embeddings.load(tmp_path / "out"), Embeddings.load(tmp_path / "wanted")
    assert got.ids == expected.ids and got.metadata == [{"n": n} for n in range(4)]
    np.testing.assert_array_equal(got.vectors.toarray(), expected.vectors.toarray())
    parquet.write_table(pa.table({**columns, "image": cells[::-1]}), tmp_path / "t.parquet", row_group_size=4)
    assert list_items(str(tmp_path / "t.parquet"), "images").items[2].read() == found[3]  # not what was read before
    with pytest.raises(SystemExit, match="content differ"):
        stair("embed", model, tmp_path / "t.parquet", tmp_path / "out")


def test_columns_that_hold_no_pictures_or_texts_are_refused_by_name(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"several": [["a", "b"]], "bytes": [b"x"], "pictures": [[b"x"]], "of": [{"width": 3}]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    for column, side in [("several", "texts"), ("bytes", "texts"), ("pictures", "images"), ("of", "images")]:
        with pytest.raises(ValueError, match=f"column '{column}' holds .*; expected .*`stair prepare datasets`"):
            list_items(str(tmp_path / "t.parquet"), side, column)
    with pytest.raises(ValueError, match=r"no column 'image'; there are \['bytes', 'of', 'pictures', 'several'\]"):
        list_items(str(tmp_path / "t.parquet"), "images")


@pytest.mark.parametrize("harm", ["header", "cut within a header", "cut between members"])
def test_a_tar_that_stops_being_one_is_refused_and_not_embedded_in_part(tmp_path, harm):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(6):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"a dog"))
    assert len(list_items(str(tmp_path / "a.tar"), "texts").items) == 6
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = 3 * 1024  # a header and a block of bytes each
    if harm == "header":
        data[at + 150] ^= 1
    else:
        del data[at + (100 if harm == "cut within a header" else 0) :]
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.tar is not an uncompressed tar, or is truncated"):
        list_items(str(tmp_path / "a.tar"), "texts")


def test_a_blank_cell_is_nothing(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\na,  \nb,a dog\n")
    listing = list_items(str(tmp_path / "t.csv"), "texts")
    assert [item.text for item in listing.items] == ["a dog"]
    assert [(one.place, one.cause) for one in listing.skipped] == [("t.csv:2", "caption empty")]


def test_a_row_with_nothing_in_its_column_is_left_out_alone(tmp_path):
    (tmp_path / "t.csv").write_text("id,text\na\nb,a dog\n")
    listing = list_items(str(tmp_path / "t.csv"), "texts")
    assert [item.text for item in listing.items] == ["a dog"]
    assert [(one.place, one.cause) for one in listing.skipped] == [("t.csv:2", "line malformed")]


def test_a_spreadsheets_mark_is_no_part_of_the_first_columns_name(tmp_path):
    (tmp_path / "t.csv").write_text("text,id\na dog,b\n", encoding="utf-8-sig")
    (item,) = list_items(str(tmp_path / "t.csv"), "texts").items
    assert (item.id, item.text) == ("b", "a dog")


def test_a_text_too_long_for_a_cell_is_left_out_alone_and_other_encodings_are_refused(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(f"id,text\na,a cat\nb,{'x' * 200_000}\nc,a dog\n")
    listing = list_items(str(table), "texts")
    assert [item.text for item in listing.items] == ["a cat", "a dog"]
    ((place, reason),) = listing.skipped
    assert place == "t.csv:3" and "larger than field limit" in reason and "quote" in reason
    table.write_bytes("id,text\na,un café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"t\.csv:2: caption not UTF-8: .*save the file as UTF-8"):
        list_items(str(table), "texts")


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_dates_of_a_table_become_texts(stair, model, tmp_path, format):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    moment = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.timezone.utc)
    row = {"text": "a dog", "day": moment.date(), "at": moment, "time": moment.time(), "days": [moment.date()]}
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    stair("embed", model, tmp_path / "t.parquet", tmp_path / "out", "--side", "texts", "--format", format)
    written = {"day": "2026-01-02", "at": "2026-01-02T03:04:00+00:00", "time": "03:04:00", "days": ["2026-01-02"]}
    assert Embeddings.load(tmp_path / "out").metadata == [written]


@pytest.mark.parametrize("value", [math.nan, math.inf, [1.0, math.nan], {"a": [-math.inf]}, datetime.timedelta(1)])
def test_values_that_json_has_no_word_for_are_refused_before_anything_is_encoded(stair, model, tmp_path, value):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"text": "a dog", "odd": None}, {"text": "a cat", "odd": value}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    with pytest.raises(SystemExit, match=r"t.parquet:2: 'odd' is .*; expected a text, a finite number"):
        stair("embed", model, tmp_path / "t.parquet", tmp_path / "out", "--side", "texts")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ending", ["safetensors", "parquet"])
def test_embeddings_are_not_saved_with_metadata_that_strict_readers_refuse(tmp_path, ending):
    from scipy import sparse

    space, vectors = EmbeddingSpace("m", "dot", ("a", "b")), sparse.csr_matrix(np.eye(2, dtype="float32"))
    for value in (math.nan, [math.inf], datetime.date(2026, 1, 2)):
        with pytest.raises(SettingError, match="second") as error:
            Embeddings(vectors, ["first", "second"], space, [{"n": 1}, {"n": value}]).save(tmp_path / f"e.{ending}")
        assert error.value.setting == "metadata"
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting, value",
    [
        *[("part_size", 0), ("part_size", -1), ("budget", 0), ("budget", -1), ("batch_size", 0), ("workers", -1)],
        *[("threshold", -1), ("threshold", "nan"), ("threshold", "inf")],
        *[("device", "foo"), ("device", "meta"), ("device", "cuda:99")],
    ],
)
def test_settings_out_of_range_are_one_line_before_the_first_item(stair, tmp_path, setting, value):
    with pytest.raises(SystemExit) as stopped:
        stair("embed", tmp_path / "no model", tmp_path / "no source", tmp_path / "out", f"--{setting}={value}")
    [line] = str(stopped.value).splitlines()
    assert line.startswith(f"stair embed: {setting}")


def test_pictures_that_cannot_be_read_are_left_out_and_named(stair, model, folder, tmp_path):
    (folder / "p0.png").write_bytes(b"no picture")
    printed = stair("embed", model, folder, tmp_path / "out", "--workers", "1", "--batch_size", "2")
    assert "2 skipped (1 not an image by its name, 1 image undecodable)" in printed
    assert "skipped p0.png: image undecodable" in printed and "skipped notes.txt: not an image" in printed
    assert Embeddings.load(tmp_path / "out").ids == ["deep/p1.png", "deep/p3.png", "p2.png"]


def test_tables_and_standard_input_are_sources(stair, model, folder, tmp_path, typed):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"name": f"row {n}", "image": path, "year": 2000 + n} for n, path in enumerate(["p0.png", "deep/p1.png"])]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    for kind, year in (("csv", "2001"), ("parquet", 2001)):
        items = list_items(str(folder / f"table.{kind}"), "images", id_column="name").items
        assert [item.id for item in items] == ["row 0", "row 1"]
        assert items[1].read() == noise_png(1) and items[1].metadata == {"year": year}
        assert items[1].source["file"] == "deep/p1.png"
    typed(b"a red ball\n\na dog\n")
    stair("embed", model, "-", tmp_path / "lines", "--side", "texts", "--budget", "2")
    lines = Embeddings.load(tmp_path / "lines")
    assert lines.ids == ["0", "1"] and lines.source[1] == {"text": "a dog"} and lines.metadata == [{}, {}]
    assert (np.diff(lines.vectors.indptr) <= 2).all()


def test_sources_that_are_none_are_refused(folder, shard, tmp_path):
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:700])
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "twice.csv").write_text("id,text\na,x\na,y\n")
    for source, side, complaint in [
        (tmp_path / "nothing", "images", "no shard matches|no such"),
        (folder, "texts", "it gives images"),
        (folder / "notes.txt", "texts", "no column 'text'"),
        (tmp_path / "notes.json", "texts", "not a folder, tar or table"),
        (tmp_path / "cut.tar", "images", "truncated"),
        (tmp_path / "twice.csv", "texts", "'a' occurs twice"),
        (tmp_path / "twice.csv", "images", "no column 'image'"),
        (tmp_path / "empty", "images", "contains no images"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            list_items(str(source), side)


@pytest.mark.parametrize("budget", [1, 3, 50])
def test_an_index_with_a_budget_is_that_of_embeddings_with_the_same_budget(stair, model, shard, tmp_path, budget):
    stair("embed", model, shard, tmp_path / "all")
    stair("embed", model, shard, tmp_path / "few", "--budget", str(budget))
    stair("index", tmp_path / "cut", tmp_path / "all", "--budget", str(budget))
    stair("index", tmp_path / "same", tmp_path / "few")
    assert (tmp_path / "cut" / "index.arrow").read_bytes() == (tmp_path / "same" / "index.arrow").read_bytes()
    for bad in ([tmp_path / "none", tmp_path / "all", "--budget", "0"], [tmp_path / "same", "--budget", str(budget)]):
        with pytest.raises(SystemExit, match="budget"):
            stair("index", *bad)
    assert not (tmp_path / "none").exists()


def test_from_pictures_to_hits_on_the_command_line(stair, model, shard, tmp_path):
    index = tmp_path / "my.index"
    assert stair("embed", model, shard, tmp_path / "e", "--quiet") == ""
    assert json.loads(stair("embed", model, shard, tmp_path / "e", "--json"))["taken"] == 5
    assert "5 documents" in stair("index", index, tmp_path / "e", "--verify")
    hits = json.loads(stair("search", index, "--like", "some-0000/sub/k2", "--json"))
    expected = SparseIndex.open(index).search(like="some-0000/sub/k2")
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit.id, hit.score) for hit in expected]
    (tmp_path / "query.png").write_bytes(noise_png(3))
    printed = stair("search", index, "--image", tmp_path / "query.png", "--model", model, "--k", "2")
    assert printed.split()[1] == "some-0000/sub/k3" and len(printed.splitlines()) == 2
    assert stair(
        "search",
        index,
        "--text",
        "two dogs",
        "--model",
        model,
        "--where",
        "stair:file=some-0000.tar and stair:length>1",
    )
    assert "4 documents" in stair("index", index, "--delete", "some-0000/sub/k3")
    for args, complaint in [((), "give one of"), (("--words", "dog:x"), "not a number"), (("--text", "dog"), "model")]:
        with pytest.raises(SystemExit, match=complaint):
            stair("search", index, *args)
    with pytest.raises(SystemExit, match="not an index"):
        stair("index", tmp_path / "other")

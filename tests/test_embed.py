"""`stair embed`, `stair index`, `stair search`: from pictures to hits, through the command line."""

import csv
import io
import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from stair.cli import main
from stair.embeddings import Embeddings
from stair.index import SparseIndex
from stair.sources import items_of

CAPTIONS = ["a red ball", "two dogs on the sea", "the small cat", "a blue house", "a green tree , a bird"]


def picture(seed, size=(40, 36)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(seed):
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def model(tiny_stair, tmp_path):
    tiny_stair.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shard(tmp_path):
    """Five samples of a picture, a json and, for the first, a text."""
    path = tmp_path / "some-0000.tar"
    with tarfile.open(path, "w") as tar:
        for n, caption in enumerate(CAPTIONS):
            captions = json.dumps({"captions": [caption, f"{caption} ."]}).encode()
            members = {"png": png(n), "json": captions, **({"txt": b"unused"} if n == 0 else {})}
            for kind, content in members.items():
                info = tarfile.TarInfo(f"sub/k{n}.{kind}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n in range(4):
        (tmp_path / "pictures" / ("deep" if n % 2 else ".") / f"p{n}.png").write_bytes(png(n))
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


@pytest.fixture
def stair(monkeypatch, capsys):
    """The command, as typed; returns what it printed."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["stair", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def test_embedded_vectors_are_those_of_the_encoders_in_training(stair, model, shard, tmp_path):
    from datamodules.pairs import CollatePairs, EvaluationPairs
    from stair.model import Stair

    stair("embed", model, shard, tmp_path / "images")
    stair("embed", model, shard, tmp_path / "texts", "--side", "texts", "--batch_size", "3")
    loaded = Stair.from_pretrained(model)
    pairs = EvaluationPairs(str(shard), loaded.config.image.image_size, 10**6)
    batch = CollatePairs(loaded.vocabulary, loaded.config.text.max_tokens)([pairs[n] for n in range(len(pairs))])
    with torch.no_grad():
        wanted = loaded(batch["pixels"], batch["ids"], batch["mask"])
    images, texts = Embeddings.load(tmp_path / "images"), Embeddings.load(tmp_path / "texts")
    np.testing.assert_allclose(images.vectors.toarray(), wanted["image_BV"].numpy(), atol=1e-6)
    np.testing.assert_allclose(texts.vectors.toarray(), wanted["text_CV"].numpy(), atol=1e-6)
    assert images.ids == batch["key"] and images.space == texts.space == loaded.space
    assert texts.ids[:3] == ["some-0000/sub/k0#0", "some-0000/sub/k0#1", "some-0000/sub/k1#0"]
    assert images.metadata[0]["captions"] == [CAPTIONS[0], f"{CAPTIONS[0]} ."]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_trainers_predict_writes_what_embed_writes(stair, tiny_stair, model, shard, tmp_path, vocab_file, ranks):
    import lightning as L

    from callbacks.embedding_writer import EmbeddingWriter
    from datamodules.shards import ImageTextShards
    from lightning_modules import Stage3
    from lightning_modules.optimizer import Optimizer
    from lightning_modules.stage import Objective
    from tests.conftest import tiny_config

    stair("embed", model, shard, tmp_path / "images")
    stair("embed", model, shard, tmp_path / "texts", "--side", "texts")
    module = Stage3(tiny_config(vocab_file), Objective(), Optimizer())
    module.stair.load_state_dict(tiny_stair.state_dict())
    data = ImageTextShards(None, None, {"c": str(shard)}, str(vocab_file), 32, 12, eval_batch_size=2, workers=0)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
        callbacks=[EmbeddingWriter(str(tmp_path / "out"))],
    )
    trainer.predict(module, datamodule=data, return_predictions=False)
    for side in ("images", "texts"):
        written, wanted = Embeddings.load(tmp_path / "out" / "c" / side), Embeddings.load(tmp_path / side)
        assert len(list((tmp_path / "out/c" / side).glob("part-*"))) == ranks
        assert sorted(written.ids) == sorted(wanted.ids) and written.space == wanted.space
        order = [written.ids.index(name) for name in wanted.ids]
        np.testing.assert_allclose(written.vectors[order].toarray(), wanted.vectors.toarray(), atol=1e-6)


@pytest.mark.parametrize("format", ["safetensors", "parquet"])
def test_an_interrupted_embedding_goes_on_where_it_stopped(stair, model, folder, tmp_path, format):
    out = tmp_path / "out"
    options = ["--part_size", "2", "--format", format]
    stair("embed", model, folder, out, *options, "--share", "1/2")
    assert sorted(path.stem for path in out.glob("part-*")) == ["part-00001"]
    with pytest.raises(ValueError, match="1 of 2 parts"):
        Embeddings.load(out)
    done = (out / f"part-00001.{format}").stat().st_mtime_ns
    stair("embed", model, folder, out, *options)
    assert (out / f"part-00001.{format}").stat().st_mtime_ns == done
    assert Embeddings.load(out).ids == ["deep/p1.png", "deep/p3.png", "p0.png", "p2.png"]
    with pytest.raises(SystemExit, match="top differ"):
        stair("embed", model, folder, out, *options, "--top", "3")


def test_pictures_that_cannot_be_read_are_left_out_and_named(stair, model, folder, tmp_path):
    (folder / "p0.png").write_bytes(b"no picture")
    printed = stair("embed", model, folder, tmp_path / "out", "--workers", "1", "--batch_size", "2")
    assert "1 skipped" in printed and "skipped p0.png: image undecodable" in printed
    assert Embeddings.load(tmp_path / "out").ids == ["deep/p1.png", "deep/p3.png", "p2.png"]


def test_tables_and_standard_input_are_sources(stair, model, folder, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"name": f"row {n}", "image": path, "year": 2000 + n} for n, path in enumerate(["p0.png", "deep/p1.png"])]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "table.parquet")
    for kind, year in (("csv", "2001"), ("parquet", 2001)):
        items = items_of(str(folder / f"table.{kind}"), "images", id_column="name")
        assert [item.id for item in items] == ["row 0", "row 1"]
        assert items[1].read() == png(1) and items[1].metadata == {"file": "deep/p1.png", "year": year}
    monkeypatch.setattr(sys, "stdin", io.StringIO("a red ball\n\na dog\n"))
    stair("embed", model, "-", tmp_path / "lines", "--side", "texts", "--top", "2")
    lines = Embeddings.load(tmp_path / "lines")
    assert lines.ids == ["0", "1"] and lines.metadata[1] == {"text": "a dog"}
    assert (np.diff(lines.vectors.indptr) <= 2).all()


def test_sources_that_are_none_are_refused(folder, shard, tmp_path):
    (tmp_path / "cut.tar").write_bytes(shard.read_bytes()[:700])
    (tmp_path / "twice.csv").write_text("id,text\na,x\na,y\n")
    for source, side, complaint in [
        (tmp_path / "nothing", "images", "no such file"),
        (folder, "texts", "it gives images"),
        (folder / "notes.txt", "texts", "no folder, tar, csv"),
        (tmp_path / "cut.tar", "images", "cut short"),
        (tmp_path / "twice.csv", "texts", "'a' occurs twice"),
        (tmp_path / "twice.csv", "images", "no column 'image'"),
        (tmp_path / "empty", "images", "holds no images"),
    ]:
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            items_of(str(source), side)


def test_from_pictures_to_hits_on_the_command_line(stair, model, shard, tmp_path):
    index = tmp_path / "my.index"
    stair("embed", model, shard, tmp_path / "e")
    assert "5 documents" in stair("index", index, tmp_path / "e", "--verify")
    hits = [
        json.loads(line) for line in stair("search", index, "--like", "some-0000/sub/k2", "--json_lines").splitlines()
    ]
    wanted = SparseIndex.open(index).search(like="some-0000/sub/k2")
    assert [(hit["id"], hit["score"]) for hit in hits] == [(hit.id, hit.score) for hit in wanted]
    (tmp_path / "query.png").write_bytes(png(3))
    printed = stair("search", index, "--image", tmp_path / "query.png", "--model", model, "--k", "2")
    assert printed.split()[1] == "some-0000/sub/k3" and len(printed.splitlines()) == 2
    assert stair("search", index, "--text", "two dogs", "--model", model, "--where", "file=some-0000.tar and length>1")
    assert "4 documents" in stair("index", index, "--delete", "some-0000/sub/k3", "--compact")
    for words, complaint in [((), "give one of"), (("--words", "dog:x"), "no number"), (("--text", "dog"), "model")]:
        with pytest.raises(SystemExit, match=complaint):
            stair("search", index, *words)
    with pytest.raises(SystemExit, match="no index"):
        stair("index", tmp_path / "other")

"""Files, names and addresses made to do harm: each claim of docs/operations/security.md, tried."""

import hashlib
import io
import json
import os
import pickle
import re
import struct
import sys
import tarfile
import time
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from packaging.requirements import Requirement
from PIL import Image

import stair.data.remote as sources
from callbacks.retrieval_panels import _escape
from datamodules.synthetic import write_scenes
from lightning_modules.consolidate import consolidate
from main import main
from stair import Embeddings, SparseIndex, Stair
from stair.data.items import list_items
from stair.data.tars import BrokenTarError, members, read_samples
from stair.errors import FileError
from stair.evaluate import output
from stair.explain import read_text
from stair.explain_page import page
from stair.images import decode_image
from stair.index import commands
from stair.index.storage import FILE
from stair.pages import write_html
from stair.plain import escape, one_line, plain
from stair.report.tables import Table
from stair.serve.app import PAGE
from tests.support.files import UNSEEN
from tests.support.rows import SPACE, embeddings
from tests.support.runs import SMALL, stage_args

ROOT = Path(__file__).parents[1]
MARKUP = "<script>alert(1)</script>"
ANSI = "\x1b]0;owned\x07\x1b[2J\x9b31m"
TURNED = "photo\u202egpj.exe\u2066\u200f"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "ran"

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path):
    """A pickle that would leave a trace; the trace must not be there at the end."""
    yield Trap(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_trap_works(tmp_path):
    pickle.loads(pickle.dumps(Trap(tmp_path)))
    assert (tmp_path / "ran").exists()


# ------------------------------------------------------------------ checkpoints


@pytest.fixture
def scenes(tmp_path):
    write_scenes(tmp_path / "scenes", train=32, val=8, image_size=32)
    (tmp_path / "scenes" / "small.yaml").write_text(SMALL)
    return tmp_path / "scenes"


def test_a_checkpoint_that_holds_code_is_made_into_nothing_and_runs_nothing(trap, tmp_path):
    torch.save({"state_dict": {}, "global_step": 3, "trap": trap}, tmp_path / "evil.ckpt")
    with pytest.raises(FileError) as refused:
        consolidate(str(tmp_path / "evil.ckpt"), str(tmp_path / "out"))
    assert refused.value.path == tmp_path / "evil.ckpt" and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_does_not_resume_from_a_checkpoint_that_holds_code(scenes, trap, tmp_path):
    torch.save({"state_dict": {}, "global_step": 3, "trap": trap}, tmp_path / "evil.ckpt")
    with pytest.raises(FileError) as refused:
        main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", str(tmp_path / "evil.ckpt")))
    assert refused.value.path == tmp_path / "evil.ckpt"


@pytest.mark.slow
def test_over_http_too_where_lightning_would_unpickle(scenes, trap, tmp_path, monkeypatch):
    from tests.support.server import Server

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "served").mkdir()
    torch.save({"state_dict": {}, "trap": trap}, tmp_path / "served" / "evil.ckpt")
    server = Server(tmp_path / "served")
    try:
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", server.url("good", "evil.ckpt")))
    finally:
        server.httpd.shutdown()
        server.httpd.server_close()


@pytest.mark.slow
def test_a_checkpoint_cannot_name_a_class_to_build(scenes, tmp_path):
    named = {"_class_path": "antigravity.Fly", "model": {"class_path": "antigravity.Fly"}}
    torch.save({"state_dict": {}, "hyper_parameters": named}, tmp_path / "evil.ckpt")
    with pytest.raises(Exception, match=r"pytorch-lightning_version|loops|state_dict|KeyError"):
        main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", str(tmp_path / "evil.ckpt")))
    assert "antigravity" not in sys.modules


# ------------------------------------------------------------------ model folders


@pytest.fixture
def model(tiny_stair, tmp_path):
    tiny_stair.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def crafted(folder, change, length=None):
    """Writes the weights anew with another header."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    header = change(header, names) or header
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data[end:])


def overlap(header, names):
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def renamed(header, names):
    header["surprise"] = header.pop(names[0])


@pytest.mark.parametrize(
    ("change", "length", "message"),
    [
        (lambda h, n: None, 1 << 62, "header too large"),
        (lambda h, n: None, 90_000_000, "invalid header length"),
        (overlap, None, "offset"),
        (renamed, None, "Missing key"),
        (lambda h, n: h[n[0]].update(dtype="I32"), None, "is of type I32; weights are floating-point"),
        (lambda h, n: h[n[0]].update(dtype="F99"), None, "JSON"),
        (lambda h, n: h[n[0]].update(shape=[1 << 60]), None, "shape"),
        (lambda h, n: b"[" * 100_000, None, "JSON"),
    ],
)
def test_crafted_weights_are_refused_with_a_message(model, change, length, message):
    crafted(model, change, length)
    with pytest.raises(ValueError, match=f"(?s)model.safetensors.*{message}"):
        Stair.from_pretrained(model)


def test_weights_that_are_a_pickle_run_nothing(model, trap):
    for write in (lambda f: torch.save({"a": trap}, f), lambda f: f.write_bytes(pickle.dumps(trap))):
        write(model / "model.safetensors")
        with pytest.raises(ValueError, match="does not hold this model's weights"):
            Stair.from_pretrained(model)
    (model / "model.safetensors").unlink()
    torch.save({"a": trap}, model / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        Stair.from_pretrained(model)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a file; give the folder of a model"):
        Stair.from_pretrained(model / "pytorch_model.bin")


def test_weights_that_are_not_finite_are_refused(model):
    broken = Stair.from_pretrained(model)
    broken.image_head.bias.data[3] = float("nan")
    broken.save_pretrained(model)
    with pytest.raises(ValueError, match=r"'image_head.bias' has values that are not finite"):
        Stair.from_pretrained(model)


def options(folder, side, **more):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["model"][side]["options"] |= more
    file.write_text(json.dumps(content))


def test_a_model_folder_brings_no_code_and_asks_for_no_other_file(model, trap):
    (model / "modeling_evil.py").write_text("import os; os.mkdir('ran')")
    options(model, "text", auto_map={"AutoModel": "modeling_evil.Model"})
    assert type(Stair.from_pretrained(model).text_encoder.bert).__module__.startswith("transformers.")
    torch.save({"a": trap}, model / "other.pt")
    options(model, "image", checkpoint_path=str(model / "other.pt"))
    with pytest.raises(ValueError, match="weights elsewhere"):
        Stair.from_pretrained(model)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "1e999", '{"format": 1}', '{"format": 1, "model": []}', "\0"])
def test_a_description_that_is_none_is_refused(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        Stair.from_pretrained(model)


def test_of_a_hub_model_only_weights_json_and_vocabulary_are_fetched(model, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **more: asked.update(more) or str(model))
    Stair.from_pretrained("somebody/model")
    assert asked["allow_patterns"] == ["model.safetensors", "*.json", "vocab.txt"]


# ------------------------------------------------------------------ configs


def test_a_config_is_read_without_objects_of_its_own(tmp_path, trap):
    (tmp_path / "evil.yaml").write_text(f"data: !!python/object/apply:os.mkdir ['{trap.folder}']\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/stage1.yaml"), "--config", str(tmp_path / "evil.yaml")])


def test_a_class_of_another_kind_is_not_built(tmp_path, trap):
    made = f"{{class_path: subprocess.Popen, init_args: {{args: [mkdir, {trap.folder}]}}}}"
    (tmp_path / "evil.yaml").write_text(f"trainer: {{callbacks: [{made}]}}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs/stage1.yaml"), "--config", str(tmp_path / "evil.yaml")])


@pytest.mark.parametrize("release", ["2.6.2", "2.6.3"])
def test_the_malicious_releases_of_lightning_cannot_be_installed(release):
    lines = re.findall(r'"(lightning[<>=!~ ][^"]*)"', (ROOT / "pyproject.toml").read_text())
    assert lines and not any(Requirement(line).specifier.contains(release, prereleases=True) for line in lines)
    assert any(Requirement(line).specifier.contains("2.6.1") for line in lines)


# ------------------------------------------------------------------ shards


def pax(records: bytes) -> bytes:
    info = tarfile.TarInfo("@")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    return info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)


def test_extended_headers_of_many_short_records_take_no_more_than_their_length():
    start = time.process_time()
    member = tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)
    assert [found.name for found in members(io.BytesIO(pax(b"5 a=\n" * 60_000) + member + bytes(1024)))] == ["a.txt"]
    assert time.process_time() - start < 5  # by slices of the rest it was the square: minutes
    with pytest.raises(BrokenTarError, match="extended header of 1048577 bytes"):
        list(members(io.BytesIO(pax(bytes((1 << 20) + 1)))))


ENDLESS = """
import tarfile, io, itertools, sys
for n in itertools.count():
    info = tarfile.TarInfo(f"{n}.txt")
    info.size = 3
    sys.stdout.buffer.write(info.tobuf() + b"abc" + bytes(509))
"""


def test_an_endless_stream_is_read_only_as_far_as_needed(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    samples = read_samples(f"pipe:{sys.executable} {tmp_path}/endless.py")
    assert [sample.key for sample in islice(samples, 3)] == ["0", "1", "2"]
    samples.close()
    with pytest.raises(FileError, match="no header"):
        next(read_samples("pipe:yes"))
    assert list(read_samples("pipe:cat /dev/zero")) == []  # zeros end an archive


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 2130706433 0x7f.1 10.0.0.1 172.16.3.4 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 "
    "::1 ::ffff:127.0.0.1 fe80::1 fd00::1 64:ff9b::a9fe:a9fe 2002:7f00:1:: localhost".split(),
)
def test_addresses_of_this_network_are_known_in_every_spelling(host):
    assert sources._local_address(host)


def test_public_addresses_are_known_too():
    assert not sources._local_address("1.1.1.1") and not sources._local_address("2606:4700:4700::1111")


def test_captions_nested_beyond_reason_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("k.json", b'{"captions": ' + b"[" * 100_000), ("k.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="a/k: caption unreadable"):
        list_items(str(tmp_path / "a.tar"), "texts")


# ------------------------------------------------------------------ indices and embeddings


def rewritten(folder, name, change):
    """Changes an array and gives the index the right checksum of it, as whoever made it could."""
    reader = pa.ipc.open_file(pa.py_buffer((folder / FILE).read_bytes()[:-32]))
    batch = reader.get_batch(0)
    changed = batch[name].values.to_numpy().copy()
    change(changed)
    column = pa.LargeListArray.from_arrays([0, len(changed)], pa.array(changed))
    batch = batch.set_column(batch.schema.get_field_index(name), name, column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, reader.schema) as file:
        file.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    (folder / FILE).write_bytes(content + hashlib.sha256(content).digest())


@pytest.mark.parametrize(
    "name", ["row_terms", "row_start", "run_start", "number_start", "documents", "bytes", "terms", "scale", "table"]
)
def test_an_index_whose_numbers_point_elsewhere_is_found(tmp_path, name):
    SparseIndex.build(tmp_path / "i", embeddings(9)).verify()
    rewritten(tmp_path / "i", name, lambda array: np.add(array[3:4], 99, array[3:4], casting="unsafe"))
    with pytest.raises(FileError) as error:
        SparseIndex.open(tmp_path / "i").verify()
    assert error.value.path == tmp_path / "i" / FILE


def test_embeddings_whose_numbers_point_elsewhere_are_refused(tmp_path):
    vectors = embeddings(4)
    vectors.vectors.indices[2] = 1 << 20
    vectors.save(tmp_path / "part-0.safetensors")
    with pytest.raises(ValueError, match=r"part-0\.safetensors is damaged"):
        Embeddings.load(tmp_path)


# ------------------------------------------------------------------ text that is looked at


def test_controls_are_spelled_out_and_scripts_and_emoji_stay():
    kept = "dog 犬 كلب 👩‍👩‍👧 naïve\tx\n"
    assert plain(kept) == kept and one_line("a\n") == "a\\n"
    assert plain(ANSI + TURNED + "\ud800") == (
        "\\x1b]0;owned\\x07\\x1b[2J\\x9b31mphoto\\u202egpj.exe\\u2066\\u200f\\ud800"
    )
    assert not UNSEEN.search(escape(ANSI + TURNED)) and "<" not in escape(MARKUP)


def test_every_page_shows_hostile_text_as_text(tiny_stair, tmp_path):
    hostile = MARKUP + ANSI + TURNED
    write_html(tmp_path / "page.html", hostile, [hostile], [])
    tiny_stair.vocabulary.tokens[12:14] = [hostile, hostile + "2"]
    pages = [(tmp_path / "page.html").read_text(), page(read_text(tiny_stair, "a red dog two small cats"))]
    for text in [*pages, _escape(hostile)]:
        assert not UNSEEN.search(text) and "<script>" not in text
    for control in ("\\x00-\\x08", "\\u2028-\\u202e", "\\u2066-\\u2069", "\\x7f-\\x9f"):
        assert control in PAGE  # the search page does it in the browser


def test_control_characters_in_ids_names_and_words_do_not_reach_a_terminal(tmp_path, capsys):
    part = embeddings(3)
    hostile = Embeddings(part.vectors, [f"{n}{ANSI}{TURNED}" for n in range(3)], SPACE)
    SparseIndex.build(tmp_path / "i", hostile)
    commands.search(tmp_path / "i", words=SPACE.tokens[part.vectors.indices.max()])
    shown = capsys.readouterr().out
    assert "owned" in shown and not UNSEEN.search(shown)


def test_names_are_no_markup_of_the_terminals_tables(monkeypatch, capsys):
    lines = [["[red]a[/blue]" + ANSI, "1"]]
    monkeypatch.setattr(output, "tables", lambda result: [Table("[bold]t", ["[x]", "y"], lines, ["[/z] " + TURNED])])
    output.show({})
    shown = capsys.readouterr().out
    assert "[red]a[/blue]" in shown and "[/z]" in shown and not UNSEEN.search(shown)


def test_pictures_that_would_fill_memory_are_refused_by_their_header():
    buffer = io.BytesIO()
    Image.new("L", (10, 10)).save(buffer, "PNG")
    bomb = bytearray(buffer.getvalue())
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)  # width and height
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    start = time.process_time()
    with pytest.raises(ValueError, match="image too large"):
        decode_image(bytes(bomb))
    assert time.process_time() - start < 1

"""Disks that are full, outputs that cannot be written, files and processes that vanish, clocks that jump, kills."""

import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import sparse
from torch.utils.data import IterableDataset

from datamodules.workers import ReadingLoader
from lightning_modules.run_folder import AtomicCheckpoints, write_atomically
from main import main
from stair import Embeddings, SparseIndex, Stair
from stair.data.prepare.sources import folder as prepare_folder
from stair.data.prepare.writer import ShardSettings
from stair.files import removed_on_failure
from tests.support.rows import SPACE, embeddings
from tests.support.runs import Line, stage_args, weights

# ------------------------------------------------------------------ a disk that is full


@pytest.fixture
def full(tmp_path):
    """A file system of a mebibyte; where none can be mounted, a limit to the size of a file does the same."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode == 0
    )
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield place
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)
    if mounted:
        subprocess.run(["umount", "--lazy", place], check=True)


def no_room(path):
    """The error: what failed, how much room there is, and where."""
    return rf"(No space left on device|File too large): \d+ bytes were left.*{re.escape(str(path))}"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_finds_no_room_leaves_the_old_one(full):
    target = full / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"weights": torch.ones(10_000)}, target)
    before = contents(full)
    with pytest.raises(OSError, match=no_room(target)):
        AtomicCheckpoints().save_checkpoint({"weights": torch.rand(2_000_000)}, target)
    assert contents(full) == before and torch.load(target, weights_only=True)["weights"].sum() == 10_000


def test_a_export_that_finds_no_room_leaves_the_old_one(full, tiny_stair):
    tiny_stair.save_pretrained(full / "stair")
    before = contents(full)
    tiny_stair.register_parameter("more", torch.nn.Parameter(torch.rand(2_000_000)))
    with pytest.raises(OSError, match=no_room(full / "stair")):
        tiny_stair.save_pretrained(full / "stair")
    assert contents(full) == before
    assert Stair.from_pretrained(full / "stair")


def test_an_index_that_finds_no_room_stays_what_it_was(full):
    index = SparseIndex.build(full / "i", embeddings(50))
    before = {path: data for path, data in contents(full / "i").items() if path.name != "lock"}
    with pytest.raises(OSError, match=no_room(full / "i")):
        index.add(embeddings(20_000, prefix="e"))
    assert {path: data for path, data in contents(full / "i").items() if path.name != "lock"} == before
    SparseIndex.open(full / "i").verify()
    with pytest.raises(OSError, match=no_room(full / "j")):
        SparseIndex.build(full / "j", embeddings(20_000))
    assert not (full / "j").exists()
    index.delete(["d3"])


@pytest.mark.parametrize("kind", ["safetensors", "parquet"])
def test_embeddings_that_find_no_room_leave_what_was_there(full, kind):
    path = full / f"part-0.{kind}"
    embeddings(9).save(path)
    before = contents(full)
    weights = sparse.random(20_000, len(SPACE.tokens), 0.1, "csr", np.float32, random_state=0)
    with pytest.raises(OSError, match=no_room(path)):
        Embeddings(weights, [str(n) for n in range(20_000)], SPACE).save(path)
    assert contents(full) == before and len(Embeddings.load(path)) == 9


def test_a_shard_that_finds_no_room_is_not_there_and_the_finished_ones_are(full, tmp_path):
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    noise = os.urandom(200 * 200 * 3)
    for n in range(24):
        Image.frombytes("RGB", (200, 200), noise).save(tmp_path / "pictures" / f"{n}.png")
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f"{n}.png,a thing {n}\n" for n in range(24)))
    with pytest.raises(OSError, match=r"(No space left on device|File too large)(?s:.)*small/shards"):
        prepare_folder(
            tmp_path / "t.csv",
            tmp_path / "pictures",
            full / "shards",
            settings=ShardSettings(shard_samples=4, workers=1),
        )
    for shard in (full / "shards").glob("*.tar"):
        assert shard.read_bytes()[-1024:] == bytes(1024)


def test_an_error_that_is_not_about_room_is_what_it_was(tmp_path):
    with pytest.raises(ValueError, match=r"^plain$"), removed_on_failure(tmp_path / "a", tmp_path / "b"):
        (tmp_path / "b").write_text("half")
        raise ValueError("plain")
    assert not (tmp_path / "b").exists()
    wrapped = RuntimeError("the writer failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "quota")
    with (
        pytest.raises(OSError, match=r"quota.*bytes were left.*/a") as caught,
        removed_on_failure(tmp_path / "a", tmp_path / "b"),
    ):
        raise wrapped
    assert caught.value.errno == errno.EDQUOT


# ------------------------------------------------------------------ checkpoints are whole or absent


@pytest.fixture
def trainer(tmp_path):
    keeper = ModelCheckpoint(dirpath=tmp_path / "checkpoints", filename="last", enable_version_counter=False)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    more = {"max_steps": 4, "max_epochs": -1, "check_val_every_n_epoch": None, "val_check_interval": 2}
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[keeper], num_sanity_val_steps=0, **off, **more
    )
    write_atomically(trainer)
    return trainer


def test_a_checkpoint_is_written_beside_its_place_and_not_in_the_systems_temporary_folder(
    trainer, tmp_path, monkeypatch
):
    seen, save = [], torch.save

    def watched(content, file):
        seen.append(Path(file.name).parent)
        save(content, file)

    monkeypatch.setattr(torch, "save", watched)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    trainer.fit(Line())
    assert seen == [tmp_path / "checkpoints"] * 2
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(trainer, tmp_path):
    child = os.fork()
    if child == 0:
        save, times = torch.save, [0]

        def dying(content, file):
            times[0] += 1
            save(content, file)
            if times[0] == 2:
                file.flush()
                os.ftruncate(file.fileno(), file.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = dying
        trainer.fit(Line())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    trainer.fit(Line(), ckpt_path="last", weights_only=True)
    assert trainer.global_step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_a_strategy_with_its_own_way_keeps_it(trainer):
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpoints
    from lightning.fabric.plugins import XLACheckpointIO

    trainer.strategy.checkpoint_io = own = object.__new__(XLACheckpointIO)
    write_atomically(trainer)
    assert trainer.strategy.checkpoint_io is own


# ------------------------------------------------------------------ files and places


def test_an_output_that_cannot_be_written_is_named(tiny_stair):
    for write in (
        lambda: tiny_stair.save_pretrained("/proc/nowhere/stair"),
        lambda: embeddings(1).save("/proc/no/part-0.safetensors"),
    ):
        with pytest.raises(OSError, match="/proc/no"):
            write()


# ------------------------------------------------------------------ processes and clocks


class Dying(IterableDataset):
    """Its third sample kills the process that reads it, as the system does when memory runs out."""

    def __init__(self, wait):
        super().__init__()
        self.wait = wait

    def __iter__(self):
        for n in range(100):
            if n == 3:
                time.sleep(self.wait)
                os.kill(os.getpid(), signal.SIGKILL)
            yield torch.zeros(1)


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_a_reader_killed_for_memory_ends_the_run_with_a_reason(trainer, wait):
    # at once, before what it gave has arrived, and after; a hang would meet the limit that every test has
    # torch's handler of SIGCHLD has the word if it comes first
    with pytest.raises(RuntimeError, match=r"were killed: {\d+: 'Killed'}.*data\.workers|killed by signal: Kill"):
        trainer.fit(Line(), ReadingLoader(Dying(wait), workers=1))


class Broken(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1)
        raise EOFError("the shard ends early")


def test_an_error_of_a_reader_that_lives_is_what_it_was():
    with pytest.raises(EOFError, match="the shard ends early"):
        list(ReadingLoader(Broken(), workers=1))


def test_nothing_is_decided_by_the_time_of_day():
    # time.time, datetime.now: clocks that jump when they are set. monotonic and perf_counter do not
    told = re.compile(r"time\.time\(|datetime\.(now|today|utcnow)|date\.today")
    root = Path(__file__).parents[1]
    for family in ("stair", "datamodules", "callbacks", "lightning_modules"):
        for path in (root / family).rglob("*.py"):
            assert not told.search(path.read_text(encoding="utf-8")), path


# ------------------------------------------------------------------ kills anywhere, and the same run again


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_same_command_gives_the_same_weights_to_the_bit(scenes, tmp_path, workers):
    for name in ("a", "b"):
        main(stage_args(scenes, 1, tmp_path / name, "--data.workers", workers))
    a, b = weights(tmp_path / "a", 1), weights(tmp_path / "b", 1)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_anywhere_ends_as_one_that_is_left_alone(tmp_path):
    # in a process of its own, which has no other test's threads to fork
    args = ["-m", "benchmarks.faults", str(tmp_path / "f"), "--kills", "6", "--seed", "3"]
    done = subprocess.run([sys.executable, *args], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "6 kills, 0 wrong" in done.stdout

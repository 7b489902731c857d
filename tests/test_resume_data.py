"""Going on inside an epoch: after any step, with any number of readers, killed or not, in epochs, mixtures and streams."""

import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest

from datamodules.synthetic import write_scenes
from datamodules.workers import start_server
from stair.data.tars import Shards
from tests.support.shards import digest, keys, loader, shards, take, write_shards

ROOT = Path(__file__).parents[1]


FORMS = {
    "epochs": {},
    "mixture": {"weights": (3.0, 1.0)},
    "union": {"weights": (None, None)},
    "resampled": {"resample": True},
    "resampled mixture": {"weights": (1.0, 4.0), "resample": True},
}


def form(folder: Path, weights=None, **options):
    """What to train on, and settings."""
    (folder / "other").mkdir()
    one = write_shards(folder, [9, 12, 5], bad={"00005.png": b"no picture", "00011.json": b"{}"})
    other = write_shards(folder / "other", [14, 8])
    spec = one if weights is None else {"a": Shards(one, weights[0]), "b": Shards(other, weights[1])}
    return spec, {"flip": True, "crop_scale": (0.3, 1.0), "max_bad_share": 0.5, **options}


@pytest.mark.parametrize("name", FORMS)
def test_a_loader_goes_on_after_any_step_as_if_nothing_had_happened(tmp_path, vocab, name):
    spec, options = form(tmp_path, **FORMS[name])
    whole = take(loader(spec, vocab, **options), 14)
    assert len({epoch for epoch, _ in whole}) > 1
    for stop in range(1, 12):
        first = loader(spec, vocab, **options)
        assert take(first, stop) == whole[:stop]
        second = loader(spec, vocab, **options)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 14 - stop) == whole[stop:], stop


def takes_and_dies(sender, server, make, steps: int, state) -> None:
    vars(forkserver._forkserver).update(server)  # that of the test's own process, which has made its imports
    forkserver.ensure_running = forkserver._forkserver.ensure_running = lambda: None
    data = loader(*make[0], **make[1])
    if state:
        data.load_state_dict(state)
    sender.send((take(data, steps), data.state_dict()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("workers", "ranks"),
    [(0, 1), (2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 1), (0, 2), (2, 2), (4, 2)))],
)
def test_readers_that_are_killed_at_random_steps_lose_and_repeat_nothing(tmp_path, vocab, ranks, workers):
    spec, options = form(tmp_path, **FORMS["mixture"])
    rng = random.Random(workers + ranks)
    start_server()
    server = dict(vars(forkserver._forkserver))
    for rank in range(ranks):
        found, state = [], None
        whole = take(loader(spec, vocab, rank, ranks, **options), 9)
        while len(found) < 9:
            receiver, sender = multiprocessing.Pipe(duplex=False)
            steps = min(rng.randint(1, 4), 9 - len(found))
            make = (spec, vocab, rank, ranks), {**options, "workers": workers}
            # its workers have read ahead of what it was handed
            context = multiprocessing.get_context("fork")
            process = context.Process(target=takes_and_dies, args=(sender, server, make, steps, state))
            process.start()
            sender.close()
            more, state = receiver.recv()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            found += more
        assert found == whole


@pytest.mark.parametrize("name", FORMS)
def test_any_number_of_ranks_goes_on_with_the_very_same_global_batches(tmp_path, vocab, name):
    spec, options = form(tmp_path, **FORMS[name])
    options["global_batch_size"] = 12

    def run(ranks, steps, state=None):
        """Global batches, as rows of all ranks in turn."""
        loaders = [loader(spec, vocab, rank, ranks, **options) for rank in range(ranks)]
        for data in loaders:
            if state:
                data.load_state_dict(state)
        found = [take(data, steps) for data in loaders]
        states = [data.state_dict() for data in loaders]
        assert all(state == states[0] for state in states)
        return [list(itertools.chain(*(part[i][1] for part in found))) for i in range(steps)], states[0]

    whole, _ = run(1, 7)
    for before, after in ((1, 2), (2, 1), (4, 3), (3, 12)):
        first, state = run(before, 3)
        assert first == whole[:3]
        assert run(after, 4, state)[0] == whole[3:]


def test_any_number_of_workers_goes_on_with_the_very_same_batches(tmp_path, vocab):
    spec, options = form(tmp_path)
    whole = take(loader(spec, vocab, **options), 9)
    first = loader(spec, vocab, **options, workers=3)
    assert take(first, 4) == whole[:4]
    for workers in (1, 2):
        second = loader(spec, vocab, **options, workers=workers)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 5) == whole[4:], workers


# ---- what a mixture and a resampled stream are


def test_every_batch_of_a_mixture_holds_its_sources_in_proportion_and_each_goes_through_all_its_own(tmp_path, vocab):
    (tmp_path / "other").mkdir()
    one, other = write_shards(tmp_path, [30, 30]), write_shards(tmp_path / "other", [10])
    mixed = {"a": Shards(one, 3), "b": Shards(other, 1)}
    data = loader(mixed, vocab, global_batch_size=10)
    assert len(data) == 7
    batches = [batch for _ in range(8) for batch in data]
    shares = [Counter(batch["source"]) for batch in batches]
    assert all(share["a"] in (7, 8) and share["a"] + share["b"] == 10 for share in shares)
    total = sum(shares, Counter())
    assert abs(total["a"] - 0.75 * 560) <= 8 and total["b"] == 560 - total["a"]
    seen = {
        name: [k for b in batches for k, s in zip(b["key"], b["source"], strict=True) if s == name] for name in "ab"
    }
    # before a sample comes again, all others of its source have come, but for what shuffling moves across a lap's end
    for name, size in (("a", 60), ("b", 10)):
        times = Counter(seen[name])
        assert len(times) == size and max(times.values()) - min(times.values()) <= 2


def test_a_union_of_named_sources_sees_each_sample_once_an_epoch(tmp_path, vocab):
    (tmp_path / "other").mkdir()
    one = write_shards(tmp_path, [13])
    write_shards(tmp_path / "other", [7])
    (tmp_path / "other" / "train-0000.tar").rename(tmp_path / "other" / "more.tar")
    data = loader({"a": one, "b": [str(tmp_path / "other" / "more.tar")]}, vocab)
    batches = list(data)
    found = Counter(source for batch in batches for source in batch["source"])
    assert found == {"a": 13, "b": 7} and len(set(keys(batches))) == 20
    assert {
        key.partition("/")[0] for b in batches for key, s in zip(b["key"], b["source"], strict=True) if s == "b"
    } == {"more"}


def test_a_resampled_stream_draws_shards_again_each_epoch_of_the_given_size(tmp_path, vocab):
    spec = write_shards(tmp_path, [8, 8, 8])
    data = loader(spec, vocab, resample=True, train_samples=160)
    assert len(data) == 40
    first, second = list(data), list(data)
    times = Counter(keys(first))
    assert len(times) == 24 and max(times.values()) > min(times.values())
    assert keys(first) != keys(second)
    again = loader(spec, vocab, resample=True, train_samples=160)
    assert [digest(batch) for batch in again] == [digest(batch) for batch in first]
    other = loader(spec, vocab, resample=True, train_samples=160, seed=1)
    assert [digest(batch) for batch in other] != [digest(batch) for batch in first]
    # drawn twice in an epoch, a sample need not have the same crop and caption twice
    assert len({row for batch in first for row in digest(batch)}) > 24


def test_mixtures_that_make_no_sense_are_refused(tmp_path, vocab):
    spec = write_shards(tmp_path, [8])
    with pytest.raises(ValueError, match=r"sources \['b'\] have no weight and others have"):
        shards({"a": Shards(spec, 1.0), "b": spec}, vocab)
    for text in ("{a: x[0-1].tar}", ["{a: {shards: x.tar, wieght: 3}}"]):  # the second as jsonargparse hands it on
        with pytest.raises(ValueError, match=r"cannot be read as a mapping: expected .* weight: NUMBER"):
            shards(text, vocab)
    with pytest.raises(ValueError, match=r"weight of source 'a' is -1"):
        shards({"a": Shards(spec, -1)}, vocab)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loader({"a": spec, "b": str(tmp_path / "nowhere")}, vocab)


# ---- a real run, killed hard

LOG = re.compile(r"^SAW (\d+) (\d+) (\w+)$", re.M)
SPY = """
import hashlib, os, sys
sys.path.insert(0, {root!r})
import lightning as L
from main import main
from lightning_modules.stage import StairStage

plain = StairStage.training_step
def training_step(self, batch, batch_idx):
    saw = "|".join(batch["key"]).encode() + batch["ids"].numpy().tobytes() + batch["pixels"].numpy().tobytes()
    line = ["SAW", self.global_rank, self.trainer.global_step, hashlib.md5(saw).hexdigest()]
    os.write(1, ("\\n" + " ".join(map(str, line)) + "\\n").encode())  # at once: ranks share the pipe
    return plain(self, batch, batch_idx)
StairStage.training_step = training_step
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    from tests.support.runs import stage_args

    script = folder / "spy.py"
    script.write_text(SPY.format(root=str(ROOT)))
    line = [*stage_args(folder, 1, folder / more[0], *more[1:])]
    return subprocess.Popen(
        [sys.executable, str(script), *line], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def seen(output: str) -> dict[tuple[int, int], str]:
    """What each rank saw at each step."""
    return {(int(rank), int(step)): what for rank, step, what in LOG.findall(output)}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fit_that_is_killed_goes_on_with_the_batches_it_would_have_seen(tmp_path, ranks, workers):
    from tests.support.runs import SMALL, scalars

    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    mixed = f"{{a: {{shards: '{tmp_path}/train-*.tar', weight: 3}}, b: {{shards: '{tmp_path}/val-*.tar', weight: 1}}}}"
    more = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "3", "--data.workers", str(workers)]
    more += ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--data.train", mixed]
    whole = seen(start(tmp_path, "whole", *more).communicate(timeout=800)[0])
    assert whole.keys() == set(itertools.product(range(ranks), range(20)))
    sender = start(tmp_path, "killed", *more)
    output = ""
    for line in sender.stdout:  # killed hard: no signal it could act on
        output += line
        if line.startswith("SAW 0 9 "):
            os.killpg(sender.pid, signal.SIGKILL)
            break
    sender.wait()
    sender.stdout.close()
    again = start(tmp_path, "killed", *more, "--ckpt_path", "last").communicate(timeout=800)[0]
    resumed = seen(again)
    assert 0 < min(step for _, step in resumed) <= 9 and len(resumed) < len(whole), again[-2000:]
    assert {**seen(output), **resumed} == whole
    # of all ranks, and counted on
    logged = scalars(tmp_path / "killed", 1)
    assert logged["source/a/pairs"][-1] == 20 * 12 and logged["source/b/pairs"][-1] == 20 * 4
    losses = zip(logged["source/a/loss"], logged["source/b/loss"], strict=True)
    assert [0.75 * a + 0.25 * b for a, b in losses] == pytest.approx(logged["train/contrastive"], rel=1e-3)

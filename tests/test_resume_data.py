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
from pathlib import Path

import pytest

from datamodules.synthetic import write_scenes
from stair.data.specs import Shards
from tests.test_shards import digest, keys, loader, shards, write_shards, write_words

ROOT = Path(__file__).parents[1]


@pytest.fixture
def vocab(tmp_path: Path) -> str:
    return write_words(tmp_path)


def take(data, steps: int) -> list:
    """So many batches from where the loader stands, through epochs."""
    found = []
    while len(found) < steps:
        for batch in data:
            found.append((data.epoch, digest(batch)))
            if len(found) == steps:
                break
    return found


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


def takes_and_dies(told, data, steps: int, state) -> None:
    if state:
        data.load_state_dict(state)
    told.send((take(data, steps), data.state_dict()))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("workers", "ranks"),
    [(0, 1), (2, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((4, 1), (0, 2), (2, 2), (4, 2)))],
)
def test_readers_that_are_killed_at_random_steps_lose_and_repeat_nothing(tmp_path, vocab, ranks, workers):
    spec, options = form(tmp_path, **FORMS["mixture"])
    rng = random.Random(workers + ranks)
    for rank in range(ranks):
        found, state = [], None
        whole = take(loader(spec, vocab, rank, ranks, **options, workers=workers), 9)
        while len(found) < 9:
            data = loader(spec, vocab, rank, ranks, **options, workers=workers)
            heard, told = multiprocessing.Pipe(duplex=False)
            steps = min(rng.randint(1, 4), 9 - len(found))
            # its workers have read ahead of what it was handed
            process = multiprocessing.get_context("fork").Process(
                target=takes_and_dies, args=(told, data, steps, state)
            )
            process.start()
            told.close()
            more, state = heard.recv()
            process.join()
            assert process.exitcode == -signal.SIGKILL
            found += more
        assert found == whole


@pytest.mark.parametrize("name", ["epochs", "mixture", "resampled"])
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (2, 3)), ((2, 2), (1, 1)), ((2, 4), (4, 2)), ((4, 1), (3, 0)), ((3, 2), (4, 3))],
    ids=str,
)
def test_other_ranks_and_workers_go_on_with_the_very_same_global_batches(tmp_path, vocab, name, before, after):
    spec, options = form(tmp_path, **FORMS[name])
    options["global_batch_size"] = 12

    def run(ranks, workers, steps, state=None):
        """Global batches, as rows of all ranks in turn."""
        loaders = [loader(spec, vocab, rank, ranks, **options, workers=workers) for rank in range(ranks)]
        for data in loaders:
            if state:
                data.load_state_dict(state)
            data._processes = 0  # what a process makes is a function of its number: one reads for all
        found = [take(data, steps) for data in loaders]
        states = [data.state_dict() for data in loaders]
        assert all(state == states[0] for state in states)
        return [sorted(itertools.chain(*(part[i][1] for part in found))) for i in range(steps)], states[0]

    left = len(loader(spec, vocab, **options)) - 1
    whole, _ = run(*before, 1 + left)
    first, state = run(*before, 1)
    rest, _ = run(*after, left, state)
    assert first + rest == whole
    # and from there on in its own way
    assert run(*after, left + 2, state)[0][left:] == run(*after, left + 3)[0][left + 1 :]


def test_one_worker_fewer_reads_what_several_would_have(tmp_path, vocab):
    spec, options = form(tmp_path)
    first = loader(spec, vocab, **options, workers=4)
    whole = take(first, 5)
    state = None
    first = loader(spec, vocab, **options, workers=4)
    take(first, 2)
    state = first.state_dict()
    for workers in (0, 1, 2, 3, 5):
        second = loader(spec, vocab, **options, workers=workers)
        second.load_state_dict(state)
        assert take(second, 3) == whole[2:], workers


def test_readers_whose_places_a_short_last_shard_lacks_read_others_and_go_on_alike(tmp_path, vocab):
    """A total is spread over four shards, and the last holds less, as every writer leaves it."""
    found = {}
    for name, last in (("even", 8), ("short", 1)):
        (tmp_path / name).mkdir()
        write_shards(tmp_path / name, [8, 8, 8, last])
        spec = f"pipe:cat {tmp_path / name}/train-{{0000..0003}}.tar"
        options = {"train_samples": 32, "workers": 16, "global_batch_size": 2, "shuffle": 2}

        def reads(spec=spec, options=options):
            data = loader(spec, vocab, **options)
            data._processes = 0  # one reads for all
            return data

        whole = take(reads(), 40)
        assert all(len(rows) == 2 for _, rows in whole)
        for stop in (1, 7, 15, 16, 17, 30):
            second = reads()
            first = reads()
            assert take(first, stop) == whole[:stop]
            second.load_state_dict(json.loads(json.dumps(first.state_dict())))
            assert take(second, 40 - stop) == whole[stop:], stop
        found[name] = whole
    moved = 0
    for even, short in zip(found["even"], found["short"], strict=True):
        # who reads nothing of the last shard (keys from 24 on) sees what it would have seen
        if all(key.rpartition("/")[2] < "00024" for key, *_ in even[1]):
            assert short == even
        else:
            moved += short != even
    assert moved
    # each epoch they read other ones
    assert len({key for _, rows in found["short"] for key, *_ in rows}) == 25


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


def test_a_resampled_stream_draws_shards_again_needs_no_sizes_and_has_the_epoch_it_is_told(tmp_path, vocab):
    write_shards(tmp_path, [8, 8, 8])
    spec = f"pipe:cat {tmp_path}/train-{{0000..0002}}.tar"
    with pytest.raises(ValueError, match="train_samples"):
        loader(spec, vocab, resample=True)
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


def test_train_samples_are_what_the_sources_hold_with_their_own_samples(tmp_path, vocab):
    """Each with its own number, the rest over the shards of those that have none."""
    (tmp_path / "other").mkdir()
    one, other = write_shards(tmp_path, [30]), write_shards(tmp_path / "other", [4, 4])

    def counts(total, **own):
        data = loader({name: Shards(spec, None, own.get(name)) for name, spec in (("a", one), ("b", other))}, vocab,
                      train_samples=total)  # fmt: skip
        return [source.counts for source in data.stream.plan.sources]

    assert counts(38, a=30, b=8) == counts(None, a=30, b=8) == [(30,), (4, 4)]
    assert counts(38, a=30) == counts(38, b=8) == [(30,), (4, 4)]
    assert counts(38) == [(13,), (13, 12)]
    for total, own, wanted in (
        (39, {"a": 30, "b": 8}, "wanted 38, their sum"),
        (37, {"a": 30, "b": 8}, "wanted 38, their sum"),
        (30, {"a": 30}, "wanted more than 30"),
    ):
        with pytest.raises(ValueError, match=rf"train_samples={total} contradicts .*a 30.*{wanted}.*data.resample"):
            counts(total, **own)


def test_mixtures_that_make_no_sense_are_refused(tmp_path, vocab):
    spec = write_shards(tmp_path, [8])
    with pytest.raises(ValueError, match=r"sources \['b'\] have no weight and others have"):
        shards({"a": Shards(spec, 1.0), "b": spec}, vocab)
    for text in ("{a: x[0-1].tar}", ["{a: {shards: x.tar, wieght: 3}}"]):  # the second as jsonargparse hands it on
        with pytest.raises(
            ValueError, match=r"looks like a mapping and cannot be read as one: wanted .* weight: NUMBER"
        ):
            shards(text, vocab)
    with pytest.raises(ValueError, match=r"weight of source 'a'=-1"):
        shards({"a": Shards(spec, -1)}, vocab)
    with pytest.raises(ValueError, match=r"samples of source 'b'=0"):
        shards({"a": spec, "b": Shards(spec, samples=0)}, vocab)
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
main(sys.argv[1:])
"""


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    from tests.test_stages import words

    script = folder / "spy.py"
    script.write_text(SPY.format(root=str(ROOT)))
    line = [*words(folder, 1, folder / more[0], *more[1:])]
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
    from tests.test_stages import SMALL, scalars

    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    mixed = f"{{a: {{shards: '{tmp_path}/train-*.tar', weight: 3}}, b: {{shards: '{tmp_path}/val-*.tar', weight: 1}}}}"
    more = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "3", "--data.workers", str(workers)]
    more += ["--trainer.accelerator", "cpu", "--trainer.devices", str(ranks), "--data.train", mixed]
    whole = seen(start(tmp_path, "whole", *more).communicate(timeout=800)[0])
    assert whole.keys() == set(itertools.product(range(ranks), range(20)))
    told = start(tmp_path, "told", *more)
    output = ""
    for line in told.stdout:  # killed hard: no signal it could act on
        output += line
        if line.startswith("SAW 0 9 "):
            os.killpg(told.pid, signal.SIGKILL)
            break
    told.wait()
    again = start(tmp_path, "told", *more, "--ckpt_path", "last").communicate(timeout=800)[0]
    resumed = seen(again)
    assert 0 < min(step for _, step in resumed) <= 9 and len(resumed) < len(whole), again[-2000:]
    assert {**seen(output), **resumed} == whole
    # of all ranks, and counted on
    logged = scalars(tmp_path / "told", 1)
    assert logged["source/a/pairs"][-1] == 20 * 12 and logged["source/b/pairs"][-1] == 20 * 4
    losses = zip(logged["source/a/loss"], logged["source/b/loss"], strict=True)
    assert [0.75 * a + 0.25 * b for a, b in losses] == pytest.approx(logged["train/contrastive"], rel=1e-3)

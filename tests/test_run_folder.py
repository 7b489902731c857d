"""One folder, one training: checkpoints are found whatever loggers, callbacks and spellings there are."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger

from lightning_modules.run_folder import checkpoint_to_resume, training_inputs
from main import StairCLI, main
from stair.errors import FileError, SettingError
from stair.files import lock
from tests.support.runs import SMALL, stage_args

TWO = ("--trainer.max_steps", "2")


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run whose stage 1 was trained for 2 steps, and exported."""
    run = tmp_path_factory.mktemp("runs") / "trained"
    main(stage_args(scenes, 1, run, *TWO))
    return run


@pytest.fixture
def copy(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class OtherNameEachTime(CSVLogger):
    """As W&B, whose folders are named after the id of a run."""

    ids = itertools.count()

    def __init__(self, save_dir: str = ".") -> None:
        super().__init__(save_dir, name="wandb", version=f"run-{next(self.ids)}")


class Scores(L.Callback):
    """Logs the scores that a test wants at the validations."""

    expected = ()

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("score", self.expected.pop(0))


IDS = "{class_path: tests.test_run_folder.OtherNameEachTime}"
CSV = "{class_path: CSVLogger, init_args: {save_dir: .}}"
EARLY = "{class_path: EarlyStopping, init_args: {monitor: val/recall, mode: max, patience: 99}}"
KEEPER = "{class_path: ModelCheckpoint, init_args: {save_last: true, save_top_k: -1}}"
OVERLAYS = {
    "callbacks": f"trainer: {{callbacks: [{EARLY}]}}",
    "no callbacks": "trainer: {callbacks: null}",
    "no logger": "trainer: {logger: false}",
    "logger of other names": f"trainer: {{logger: {IDS}}}",
    "two loggers": f"trainer: {{logger: [{CSV}, {IDS}]}}",
    "own ModelCheckpoint": f"trainer: {{callbacks: [{KEEPER}]}}",
}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_run_is_resumed_whatever_loggers_and_callbacks_there_are(scenes, tmp_path, overlay):
    file = tmp_path / "overlay.yaml"
    file.write_text(OVERLAYS[overlay])
    more = ("--config", str(file), "--ckpt_path", "last")
    main(stage_args(scenes, 1, tmp_path / "r", *TWO, *more))
    checkpoints = tmp_path / "r" / "stage1" / "checkpoints"
    assert {"last.ckpt", "best.ckpt"} <= {path.name for path in checkpoints.iterdir()}
    resumed = main(stage_args(scenes, 1, tmp_path / "r", *more))
    assert Path(resumed.trainer.ckpt_path) == checkpoints / "last.ckpt" and resumed.trainer.global_step == 4
    assert resumed.trainer.fit_loop.epoch_loop.batch_progress.total.completed == 4
    if overlay == "own ModelCheckpoint":
        assert len(list((tmp_path / "r").rglob("epoch=*.ckpt"))) == 2


@pytest.mark.slow
def test_a_run_is_resumed_whatever_the_spelling_of_its_folder(scenes, copy, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(copy)
    for steps, spelling in enumerate(("~/copy", "$RUNS/copy/", "copy", "./copy/../link", copy), 3):
        cli = main(stage_args(scenes, 1, spelling, "--trainer.max_steps", str(steps), "--ckpt_path", "last"))
        assert Path(cli.trainer.ckpt_path).resolve() == copy / "stage1" / "checkpoints" / "last.ckpt"
        assert cli.trainer.fit_loop.epoch_loop.batch_progress.total.completed == steps
        main(stage_args(scenes, 1, spelling, "--ckpt_path", "best", subcommand="validate"))
    assert not (tmp_path / "~").exists()
    with pytest.raises(SettingError) as refused:
        main(stage_args(scenes, 1, "$NO_SUCH_VARIABLE/r"))
    assert refused.value.setting == "run"


def test_best_ckpt_is_never_replaced_by_a_worse_one(scenes, tmp_path, monkeypatch):
    more = ("--trainer.callbacks", "tests.test_run_folder.Scores", "--best.monitor", "score", "--ckpt_path", "last")
    scores = [0.5, 0.4, 0.45, 0.6]
    monkeypatch.setattr("tests.test_run_folder.Scores.expected", scores)
    main(stage_args(scenes, 1, tmp_path / "a", *TWO, *more))
    copied = Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    best = copied / "stage1" / "checkpoints" / "best.ckpt"
    # as after a kill between the two: `last` does not know of the best
    state = torch.load(best.with_name("last.ckpt"), weights_only=True)
    state["callbacks"] = {}
    torch.save(state, best.with_name("last.ckpt"))
    monkeypatch.chdir(tmp_path)
    seen = []
    for steps in (4, 6, 8):
        main(stage_args(scenes, 1, "b", "--trainer.max_steps", str(steps), *more))
        seen.append(torch.load(best, weights_only=True)["global_step"])
    assert seen == [2, 2, 8] and scores == []
    with pytest.raises(SettingError) as refused:
        main(stage_args(scenes, 1, "b", "--trainer.max_steps", "9", "--ckpt_path", "last"))
    assert refused.value.setting == "best.monitor"


def test_a_callback_that_would_write_the_same_checkpoint_is_refused(scenes, tmp_path):
    own = "[{class_path: ModelCheckpoint, init_args: {filename: last, enable_version_counter: false}}]"
    with pytest.raises(SettingError) as refused:
        main(stage_args(scenes, 1, tmp_path / "r", "--trainer.logger", "false", "--trainer.callbacks", own))
    assert refused.value.setting == "trainer.callbacks"


TRACES = {
    "curves": "tensorboard/events.out.tfevents.1",
    "curves as csv": "csv/version_0/metrics.csv",
    "settings": "config.yaml",
    "export": "stair/config.json",
    "checkpoint of another name": "checkpoints/last-v1.ckpt",
    "checkpoint elsewhere": "wandb/x/epoch=0-step=2.ckpt",
    "leftover of Lightning": "hpc_ckpt_1.ckpt",
}


@pytest.mark.parametrize("trace", TRACES)
@pytest.mark.parametrize("more", [(), ("--ckpt_path", "last")], ids=["new", "last"])
def test_a_folder_with_a_trace_of_training_and_no_last_ckpt_is_refused(scenes, tmp_path, trace, more):
    path = tmp_path / "stage1" / TRACES[trace]
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1000))
    before = content(tmp_path)
    with pytest.raises(FileError) as refused:
        main(stage_args(scenes, 1, tmp_path, *more))
    assert refused.value.path in (path, path.parent) and content(tmp_path) == before


def test_what_is_of_no_training_does_not_keep_one_from_beginning(tmp_path):
    for name in (
        "slurm-1.out",
        "tensorboard/events.out.tfevents.1",
        "validate/events.out.tfevents.1",
        "validate/x.ckpt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000 if name.startswith("validate") else 88))
    assert checkpoint_to_resume("last", tmp_path, tmp_path / "stair", {}) is None


@pytest.mark.parametrize("size", [0, 5000])
@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_damaged_checkpoint_is_refused_by_name(scenes, copy, size, command):
    last = copy / "stage1" / "checkpoints" / "last.ckpt"
    os.truncate(last, size)
    before = content(copy)
    with pytest.raises(FileError) as refused:
        main(stage_args(scenes, 1, copy, "--ckpt_path", "last", subcommand=command))
    assert refused.value.path == last and content(copy) == before


def test_a_run_and_a_root_folder_are_not_given_together(scenes, tmp_path):
    with pytest.raises(SettingError) as refused:
        main(stage_args(scenes, 1, tmp_path / "r", "--trainer.default_root_dir", str(tmp_path / "x")))
    assert refused.value.setting == "trainer.default_root_dir"
    line = stage_args(
        scenes,
        1,
        "",
        *TWO,
        "--trainer.default_root_dir",
        str(tmp_path / "x"),
        "--trainer.enable_checkpointing",
        "false",
    )
    at = line.index("--run")
    main(line[:at] + line[at + 2 :])
    assert {"stair", "config.yaml", "tensorboard"} == {path.name for path in (tmp_path / "x").iterdir()}


# ------------------------------------------------------------------ results are of the inputs that there are


LAST = ("--ckpt_path", "last")


@pytest.fixture(scope="module")
def two_stages(scenes, trained, tmp_path_factory):
    run = Path(shutil.copytree(trained, tmp_path_factory.mktemp("runs") / "two"))
    main(stage_args(scenes, 2, run, *TWO))
    return run


def test_a_finished_stage_that_is_submitted_again_writes_nothing(scenes, trained, copy, tmp_path):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copy.rglob("*")}
    moved = Path(shutil.copytree(scenes, tmp_path / "elsewhere"))
    free = ("--data.workers", "1", "--trainer.log_every_n_steps", "7", "--model.init_args.micro_batch_size", "4")
    main(stage_args(scenes, 1, copy, *TWO, *LAST))
    main(stage_args(moved, 1, copy, *TWO, *LAST, *free))
    shutil.rmtree(copy / "stage1" / "checkpoints")  # to save room
    main(stage_args(scenes, 1, copy, *TWO, *LAST))
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in copy.rglob("*")}
    del before[copy / "stage1"], after[copy / "stage1"]
    assert after.items() <= before.items()


@pytest.mark.parametrize("finished", [True, False])
def test_a_stage_whose_stage_before_was_trained_anew_is_refused(scenes, two_stages, tmp_path, finished):
    run = Path(shutil.copytree(two_stages, tmp_path / "r"))
    shutil.rmtree(run / "stage1")
    main(stage_args(scenes, 1, run, *TWO, "--seed_everything", "7"))
    if not finished:
        shutil.rmtree(run / "stage2" / "stair")
    before = content(run)
    with pytest.raises(FileError, match=r"transition\.init_from") as refused:
        main(stage_args(scenes, 2, run, *TWO, *LAST))
    assert refused.value.path == run / "stage2" / ("stair" if finished else "checkpoints/last.ckpt")
    assert content(run) == before


@pytest.mark.parametrize(
    "changed",
    [
        ("model.init_args.optimizer.lr", "0.1"),
        ("model.init_args.objective.flops_image", "0.1"),
        ("seed_everything", "3"),
        ("data.global_batch_size", "8"),
        ("data.train", "{scenes}/train-0000.tar"),
        ("trainer.max_steps", "1"),
    ],
)
def test_a_finished_stage_is_not_complete_for_other_inputs(scenes, trained, changed):
    name, value = changed
    before = content(trained)
    with pytest.raises(FileError, match=name) as refused:
        main(stage_args(scenes, 1, trained, *TWO, *LAST, f"--{name}", value.format(scenes=scenes)))
    assert refused.value.path == trained / "stage1" / "stair" and content(trained) == before


def test_a_finished_stage_is_not_complete_for_data_of_the_same_names_and_sizes(scenes, trained, tmp_path):
    other = Path(shutil.copytree(scenes, tmp_path / "other"))
    for tar in other.glob("train-*.tar"):
        with tar.open("r+b") as file:
            file.seek(600)  # in the first picture
            file.write(b"other")
    with pytest.raises(FileError, match=r"data\.train"):
        main(stage_args(other, 1, trained, *TWO, *LAST))


@pytest.mark.parametrize("name", ["vocabulary.txt", "tower"])
def test_a_moved_file_of_the_model_is_the_same_input_and_a_changed_one_is_not(tmp_path, name):
    digests = []
    names = ("callbacks", "max_steps", "max_epochs", "limit_train_batches", "precision")
    trainer = Namespace(**dict.fromkeys([*names, "gradient_clip_val", "gradient_clip_algorithm"]))
    for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        path = tmp_path / folder / name
        path.parent.mkdir()
        if name == "tower":
            path.mkdir()
        (path / "model.safetensors" if name == "tower" else path).write_bytes(content)
        stair = Namespace(text=Namespace(name=str(path)))
        settings = {"trainer": trainer, "data": Namespace(train=None), "seed_everything": 0}
        model = Namespace(class_path="Stage1", init_args=Namespace(stair=stair))
        digests.append(training_inputs(Namespace(model=model, **settings), None))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("changed", [("model.init_args.optimizer.lr", "0.1"), ("trainer.max_steps", "1")])
def test_a_last_checkpoint_without_a_step_left_is_exported_with_its_own_settings_only(scenes, copy, changed):
    shutil.rmtree(copy / "stage1" / "stair")
    before, (name, value) = content(copy), changed
    with pytest.raises(FileError, match=name) as refused:
        main(stage_args(scenes, 1, copy, *TWO, *LAST, f"--{name}", value))
    assert refused.value.path == copy / "stage1" / "checkpoints" / "last.ckpt" and content(copy) == before
    main(stage_args(scenes, 1, copy, *TWO, *LAST))
    assert (copy / "stage1" / "stair" / "config.json").exists()


def test_a_checkpoint_of_another_folder_does_not_train_over_this_one(scenes, trained, copy):
    theirs, before = trained / "stage1" / "checkpoints" / "last.ckpt", content(copy)
    with pytest.raises(FileError) as refused:
        main(stage_args(scenes, 1, copy, "--ckpt_path", str(theirs)))
    assert refused.value.path.is_relative_to(copy) and content(copy) == before
    with pytest.raises(FileError) as refused:  # stage 2 starts from an exported model
        main(stage_args(scenes, 2, copy, "--ckpt_path", str(theirs)))
    assert refused.value.path == theirs and content(copy) == before
    own = copy / "stage1" / "checkpoints" / "best.ckpt"
    assert main(stage_args(scenes, 1, copy, "--ckpt_path", str(own))).trainer.global_step == 4


def test_a_stage_that_earlystopping_ended_goes_on_with_another_patience_or_without_it(scenes, tmp_path):
    stop = "[{{class_path: EarlyStopping, init_args: {{monitor: val/recall, mode: max, patience: {}, min_delta: 2}}}}]"
    run, steps = tmp_path / "r", ("--trainer.max_steps", "8", *LAST)
    main(stage_args(scenes, 1, run, *steps, "--trainer.callbacks", stop.format(1)))
    before = content(run)
    main(stage_args(scenes, 1, run, *steps, "--trainer.callbacks", stop.format(1)))
    assert content(run) == before
    longer = main(stage_args(scenes, 1, run, *steps, "--trainer.callbacks", stop.format(2)))
    assert longer.trainer.global_step == 6
    assert main(stage_args(scenes, 1, run, *steps)).trainer.global_step == 8


class OutOfMemory(L.Callback):
    """Ends the first step as a device without room does."""

    def on_before_backward(self, trainer, pl_module, loss):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("more", [(), LAST], ids=["new", "last"])
@pytest.mark.parametrize(
    "corrected", [("model.init_args.optimizer.lr", "1e-4"), ("data.train", "{scenes}/train-0000.tar")]
)
def test_a_start_that_failed_in_its_first_step_does_not_bind_the_folder(scenes, tmp_path, more, corrected):
    with pytest.raises(torch.OutOfMemoryError):
        main(stage_args(scenes, 1, tmp_path, *TWO, "--trainer.callbacks", "tests.test_run_folder.OutOfMemory"))
    name, value = corrected
    assert (
        main(stage_args(scenes, 1, tmp_path, *TWO, *more, f"--{name}", value.format(scenes=scenes))).trainer.global_step
        == 2
    )
    assert (tmp_path / "stage1" / "stair" / "config.json").is_file()
    with pytest.raises(FileError):  # now it holds a training
        main(stage_args(scenes, 1, tmp_path, *TWO, "--model.init_args.optimizer.lr", "1e-5"))


def test_config_yaml_states_the_settings_that_trained_what_is_there(scenes, copy):
    file = copy / "stage1" / "config.yaml"
    rate = "--model.init_args.optimizer.lr"
    with pytest.raises((ValueError, RuntimeError)):  # data.seed is not that of the checkpoint
        main(stage_args(scenes, 1, copy, *LAST, rate, "0.5", "--data.seed", "3"))
    assert yaml.safe_load(file.read_text())["model"]["init_args"]["optimizer"]["lr"] == 2e-3
    main(stage_args(scenes, 1, copy, *LAST, rate, "0.5"))
    assert yaml.safe_load(file.read_text())["model"]["init_args"]["optimizer"]["lr"] == 0.5
    exported = json.loads((copy / "stage1" / "stair" / "config.json").read_text())["training"]
    assert exported["inputs"]["model.init_args.optimizer.lr"] == 0.5 and exported["steps"] == 4


# ------------------------------------------------------------------ two jobs


HOLD = """
import pathlib, sys, time
from stair.files import lock
with lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_job_in_a_folder_is_refused_by_naming_the_first_until_that_is_killed(scenes, tmp_path):
    path = tmp_path / "r" / "stage1" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        before = content(tmp_path / "r")
        for more in ((), LAST):
            with pytest.raises(FileError, match=f"process {first.pid} on ") as refused:
                main(stage_args(scenes, 1, tmp_path / "r", *more))
            assert refused.value.path == path and content(tmp_path / "r") == before
        first.kill()
    assert path.exists()
    main(stage_args(scenes, 1, tmp_path / "r", *TWO))
    assert not path.exists()


def test_other_ranks_of_a_job_take_no_lock(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("NODE_RANK", "1")
    with lock(tmp_path / "r" / "stage1" / "lock"):
        main(stage_args(scenes, 1, tmp_path / "r", *TWO))


# ------------------------------------------------------------------ names stay as typed


@pytest.mark.parametrize("name", ["007", "1e3", "null", "no", "2024-01-01", "0x1F"])
def test_names_that_yaml_reads_as_something_else_stay_as_typed(tmp_path, monkeypatch, name):
    monkeypatch.setattr(StairCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(StairCLI, "instantiate_classes", lambda self: None)
    monkeypatch.chdir(tmp_path)
    line = stage_args(
        tmp_path, 1, name, "--data.train", f"{{{name}: a.tar}}", "--data.val", f"{{{name}: v.tar, other: w.tar}}"
    )
    (tmp_path / "small.yaml").write_text(SMALL)
    config = main(line).config.fit
    assert (
        config.run == name and config.data.val == {name: "v.tar", "other": "w.tar"} and [*config.data.train] == [name]
    )
    assert main([*line, "--data.train", "{no: a.tar, off: b.tar}"]).config.fit.data.train.keys() == {"no", "off"}
    (tmp_path / "small.yaml").write_text(f"{SMALL}\nrun: {name}\n")
    at = line.index("--run")
    if name == "2024-01-01" or name == "null":
        assert main(line[:at] + line[at + 2 :]).config.fit.run == (None if name == "null" else name)
        return
    with pytest.raises(SystemExit):
        main(line[:at] + line[at + 2 :])

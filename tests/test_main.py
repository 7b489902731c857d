"""What the command adds to Lightning's: the training's record stays as it is, and checkpoints come without validations."""

import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
from tests.conftest import write_small_scenes
from tests.test_stages import SMALL, start, weights, words


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_small_scenes(tmp_path_factory.mktemp("scenes"), SMALL)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run of stage 1."""
    run = tmp_path_factory.mktemp("runs") / "r"
    main.main(words(scenes, 1, run))
    return run


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scalars(folder):
    log = EventAccumulator(str(folder))
    log.Reload()
    return {tag: log.Scalars(tag)[-1].value for tag in log.Tags()["scalars"]}


# ------------------------------------------------------------------ the record of a training


@pytest.mark.parametrize("command", ["validate", "test"])
def test_what_does_not_train_leaves_the_record_of_the_training_as_it_is(finished, scenes, command):
    home = finished / "stage1"
    before = content(home)
    assert {Path("tensorboard/config.yaml"), Path("tensorboard/checkpoints/last.ckpt")} <= before.keys()
    more = ("--data.test", f"{{scenes: {scenes}/val-*.tar}}") if command == "test" else ()
    main.main(words(scenes, 1, finished, *more, subcommand=command))
    after = content(home)
    assert all(after[path] == kept for path, kept in before.items())
    assert {path.parts[0] for path in after.keys() - before.keys()} <= {"validate", "test"}
    prefix = "val" if command == "validate" else "test"
    assert 0 <= scalars(home / command)[f"{prefix}/scenes/t2i/recall@5"] <= 1
    settings = yaml.safe_load((home / command / f"{command}.yaml").read_text())
    assert settings["data"]["val"] and settings["trainer"]["default_root_dir"] == str(home)


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_is_looked_for_where_the_training_keeps_it(finished, scenes, which, capfd):
    checkpoint = finished / "stage1" / "tensorboard" / "checkpoints" / f"{which}.ckpt"
    cli = main.main(words(scenes, 1, finished, "--ckpt_path", which, subcommand="validate"))
    assert Path(cli.trainer.ckpt_path) == checkpoint
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], weight) for name, weight in cli.model.state_dict().items())
    said = capfd.readouterr()
    assert "dirpath has changed" not in said.out + said.err
    if which == "last":
        tag = "val/scenes/t2i/median_rank"
        assert scalars(finished / "stage1" / "validate")[tag] == scalars(checkpoint.parents[1])[tag]


def test_a_best_checkpoint_that_is_not_there_is_told_with_its_path(scenes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stage1/tensorboard/checkpoints/best\.ckpt"):
        main.main(words(scenes, 1, tmp_path / "r", "--ckpt_path", "best", subcommand="validate"))


def test_a_last_checkpoint_that_is_not_there_is_not_measured_as_fresh_weights(scenes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no last\.ckpt in .*r/stage1/tensorboard/.*checkpoints"):
        main.main(words(scenes, 1, tmp_path / "r", "--ckpt_path", "last", subcommand="validate"))


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ([], "stage1/predict"),
        (["--trainer.logger.init_args.name", "mine"], "stage1/mine"),
        (["--trainer.logger", "CSVLogger"], "stage1/predict"),
        (["--trainer.logger", "false"], "stage1"),
    ],
)
def test_a_logger_that_the_user_named_keeps_its_name(scenes, monkeypatch, more, wanted):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = main.main(words(scenes, 1, Path("runs/x"), *more, subcommand="predict"))
    assert Path(cli.trainer.log_dir) == Path("runs/x", wanted)


def test_without_a_run_a_validation_has_a_folder_of_its_own_too(scenes, monkeypatch):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    line = words(scenes, 1, "", subcommand="validate")
    at = line.index("--run")
    cli = main.main([*line[:at], *line[at + 2 :], "--transition.start_from", "mine/stage1/stair"])
    assert Path(cli.trainer.log_dir) == Path("runs/default/validate")
    assert cli.trainer.checkpoint_callback.dirpath == "runs/default/tensorboard/checkpoints"


# ------------------------------------------------------------------ without validations


def without_val(line):
    at = line.index("--data.val")
    return line[:at] + line[at + 2 :]


@pytest.mark.slow
def test_a_run_without_validations_that_is_killed_goes_on_from_its_last_checkpoint(scenes, tmp_path):
    more = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(without_val(words(scenes, 1, killed, *more)))
    checkpoint = killed / "stage1" / "tensorboard" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output[-2000:]
    assert output.count("nothing chooses a best checkpoint; last.ckpt is written every 3 steps") == 1
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 3 <= steps < 40 and steps % 3 == 0
    resumed = main.main(without_val(words(scenes, 1, killed, *more, "--ckpt_path", "last")))
    assert Path(resumed.trainer.ckpt_path) == checkpoint
    main.main(without_val(words(scenes, 1, whole, *more)))
    assert [path.name for path in (whole / "stage1" / "tensorboard" / "checkpoints").iterdir()] == ["last.ckpt"]
    for (name, a), b in zip(weights(killed, 1).items(), weights(whole, 1).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("more", "seen"),
    [
        ([], {"every_n_train_steps": 2}),
        (["--trainer.val_check_interval", "0.5"], {"save_on_train_epoch_end": True}),
        (["--trainer.val_check_interval", "00:01:00:00"], {"train_time_interval": timedelta(minutes=15)}),
        (["--trainer.callbacks.every_n_epochs", "2"], {"every_n_epochs": 2}),
    ],
)
def test_only_a_checkpoint_without_a_time_of_its_own_is_given_one(scenes, tmp_path, monkeypatch, more, seen):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    keepers = tmp_path / "callbacks.yaml"
    keepers.write_text("trainer: {check_val_every_n_epoch: 1, callbacks: [ModelCheckpoint]}\n")
    line = without_val(words(scenes, 1, tmp_path / "r", "--config", str(keepers), *more))
    cli = main.main(line)
    (options,) = (callback.init_args for callback in cli.config.fit.trainer.callbacks)
    assert {key: options[key] for key in main._TIMES if options[key] is not None} == seen
    cli._parser("fit").save(cli.config.fit, str(tmp_path / "config.yaml"), skip_none=False)


def test_a_run_with_validations_keeps_their_times(scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    for more, wanted in ([], None), (["--trainer.limit_val_batches", "0"], 2):
        cli = main.main(words(scenes, 1, tmp_path / "r", *more))
        best, last, _ = (callback.init_args for callback in cli.config.fit.trainer.callbacks)
        assert best.every_n_train_steps is None and last.every_n_train_steps == wanted

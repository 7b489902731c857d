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
from callbacks.checkpoints import LastCheckpoint
from stair.errors import FileError, SettingError
from tests.support.runs import stage_args, start, weights


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run of stage 1."""
    run = tmp_path_factory.mktemp("runs") / "r"
    main.main(stage_args(scenes, 1, run))
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
    assert {Path("config.yaml"), Path("checkpoints/last.ckpt")} <= before.keys()
    more = ("--data.test", f"{{scenes: {scenes}/val-*.tar}}") if command == "test" else ()
    main.main(stage_args(scenes, 1, finished, *more, subcommand=command))
    after = content(home)
    assert all(after[path] == kept for path, kept in before.items())
    assert {path.parts[0] for path in after.keys() - before.keys()} <= {"validate", "test"}
    prefix = "val" if command == "validate" else "test"
    assert 0 <= scalars(home / command)[f"{prefix}/scenes/t2i/recall@5"] <= 1
    settings = yaml.safe_load((home / command / f"{command}.yaml").read_text())
    assert settings["data"]["val"] and settings["run"] == str(finished)


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_is_looked_for_where_the_training_keeps_it(finished, scenes, which):
    checkpoint = finished / "stage1" / "checkpoints" / f"{which}.ckpt"
    cli = main.main(stage_args(scenes, 1, finished, "--ckpt_path", which, subcommand="validate"))
    assert Path(cli.trainer.ckpt_path) == checkpoint
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], weight) for name, weight in cli.model.state_dict().items())
    if which == "last":
        tag = "val/scenes/t2i/median_rank"
        assert scalars(finished / "stage1" / "validate")[tag] == scalars(checkpoint.parents[1] / "tensorboard")[tag]


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_checkpoint_that_is_not_there_is_not_measured_as_fresh_weights(scenes, tmp_path, which):
    with pytest.raises(FileError) as refused:
        main.main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", which, subcommand="validate"))
    assert refused.value.path == tmp_path / "r" / "stage1" / "checkpoints" / f"{which}.ckpt"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], "stage1/predict"),
        (["--trainer.logger.init_args.name", "mine"], "stage1/mine"),
        (["--trainer.logger", "CSVLogger"], "stage1/predict"),
        (["--trainer.logger", "false"], "stage1"),
    ],
)
@pytest.mark.filterwarnings("ignore:predict writes nothing")
def test_a_logger_that_the_user_named_keeps_its_name(scenes, monkeypatch, more, expected):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    more = (*more, "--data.test", "{t: t.tar}")
    cli = main.main(stage_args(scenes, 1, Path("runs/x"), *more, subcommand="predict"))
    assert Path(cli.trainer.log_dir) == Path("runs/x", expected)


def test_without_a_run_a_validation_has_a_folder_of_its_own_too(scenes, monkeypatch):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    line = stage_args(scenes, 1, "", subcommand="validate")
    at = line.index("--run")
    cli = main.main([*line[:at], *line[at + 2 :], "--transition.init_from", "mine/stage1/stair"])
    assert Path(cli.trainer.log_dir) == Path("runs/default/validate")
    assert cli.trainer.default_root_dir == "runs/default"


# ------------------------------------------------------------------ without validations


def without_val(line):
    at = line.index("--data.val")
    return line[:at] + line[at + 2 :]


@pytest.mark.slow
def test_a_run_without_validations_that_is_killed_goes_on_from_its_last_checkpoint(scenes, tmp_path):
    more = ["--trainer.max_steps", "40", "--trainer.val_check_interval", "3"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(without_val(stage_args(scenes, 1, killed, *more)))
    checkpoint = killed / "stage1" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output[-2000:]
    assert output.count("last.ckpt is written every 3 steps") == 1
    steps = torch.load(checkpoint, weights_only=True)["global_step"]
    assert 0 <= steps < 40 and steps % 3 == 0
    resumed = main.main(without_val(stage_args(scenes, 1, killed, *more, "--ckpt_path", "last")))
    assert Path(resumed.trainer.ckpt_path) == checkpoint
    main.main(without_val(stage_args(scenes, 1, whole, *more)))
    assert [path.name for path in (whole / "stage1" / "checkpoints").iterdir()] == ["last.ckpt"]
    for (name, a), b in zip(weights(killed, 1).items(), weights(whole, 1).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("more", "steps", "seconds", "epoch_end"),
    [
        ((), 2, None, None),
        (("--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "0.5"), 0, None, True),
        (("--trainer.val_check_interval", "00:01:00:00"), 0, 3600, None),
    ],
)
def test_without_validations_last_ckpt_is_written_where_they_would_be(
    scenes, tmp_path, monkeypatch, more, steps, seconds, epoch_end
):
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    line = stage_args(scenes, 1, tmp_path / "r", *more)
    for nothing in (without_val(line), [*line, "--trainer.limit_val_batches", "0"]):
        cli = main.main(nothing)
        cli.trainer._data_connector.attach_data(cli.model, datamodule=cli.datamodule)
        (last,) = (each for each in cli.trainer.callbacks if isinstance(each, LastCheckpoint))
        last.setup(cli.trainer, cli.model, "fit")
        assert last._every_n_train_steps == steps and last._save_on_train_epoch_end == epoch_end
        assert last._train_time_interval == (seconds and timedelta(seconds=seconds))


def test_help_of_training_shows_our_settings_before_those_of_the_trainer(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["fit", "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n  {name} ") for name in ("--run", "--data.train", "--transition.init_from")]
    assert ended.value.code == 0 and text.startswith("usage: ") and "--trainer.max_steps" not in text[: max(places)]
    assert text.index("--trainer.max_steps") > max(places)


def test_options_that_replace_those_of_an_earlier_file_are_named_where_some_are_left_out(scenes, tmp_path, caplog):
    (tmp_path / "mine.yaml").write_text("model: {init_args: {stair: {text: {options: {num_hidden_layers: 2}}}}}")
    (tmp_path / "all.yaml").write_text(
        "model: {init_args: {stair: {image: {name: vit_tiny_patch16_224, options: {}}}}}"
    )
    overlays = ("--config", str(tmp_path / "mine.yaml"), "--config", str(tmp_path / "all.yaml"))
    args = stage_args(scenes, 1, tmp_path / "r", *overlays, "--trainer.limit_train_batches=0")
    with pytest.raises(SettingError):  # no batch: ends before the first step
        main.main(args)
    named = [each for each in caplog.messages if ".options is" in each]
    assert (
        len(named) == 1 and "stair.text.options" in named[0] and "hidden_size" in named[0] and "tiny.yaml" in named[0]
    )

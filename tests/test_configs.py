"""Every settings file reads through the command line, alone and with each overlay, and mistakes are refused.

The real recipe is only parsed: building it would fetch published weights. The same road builds the small towers.
"""

import itertools
import os
import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace

import main
from training.settings import report_defaults

CONFIGS = Path(main.__file__).parent / "configs"
STAGES = (1, 2, 3)
SHARDS = "--data.train=shards/{0000..0009}.tar"


def files(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]


def overlays() -> list[str]:
    """Everything but the stages themselves and what is laid over one stage."""
    names = (str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("*.yaml"))
    return sorted(name for name in names if name not in ("base", "clip") and "stage" not in name)


def of_one_stage() -> list[tuple[int, str]]:
    """Overlays of one stage, `demo/stage2` of stage 2."""
    found = [(k, path) for k in STAGES for path in CONFIGS.glob(f"*/stage{k}.yaml")]
    return [(k, str(path.relative_to(CONFIGS).with_suffix(""))) for k, path in found]


@pytest.fixture
def parsed(capsys: pytest.CaptureFixture[str]):
    """Resolves a command line to its settings, without building anything."""

    def parse(*args: str) -> dict:
        with pytest.raises(SystemExit) as end:
            main.main(["fit", *args, "--print_config"])
        out, err = capsys.readouterr()
        assert end.value.code == 0, err
        return yaml.safe_load(out)

    return parse


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vocab_file: Path):
    """Builds all classes of a command line of small towers, and stops where training would begin."""
    monkeypatch.setattr(main.StairCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.chdir(tmp_path)

    def build(*args: str) -> main.StairCLI:
        small = ["--model.init_args.stair.vocabulary", str(vocab_file), "--data.workers=0", SHARDS]
        return main.main(["fit", *args, *small])

    return build


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_needs_no_file_but_its_own(parsed, stage: int):
    settings = parsed(*files(f"stage{stage}"), SHARDS)
    assert settings["model"]["class_path"] == f"lightning_modules.Stage{stage}"
    towers = settings["model"]["init_args"]["stair"]
    assert towers["vocabulary"] == towers["text"]["name"] == "bert-base-uncased"
    assert towers["image"]["name"].startswith("vit_base_patch16_224") and towers["image"]["pretrained"]
    assert settings["trainer"]["max_steps"] > settings["model"]["init_args"]["optimizer"]["warmup_steps"]
    assert settings["seed_everything"] == 0  # of base.yaml, which nobody has to name


@pytest.mark.parametrize("overlay", overlays())
@pytest.mark.parametrize("stage", STAGES)
def test_every_overlay_goes_over_every_stage(parsed, stage: int, overlay: str):
    settings = parsed(*files(f"stage{stage}", overlay), SHARDS)
    assert settings["model"]["class_path"] == f"lightning_modules.Stage{stage}"
    assert settings["model"]["init_args"]["optimizer"]["name"] == "adamw"  # what the overlay does not name stays


@pytest.mark.parametrize("overlay", overlays())
def test_every_overlay_goes_over_the_dense_baseline(parsed, overlay: str):
    settings = parsed(*files("clip", overlay), SHARDS)
    assert settings["model"]["class_path"] == "lightning_modules.Clip"
    assert settings["model"]["init_args"]["width"] == 512 and settings["model"]["init_args"]["pooling"] == "mean"
    assert len((CONFIGS / "clip.yaml").read_text().splitlines()) <= 25


@pytest.mark.parametrize(("stage", "overlay"), of_one_stage())
def test_an_overlay_of_one_stage_goes_over_that_stage(parsed, stage: int, overlay: str):
    settings = parsed(*files(f"stage{stage}", "model/tiny", overlay), SHARDS)
    assert settings["trainer"]["max_steps"] > settings["model"]["init_args"]["optimizer"]["warmup_steps"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_papers_form_is_an_overlay_of_each_stage(parsed, stage: int):
    def objective(*more: str) -> dict:
        return parsed(*files(f"stage{stage}", *more), SHARDS)["model"]["init_args"]["objective"]

    ours, papers = objective(), objective(f"paper/stage{stage}")
    assert (ours["masked_loss_weight"], ours["similarity"]) == (0.25, "cosine")
    # no share given: the text is masked in stage 1 and whole in stages 2 and 3
    assert papers["masked_loss_weight"] is None and papers["flops_text_form"] == ("masked" if stage == 1 else None)
    assert papers["similarity"] == ("cosine" if stage == 3 else "dot")
    if stage != 2:
        assert (ours["negative_slope"], papers["negative_slope"]) == (0.3, 0.0)


@pytest.mark.parametrize("setting", ["flops_image", "target_image", "negative_slope"])
def test_stage_2_has_no_settings_of_the_image_side_that_it_freezes(setting, capsys):
    with pytest.raises(SystemExit) as end:
        main.main(["fit", *files("stage2"), f"--model.init_args.objective.{setting}=0.1", "--print_config"])
    assert end.value.code == 2 and setting in capsys.readouterr().err


def test_the_recipe_of_pretrained_towers_has_a_margin_and_what_trains_from_scratch_states_its_own(parsed):
    for stage in STAGES:
        margins = [
            parsed(*files(f"stage{stage}", *more), SHARDS)["model"]["init_args"]["stair"]["in_caption_margin"]
            for more in (
                [],
                [f"paper/stage{stage}"],
                ["small/base"],
                ["model/tiny"],
                ["model/tiny", f"scratch/stage{stage}"],
            )
        ]
        assert margins == [3.0, 0.0, 0.0, 0.0, 0.45]


@pytest.mark.parametrize("form", ["", "paper/"])
def test_three_stages_take_as_many_steps_as_the_dense_baseline(parsed, form: str):
    runs = [parsed(*files(f"stage{k}", *([f"{form}stage{k}"] if form else [])), SHARDS) for k in STAGES]
    dense = parsed(*files("clip"), SHARDS)
    assert sum(run["trainer"]["max_steps"] for run in runs) == dense["trainer"]["max_steps"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_demo_validates_the_weights_it_hands_over(parsed, stage: int):
    trainer = parsed(*files(f"stage{stage}", f"paper/stage{stage}", "model/tiny", "demo/scenes", f"demo/stage{stage}"))[
        "trainer"
    ]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0


@pytest.mark.parametrize("stage", STAGES)
def test_stages_build_with_settings_that_agree_everywhere(built, stage: int):
    cli = built(*files(f"stage{stage}", "model/tiny"), "--run", "runs/x")
    assert cli.model.stage == stage
    assert cli.datamodule.augment.size == cli.model.stair.config.image.image_size == 64
    assert cli.datamodule.collate.max_tokens == cli.model.stair.config.text.max_tokens
    assert cli.datamodule.collate.vocabulary.fingerprint == cli.model.stair.vocabulary.fingerprint


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_has_a_folder_for_each_stage_and_starts_from_the_one_before(built, stage: int):
    cli = built(*files(f"stage{stage}", "model/tiny"), "--run", "runs/x")
    assert cli.trainer.default_root_dir == f"runs/x/stage{stage}"
    assert Path(cli.trainer.logger.log_dir) == Path(f"runs/x/stage{stage}/tensorboard")
    transition = next(c for c in cli.trainer.callbacks if type(c).__name__ == "StageTransition")
    assert transition.init_from == (None if stage == 1 else f"runs/x/stage{stage - 1}/stair")


@pytest.mark.parametrize(
    "wrong", ["--model.init_args.objective.flops_imagine=1", "--data.trian=x", "--trainer.maximum_steps=3", "--rum=x"]
)
def test_an_unknown_setting_is_refused_by_name(capsys: pytest.CaptureFixture[str], wrong: str):
    with pytest.raises(SystemExit) as end:
        main.main(["fit", *files("stage1"), wrong, "--print_config"])
    assert end.value.code != 0
    assert wrong.split("=")[0].split(".")[-1].strip("-") in capsys.readouterr().err


def test_an_unknown_key_in_a_file_is_refused_by_name(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model:\n  init_args:\n    objective: {flops_imagine: 1.0}\n")
    with pytest.raises(SystemExit) as end:
        main.main(["fit", *files("stage1"), "--config", str(overlay), "--print_config"])
    assert end.value.code != 0
    assert "flops_imagine" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "data").glob("*.yaml")))
def test_data_files_follow_the_folder_named_by_the_environment(parsed, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv("STAIR_SHARED_DATA", os.path.join("elsewhere", "sets"))
    elsewhere = parsed(*files("stage1", f"data/{name}"))
    monkeypatch.delenv("STAIR_SHARED_DATA")
    near = parsed(*files("stage1", f"data/{name}"))
    for settings, folder in ((elsewhere, "elsewhere/sets/"), (near, "../shared/data/")):
        places = [settings["data"]["train"], *settings["data"]["val"].values()]
        assert all(place.startswith(folder) for place in places)


def test_no_settings_file_names_a_place_on_one_machine():
    for path in CONFIGS.rglob("*.yaml"):
        assert not any(word in path.read_text() for word in ("/home/", "/mnt/", "/data/stair")), path


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_settings_file_opens_with_its_command_and_what_was_measured(path: Path):
    opening = " ".join(itertools.takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))
    assert re.search("lightning fit|make demo|small_runs.sh|Command", opening)
    assert path.stem == "base" or re.search(r"not measured|R@1|[Rr]ecall", opening)
    figures = re.findall(r"\d+ min(?:utes)?(?: \d+ s)?|\d+\.\d+(?= %)", opening)
    record = re.search(r"benchmarks/results/[\w-]+\.md", opening)
    measured = (CONFIGS.parent / record[0]).read_text() if record else ""
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){figure}(?![\d.])", measured)] == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_file_holds_only_what_differs(stage: int):
    assert len((CONFIGS / f"stage{stage}.yaml").read_text().splitlines()) <= 25


def test_options_that_a_later_file_drops_are_named_whatever_else_the_parser_accepts_in_files(tmp_path, monkeypatch):
    def file(name, image, rest=""):
        (tmp_path / name).write_text(f"model: {{init_args: {{stair: {{image: {image}}}}}}}\n{rest}")
        return tmp_path / name

    paths = [
        file("a.yaml", "{name: vit, options: {depth: 2, width: 3}}", "run: x\nrun: y\n"),  # a key that comes twice
        file("b.yaml", "{options: {depth: 4}, image_size: '${data.image_size}'}", "trainer: {now: 2026-11-30}\n"),
    ]
    said = []
    monkeypatch.setattr("training.settings.rank_zero_info", said.append)
    sides = {side: Namespace(name="vit", options={"depth": 4}) for side in ("image", "text")}
    config = Namespace(config=paths, model=Namespace(init_args=Namespace(stair=Namespace(**sides))))
    report_defaults(config)
    (line,) = said
    assert line.startswith("stair.image.options") and "a.yaml" in line and "width" in line

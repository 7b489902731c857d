"""The three stages through the command line: one after the other, taking over, handing over, resuming, on two ranks."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_modules import Stage1, Stage2, Stage3
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.optimizer import Optimizer
from lightning_modules.stage import Objective
from main import main
from stair import Stair
from stair.errors import FileError, SettingError, StairError
from stair.towers import read_description
from tests.support.models import IMAGE_TOWERS, tiny_config
from tests.support.runs import scalars, stage_args, start, weights


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run of all three stages."""
    run = tmp_path_factory.mktemp("runs") / "r"
    for stage in (1, 2, 3):
        main(stage_args(scenes, stage, run))
    return run


def test_three_stages_log_what_people_watch(finished):
    for stage in (1, 2, 3):
        seen = scalars(finished, stage)
        for way in ("t2i", "i2t"):
            assert all(0 <= seen[f"val/scenes/{way}/recall@{k}"][-1] <= 1 for k in (1, 5, 10))
        expected = {"train/contrastive", "train/flops_image", "train/lambda_text", "train/scale", "val/recall"}
        assert expected <= seen.keys() and any(tag.startswith("lr-") for tag in seen)
        assert {
            "val/scenes/sparsity/image/active_terms",
            "val/scenes/grounding@10",
            "run/pairs_per_second",
        } <= seen.keys()


def test_lambda_rises_quadratically_with_the_step(finished):
    # 2 ramp steps towards 1e-2: steps 0, 1, 2, 3
    assert scalars(finished, 1)["train/lambda_image"] == pytest.approx([0, 2.5e-3, 1e-2, 1e-2])


def test_stage_2_leaves_the_image_side_bitwise_unchanged_while_text_moves(finished):
    before, after = weights(finished, 1), weights(finished, 2)
    image = [name for name in before if name.startswith("image_")]
    text = [name for name in before if name.startswith("text_head.")]
    assert image and all(torch.equal(before[name], after[name]) for name in image)
    assert text and all(not torch.equal(before[name], after[name]) for name in text)


def test_stage_3_moves_both_sides(finished):
    before, after = weights(finished, 2), weights(finished, 3)
    assert all(not torch.equal(before[n], after[n]) for n in ("image_head.dense.weight", "text_head.dense.weight"))


def test_the_release_can_be_loaded_and_asked(finished):
    model = Stair.from_pretrained(finished / "stage3" / "stair")
    assert model.config.similarity == "cosine" and model.config.text_form == "full"
    text = model.encode_text(["a red circle", "two boats"])
    image = model.encode_image(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert model.score(image, text).shape == (3, 2)


def test_validate_needs_no_training_data_as_the_readme_says(finished, scenes):
    line = stage_args(scenes, 3, finished, subcommand="validate")
    place = line.index("--data.train")
    assert main(line[:place] + line[place + 2 :]).trainer.callback_metrics["val/recall"] >= 0
    with pytest.raises(SettingError) as refused:
        main([word for word in stage_args(scenes, 1, finished / "new") if word not in line[place : place + 2]])
    assert refused.value.setting == "data.train"


def test_validate_gives_the_recall_that_was_logged_at_the_export(finished, scenes):
    cli = main(stage_args(scenes, 3, finished, subcommand="validate"))
    got = cli.trainer.callback_metrics
    seen = scalars(finished, 3)
    for tag in ("val/scenes/t2i/recall@5", "val/scenes/i2t/recall@10", "val/scenes/t2i/median_rank"):
        assert float(got[tag]) == pytest.approx(seen[tag][-1])


def test_the_settings_that_a_training_saved_measure_its_own_stage(finished, scenes):
    saved = finished / "stage3" / "config.yaml"
    got = main(["validate", "--config", str(saved)]).trainer.callback_metrics
    assert float(got["val/recall"]) == pytest.approx(scalars(finished, 3)["val/recall"][-1])
    other = ("--transition.init_from", str(finished / "stage2" / "stair"))  # as settings saved before say
    with pytest.raises(FileError, match=r"configs/stage2\.yaml") as refused:
        main(["validate", "--config", str(saved), *other])
    assert refused.value.path == finished / "stage2" / "stair"


@pytest.mark.filterwarnings("ignore:predict writes nothing")
def test_predict_gives_the_embeddings_of_every_test_image_once(finished, scenes):
    cli = main(stage_args(scenes, 3, finished, "--data.test", f"{{t: {scenes}/val-*.tar}}", subcommand="predict"))
    out = cli.trainer.predict_loop.predictions
    ids = torch.cat([batch["image_id"] for batch in out])
    assert sorted(ids[ids >= 0].tolist()) == list(range(12))


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("stage", "more", "at_fault"),
    [
        (3, ["--transition.init_from", "{run}/stage1/stair"], Path("stage1/stair")),
        (2, ["--transition.init_from", "{run}/nowhere"], Path("nowhere")),
        (1, ["--transition.init_from", "{run}/stage1/stair"], "transition.init_from"),
        (2, ["--model.init_args.stair.image.options.depth", "2"], Path("stage1/stair")),
        (2, ["--model.init_args.stair.in_caption_margin", "1"], Path("stage1/stair")),
        (2, ["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches"),
        (2, ["--trainer.sync_batchnorm", "true"], "trainer.sync_batchnorm"),
        (2, ["--model.init_args.optimizer.warmup_steps", "9"], "optimizer.warmup_steps"),
        (2, ["--data.global_batch_size", "1000"], "data.global_batch_size"),
        (2, ["--model.init_args.objective.similarity", "dot"], "objective.scale_start"),
    ],
)
def test_what_cannot_train_is_refused_before_the_first_step(finished, scenes, stage, more, at_fault, tmp_path):
    more = [word.format(run=finished) for word in more]
    if "--transition.init_from" not in more:
        more += ["--transition.init_from", str(finished / f"stage{stage - 1}" / "stair")]
    with pytest.raises(StairError) as refused:
        main(stage_args(scenes, stage, tmp_path / "new", *more))
    if isinstance(at_fault, Path):
        assert refused.value.path == finished / at_fault
    else:
        assert refused.value.setting == at_fault


def test_strategies_that_would_train_something_else_are_refused():
    # not through the command line: this strategy leaves a process group behind, and the next test's ranks would wait for it
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(), precision="32-true")
    with pytest.raises(SettingError, match="fsdp2") as refused:
        ContrastiveModule.setup(SimpleNamespace(trainer=trainer), "fit")
    assert refused.value.setting == "trainer.strategy"


def test_a_training_that_is_there_is_not_written_over(finished, scenes, tmp_path):
    def content():
        return {path: path.read_bytes() for path in tmp_path.glob("r/**/*") if path.is_file()}

    shutil.copytree(finished, tmp_path / "r")
    before = content()
    with pytest.raises(FileError):
        main(stage_args(scenes, 1, tmp_path / "r"))
    for dry in ([], ["--model.init_args.optimizer.warmup_steps", "99"]):
        main(stage_args(scenes, 1, tmp_path / "r", "--trainer.fast_dev_run", "2", *dry))
    assert content() == before


def test_a_cpu_recomputes_in_half_precision_too(scenes, tmp_path):
    more = ("--trainer.precision", "bf16-mixed", "--model.init_args.recompute", "true", "--trainer.max_steps", "2")
    assert main(stage_args(scenes, 1, tmp_path / "r", *more)).trainer.global_step == 2


def test_another_vocabulary_is_refused_naming_both(finished, scenes, tmp_path):
    lines = (scenes / "vocab.txt").read_text().splitlines()
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]) + "\n")
    start = ("--transition.init_from", str(finished / "stage1" / "stair"))
    with pytest.raises(FileError, match=r"vocabulary: .* there, .* here") as refused:
        main(stage_args(scenes, 2, tmp_path / "new", "--model.init_args.stair.vocabulary", str(other), *start))
    assert refused.value.path == finished / "stage1" / "stair"


def test_a_stage_that_begins_from_nothing_has_no_scale_to_keep(scenes, tmp_path):
    alone = stage_args(scenes, 3, tmp_path / "new", "--transition.init_stage", "0")
    with pytest.raises(SettingError, match=r"14\.3") as refused:
        main(alone)
    assert refused.value.setting == "objective.scale_start"
    main([*alone, "--model.init_args.objective.scale_start", "14.3", "--trainer.max_steps", "2"])
    assert (tmp_path / "new" / "stage3" / "stair").is_dir()


def test_after_a_hard_mask_own_words_may_lead_by_more(scenes, tmp_path):
    (tmp_path / "hard.yaml").write_text("model: {init_args: {objective: {masked_loss_weight: null}}}")
    main(stage_args(scenes, 1, tmp_path / "r", "--config", str(tmp_path / "hard.yaml")))
    main(stage_args(scenes, 2, tmp_path / "r", "--model.init_args.stair.in_caption_margin", "1"))
    assert Stair.from_pretrained(tmp_path / "r" / "stage2" / "stair").config.in_caption_margin == 1


@pytest.mark.parametrize("more", [[], ["--ckpt_path", "last"]])
def test_what_was_trained_by_cosine_is_not_measured_by_dot_products(finished, scenes, more):
    dot = ("--model.init_args.objective.similarity", "dot", "--model.init_args.objective.scale_start", "1")
    with pytest.raises(StairError, match="similarity: cosine there, dot here"):
        main(stage_args(scenes, 3, finished, *more, *dot, subcommand="validate"))


@pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
def test_weights_as_they_start_are_not_measured(scenes, subcommand):
    line = stage_args(scenes, 3, "r", subcommand=subcommand)
    at = line.index("--run")
    with pytest.raises(SettingError) as refused:
        main(line[:at] + line[at + 2 :])
    assert refused.value.setting == "run"


def test_evaluation_sets_may_have_any_name(finished, scenes):
    sets = ", ".join(f"{name}: {scenes}/val-*.tar" for name in ("train", "type", "coco.val"))
    cli = main(stage_args(scenes, 3, finished, "--data.val", f"{{{sets}}}", subcommand="validate"))
    got = cli.trainer.callback_metrics
    assert got["val/train/t2i/recall@5"] == got["val/coco.val/t2i/recall@5"] == got["val/type/t2i/recall@5"]


class PushesScale(L.Callback):
    """Sees to it that the scale wants to rise, and that nobody who saves after a step sees it above 100."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pl_module.stair.log_scale.grad = -torch.ones(1)

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.scales = [*getattr(trainer, "scales", []), float(pl_module.stair.scale.detach())]


@pytest.mark.filterwarnings("ignore:the first batch's logits")
def test_the_scale_is_held_at_100_before_anything_saves_it(scenes, tmp_path):
    more = ("--model.init_args.objective.scale_start", "99.9", "--model.init_args.optimizer.lr", "0.01")
    cli = main(stage_args(scenes, 1, tmp_path / "r", *more, "--trainer.callbacks+", "tests.test_stages.PushesScale"))
    assert (
        len(cli.trainer.scales) == 4
        and cli.trainer.scales[-1] == pytest.approx(100)
        and max(cli.trainer.scales) < 100.01
    )


def test_stage_2_without_a_stage_1_says_what_to_give(scenes, tmp_path):
    with pytest.raises(FileError) as refused:
        main(stage_args(scenes, 2, tmp_path / "new"))
    assert refused.value.path == tmp_path / "new" / "stage1" / "stair"


def test_a_stage_stopped_before_its_planned_end_hands_nothing_over(scenes, tmp_path):
    with pytest.raises(StairError, match="max_time"):
        main(stage_args(scenes, 1, tmp_path / "r", "--trainer.max_steps", "5000", "--trainer.max_time", "00:00:00:02"))
    assert not (tmp_path / "r" / "stage1" / "stair").exists()
    saved = torch.load(tmp_path / "r" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0


@pytest.mark.parametrize("then", ["export", "fail"])
def test_an_early_stop_is_exported_or_fails(scenes, tmp_path, then):
    early = "{class_path: EarlyStopping, init_args: {monitor: val/recall, mode: max, stopping_threshold: -1}}"
    more = ("--trainer.callbacks", f"[{early}]", "--transition.on_early_stop", then, "--ckpt_path", "last")
    export = tmp_path / "r" / "stage1" / "stair"
    if then == "fail":
        with pytest.raises(StairError, match="EarlyStopping"):
            main(stage_args(scenes, 1, tmp_path / "r", *more))
        assert not export.exists()
        return
    main(stage_args(scenes, 1, tmp_path / "r", *more))
    facts = read_description(export)["training"]
    assert (facts["steps"], facts["planned_steps"], facts["finished"]) == (2, 4, True)
    assert "EarlyStopping" in facts["stopped_by"]
    main(stage_args(scenes, 2, tmp_path / "r", "--trainer.max_steps", "2"))


@pytest.mark.parametrize(
    ("command", "more", "setting"),
    [
        ("test", (), "data.test"),
        ("predict", (), "data.test"),
        ("validate", ("--data.val", "null"), "data.val"),
        ("validate", ("--trainer.limit_val_batches", "0"), "trainer.limit_val_batches"),
        ("fit", ("--trainer.limit_train_batches", "0"), "trainer.limit_train_batches"),
    ],
)
def test_a_command_that_would_do_nothing_is_refused(finished, scenes, tmp_path, command, more, setting):
    run = tmp_path / "r" if command == "fit" else finished
    with pytest.raises(SettingError) as refused:
        main(stage_args(scenes, 1, run, *more, subcommand=command))
    assert refused.value.setting == setting


@pytest.mark.parametrize("setting", ["similarity", "text_form"])
def test_what_a_stage_sets_itself_is_no_setting_of_the_model(scenes, tmp_path, setting, capsys):
    with pytest.raises(SystemExit):
        main(stage_args(scenes, 1, tmp_path / "r", f"--model.init_args.stair.{setting}", "dot"))
    assert setting in capsys.readouterr().err


def test_a_log_file_shows_the_progress_of_a_run(scenes, tmp_path):
    more = ("--trainer.enable_progress_bar", "true", "--trainer.log_every_n_steps", "2")
    process = start(stage_args(scenes, 1, tmp_path / "r", *more))
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output[-2000:]
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert [line.split(" · ")[0] for line in lines] == ["step 2/4", "step 4/4"] and "/-2" not in output
    assert all(part in lines[1] for part in ("loss ", "val/recall ", " pairs/s", "waiting ", " GiB", " left"))


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_resume(scenes, tmp_path):
    more = ("--trainer.max_steps", "5000", "--trainer.val_check_interval", "5000", "--data.workers", "1")
    process = start(stage_args(scenes, 1, tmp_path / "r", *more), start_new_session=True)
    for line in process.stdout:
        if line.startswith("step 1"):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in output, output[-3000:]
    assert "--ckpt_path last" in output
    saved = torch.load(tmp_path / "r" / "stage1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] > 0


# ------------------------------------------------------------------ alarms


class BreaksGradients(L.Callback):
    """From step 3 on a layer of the image tower has no finite gradient, though the loss is."""

    def on_fit_start(self, trainer, pl_module):
        def broken(gradient):
            return gradient * float("inf") if trainer.global_step >= 3 else gradient

        next(pl_module.stair.image_encoder.parameters()).register_hook(broken)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / "before.pt")


@pytest.mark.filterwarnings("ignore:the gradient is not finite at step 5")
def test_gradients_that_are_not_finite_stop_the_run_with_keys_and_the_state_from_before(scenes, tmp_path):
    more = ("--trainer.max_steps", "12", "--health.every", "1", "--health.skip", "2")
    with (
        pytest.warns(UserWarning, match=r"gradient is not finite at step 4; .*Such steps are skipped"),
        pytest.raises(RuntimeError, match=r"at step 6.* of rank 0 .*train-0000.*, in 3 consecutive steps; the state"),
    ):
        main(stage_args(scenes, 1, tmp_path / "r", *more, "--trainer.callbacks+", "tests.test_stages.BreaksGradients"))
    kept = tmp_path / "r" / "stage1" / "checkpoints" / "last.ckpt"
    saved, before = (torch.load(path, weights_only=True) for path in (kept, tmp_path / "r" / "stage1" / "before.pt"))
    assert saved["global_step"] == 6 and saved["state_dict"].keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(saved["state_dict"][name], weight), name
    assert scalars(tmp_path / "r", 1)["health/skipped_steps"] == [0, 0, 0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "steps", "message"),
    [
        (("flops_image", "1e9"), 400, "run is dead"),
        (("scale_start", "1e-3"), 80, "loss has been log N for"),
        (("flops_image", "0"), 530, "of the vocabulary is active"),
    ],
    ids=["all zero", "stuck at log N", "all dense"],
)
@pytest.mark.filterwarnings("ignore:the loss has been log N")
def test_a_collapse_raises_the_alarm_within_a_few_hundred_steps_by_default(scenes, tmp_path, more, steps, message):
    # the caption loss alone would keep terms active
    settings = (("flops_text", "0"), ("caption_loss_weight", "0"), more)
    objective = [part for name, value in settings for part in (f"--model.init_args.objective.{name}", value)]
    lr = "3e-2" if "dead" in message else "1e-9"
    rest = ("--model.init_args.optimizer.lr", lr, "--trainer.max_steps", str(steps), "--data.global_batch_size", "8")
    rest += ("--trainer.val_check_interval", str(steps), "--trainer.log_every_n_steps", "10")
    run = tmp_path / "r"
    if "dead" in message:
        with pytest.raises(RuntimeError, match=message):
            main(stage_args(scenes, 1, run, *objective, *rest))
    else:
        with pytest.warns(UserWarning, match=message):
            main(stage_args(scenes, 1, run, *objective, *rest))
        assert scalars(run, 1)["health/alarm"][0] == 0 and scalars(run, 1)["health/alarm"][-1] == 1


def test_an_objective_that_cannot_train_is_refused():
    for bad in (
        {"scale_start": 0},
        {"scale_start": 101.0},
        {"scale_start": "warm"},
        {"flops_text": -1.0},
        {"masked_loss_weight": 1.5},
        {"negative_slope": -0.1},
        {"negative_slope": 1.5},
        {"negative_slope": 0.0, "caption_loss_weight": 1.0},
        {"caption_loss_weight": -1.0},
        {"target_text": 0.0},
        {"image_budgets": [0, 8]},
        {"image_budgets": [9, 8]},
        {"image_budgets": [8]},
    ):
        with pytest.raises(SettingError) as refused:
            Objective(**bad)
        assert refused.value.setting == f"objective.{next(iter(bad))}"


def test_with_image_budgets_half_of_the_steps_compare_only_the_heaviest_terms_of_images(vocab_file, batch):
    def step(budgets, number):
        objective = Objective("dot", scale_start=2.0, masked_loss_weight=0.0, image_budgets=budgets)
        stage = module(vocab_file, None, Stage3, objective=objective)
        stage._trainer, stage.log_dict = SimpleNamespace(global_step=number), lambda *args, **kwargs: None
        return stage.training_step(batch, 0), stage.stair.scale.detach()

    whole, scale = step(None, 0)
    image_BV, text_BV = whole["image_BV"].detach(), whole["text_CV"].detach()
    expected = {}
    for k in (2, 3, 4, image_BV.shape[1]):
        kept_BV = torch.zeros_like(image_BV)
        for b, row_V in enumerate(image_BV):
            for v in sorted(range(len(row_V)), key=lambda v: -row_V[v])[:k]:
                kept_BV[b, v] = row_V[v]
        logits_BC, pair = scale * kept_BV @ text_BV.T, torch.arange(len(image_BV))
        entropy = torch.nn.functional.cross_entropy
        expected[k] = float(entropy(logits_BC, pair) + entropy(logits_BC.T, pair)) / 2
    drawn = []
    for number in range(30):
        got, _ = step([2, 4], number)
        assert got["flops_image"] == whole["flops_image"]
        drawn += [k for k, value in expected.items() if float(got["contrastive"]) == pytest.approx(value, rel=1e-5)]
    assert len(drawn) == 30 and set(drawn) == set(expected) and 8 <= drawn.count(image_BV.shape[1]) <= 22
    assert step([2, 4], 5)[0]["contrastive"] == step([2, 4], 5)[0]["contrastive"]


@pytest.mark.parametrize("cls, share", [(Stage1, 0.0), (Stage3, 1.0)])
def test_a_share_of_own_words_that_makes_a_stage_another_one_is_refused(vocab_file, cls, share):
    with pytest.raises(SettingError) as refused:
        module(vocab_file, None, cls, objective=Objective(masked_loss_weight=share))
    assert refused.value.setting == "objective.masked_loss_weight"


@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_a_share_of_own_words_mixes_the_loss_of_the_whole_text_with_that_of_its_own_words(vocab_file, batch, cls):
    def loss(share):
        objective = Objective("dot", scale_start=2.0, flops_image=0.0, flops_text=0.0, masked_loss_weight=share)
        stage = module(vocab_file, None, cls, objective=objective)
        stage._trainer, stage.log_dict = SimpleNamespace(global_step=0), lambda *args, **kwargs: None
        return stage, stage.training_step(batch, 0)["loss"]

    stage, got = loss(0.25)
    out = stage.stair(batch["pixels"], batch["ids"], batch["mask"], {"text_full"})
    whole_CV = out["text_full"]
    own_CV = torch.zeros_like(whole_CV)
    for c, ids in enumerate(batch["ids"]):
        for word in stage.stair.vocabulary.tokens_of(ids[batch["mask"][c]].tolist()):
            if not word.startswith("["):
                at = stage.stair.vocabulary.tokens.index(word)
                own_CV[c, at] = whole_CV[c, at]

    def compared(text_CV):
        logits_BC = stage.stair.scale * out["image_BV"] @ text_CV.T
        pair = torch.arange(len(logits_BC))
        entropy = torch.nn.functional.cross_entropy
        return (entropy(logits_BC, pair) + entropy(logits_BC.T, pair)) / 2

    assert not torch.allclose(compared(own_CV), got)
    torch.testing.assert_close(got, 0.75 * compared(whole_CV) + 0.25 * compared(own_CV))
    # the paper's form is what is not asked for: in-caption terms alone in stage 1, all of them in stage 3
    torch.testing.assert_close(loss(None)[1], compared(own_CV if cls is Stage1 else whole_CV))


@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_terms_of_the_loss_have_one_name_in_every_stage_and_one_of_weight_0_is_not_computed(vocab_file, batch, cls):
    def step(share):
        stage = module(vocab_file, None, cls, objective=Objective("dot", scale_start=2.0, masked_loss_weight=share))
        stage._trainer, stage.log_dict = SimpleNamespace(global_step=0), lambda *args, **kwargs: None
        return stage.training_step(batch, 0)

    both = step(0.25)
    expected = 0.25 * both["contrastive_masked"] + 0.75 * both["contrastive_full"]
    torch.testing.assert_close(both["contrastive"], expected)
    one, (used, absent) = step(None), ("masked", "full") if cls is Stage1 else ("full", "masked")
    assert one["contrastive"] == one[f"contrastive_{used}"] and f"text_{used}" in one
    assert not {f"contrastive_{absent}", f"text_{absent}"} & one.keys()


@pytest.mark.parametrize("cls", [Stage1, Stage2, Stage3])
def test_a_leak_gives_words_that_are_off_a_gradient_and_is_seen_by_nothing_but_the_comparison(vocab_file, batch, cls):
    def step(leak):
        objective = Objective("dot", scale_start=2.0, flops_image=1.0, flops_text=0.0, negative_slope=leak)
        stage = module(vocab_file, None, cls, objective=objective)
        stage._trainer, stage.log_dict = SimpleNamespace(global_step=0), lambda *args, **kwargs: None
        with torch.no_grad():
            stage.stair.image_head.bias.fill_(-50.0)  # every word is off in every image
        stage.stair.image_head.requires_grad_(cls is not Stage2)
        return stage, stage.training_step(batch, 0)

    leaky, got = step(0.5)
    still, plain = step(0.0)
    assert got["flops_image"] == plain["flops_image"] == 0 and (got["image_BV"] == 0).all()
    leaky.eval()
    assert (leaky.embed(batch["pixels"], batch["ids"], batch["mask"])["image_BV"] == 0).all()
    if cls is Stage2:  # images are frozen: nothing could come back
        assert got["loss"] == plain["loss"]
        return
    assert got["loss"] != plain["loss"]
    (gradient_V,) = torch.autograd.grad(got["loss"], [leaky.stair.image_head.bias])
    own_CV = leaky.stair.vocabulary.in_caption_terms(batch["ids"], batch["mask"])
    assert (gradient_V != 0).any() and not (gradient_V[~own_CV.any(0)] != 0).any()
    assert (torch.autograd.grad(plain["loss"], [still.stair.image_head.bias])[0] == 0).all()


@pytest.mark.parametrize("form", ["masked", "full"])
def test_a_soft_mask_is_regularised_on_the_form_that_is_set(vocab_file, batch, form):
    objective = Objective("dot", 2.0, flops_image=0, flops_text=1, flops_text_form=form, masked_loss_weight=0.25)
    stage = module(vocab_file, None, objective=objective)
    stage._trainer, stage.log_dict = SimpleNamespace(global_step=0), lambda *args, **kwargs: None
    logged = stage.training_step(batch, 0)
    out = stage.embed(batch["pixels"], batch["ids"], batch["mask"])
    text_CV = out[f"text_{form}"]
    torch.testing.assert_close(logged["flops_text"], (text_CV.mean(0) ** 2).sum().detach())


@pytest.mark.parametrize("share", [0.25, 0.75, None])
def test_the_scale_is_measured_on_the_texts_that_weigh_most(vocab_file, batch, share):
    stage = module(vocab_file, None, objective=Objective("dot", "measure", masked_loss_weight=share))
    stage._trainer, stage.log_dict = SimpleNamespace(global_step=0), lambda *args, **kwargs: None
    out = stage.stair(batch["pixels"], batch["ids"], batch["mask"], {"text_full", "text_masked"})
    heavy_CV = out["text_full" if share == 0.25 else "text_masked"]
    stage.training_step(batch, 0)
    logits_BC = stage.stair.scale * out["image_BV"] @ heavy_CV.T
    assert logits_BC.std(correction=0).item() == pytest.approx(1, rel=1e-3)


# ------------------------------------------------------------------ micro-batches


def module(vocab_file, micro, cls=Stage1, dropout=0.0, objective=None):
    torch.manual_seed(0)
    config = tiny_config(vocab_file)
    config.text.options |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return cls(config, objective or Objective(), Optimizer(), micro_batch_size=micro).train()


def embeddings_and_gradient(stage, batch, seed=5):
    torch.manual_seed(seed)
    out = stage.encode(batch)
    loss = sum((value * torch.linspace(0, 1, value.numel()).view_as(value)).sum() for value in out.values())
    loss.backward()
    return out, {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}


@pytest.fixture
def batch(tiny_stair, captions, pixels):
    ids, mask = tiny_stair.vocabulary.tokenize(captions, 12)
    return {"pixels": pixels, "ids": ids, "mask": mask}


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_micro_batches_give_the_gradient_of_the_whole_batch(vocab_file, batch, micro, cls):
    got, want = (embeddings_and_gradient(module(vocab_file, m, cls), batch) for m in (micro, None))
    assert got[1].keys() == want[1].keys()
    for part in (0, 1):
        for name in want[part]:
            torch.testing.assert_close(got[part][name], want[part][name], rtol=1e-4, atol=1e-5)


def test_micro_batches_encode_a_frozen_image_once(vocab_file, batch):
    for share in (None, 0.25):
        stage = module(vocab_file, 2, Stage2, objective=Objective(masked_loss_weight=share))
        for part in stage.frozen_modules():
            part.requires_grad_(False)
        seen = []
        stage.stair.image_encoder.register_forward_hook(lambda module, given, out, seen=seen: seen.append(len(out)))
        assert embeddings_and_gradient(stage, batch)[1] and seen == [2, 2]


def test_a_scale_at_its_bound_comes_back_when_the_loss_asks(vocab_file):
    stage = module(vocab_file, None)
    optimizer = torch.optim.SGD([stage.stair.log_scale], lr=0.1)
    scales = []
    for expected in (1.0, 1.0, -1.0):
        stage.set_scale(99.0) if not scales else None
        optimizer.zero_grad()
        (-expected * stage.stair.scale).sum().backward()
        stage.optimizer_step(0, 0, optimizer, None)
        scales.append(stage.stair.scale.item())
    assert scales[:2] == pytest.approx([100, 100]) and scales[2] < 99


def test_what_is_no_matrix_does_not_decay_and_lamb_leaves_clipping_to_the_trainer(vocab_file):
    stage = module(vocab_file, None)
    decays, spared = Optimizer(name="lamb").build(stage).param_groups
    names = {id(p): name for name, p in stage.named_parameters()}
    assert decays["weight_decay"] > spared["weight_decay"] == 0
    spared = {names[id(p)] for p in spared["params"]}
    assert {
        "stair.image_encoder.backbone.cls_token",
        "stair.image_encoder.backbone.pos_embed",
        "stair.log_scale",
    } <= spared
    assert all(names[id(p)].endswith("weight") for p in decays["params"])
    assert Optimizer(name="lamb").build(stage).defaults["max_grad_norm"] is None


def test_parts_and_layers_have_their_own_learning_rates(vocab_file):
    stair = Stair(tiny_config(vocab_file))  # 2 blocks of image, 1 of text
    scale = {"image_encoder": 0.5, "image_encoder.backbone.pos_embed": 0.25, "log_scale": 2.0}
    groups = Optimizer(lr=1.0, lr_scale=scale, layer_decay=0.1).build(stair).param_groups
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    rates = {name: rates[id(parameter)] for name, parameter in stair.named_parameters()}
    image, text = "image_encoder.backbone", "text_encoder.bert"
    assert (
        rates
        | {
            f"{image}.pos_embed": pytest.approx(0.25 * 0.01),
            f"{image}.patch_embed.proj.weight": pytest.approx(0.5 * 0.01),
            f"{image}.blocks.0.attn.qkv.weight": pytest.approx(0.5 * 0.1),
            f"{image}.blocks.1.attn.qkv.weight": 0.5,
            f"{image}.norm.weight": 0.5,
            f"{text}.embeddings.word_embeddings.weight": pytest.approx(0.1),
            f"{text}.encoder.layer.0.output.dense.weight": 1.0,
            "image_head.dense.weight": 1.0,
            "log_scale": 2.0,
        }
        == rates
    )
    with pytest.raises(SettingError, match="image_encoder, image_head, log_scale") as error:
        Optimizer(lr_scale={"image": 0.1}).build(stair)
    assert error.value.setting == "optimizer.lr_scale"


def test_micro_batches_replay_their_dropout(vocab_file, batch):
    got = embeddings_and_gradient(module(vocab_file, 2, dropout=0.5), batch)
    stage = module(vocab_file, None, dropout=0.5)
    torch.manual_seed(5)
    # the same two forward passes, kept in memory instead of replayed
    pieces = [stage.encode({key: value[half] for key, value in batch.items()}) for half in (slice(0, 2), slice(2, 4))]
    out = {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}
    sum((value * torch.linspace(0, 1, value.numel()).view_as(value)).sum() for value in out.values()).backward()
    for name, p in stage.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[1][name], p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_the_first_batch_sets_the_scale_that_gives_logits_of_spread_1(scenes, tmp_path, similarity):
    name = "--model.init_args.objective."
    asked = (f"{name}similarity", similarity, f"{name}scale_start", "measure")
    main(stage_args(scenes, 1, tmp_path / "r", *asked, "--trainer.max_steps", "2"))
    assert scalars(tmp_path / "r", 1)["train/logit_std"][0] == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------ other processes


@pytest.mark.slow
def test_a_run_killed_hard_resumes_to_the_same_weights_as_one_never_interrupted(scenes, tmp_path):
    # a scale whose start is set, which a resumed run must not do again
    more = [
        "--trainer.max_steps",
        "14",
        "--trainer.val_check_interval",
        "2",
        "--model.init_args.objective.scale_start",
        "5",
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(stage_args(scenes, 1, killed, *more))
    checkpoint = killed / "stage1" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, output[-2000:]
    assert not (killed / "stage1" / "stair").exists()
    resumed = start(stage_args(scenes, 1, killed, *more, "--ckpt_path", "last"))
    output = resumed.communicate(timeout=200)[0]
    assert resumed.returncode == 0 and "Restored all states" in output, output[-2000:]
    main(stage_args(scenes, 1, whole, *more))
    for (name, a), b in zip(weights(killed, 1).items(), weights(whole, 1).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_killed_between_its_last_checkpoint_and_the_export_exports_when_resumed(scenes, tmp_path):
    more = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--ckpt_path", "last"]
    main(stage_args(scenes, 1, tmp_path / "r", *more))
    before = weights(tmp_path / "r", 1)
    shutil.rmtree(tmp_path / "r" / "stage1" / "stair")
    main(stage_args(scenes, 1, tmp_path / "r", *more))
    after = weights(tmp_path / "r", 1)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_resumed_run_uses_the_optimizer_settings_given_now(scenes, tmp_path):
    optimizer = "--model.init_args.optimizer"
    before = main(stage_args(scenes, 1, tmp_path / "r", "--trainer.max_steps", "2", f"{optimizer}.weight_decay", "0"))
    with pytest.raises(SettingError) as error:
        main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", "last", f"{optimizer}.layer_decay", "0.5"))
    assert error.value.setting == "optimizer.lr_scale"
    changed = (f"{optimizer}.lr", "1e-5", f"{optimizer}.weight_decay", "0.3", f"{optimizer}.betas", "[0.5, 0.6]")
    resumed = main(stage_args(scenes, 1, tmp_path / "r", "--ckpt_path", "last", *changed))
    groups = resumed.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0] and groups[0]["betas"] == (0.5, 0.6)
    factor = resumed.model.optimizer.schedule(4)
    assert before.model.optimizer.lr == 2e-3
    assert scalars(tmp_path / "r", 1)["lr-AdamW/pg1"][-2:] == pytest.approx([1e-5 * factor(2), 1e-5 * factor(3)])
    moments = resumed.trainer.optimizers[0].state.values()
    assert {int(moment["step"]) for moment in moments} == {4}


@pytest.mark.filterwarnings("ignore:trainer.precision is bf16")  # its cost is measured, on whatever CPU this is
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_two_ranks_run_all_three_stages_of_a_partly_frozen_cnn(scenes, tmp_path, precision):
    name, options = IMAGE_TOWERS["cnn"]
    image = "--model.init_args.stair.image"
    for stage in (1, 2, 3):
        # forked: a launched rank would import everything again
        ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork", "--trainer.precision", precision)
        cnn = (f"{image}.name", name, f"{image}.options", json.dumps(options), f"{image}.freeze_until", f"layer{stage}")
        fixed = ", text_encoder: 0, text_head: 0" if stage == 3 else ""
        scale = ("--model.init_args.optimizer.lr_scale", f"{{image_encoder: 0.5{fixed}}}")
        main(stage_args(scenes, stage, tmp_path / "r", *ranks, *cnn, *scale))
    seen = scalars(tmp_path / "r", 3)
    assert seen["val/recall"] and all(math.isfinite(loss) for loss in seen["train/loss"])
    first, second, third = (weights(tmp_path / "r", stage) for stage in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first if name.startswith("image_"))
    assert not torch.equal(first["text_head.dense.weight"], second["text_head.dense.weight"])
    changed = {name for name in second if not torch.equal(second[name], third[name])}
    assert all(name.startswith(("image_", "log_scale")) for name in changed)
    frozen = [name for name in second if name.startswith(tuple(f"image_encoder.backbone.layer{n}" for n in (1, 2, 3)))]
    assert frozen and not changed & {*frozen, "image_encoder.backbone.bn1.running_mean"}
    assert {
        "image_encoder.backbone.layer4.0.conv1.weight",
        "image_encoder.backbone.layer4.0.bn1.running_mean",
    } <= changed


@pytest.mark.slow
def test_the_command_starts_its_second_rank_itself(scenes, tmp_path):
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.workers", "1")
    process = start(stage_args(scenes, 1, tmp_path / "r", *ranks, "--trainer.max_steps", "2"))
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0 and "MEMBER: 2/2" in output, output[-3000:]
    assert weights(tmp_path / "r", 1)

"""The dense baseline: trains through the command line, its loss is CLIP's, and what it saves is what it is."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import Clip
from lightning_modules.optimizer import Optimizer
from main import main
from stair import Stair
from stair.clip import ClipConfig, DenseClip
from stair.errors import SettingError
from tests.support.models import tiny_config
from tests.support.runs import write_small_scenes

ROOT = Path(__file__).parents[1]
SMALL = """
model:
  init_args:
    stair:
      image: {image_size: 32, options: {patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}}
      text: {options: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
    width: 24
    optimizer: {warmup_steps: 1}
data: {global_batch_size: 16, workers: 0, eval_batch_size: 8}
trainer: {max_steps: 4, val_check_interval: 2, log_every_n_steps: 1, enable_progress_bar: false}
"""


def clip_args(scenes, run, *more, subcommand="fit"):
    return [
        subcommand,
        *("--config", str(ROOT / "configs/clip.yaml")),
        *("--config", str(ROOT / "configs/model/tiny.yaml")),
        *("--config", str(scenes / "small.yaml")),
        *("--run", str(run)),
        *("--data.train", str(scenes / "train-*.tar")),
        *("--data.val", f"{{scenes: {scenes}/val-*.tar}}"),
        *("--model.init_args.stair.vocabulary", str(scenes / "vocab.txt")),
        *more,
    ]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return write_small_scenes(tmp_path_factory.mktemp("scenes"), SMALL)


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "r"
    main(clip_args(scenes, run))
    return run


def scalars(run):
    log = EventAccumulator(str(run / "clip" / "tensorboard"))
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def dense(vocab_file, **changes):
    torch.manual_seed(0)
    config = tiny_config(vocab_file)
    return DenseClip(ClipConfig(config.vocabulary, config.image, config.text, 20, **changes)).eval()


def test_a_dense_run_logs_its_recall_and_nothing_of_words(finished):
    seen = scalars(finished)
    for way in ("t2i", "i2t"):
        assert all(0 <= seen[f"val/scenes/{way}/recall@{k}"][-1] <= 1 for k in (1, 5, 10))
    assert {"train/loss", "train/contrastive", "train/scale", "val/recall", "health/alarm"} <= seen.keys()
    assert not any("sparsity" in tag or "grounding" in tag or "lambda" in tag for tag in seen)
    assert seen["train/loss"] == seen["train/contrastive"]
    # the scale of a step is logged as it was in that step
    assert seen["train/scale"][0] == pytest.approx(1 / 0.07)


def test_the_export_is_loaded_measured_and_refused_as_what_it_is(finished, scenes):
    folder = finished / "clip" / "clip"
    model = DenseClip.from_pretrained(folder)
    assert model.encode_text(["a red circle", "two boats"]).shape == (2, 24) and model.similarity == "cosine"
    cli = main(clip_args(scenes, finished, subcommand="validate"))
    logged = scalars(finished)
    for tag in ("val/scenes/t2i/recall@5", "val/scenes/i2t/median_rank"):
        assert float(cli.trainer.callback_metrics[tag]) == pytest.approx(logged[tag][-1])
    with pytest.raises(ValueError, match="family 'clip'; Stair reads 'stair'"):
        Stair.from_pretrained(folder)


def test_a_dense_run_starts_from_nothing_and_says_so(finished, scenes, tmp_path):
    with pytest.raises(SettingError) as refused:
        main(clip_args(scenes, tmp_path / "r", "--transition.init_from", str(finished / "clip" / "clip")))
    assert refused.value.setting == "transition.init_from"


def test_the_loss_of_a_step_is_clips(vocab_file, captions, pixels, monkeypatch):
    torch.manual_seed(0)
    module = Clip(tiny_config(vocab_file), Optimizer(), width=20)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    module.set_scale(5.0)
    ids, mask = module.clip.vocabulary.tokenize(captions, 12)
    out = module.eval().training_step({"pixels": pixels, "ids": ids, "mask": mask}, 0)
    image, text = (torch.nn.functional.normalize(out[k].double(), dim=1) for k in ("image_BV", "text_CV"))
    loss = 0.0
    for i in range(4):
        for a, b in ((image, text), (text, image)):
            scores = [math.exp(5.0 * float(a[i] @ b[j])) for j in range(4)]
            loss -= math.log(scores[i] / sum(scores)) / 8
    assert float(out["loss"].detach()) == pytest.approx(loss, rel=1e-5)
    assert out["loss"].requires_grad and out["pairs"] == 4


def test_mean_pooling_sees_every_real_token_and_no_padding(vocab_file, captions):
    model = dense(vocab_file)
    ids, mask = model.vocabulary.tokenize(captions, 12)
    hidden = model.text_encoder(ids, mask)
    got = model.embed_tokens(ids, mask)
    for row in range(4):
        mean = sum(hidden[row, t] for t in range(ids.shape[1]) if mask[row, t]) / int(mask[row].sum())
        torch.testing.assert_close(got[row], model.text_projection.weight @ mean)


def test_class_pooling_reads_the_class_tokens(vocab_file, captions, pixels):
    model = dense(vocab_file, pooling="class")
    ids, mask = model.vocabulary.tokenize(captions, 12)
    first = model.text_encoder(ids, mask)[:, 0]
    torch.testing.assert_close(model.embed_tokens(ids, mask), model.text_projection(first))
    normed = (pixels / 255 - model.image_encoder.mean) / model.image_encoder.deviation
    # 16 patches behind the class token
    hidden = model.image_encoder.backbone.forward_features(normed)
    assert hidden.shape[1] == 17 and not hasattr(model.image_encoder.backbone.fc_norm, "weight")
    torch.testing.assert_close(model.embed_pixels(pixels), model.image_projection(hidden[:, 0]))


@pytest.mark.parametrize("pooling", ["mean", "class"])
def test_a_saved_model_says_the_same_when_loaded(vocab_file, captions, pixels, tmp_path, pooling):
    model = dense(vocab_file, pooling=pooling)
    model.save_pretrained(tmp_path / "m", {"note": 1})
    again = DenseClip.from_pretrained(tmp_path / "m")
    assert torch.equal(model.encode_text(captions), again.encode_text(captions))
    assert torch.equal(model.encode_image(pixels), again.encode_image(pixels))


def test_settings_that_cannot_be_are_refused(vocab_file):
    with pytest.raises(ValueError, match="width is 0"):
        Clip(tiny_config(vocab_file), Optimizer(), width=0)
    with pytest.raises(SettingError) as refused:
        Clip(tiny_config(vocab_file), Optimizer(), scale_start=101)
    assert refused.value.setting == "model.init_args.scale_start"
    config = tiny_config(vocab_file)
    config.image.options |= {"class_token": False, "global_pool": "avg"}
    with pytest.raises(ValueError, match="no class token"):
        Clip(config, Optimizer(), pooling="class")


def test_a_stage_can_start_after_another_than_the_one_before(scenes, tmp_path):
    small = tmp_path / "small.yaml"
    small.write_text("\n".join(line for line in SMALL.splitlines() if "width" not in line))
    for stage, after in ((3, 0), (1, None), (3, 1)):
        line = clip_args(scenes, tmp_path / "r", "--trainer.max_steps", "2")
        line[2], line[6] = str(ROOT / f"configs/stage{stage}.yaml"), str(small)
        line += ["--transition.init_stage", str(after)] if after is not None else []
        line += ["--model.init_args.objective.scale_start", "14.3"] if after == 0 else []  # there is none to keep
        cli = main(line)
        assert cli.trainer.global_step == 2
        if after == 0:
            shutil.rmtree(tmp_path / "r" / "stage3")
    with pytest.raises(SettingError) as refused:
        main([*line, "--transition.init_stage", "3"])
    assert refused.value.setting == "transition.init_stage"

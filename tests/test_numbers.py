"""Numbers that go wrong: at the limits of fp16, not finite, all the same, far too large. Guarded, alarmed or refused.

Elsewhere: losses and gradients that are not finite (test_callbacks.py, test_stages.py, test_parallel.py), empty embeddings
(test_losses.py, test_metrics.py), another vocabulary (test_stages.py).
"""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.shards import ImageTextShards
from lightning_modules.stage import StairStage
from main import main
from stair.errors import SettingError
from stair.losses import flops, info_nce
from tests.support.runs import scalars, stage_args


def test_a_batch_of_one_pair_is_refused():
    with pytest.raises(SettingError) as refused:
        ImageTextShards("a.tar", vocabulary="vocab.txt", image_size=32, max_tokens=12, global_batch_size=1)
    assert refused.value.setting == "global_batch_size"


def test_pictures_of_numbers_that_are_none_give_no_weight_that_is_none(tiny_stair):
    strange = [Image.fromarray(np.full((32, 32), value, np.float32)) for value in (np.nan, np.inf, -np.inf, 1e38)]
    assert tiny_stair.encode_image(strange).isfinite().all()
    with pytest.raises(ValueError, match="uint8"):
        tiny_stair.encode_image(torch.full((1, 3, 32, 32), torch.nan))


def test_losses_of_fp16_numbers_at_their_limit_are_those_of_exact_ones():
    generator = torch.Generator().manual_seed(0)
    half = [(65504 * torch.rand(6, 40, generator=generator)).half().requires_grad_() for _ in range(2)]
    assert max(side.max().item() for side in half) > 64_000
    exact = [side.detach().double().requires_grad_() for side in half]
    for cosine, scale in ((False, 1e-9), (True, 30.0)):
        scale = torch.tensor(scale)
        got = info_nce(*half, scale, cosine).loss + flops(half[0]) * 1e-12
        expected = info_nce(*exact, scale.double(), cosine).loss + flops(exact[0]) * 1e-12
        assert got.dtype == torch.float32 and got.item() == pytest.approx(expected.item(), rel=1e-5)
        gradients = [torch.autograd.grad(loss, sides[0])[0] for loss, sides in ((got, half), (expected, exact))]
        assert torch.allclose(gradients[0].double(), gradients[1], rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_weights_of_16_bits_are_refused(scenes, tmp_path, precision):
    with pytest.raises(SettingError, match="bf16-mixed") as refused:
        main(stage_args(scenes, 1, tmp_path / "r", "--trainer.accelerator", "cpu", "--trainer.precision", precision))
    assert refused.value.setting == "trainer.precision"


# ------------------------------------------------------------------ runs in fp16, with its gradient scaler

#: Lightning turns fp16 on a CPU into bf16; its plugin, named, does not
FP16_ON_CPU = """[{class_path: lightning.pytorch.plugins.MixedPrecision, init_args: {precision: 16-mixed, device: cpu,
    scaler: {class_path: torch.amp.GradScaler, init_args: {device: cpu, init_scale: 1.0e+9}}}}]"""
FP16 = ["--trainer.precision", "null", "--trainer.accelerator", "cpu", "--trainer.plugins", FP16_ON_CPU]
LONGER = ["--trainer.max_steps", "60", "--trainer.val_check_interval", "60", "--health.patience", "20"]
MEASURE = ["--model.init_args.objective.scale_start", "measure"]


@pytest.mark.slow
def test_a_run_in_fp16_finds_the_scale_of_its_gradients_without_an_alarm(scenes, tmp_path):
    more = ("--trainer.max_steps", "12", "--trainer.val_check_interval", "12")
    main(stage_args(scenes, 1, tmp_path / "r", *more, *FP16))
    stage = tmp_path / "r" / "stage1"
    saved = torch.load(stage / "checkpoints" / "last.ckpt", weights_only=True)
    assert 1 <= saved["MixedPrecision"]["scale"] < 1e9  # its start: the first gradients overflowed
    assert sum(scalars(tmp_path / "r", 1)["health/skipped_steps"]) == 0 and (stage / "stair").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the (loss is not finite|first batch)")
def test_embeddings_that_overflow_fp16_stop_the_run_and_hand_nothing_over(scenes, tmp_path, monkeypatch):
    embed = StairStage.embed
    monkeypatch.setattr(StairStage, "embed", lambda *them: {k: 1e6 * v for k, v in embed(*them).items()})
    first, second = (stage_args(scenes, 1, tmp_path / run, *LONGER, *FP16) for run in "rs")
    with pytest.raises(RuntimeError, match=r"first batch's logits are not finite"):
        main([*first, *MEASURE])
    with pytest.raises(RuntimeError, match=r"the loss is not finite at step .* without these steps is saved.* bf16"):
        main(second)
    assert not list(tmp_path.glob("?/stage1/stair"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the gradient is not finite")
def test_gradients_that_overflow_fp16_at_any_scale_stop_the_run(scenes, tmp_path):
    breaking = ("--trainer.callbacks+", "tests.test_stages.BreaksGradients")
    with pytest.raises(RuntimeError, match=r"the gradient is not finite at step .*, in .* consecutive steps"):
        main(stage_args(scenes, 1, tmp_path / "r", *LONGER, *FP16, *breaking))
    assert not (tmp_path / "r" / "stage1" / "stair").exists()


# ------------------------------------------------------------------ runs that cannot learn


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss has been log N")
def test_captions_that_are_all_the_same_raise_the_alarm(scenes, tmp_path):
    for path in scenes.iterdir():
        if path.suffix != ".idx":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "index.json").unlink(missing_ok=True)
    for path in tmp_path.glob("train-*.tar"):
        with tarfile.open(scenes / path.name) as old, tarfile.open(path, "w") as new:
            for info in old:
                data = b"a red circle" if info.name.endswith(".txt") else old.extractfile(info).read()
                data = b'{"captions": ["a red circle"]}' if info.name.endswith(".json") else data
                info.size = len(data)
                new.addfile(info, io.BytesIO(data))
    with pytest.warns(UserWarning, match=r"the loss has been log N for \d+ steps"):
        main(stage_args(tmp_path, 1, tmp_path / "r", *LONGER, "--trainer.max_steps", "200"))
    assert 1 in scalars(tmp_path / "r", 1)["health/alarm"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss (has been|is not)")
@pytest.mark.parametrize("rate", ["0.5", "1e20"])  # 0.5: hundreds of times too high
def test_a_rate_beyond_reason_stops_the_run_and_hands_nothing_over(scenes, tmp_path, rate):
    with pytest.raises(RuntimeError, match=r"not finite|the run is dead"):
        main(stage_args(scenes, 1, tmp_path / "r", *LONGER, "--model.init_args.optimizer.lr", rate))
    assert not (tmp_path / "r" / "stage1" / "stair").exists()

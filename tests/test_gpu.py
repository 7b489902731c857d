"""What only a GPU can show: the Triton form of the head on tensor cores, stages in mixed precision, sharding, serving."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from main import main
from stair import Stair
from stair.embeddings import Embeddings
from stair.kernels import fused, vocabulary_max, vocabulary_max_reference
from stair.losses import flops, info_nce
from tests.support.kernels import SHAPES, gradients
from tests.support.models import tiny_config
from tests.support.runs import scalars, stage_args, weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).parents[1]
HALF = [torch.bfloat16, torch.float16]
ON_GPU = ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed"]


def head_inputs(B, T, D, V, keep, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(B, T, generator=g) < keep
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((B, T, D), (V, D), (V,)))
    return mask.cuda(), [hidden.to("cuda", dtype), (weight / D**0.5).to("cuda", dtype), bias.to("cuda", dtype)]


def relative_error(got, want):
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


# ------------------------------------------------------------------ the head


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (32, 197, 768, 30_522, 1.0), (64, 30, 768, 5_000, 0.5)], ids=str)
def test_the_head_equals_the_plain_formula_in_double_precision(shape, dtype):
    mask, inputs = head_inputs(*shape, dtype)
    got = gradients(vocabulary_max, inputs, mask)
    # row by row: the oracle holds every logit
    wide = [value.double().requires_grad_() for value in inputs]
    rows = [vocabulary_max_reference(wide[0][at : at + 1], mask[at : at + 1], *wide[1:]) for at in range(len(mask))]
    seed = torch.linspace(-1, 1, got[0].numel(), device="cuda").view_as(got[0])
    for out, part in zip(rows, seed.split(1), strict=True):
        (out * part).sum().backward(retain_graph=True)
    want = [torch.cat(rows).detach(), *(leaf.grad for leaf in wide)]
    # products of halves are exact in fp32, and gradients are returned in the type of the inputs; in fp32 another one of two
    # nearly equal positions may win, and has the gradient
    assert relative_error(got[0], want[0]) < 1e-5
    for ours, theirs in zip(got[1:], want[1:], strict=True):
        assert relative_error(ours, theirs) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-3}[dtype]


def test_half_precision_takes_the_triton_form_and_single_does_not():
    assert fused._form(torch.device("cuda"), torch.bfloat16).__name__ == "stair.kernels.triton_head"
    assert fused._form(torch.device("cuda"), torch.float32) is fused._Padded


def test_the_head_gives_the_same_bits_twice():
    mask, inputs = head_inputs(16, 197, 256, 30_522, 0.9, torch.bfloat16)
    once, twice = (gradients(vocabulary_max, inputs, mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_of_equal_positions_the_first_has_the_gradient():
    mask, (hidden, weight, bias) = head_inputs(2, 1, 32, 200, 1.0, torch.bfloat16)
    mask = torch.ones(2, 4, dtype=torch.bool, device="cuda")
    got = gradients(vocabulary_max, [hidden.repeat(1, 4, 1), weight, bias], mask)[1]
    assert (got[:, 1:] == 0).all() and (got[:, 0] != 0).any()


def test_words_that_cannot_be_active_are_zero_on_a_gpu():
    mask, inputs = head_inputs(4, 9, 64, 300, 1.0, torch.bfloat16)
    some = vocabulary_max(inputs[0], mask, *inputs[1:], active_ranges=((7, 130), (200, 300)))
    whole = vocabulary_max(inputs[0], mask, *inputs[1:])
    whole[:, :7], whole[:, 130:200] = 0, 0
    assert torch.equal(some, whole) and some.any()


def test_a_number_that_is_none_reaches_the_embedding():
    mask, inputs = head_inputs(2, 9, 64, 300, 1.0, torch.bfloat16)
    inputs[0][0, 0, 0] = float("nan")
    assert not vocabulary_max(inputs[0], mask, *inputs[1:])[0].isfinite().any()


def test_no_tensor_of_positions_times_words_exists():
    mask, inputs = head_inputs(64, 197, 768, 30_522, 1.0, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients(vocabulary_max, inputs, mask)
    # 64 x 197 x 30,522 logits in bf16 have 770 MB; the plain form holds several of them
    assert torch.cuda.max_memory_allocated() - before < 770e6


def test_the_head_and_the_loss_never_wait_for_the_host():
    mask, inputs = head_inputs(8, 19, 64, 300, 0.5, torch.bfloat16)
    inputs = [value.requires_grad_() for value in inputs]
    scale = torch.ones(1, device="cuda")

    def run():
        with torch.autocast("cuda", torch.bfloat16):
            image, text = (vocabulary_max(inputs[0], side, *inputs[1:]) for side in (mask, ~mask))
            (info_nce(image, text, scale, cosine=True).loss + flops(image)).backward()

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cosine", [False, True])
def test_tensor_cores_take_nothing_from_the_loss_or_its_gradient(cosine):
    g = torch.Generator().manual_seed(0)
    sides = [torch.relu(torch.randn(64, 5000, generator=g) - 1).bfloat16() for _ in range(2)]
    results = []
    for dtype in (torch.float32, torch.float64):
        image, text = (side.to("cuda", dtype).requires_grad_() for side in sides)
        scale = torch.full((1,), 3.0, device="cuda", dtype=dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.float32):
            loss = info_nce(image / 8, text, scale, cosine).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, (image, text, scale))])
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) < 2e-5


# ------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory):
    """A run of all three stages in bf16-mixed."""
    run = tmp_path_factory.mktemp("runs") / "r"
    for stage in (1, 2, 3):
        main(stage_args(scenes, stage, run, *ON_GPU))
    return run


def test_three_stages_train_on_a_gpu_in_bf16(finished):
    for stage in (1, 2, 3):
        seen = scalars(finished, stage)
        assert np.isfinite(seen["train/contrastive"]).all() and 0 <= seen["val/scenes/t2i/recall@1"][-1] <= 1
        assert seen["run/max_memory_gib"][-1] > 0


def test_stage_2_leaves_the_image_side_bitwise_on_a_gpu(finished):
    before, after = weights(finished, 1), weights(finished, 2)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("image_"))
    assert not torch.equal(before["text_head.dense.weight"], after["text_head.dense.weight"])


def test_the_first_losses_of_a_gpu_are_those_of_a_cpu(scenes, tmp_path):
    losses = []
    for name, where in (("gpu", ["--trainer.accelerator", "gpu"]), ("cpu", ["--trainer.accelerator", "cpu"])):
        main(stage_args(scenes, 1, tmp_path / name, *where, "--trainer.precision", "32-true"))
        losses.append(scalars(tmp_path / name, 1)["train/contrastive"])
    np.testing.assert_allclose(*losses, rtol=2e-3)


def test_fp16_trains_with_the_scaler(scenes, tmp_path):
    main(stage_args(scenes, 1, tmp_path, "--trainer.accelerator", "gpu", "--trainer.precision", "16-mixed"))
    assert np.isfinite(scalars(tmp_path, 1)["train/contrastive"]).all()
    assert (tmp_path / "stage1" / "stair" / "model.safetensors").is_file()


@pytest.mark.parametrize("hardware", ["ddp", "fsdp2"])
def test_a_stage_trains_under_the_strategies_of_the_cluster(scenes, tmp_path, hardware):
    # a process of its own: it starts a process group
    command = [sys.executable, "main.py", *stage_args(scenes, 1, tmp_path, *ON_GPU), "--trainer.devices", "1"]
    command[3:3] = ["--config", str(ROOT / f"configs/hardware/{hardware}.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (tmp_path / "stage1" / "stair" / "model.safetensors").is_file()


def test_a_run_goes_on_from_its_last_checkpoint_on_a_gpu(scenes, tmp_path):
    more = [*ON_GPU, "--ckpt_path", "last"]
    main(stage_args(scenes, 1, tmp_path, *more, "--trainer.max_steps", "2"))
    main(stage_args(scenes, 1, tmp_path, *more, "--trainer.max_steps", "6"))
    assert len(scalars(tmp_path, 1)["train/contrastive"]) == 6


def test_a_compiled_stage_trains_on_a_gpu(scenes, tmp_path):
    main(stage_args(scenes, 1, tmp_path, *ON_GPU, "--model.init_args.compile", "inductor"))
    assert np.isfinite(scalars(tmp_path, 1)["train/contrastive"]).all()


# ------------------------------------------------------------------ serving


def test_embeddings_of_a_gpu_are_those_of_a_cpu(vocab_file, pixels, captions):
    torch.manual_seed(0)
    model = Stair(tiny_config(vocab_file)).eval()
    on_cpu = model.encode_image(pixels), model.encode_text(captions)
    model.cuda()
    for got, want in zip((model.encode_image(pixels), model.encode_text(captions)), on_cpu, strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-3)


def test_embed_takes_the_gpu_and_finds_the_same_words(finished, scenes, tmp_path):
    shards, rows = str(scenes / "val-*.tar"), {}
    for device in ("cuda", "cpu"):
        command = [sys.executable, "-m", "stair.cli", "embed", str(finished / "stage3" / "stair"), shards]
        done = subprocess.run(
            [*command, str(tmp_path / device), "--device", device], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        rows[device] = Embeddings.load(tmp_path / device).vectors.toarray()
    np.testing.assert_allclose(rows["cuda"], rows["cpu"], atol=2e-3)


def test_evaluate_gives_the_recall_of_a_cpu(finished, scenes, tmp_path):
    command = [sys.executable, "-m", "stair.cli", "evaluate", str(finished / "stage3" / "stair")]
    command += [f"scenes={scenes}/val-*.tar", "--no_probe", "--output"]
    recall = []
    for name, hidden in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        done = subprocess.run(
            [*command, str(tmp_path / name)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, **hidden}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        measured = json.loads((tmp_path / name / "evaluation.json").read_text())["sets"]["scenes"]
        recall.append([measured["retrieval"][f"{way}/recall@10"] for way in ("t2i", "i2t")])
    assert recall[0] == pytest.approx(recall[1], abs=0.1)  # 12 images: one of them may change places

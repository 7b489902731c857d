"""The overlays for real images, with the real vocabulary: a few steps of all stages through the command line."""

import math
from pathlib import Path

import pytest

from main import main
from stair import Stair

ROOT = Path(__file__).parents[1]
FEW = ["--trainer.max_steps", "3", "--trainer.val_check_interval", "3", "--trainer.limit_val_batches", "1"]
SIZE = ["--data.global_batch_size", "16", "--data.eval_batch_size", "8", "--data.workers", "0"]


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.parametrize(
    ("overlay", "sets"),
    [
        ("emoji_fluent", ["emoji", "emoji-test", "emoji-unseen", "noto", "noto-unseen"]),
        ("flickr8k", ["flickr8k", "flickr8k-test"]),
    ],
)
def test_three_stages_take_steps_on_real_images_with_the_whole_vocabulary(
    shared_data, monkeypatch, tmp_path, overlay, sets
):
    monkeypatch.setenv("STAIR_SHARED_DATA", str(shared_data))
    for stage in (1, 2, 3):
        files = [f"stage{stage}", "model/tiny", f"data/{overlay}", "scratch/base", f"scratch/stage{stage}"]
        configs = [word for name in files for word in ("--config", str(ROOT / f"configs/{name}.yaml"))]
        warmup = ["--model.init_args.optimizer.warmup_steps", "1"]
        cli = main(["fit", *configs, "--run", str(tmp_path), *FEW, *SIZE, *warmup])
        seen = cli.trainer.callback_metrics
        assert all(math.isfinite(seen[f"val/{name}/t2i/recall@10"]) for name in sets)
        assert math.isfinite(seen["train/loss"])
    model = Stair.from_pretrained(tmp_path / "stage3" / "stair")
    assert len(model.vocabulary) == 30_522 and model.encode_text(["a dog"]).shape == (1, 30_522)

"""A mixture's sources in the log: pairs, losses that add up to the loss, and counting on after an interruption."""

import pytest

from datamodules.synthetic import write_scenes
from main import main
from tests.support.runs import SMALL, scalars, stage_args


@pytest.mark.timeout(600)
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_with_a_soft_mask_and_two_ranks_sources_losses_add_up_to_that_of_the_texts_that_weigh_most(tmp_path, share):
    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    mixed = f"{{a: {{shards: '{tmp_path}/train-*.tar', weight: 3}}, b: {{shards: '{tmp_path}/val-*.tar', weight: 1}}}}"
    soft = ("--model.init_args.objective.masked_loss_weight", str(share), "--trainer.max_steps", "2")
    soft += ("--model.init_args.objective.negative_slope", "0.5")
    ranks = ("--trainer.devices", "2", "--trainer.strategy", "ddp_fork")
    main(stage_args(tmp_path, 1, tmp_path / "run", "--data.train", mixed, *soft, *ranks))
    seen = scalars(tmp_path / "run", 1)
    losses = zip(seen["source/a/loss"], seen["source/b/loss"], strict=True)
    assert [0.75 * a + 0.25 * b for a, b in losses] == pytest.approx(seen["train/contrastive"], rel=1e-3)


@pytest.mark.timeout(600)
def test_sources_losses_add_up_to_the_loss_and_their_pairs_are_counted_on_when_resumed(tmp_path):
    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    mixed = f"{{a: {{shards: '{tmp_path}/train-*.tar', weight: 3}}, b: {{shards: '{tmp_path}/val-*.tar', weight: 1}}}}"
    main(stage_args(tmp_path, 1, tmp_path / "run", "--data.train", mixed))
    seen = scalars(tmp_path / "run", 1)
    assert seen["source/a/pairs"] == [12, 24, 36, 48] and seen["source/b/pairs"] == [4, 8, 12, 16]
    assert seen["source/a/skipped"] == [0] * 4
    losses = zip(seen["source/a/loss"], seen["source/b/loss"], strict=True)
    assert [0.75 * a + 0.25 * b for a, b in losses] == pytest.approx(seen["train/contrastive"], rel=1e-4)
    more = ("--trainer.max_steps", "6", "--ckpt_path", "last")
    main(stage_args(tmp_path, 1, tmp_path / "run", "--data.train", mixed, *more))
    assert scalars(tmp_path / "run", 1)["source/a/pairs"][-1] == 72

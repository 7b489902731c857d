"""Sharded training against replicated training: the same weights, checkpoints that both read, a release like any other."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.synthetic import write_scenes
from lightning_modules import Stage1, Stage2, Stage3
from lightning_modules.consolidate import consolidate
from lightning_modules.parallel import FullySharded, blocks
from main import main
from stair import Stair
from stair.errors import FileError
from tests.support.ranks import STAGES, STEPS, Case, difference, fit, make, run, same
from tests.support.runs import SMALL, stage_args, weights


@pytest.fixture
def case(vocab_file, tmp_path):
    return lambda cls, **more: Case(cls, str(vocab_file), str(tmp_path), ranks=2, **more)


@pytest.mark.parametrize(
    "cls", [pytest.param(Stage1, marks=pytest.mark.slow), Stage2, pytest.param(Stage3, marks=pytest.mark.slow)]
)
def test_sharded_training_gives_the_gradients_and_weights_of_replicated(case, cls):
    assert same(run(case(cls, strategy=FullySharded)), run(case(cls))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"micro": 4},
        {"settings": {"recompute": True}},
        {"micro": 4, "settings": {"recompute": True, "compile": "aot_eager"}},
        {"optimizer": "lamb"},
    ],
    ids=["micro-batches", "recompute", "compile", "lamb"],
)
def test_sharded_training_is_the_same_with_every_setting(case, more):
    plain = {"optimizer": more.get("optimizer", "adamw")}
    assert same(run(case(Stage1, strategy=FullySharded, **more)), run(case(Stage1, **plain))) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("cls", STAGES)
def test_bf16_mixed_is_the_same_too(case, cls):
    precision = {"trainer": {"precision": "bf16-mixed"}}
    want = run(case(cls, **precision))
    assert same(run(case(cls, strategy=FullySharded, **precision)), want) < 1e-5
    assert same(run(case(cls)), want) > 1e-4


def reduced(case):
    """Numbers that were reduced between ranks in a step, and those of parameters that train, all and in blocks."""
    name = "reduce_scatter_single" if hasattr(torch.distributed, "reduce_scatter_single") else "reduce_scatter_tensor"
    real, counts = getattr(torch.distributed, name), []

    def counted(*args, **kwargs):
        counts.append(max(value.numel() for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))
        return real(*args, **kwargs)

    setattr(torch.distributed, name, counted)
    fit(case)
    return {
        "reduced": sum(counts) / STEPS,
        "trained": sum(p.numel() for p in make(case).parameters() if p.requires_grad),
    }


def test_what_stage_2_freezes_is_never_reduced(case):
    counts = run(case(Stage2, strategy=FullySharded), reduced)
    # rows are padded to a multiple of the ranks
    assert counts["trained"] <= counts["reduced"] < 1.01 * counts["trained"]


def test_the_blocks_of_both_towers_are_found(case):
    stair = make(case(Stage1)).stair
    assert blocks(stair.image_encoder) == list(stair.image_encoder.backbone.blocks)
    assert blocks(stair.text_encoder) == list(stair.text_encoder.bert.encoder.layer)


# ------------------------------------------------------------------ checkpoints


def keeper(folder):
    checkpoint = ModelCheckpoint(folder, "last", every_n_train_steps=2, save_on_train_epoch_end=False)
    return {"enable_checkpointing": True, "callbacks": [checkpoint]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [("ddp", FullySharded), (FullySharded, "ddp")], ids=["ddp to fsdp2", "fsdp2 to ddp"]
)
def test_a_run_resumes_under_the_other_strategy_as_if_never_interrupted(case, tmp_path, first, then):
    run(case(Stage2, strategy=first, trainer=keeper(tmp_path / "kept")))
    checkpoint = tmp_path / "kept" / "last.ckpt"
    got, want = run(case(Stage2, strategy=then, resume=str(checkpoint))), run(case(Stage2))
    assert len(got["losses"]) == 1 and difference(got["weights"], want["weights"]) < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", pytest.param(FullySharded, marks=pytest.mark.slow)])
def test_a_model_can_be_made_of_a_checkpoint(case, tmp_path, strategy, capsys):
    trained = run(case(Stage3, strategy=strategy, trainer=keeper(tmp_path / "kept")))
    consolidate(str(tmp_path / "kept" / "last.ckpt"), str(tmp_path / "model"))
    assert f"{tmp_path}/model: step 2 of" in capsys.readouterr().out
    model = Stair.from_pretrained(tmp_path / "model")
    assert model.config.similarity == "cosine"
    want = {name.removeprefix("stair."): weight for name, weight in trained["before"].items()}
    assert difference({name: weight.detach() for name, weight in model.named_parameters()}, want) == 0
    with pytest.raises(FileError) as refused:
        consolidate(str(tmp_path / "kept" / "last.ckpt"), str(tmp_path / "model"))
    assert refused.value.path == tmp_path / "model"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "damaged.ckpt").write_bytes(b"x" * 100)
    for name in ("nowhere", "", "other.ckpt", "damaged.ckpt"):
        with pytest.raises(FileError) as refused:
            consolidate(str(tmp_path / name), str(tmp_path / "x"))
        assert refused.value.path == tmp_path / name and not (tmp_path / "x").exists()


# ------------------------------------------------------------------ through the command line


def train_stages(case):
    folder = Path(case.folder)
    for stage, strategy in case.settings["stages"].items():
        overlay = ("--config", str(Path(__file__).parents[1] / "configs" / "hardware" / f"{strategy}.yaml"))
        main(stage_args(folder, stage, folder / "r", *overlay, "--trainer.devices", "2"))
    return None


@pytest.mark.slow
def test_exported_models_load_from_any_strategy_to_any(case, tmp_path):
    write_scenes(tmp_path, train=64, val=12, image_size=32)
    (tmp_path / "small.yaml").write_text(SMALL)
    run(case(Stage1, settings={"stages": {1: "ddp", 2: "fsdp2", 3: "ddp"}}), train_stages)
    one, two, three = (weights(tmp_path / "r", stage) for stage in (1, 2, 3))
    assert one.keys() == two.keys() == three.keys()
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("image_"))
    assert not torch.equal(one["text_head.dense.weight"], two["text_head.dense.weight"])
    assert Stair.from_pretrained(tmp_path / "r" / "stage3" / "stair").encode_text(["a red circle"]).isfinite().all()
    assert Stair.from_pretrained(tmp_path / "r" / "stage2" / "stair")

"""One objective: the same gradients and weights from any number of ranks and of micro-batches, in all three stages.

Through the Trainer, its strategies and the stages; a run is a number of forked processes that find each other over gloo.
"""

import lightning as L
import pytest
import torch

from lightning_modules import Stage1, Stage2, Stage3
from lightning_modules.parallel import FullySharded, blocks
from stair.errors import SettingError
from tests.support.ranks import STAGES, Case, difference, make, run, same, whole


@pytest.fixture
def case(vocab_file, tmp_path):
    return lambda cls, **more: Case(cls, str(vocab_file), str(tmp_path), **more)


@pytest.mark.parametrize("cls", STAGES)
def test_two_ranks_by_micro_batches_train_as_one_process_does(case, cls):
    want = run(case(cls))
    assert any(name.startswith("stair.image_encoder") for name in want["gradients"]) == (cls is not Stage2)
    assert same(run(case(cls, ranks=2, micro=4)), want) < 1e-5


@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_ranks_share_the_loss_of_own_words_and_that_of_all(case, cls):
    half = {"objective": {"masked_loss_weight": 0.5}}
    want = run(case(cls, **half))
    # two losses, twice the rounding
    assert same(run(case(cls, ranks=2, micro=4, **half)), want) < 3e-5
    assert same(run(case(cls)), want) > 1e-3


@pytest.mark.parametrize("more", [{}, {"caption_loss_weight": 1.0}], ids=["slope", "caption loss"])
@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_ranks_share_what_leaks_below_zero(case, cls, more):
    quiet = {"image_bias": -0.2}  # some words are off
    leaky = {"objective": {"negative_slope": 0.5, **more}, **quiet}
    want = run(case(cls, **leaky))
    assert same(run(case(cls, ranks=2, micro=4, **leaky)), want) < 3e-5
    assert same(run(case(cls, **quiet)), want) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"ranks": 2}, {"ranks": 4}, {"micro": 8}, {"micro": 2}], ids=str)
@pytest.mark.parametrize("cls", STAGES)
def test_ranks_and_micro_batches_train_as_one_process_does(case, cls, more):
    assert same(run(case(cls, **more)), run(case(cls))) < 1e-5


@pytest.mark.parametrize("part", ["info_nces", "flops"])
def test_a_loss_without_its_factor_of_ranks_is_noticed(case, part):
    got, want = run(case(Stage3, ranks=2, wrong=(part,))), run(case(Stage3))
    assert difference(got["gradients"], want["gradients"]) > 1e-2


class InPieces(Stage1):
    """Embeds the pieces a micro-batch would be, and keeps them all in memory: nothing is encoded twice."""

    def encode(self, batch):
        parts = [batch[key].split(self.pieces) for key in ("pixels", "ids", "mask")]
        done = [self.embed(*piece) for piece in zip(*parts, strict=True)]
        return {key: torch.cat([piece[key] for piece in done]) for key in done[0]}


@pytest.mark.parametrize("micro", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_micro_batches_replay_their_dropout(case, micro):
    # dropout draws by the shape of what it is given: the oracle is given the same pieces, and has no second forward
    want = run(case(type("Pieces", (InPieces,), {"pieces": micro}), dropout=0.2))
    got = run(case(Stage1, dropout=0.2, micro=micro))
    assert same(got, want) < 1e-5
    assert same(got, run(case(Stage1))) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"recompute": True}, {"compile": "aot_eager"}, {"recompute": True, "compile": "eager"}], ids=str
)
@pytest.mark.parametrize("cls", STAGES)
def test_recomputing_and_compiling_change_nothing(case, cls, settings):
    got = run(case(cls, micro=8, dropout=0.2 if "compile" not in settings else 0.0, settings=settings))
    assert same(got, run(case(cls, micro=8, dropout=0.2 if "compile" not in settings else 0.0))) < 1e-5


def test_an_unknown_compiler_is_refused(case):
    with pytest.raises(SettingError, match="inductor") as refused:
        make(case(Stage1, settings={"compile": "magic"}))
    assert refused.value.setting == "model.init_args.compile"


class OneBreaks(Stage3):
    """In step 1 an image of the last rank has no finite embedding."""

    def encode(self, batch):
        out = super().encode(batch)
        if self.trainer.global_step == 1 and self.global_rank == self.trainer.world_size - 1:
            out["image_BV"] = out["image_BV"] * torch.tensor(float("nan"))
        return out


class GradientBreaks(Stage3):
    """In step 1 a layer in a tower of the last rank has no finite gradient."""

    def on_fit_start(self):
        super().on_fit_start()
        blocks(self.stair.text_encoder)[0].register_forward_hook(self.break_it)

    def break_it(self, module, inputs, output):
        value = output[0] if isinstance(output, tuple) else output
        if self.trainer.global_step == 1 and self.global_rank == self.trainer.world_size - 1:
            value.register_hook(lambda gradient: gradient * float("inf"))


class Around(L.Callback):
    """Writes down what each step moved."""

    def __init__(self, folder):
        self.folder, self.moved = folder, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = [whole(p) for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        after = [whole(p) for p in pl_module.parameters()]
        self.moved.append(any(not torch.equal(a, b) for a, b in zip(after, self.before, strict=True)))

    def on_train_end(self, trainer, pl_module):
        torch.save(self.moved, f"{self.folder}/moved{trainer.global_rank}.pt")


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("ddp", {}),
        pytest.param(FullySharded, {}, marks=pytest.mark.slow),
        pytest.param("ddp", {"optimizer": "lamb"}, marks=pytest.mark.slow),
        pytest.param("ddp", {"trainer": {"gradient_clip_val": None}}, marks=pytest.mark.slow),
        pytest.param("ddp", {"trainer": {"gradient_clip_algorithm": "value"}}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2", "lamb", "not clipped", "clipped by value"],
)
@pytest.mark.parametrize("cls", [OneBreaks, GradientBreaks])
def test_a_step_whose_loss_or_gradient_is_not_finite_moves_no_rank(case, tmp_path, cls, strategy, more):
    trainer = {**more.get("trainer", {}), "callbacks": [Around(str(tmp_path))]}
    got = run(case(cls, ranks=2, strategy=strategy, **{**more, "trainer": trainer}))
    assert got["losses"].isfinite().tolist() == [True, cls is GradientBreaks, True]
    assert all(value.isfinite().all() for value in got["weights"].values())
    for rank in range(2):
        assert torch.load(tmp_path / f"moved{rank}.pt") == [True, False, True]

"""One objective: the same gradients and weights from any number of ranks and of micro-batches, in all three stages.

Through the Trainer, its strategies and the stages; a run is a number of forked processes that find each other over gloo.
"""

import os
import socket
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from lightning_modules import Stage1, Stage2, Stage3, stage
from lightning_modules.contrastive import sides
from lightning_modules.optimizer import Optimizer
from lightning_modules.parallel import FullySharded, blocks
from lightning_modules.stage import Objective
from stair import losses, regularisers
from stair.errors import SettingError
from tests.conftest import tiny_config

STAGES = [Stage1, Stage2, Stage3]
PAIRS, STEPS = 16, 3


@dataclass
class Case:
    """A run: what is compared, and what a test changes."""

    cls: type
    vocabulary: str
    folder: str
    ranks: int = 1
    micro: int | None = None
    dropout: float = 0.0
    strategy: Any = "ddp"
    optimizer: str = "adamw"
    image_bias: float = 0.0  # added to that of the image head
    settings: dict[str, Any] = field(default_factory=dict)  # of the stage
    objective: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    wrong: tuple[str, ...] = ()  # parts of the loss that lose their factor of ranks
    resume: str | None = None  # a checkpoint


class Pairs(L.LightningDataModule):
    """The same global batches whatever the number of ranks; each rank has its own rows of them."""

    def __init__(self, vocabulary):
        super().__init__()
        self.val_names, self.test_names = [], []
        generator = torch.Generator().manual_seed(1)
        word = len(vocabulary)
        ids = torch.randint(9, word, (STEPS, PAIRS, 12), generator=generator)
        length = torch.randint(3, 13, (STEPS, PAIRS, 1), generator=generator)
        self.mask = torch.arange(12) < length
        self.ids = torch.where(self.mask, ids, vocabulary.pad_id)
        self.pixels = torch.randint(0, 256, (STEPS, PAIRS, 3, 32, 32), dtype=torch.uint8, generator=generator)

    def train_dataloader(self):
        own = PAIRS // self.trainer.world_size
        rows = slice(self.trainer.global_rank * own, (self.trainer.global_rank + 1) * own)
        return DataLoader(Steps(self, rows), batch_size=None)


@dataclass
class Steps:
    """Batches by the trainer's step: a resumed run goes on with the next."""

    pairs: Pairs
    rows: slice

    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        step = self.pairs.trainer.global_step
        batch = {key: getattr(self.pairs, key)[step, self.rows] for key in ("pixels", "ids", "mask")}
        return {**batch, "key": [str(row) for row in range(PAIRS)[self.rows]]}


class Watch(L.Callback):
    """Keeps the first step's gradients, before they are clipped, the weights before the last, and all losses."""

    def __init__(self):
        self.gradients, self.before, self.losses = {}, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == STEPS - 1:
            self.before = {name: whole(p) for name, p in pl_module.named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.gradients:
            named = pl_module.named_parameters()
            self.gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))


def whole(tensor):
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def without_factor(part, ranks):
    """A loss whose gradient is what it would be had somebody forgotten the factor of ranks."""

    def less(value):
        return value / ranks + (value - value / ranks).detach()

    def dropped(*args):
        result = part(*args)
        if isinstance(result, list):  # of several forms of the texts
            return [each._replace(loss=less(each.loss)) for each in result]
        return less(result)

    return dropped


def make(case):
    torch.manual_seed(0)
    config = tiny_config(case.vocabulary)
    config.text.options = config.text.options | {
        "hidden_dropout_prob": case.dropout,
        "attention_probs_dropout_prob": case.dropout,
    }
    config.image.options = config.image.options | {"proj_drop_rate": case.dropout}
    similarity = "cosine" if case.cls.stage == 3 else "dot"
    objective = Objective(similarity=similarity, flops_image=0.05, flops_text=0.1, **case.objective)
    module = case.cls(
        config,
        objective,
        Optimizer(case.optimizer, lr=1e-3, warmup_steps=1),
        micro_batch_size=case.micro,
        **case.settings,
    )
    with torch.no_grad():
        module.stair.image_head.bias += case.image_bias
    for side in module.frozen:
        for part in sides(module.stair)[side]:
            part.requires_grad_(False)
    return module


def fit(case):
    """Trains in this process, as the rank that the environment says, and returns what is compared."""
    torch.set_num_threads(1)
    os.environ["PL_GLOBAL_SEED"] = "0"
    for part in case.wrong:
        user = {"info_nces": stage, "flops": regularisers}[part]  # the module that calls it
        setattr(user, part, without_factor(getattr(losses, part), case.ranks))
    module, watch = make(case), Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=case.ranks,
        strategy=case.strategy() if callable(case.strategy) else case.strategy if case.ranks > 1 else "auto",
        max_steps=STEPS,
        default_root_dir=case.folder,
        use_distributed_sampler=False,
        **{
            "gradient_clip_val": 0.5,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **case.trainer,
            "callbacks": [watch, *case.trainer.get("callbacks", [])],
        },
    )
    trainer.fit(module, datamodule=Pairs(module.stair.vocabulary), ckpt_path=case.resume)
    return {
        "gradients": watch.gradients,
        "weights": {name: whole(p) for name, p in module.named_parameters()},
        "before": watch.before,
        "losses": torch.tensor(watch.losses),
    }


def on_rank(rank, port, case, function):
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": case.ranks,
        "GROUP_RANK": 0,
        "LOCAL_WORLD_SIZE": case.ranks,
    }
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    result = function(case)
    if rank == 0:
        torch.save(result, f"{case.folder}/result.pt")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def run(case, function=fit):
    """What `function` returns on rank 0 of forked ranks."""
    mp.start_processes(on_rank, (free_port(), case, function), nprocs=case.ranks, start_method="fork")
    return torch.load(f"{case.folder}/result.pt", weights_only=False)


def difference(got, want):
    """The greatest distance of a tensor, relative to its length; one that is all but zero counts by the whole's."""
    assert got.keys() == want.keys()
    least = 1e-3 * max(float(value.norm()) for value in want.values())
    return max(float((got[name] - want[name]).norm()) / max(float(want[name].norm()), least) for name in want)


@pytest.fixture
def case(vocab_file, tmp_path):
    return lambda cls, **more: Case(cls, str(vocab_file), str(tmp_path), **more)


def same(got, want):
    return max(difference(got[part], want[part]) for part in ("gradients", "weights"))


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


@pytest.mark.parametrize("cls", [Stage1, Stage3])
def test_ranks_share_what_leaks_below_zero(case, cls):
    quiet = {"image_bias": -0.2}  # some words are off
    leaky = {"objective": {"negative_slope": 0.5}, **quiet}
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

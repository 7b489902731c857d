"""A stage trained by forked ranks, and the comparison of two such trainings."""

import os
import socket
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader

from lightning_modules import Stage1, Stage2, Stage3, stage
from lightning_modules.optimizer import Optimizer
from lightning_modules.stage import Objective
from stair import losses, regularisers
from tests.support.models import tiny_config

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
    for part in module.frozen_modules():
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


def same(got, want):
    return max(difference(got[part], want[part]) for part in ("gradients", "weights"))

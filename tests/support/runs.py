"""Training runs of seconds through the command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[2]


SMALL = """
model:
  init_args:
    stair:
      image: {image_size: 32, options: {patch_size: 16, embed_dim: 16, depth: 1, num_heads: 2}}
      text: {options: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}
    optimizer: {warmup_steps: 1}
    objective: {flops_ramp_steps: 2}
data: {global_batch_size: 16, workers: 0, eval_batch_size: 8}
trainer: {max_steps: 4, val_check_interval: 2, log_every_n_steps: 1, enable_progress_bar: false}
panels: {images: 2}
"""


def write_small_scenes(folder: Path, settings: str = SMALL) -> Path:
    """Drawn scenes for runs of seconds, with a vocabulary, and `small.yaml` to overlay."""
    from datamodules.synthetic import write_scenes

    write_scenes(folder, train=64, val=12, image_size=32)
    (folder / "small.yaml").write_text(settings)
    return folder


def stage_args(scenes, stage, run, *more, subcommand="fit"):
    return [
        subcommand,
        *("--config", str(ROOT / f"configs/stage{stage}.yaml")),
        *("--config", str(ROOT / "configs/model/tiny.yaml")),
        *("--config", str(scenes / "small.yaml")),
        *("--run", str(run)),
        *("--data.train", str(scenes / "train-*.tar")),
        *("--data.val", f"{{scenes: {scenes}/val-*.tar}}"),
        *("--model.init_args.stair.vocabulary", str(scenes / "vocab.txt")),
        *more,
    ]


def weights(run, stage):
    return load_file(run / f"stage{stage}" / "stair" / "model.safetensors")


def scalars(run, stage):
    log = EventAccumulator(str(run / f"stage{stage}" / "tensorboard"))
    log.Reload()
    return {tag: [event.value for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def start(arguments, **more):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


class Line(L.LightningModule):
    """A weight that counts the steps; sends itself a signal in step `when`."""

    def __init__(self, when=None, signum=signal.SIGTERM):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))
        self.when, self.signum, self.validated = when, signum, []

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == self.when:
            os.kill(os.getpid(), self.signum)
        return -self.w.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def train_dataloader(self):
        return DataLoader(torch.zeros(10, 1))

    def val_dataloader(self):
        return DataLoader(torch.zeros(1, 1))

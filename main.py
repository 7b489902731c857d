"""Entry point of training: `python main.py fit --config configs/stage1.yaml …`, also `stair fit` and `lightning fit`.

Everything is Lightning's own command line (`--print_config`, `--help`, overlays by further `--config`) with what
`training/cli.py` adds.
"""

if __name__ == "__main__":  # before anything is imported that takes time
    import sys

    from stair.launch import prepare

    prepare(sys.argv[1:])

import warnings
from logging import LogRecord
from pathlib import Path

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_module

from datamodules.shards import ImageTextShards
from lightning_modules.contrastive import ContrastiveModule
from stair.launch import TRAINER, one_line_errors
from training.cli import Parser, StairCLI
from training.settings import keep_names

BASE = Path(__file__).parent / "configs" / "base.yaml"
# of the libraries to each other, once a run and rank; nothing a user could act on
_NOTICES = (
    r".*treespec, LeafSpec.*is deprecated",
    r".*It is recommended to use `self.log\(.*sync_dist=True",  # ours are reduced over ranks before they are logged
    r"FSDP2-wrapped module .* returned a view tensor",  # nothing is written into hidden states
    r"Sparse CSR tensor support is in beta",
    r"The `srun` command is available",
    r"The number of training batches .* is smaller than the logging interval",
    r"Found \d+ module\(s\) in eval mode",  # the frozen side of stage 2, meant so
)


def _is_no_advertisement(record: LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()


def main(args: list[str] | None = None) -> StairCLI:
    """Runs the command line.

    Args:
        args: the arguments after the command; those of the process if None.
    """
    for notice in _NOTICES:
        warnings.filterwarnings("ignore", notice)
    rank_zero_module.log.addFilter(_is_no_advertisement)
    keep_names()
    return StairCLI(
        ContrastiveModule,
        ImageTextShards,
        subclass_mode_model=True,
        auto_configure_optimizers=False,
        args=args,
        save_config_callback=None,  # see SaveSettings
        parser_class=Parser,
        parser_kwargs={
            "parser_mode": "omegaconf+",
            "allow_abbrev": False,
            **{name: {"default_config_files": [str(BASE)], "description": text} for name, text in TRAINER.items()},
        },
    )


def run() -> None:
    """The command line as a process of its own: a user's error is one line."""
    with one_line_errors(MisconfigurationException):
        main()


if __name__ == "__main__":
    run()

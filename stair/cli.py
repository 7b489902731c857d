"""The commands `stair` and `lightning`. Training lives in the checkout (main.py), not in the wheel.

Nothing heavy is imported before it is needed.
"""

import importlib.util
import sys
from pathlib import Path

from stair.errors import install
from stair.launch import TRAINER, prepare
from stair.plain import plain

_CHECKOUT = (
    f"needs a clone of the project, but this environment has only the package ({Path(__file__).parent}). Run "
    "`pip install -e '.[train]'` in a clone of the repository"
)


def main() -> None:
    """`stair COMMAND …`."""
    import warnings

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # here, as a library leaves filters alone
    command = (sys.argv[1:] or ["--help"])[0]
    if command in TRAINER:
        _train()
        return
    from stair.commands import COMMANDS, run

    if command == "consolidate" and importlib.util.find_spec("lightning_modules") is None:
        sys.exit(f"stair: `{command}` {_CHECKOUT}")
    try:
        run(sys.argv[1:] or ["--help"])
    except ModuleNotFoundError as error:
        sys.exit(f"stair {command}: package {error.name} is missing; {install(COMMANDS[command][2])}")
    except (ValueError, OSError) as error:
        sys.exit(f"stair {command}: {plain(str(error))}")


def lightning_main() -> None:
    """`lightning COMMAND …`: the trainer's commands are ours, all others belong to whoever else owns the name.

    Lightning installs no such command since 2.5.1; lightning-sdk does. `sys.argv` stays as it is: the DDP launcher starts
    the other ranks by running it again.
    """
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in TRAINER or command in ("", "-h", "--help"):
        main()
    elif importlib.util.find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli

        main_cli()
    elif command in ("run", "consolidate"):
        from lightning.fabric.cli import _main

        _main()
    else:
        main()


def _train() -> None:
    if importlib.util.find_spec("main") is None or importlib.util.find_spec("lightning_modules") is None:
        sys.exit(f"stair: training {_CHECKOUT}")
    if importlib.util.find_spec("lightning") is None:
        sys.exit("stair: lightning is not installed; run `pip install -e '.[train]'` in the checkout")
    prepare(sys.argv[1:])
    from main import run

    run()


if __name__ == "__main__":
    main()

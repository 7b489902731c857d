"""The settings of a command: what is checked and resolved before anything is built."""

import os
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from stair.errors import SettingError
from stair.files import keys_as_text
from stair.launch import launched_processes

HOME = "runs/default"  # a stage's folder where neither --run nor trainer.default_root_dir is given
_UNKNOWN = re.compile(r"\$(\w+|\{\w+\})")


def keep_names() -> None:
    """Keeps names in YAML mappings as typed: those of `{on: SPEC, 2024: SPEC}` are `on` and `2024`, not True and 2024."""
    default = get_loader("yaml")

    def load(text: str) -> Any:
        value = default(text)
        return default(keys_as_text(text)) if isinstance(value, dict | list) else value

    set_loader("omegaconf+", load, exceptions=(yaml.YAMLError,))


def expand_paths(config: Namespace) -> None:
    """Expands `~` and environment variables in every string of the settings. `pipe:` commands are left to their shell.

    SettingError if `run` or `trainer.default_root_dir` names a variable that is not set.
    """
    _expanded(config)
    for key in ("run", "trainer.default_root_dir"):
        value = config.get(key)
        if value and _UNKNOWN.search(str(value)):
            raise SettingError(f"{key} is {value!r}: the environment has no such variable", key)


def _expanded(value: Any) -> Any:
    if isinstance(value, Namespace):
        for key, inner in vars(value).items():
            value[key] = _expanded(inner)
        return value
    if isinstance(value, dict):
        return {key: _expanded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_expanded(inner) for inner in value)
    if isinstance(value, str) and not value.startswith("pipe:"):
        return os.path.expandvars(os.path.expanduser(value))
    return value


def match_launcher(trainer: Any) -> None:
    """Gives the trainer the processes that srun or torchrun started; SettingError if settings name another number."""
    if (launched := launched_processes()) is None:
        return
    launcher, nodes, processes = launched
    for name, unset, count in (("devices", ("auto", -1, "-1"), processes), ("num_nodes", (1,), nodes)):
        value = trainer[name]
        if value in unset:
            trainer[name] = count
        elif str(value) != str(count) and not (isinstance(value, list) and len(value) == count):
            started = f"{launcher} started {processes} processes on each of {nodes} nodes"
            raise SettingError(f"trainer.{name} is {value}, but {started}: remove the setting", f"trainer.{name}")


def check_data(command: str, config: Any) -> None:
    """Refuses a command that would do nothing: SettingError for missing data, or a limit that leaves no batch."""
    name, limit = {"fit": ("train", "train"), "validate": ("val", "val")}.get(command, ("test", command))
    if not config.data[name]:
        spec = "SHARDS" if name == "train" else "'{NAME: SHARDS}'"
        raise SettingError(f"{command} has no data: give --data.{name} {spec}", f"data.{name}")
    limit = f"limit_{limit}_batches"
    if config.trainer[limit] == 0:
        raise SettingError(f"trainer.{limit} is 0: {command} would do nothing", f"trainer.{limit}")
    if command == "predict" and not config.trainer.callbacks:
        rank_zero_warn("predict writes nothing without a callback that writes. Use `stair embed` to write embeddings")


def report_defaults(config: Any) -> None:
    """Logs `options` of an encoder that replace those of an earlier file and leave some out.

    A file that sets the encoder's `name` starts anew.
    """
    for encoder in ("image", "text"):
        name, earlier = None, dict[str, str]()
        for path in filter(None, config.get("config") or ()):  # None: settings in place of a path
            # not by OmegaConf: it refuses keys that come twice and `${...}` of another file, which the parser accepts
            settings = yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))
            for key in ("model", "init_args", "stair", encoder):
                settings = settings.get(key) if isinstance(settings, dict) else None
            settings = settings if isinstance(settings, dict) else {}
            if "name" in settings:
                name, earlier = settings["name"], {}
            earlier |= dict.fromkeys(settings.get("options") or {}, str(path))
        used = config.model.init_args.stair[encoder]
        if used.name in (name, None) and (unset := [key for key in earlier if key not in used.options]):
            replaced = ", ".join(dict.fromkeys(earlier[key] for key in unset))
            rank_zero_info(
                f"stair.{encoder}.options is {used.options}. It replaces that of {replaced}. These have the defaults of "
                f"{used.name}: {', '.join(unset)}. Repeat them in `options`"
            )


def stage_folder(config: Any, name: str) -> Path:
    """The folder that a command works in, of this name in a run; SettingError if it is given twice, or empty."""
    given = config.trainer.default_root_dir
    if config.run is None:
        return Path(given or HOME)
    if not config.run.strip():
        raise SettingError(f"--run is {config.run!r}: give a folder", "run")
    if given is not None:
        both = f"--run {config.run} and --trainer.default_root_dir {given}"
        raise SettingError(f"{both} both set the folder: pass only one", "trainer.default_root_dir")
    return Path(config.run) / name


def place_loggers(trainer: Any, home: Path, command: str) -> None:
    """Has loggers write into the stage's folder, unless theirs is given; those of validate, test and predict apart."""
    for logger in listed(trainer.logger):
        options = getattr(logger, "init_args", {})
        if options.get("save_dir", "") in (None, "."):
            options["save_dir"] = str(home)
        # that of base.yaml: its curves begin at step 0 too
        if command != "fit" and options.get("name") == "tensorboard":
            options["name"] = command


def listed(value: Any) -> list[Any]:
    """A setting that may be one value or a list of them, as a list."""
    return value if isinstance(value, list) else [value]

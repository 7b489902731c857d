"""Every setting of every command, as Markdown, from the parsers themselves: the pages of the site cannot go stale.

python docs/figures/reference.py      # prints both pages
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from jsonargparse import ArgumentParser, capture_parser

ROOT = Path(__file__).parents[2]
TRAINER = "Customize every aspect of training via flags"  # Lightning's own settings
_SAME = ("--config", "--help", "--print_config")  # of every command
#: an entry of `--help`: name, meaning, type, default
Entry = tuple[str, str, str, str]


def pages() -> dict[str, str]:
    """Pages of the site by their path below docs/."""
    with mock.patch.dict(os.environ, {"COLUMNS": "100000"}), mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        return {"reference/commands.md": _commands(), "reference/settings.md": "\n".join(_settings())}


def _commands() -> str:
    from stair.commands import reference

    text = re.sub(r"## Table of Contents\n.*?(?=\*\*Commands)", "", reference(), flags=re.DOTALL)
    text = re.sub(r"\*\*Training\*\*.*?(?=## stair prepare)", "", text, flags=re.DOTALL)  # see _settings
    return text.replace("# stair\n", "# Commands\n", 1)


def _settings() -> Iterator[str]:
    import lightning_modules
    from main import main

    yield "# Training settings\n\nGenerated from the parser of `lightning fit`, with the defaults of `configs/base.yaml`.\n"
    words = _subcommands(_quietly(lambda: capture_parser(lambda: main([]))))
    groups = {title: entries for title, entries in _groups(words["fit"].format_help()) if title != "Linked arguments"}
    for title in sorted(groups, key=lambda title: title == TRAINER):  # ours first
        prefixes = [name.lstrip("-").split(".")[:-1] for name, *_ in groups[title]] or [[]]
        heading = ".".join(max(prefixes, key=len)) or groups[title][0][0].lstrip("-")
        yield f"## {'run' if title == 'options' else heading}\n\n{_escaped(title) + '.' if title != 'options' else ''}\n"
        yield from _table(groups[title])
        if heading == "model":
            yield from _models(lightning_modules)
    own = {name for entries in groups.values() for name, *_ in entries}
    for word in ("validate", "test", "predict"):
        others = {entry[0]: entry for _, entries in _groups(words[word].format_help()) for entry in entries}
        yield f"## lightning {word}\n\nThe settings of `fit`, {_without(own - set(others))}.\n"
        yield from _table(entry for name, entry in others.items() if name not in own)


def _models(modules: ModuleType) -> Iterator[str]:
    """The settings of the model's classes: the first in full, of the others what differs."""
    first: dict[str, Entry] = {}
    yield "`…` stands for `--model.init_args.`.\n"
    for name in sorted(modules.__all__, key=lambda name: (not name.startswith("Stage"), name)):
        parser = ArgumentParser()
        parser.add_class_arguments(getattr(modules, name))
        entries = {
            entry[0].replace("--", "…", 1): entry for _, found in _groups(parser.format_help()) for entry in found
        }
        yield f"### {name}\n"
        if first:
            yield f"The settings of `Stage1`, {_without(set(first) - set(entries))}.\n"
        yield from _table((key, *rest) for key, (_, *rest) in entries.items() if first.get(key) != entries[key])
        first = first or entries


def _without(names: set[str]) -> str:
    return "without " + ", ".join(f"`{name}`" for name in sorted(names)) if names else "all of them"


def _groups(text: str) -> Iterator[tuple[str, list[Entry]]]:
    """The groups of a help text, each with its entries."""
    for block in re.split(r"\n\n+", text):
        title, _, body = block.partition("\n")
        if not title.endswith(":") or title.startswith(("usage", "default config", "subcommands")):
            continue
        entries = []
        for item in re.split(r"\n(?=  \S)", "\n" + body)[1:]:
            name, meaning = re.fullmatch(r"  (\S.*?)(?:(?: {2,}|\n\s*)(.*))?", item, re.DOTALL).groups()  # type: ignore[union-attr]
            meaning = " ".join((meaning or "").split())
            option = name.split(", --")[-1] if name.startswith("-") and ", --" in name and "+" not in name else name
            option = option.split()[0].rstrip(",") if name.startswith("-") else name
            option = option if option.startswith("-") or not name.startswith("-") else f"--{option}"
            if meaning == "Path to a configuration file." or option in _SAME or re.search(r"\.help$| --> ", option):
                continue
            facts = re.search(r" ?\((required, )?(?:type: (.*?))?(?:, )?(?:default: (.*))?\)$", meaning)
            required, kind, default = facts.groups() if facts else (None, "", "")
            meaning = meaning[: facts.start()] if facts else meaning
            default = (default or "").partition(", known subclasses")[0]
            kind = re.sub(r"<class '(.*)'>", r"\1", kind or "")
            kind = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " | "), kind)
            kind = re.sub(r"^Optional\[(.*)\]$", r"\1 | null", kind)
            entries.append((option, meaning, kind, "required" if required else default))
        yield title[:-1], entries


def _table(entries: Iterator[Entry] | list[Entry]) -> Iterator[str]:
    rows = list(entries)
    if rows:
        yield "| Setting | Type | Default | Meaning |\n|---|---|---|---|"
        for name, meaning, kind, default in rows:
            shown = default if default in ("", "required") else f"`{default}`"
            yield f"| `{name}` | {f'`{kind}`' if kind else ''} | {shown} | {_escaped(meaning)} |"
        yield ""


def _escaped(text: str) -> str:
    """Text whose parts outside of code are not read as markup."""
    text = re.sub(r":\w+:`([^`]*)`|``([^`]*)``", r"`\1\2`", text)
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]|])", r"\\\1", part.replace("<", "&lt;")) for part in parts[::2]]
    return "`".join(parts)


def _subcommands(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action.choices, dict)]
    return actions[0].choices if actions else {}  # type: ignore[return-value]


def _quietly(call: Callable[[], ArgumentParser]) -> ArgumentParser:
    """The call, without Lightning's advice on arguments that are given in Python."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


if __name__ == "__main__":
    print(*pages().values(), sep="\n")

"""The commands `stair` and `lightning`.

Nothing heavy is imported before it is needed: `stair --help` answers at once. Training lives in the checkout (main.py),
not in the wheel, which is for using trained models.
"""

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from stair.errors import install
from stair.launch import prepare
from stair.plain import plain

_TRAINER_WORDS = {
    "fit": "train a stage:           stair fit --config configs/stage1.yaml --data.train 'shards/train-{0000..0099}.tar'",
    "validate": "recall on validation sets, as during training",
    "test": "recall on test sets",
    "predict": "embeddings of the test sets, through the trainer",
}


class _Word(NamedTuple):
    """A word of the command that is a function, or a table of them by a second word.

    Signature and docstring are the command line (jsonargparse).
    """

    does: str
    module: str
    function: str
    extra: str = "search"  # what installs the packages that the module imports


_FUNCTIONS: dict[str, _Word] = {
    "embed": _Word("pictures or texts to sparse embeddings on disk", "stair.embed", "embed"),
    "index": _Word("make or change a search index of embeddings", "stair.index.commands", "index"),
    "explain": _Word("why two items match, as heat maps and words", "stair.explain_page", "explain_command"),
    "export": _Word("to SQLite, DuckDB, Qdrant, Milvus, ONNX, ...", "stair.export", "FORMATS"),
    "serve": _Word("a search page in the browser", "stair.serve.app", "serve"),
    "push": _Word("upload a model with its card to the hub", "stair.hub", "push"),
    "search": _Word("find documents by text, picture or weighted words", "stair.index.commands", "search"),
    "evaluate": _Word(
        "measure a model: retrieval, classification, words, cost", "stair.evaluate.open_set", "evaluate", "evaluate"
    ),
    "consolidate": _Word("a model of a training's checkpoint", "lightning_modules.consolidate", "consolidate", "train"),
    "doctor": _Word("what is wrong with shards, and the setting that mends it", "stair.data.doctor", "doctor", "train"),
    "prepare": _Word(
        "make shards of images and captions, COCO, Flickr, Hugging Face data, ...", "stair.data.prepare", "SOURCES"
    ),
}
_JOINER = "\u2060"  # invisible; jsonargparse reads `null` without it as no value, also where text is wanted
_NULL = re.compile(r"\A(--\w+=)?\s*null\s*\Z")
_HELP = """usage: stair WORD ...

STAIR: sparse, readable image and text embeddings.

{words}

`stair WORD --help` tells the settings of a word. `lightning fit|validate|test|predict ...` does the same for these four.
"""


def _help() -> str:
    words = _TRAINER_WORDS | {word: function.does for word, function in _FUNCTIONS.items()}
    return _HELP.format(words="\n".join(f"  {word:12}{what}" for word, what in words.items()))


def main() -> None:
    """`stair WORD …`."""
    import warnings

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # here, as a library leaves filters alone
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
    elif words[0] == "--version":
        from stair import __version__

        print(__version__)
    elif words[0] in _TRAINER_WORDS:
        _train()
    elif words[0] in _FUNCTIONS:
        _call(_FUNCTIONS[words[0]], words[0], words[1:])
    else:
        known = ", ".join([*_TRAINER_WORDS, *_FUNCTIONS])
        sys.exit(f"stair: no word {words[0]!r}; known are {known}. `stair --help` explains them")


def lightning_main() -> None:
    """`lightning WORD …`: the trainer's words are ours, all others belong to whoever else owns the name.

    Lightning installs no such command since 2.5.1; lightning-sdk does. `sys.argv` stays as it is: the DDP launcher starts
    the other ranks by running it again.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in _TRAINER_WORDS or word in ("", "-h", "--help"):
        main()
    elif importlib.util.find_spec("lightning_sdk") is not None:
        from lightning_sdk.cli.entrypoint import main_cli

        main_cli()
    elif word in ("run", "consolidate"):
        from lightning.fabric.cli import _main

        _main()
    else:
        main()


def _call(word: _Word, name: str, arguments: list[str]) -> None:
    """Runs a function with the arguments that its signature describes; what a user did wrong is one line, no trace."""
    if importlib.util.find_spec(word.module.partition(".")[0]) is None:
        sys.exit(f"stair: `{name}` needs the project's checkout. Clone the repository and run `make setup` there")
    from jsonargparse import auto_cli, get_loader, set_loader
    from yaml import YAMLError

    set_loader("yaml", _as_typed(get_loader("yaml")), exceptions=(YAMLError,))
    try:
        function = getattr(importlib.import_module(word.module), word.function)
    except ModuleNotFoundError as error:
        sys.exit(f"stair {name}: package {error.name} is missing; {install(word.extra)}")
    description = word.does if isinstance(function, dict) else None  # a function's docstring describes it
    words = _null_as_typed(function, _spelled_out(function, arguments))
    typed: Any = {key: _as_given(each) for key, each in function.items()} if description else _as_given(function)
    try:
        auto_cli(typed, args=words, prog=f"stair {name}", as_positional=True, description=description)
    except (ValueError, OSError) as error:
        sys.exit(f"stair {name}: {plain(str(error))}")


def _as_typed(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """The loader, except that `#sunset` and `~` stay as typed: YAML reads them as no value."""
    return lambda text: text if (value := load(text)) is None else value


def _null_as_typed(function: Callable[..., Any] | dict[str, Callable[..., Any]], arguments: list[str]) -> list[str]:
    """Marks `null` where text is wanted; for numbers, as of `--seed null`, it is no value."""
    import inspect

    functions = list(function.values()) if isinstance(function, dict) else [function]
    parameters = [parameter for each in functions for parameter in inspect.signature(each).parameters.values()]
    texts = {f"--{p.name}" for p in parameters if "str" in str(p.annotation) or "Path" in str(p.annotation)}
    marked = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        option = argument.partition("=")[0] if argument.startswith("--") else before
        is_text = not option.startswith("--") or option in texts
        marked.append(_NULL.sub(rf"\g<0>{_JOINER}", argument) if is_text else argument)
    return marked


def _as_given(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with `null` for the text that stands in its place on the command line."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        marked = {key: value for key, value in given.items() if str(value).endswith(_JOINER)}
        return function(**{**given, **{key: type(value)(str(value)[:-1]) for key, value in marked.items()}})

    return call


def _spelled_out(function: Callable[..., Any] | dict[str, Callable[..., Any]], arguments: list[str]) -> list[str]:
    """Arguments as jsonargparse takes them: it wants `--json=true` for a flag, and a list as one word."""
    import inspect
    import json

    functions = list(function.values()) if isinstance(function, dict) else [function]
    parameters = [parameter for each in functions for parameter in inspect.signature(each).parameters.values()]
    flags = {f"--{parameter.name}" for parameter in parameters if parameter.annotation is bool}
    following = [*arguments[1:], "--"]
    words = [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in zip(arguments, following, strict=False)
    ]
    needed = [] if isinstance(function, dict) else [p for p in parameters if p.default is p.empty]
    if needed and needed[-1].annotation == list[str]:
        if words and words[0].split("=")[0] in {f"--{parameter.name}" for parameter in parameters}:
            first = " ".join(parameter.name.upper() for parameter in needed)
            sys.exit(f"{words[0]} stands before {first}: which words are whose cannot be told; give {first} first")
        count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
        before = len(needed) - 1
        words = [*words[:before], json.dumps(words[before:count]), *words[count:]] if count > before else words
    return words


def _train() -> None:
    if importlib.util.find_spec("main") is None or importlib.util.find_spec("lightning_modules") is None:
        sys.exit(
            "stair: training needs the project's checkout, this is the package alone. Clone the repository and run "
            "`make setup` there"
        )
    if importlib.util.find_spec("lightning") is None:
        sys.exit("stair: lightning is not installed; run `pip install -e '.[train]'` in the checkout")
    prepare(sys.argv[1:])
    from main import run

    run()


if __name__ == "__main__":
    main()

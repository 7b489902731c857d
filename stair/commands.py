"""The commands of `stair` but for training: functions, whose signatures and docstrings are the command line."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import io
import json as json_format
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, UnusedCliTokensError

from stair import __version__
from stair.launch import TRAINER
from stair.plain import plain

# description, module:function or a table of these by a second word, extra that installs the packages it imports
COMMANDS: dict[str, tuple[str, str | dict[str, str], str]] = {
    "prepare": (
        "create shards from folders, tables, COCO, Flickr, Hugging Face data sets and others",
        {
            "folder": "stair.data.prepare.sources:folder",
            "coco": "stair.data.prepare.sources:karpathy",
            "flickr": "stair.data.prepare.sources:karpathy",
            "cc": "stair.data.prepare.img2dataset:cc",
            "datasets": "stair.data.prepare.sources:datasets",
            "classes": "stair.data.prepare.sources:classes",
            "emoji": "stair.data.prepare.emoji:emoji",
        },
        "prepare",
    ),
    "doctor": ("report problems in shards, with their remedies", "stair.data.doctor:doctor", "train"),
    "embed": ("write sparse embeddings of images or texts", "stair.embed:embed", "search"),
    "index": ("create or change a search index", "stair.index.commands:index", "search"),
    "search": ("find documents by text, image or weighted words", "stair.index.commands:search", "search"),
    "explain": ("show why two items match: terms and heat maps", "stair.explain_page:explain_command", "search"),
    "serve": ("serve a search page for the browser", "stair.serve.app:serve", "search"),
    "evaluate": (
        "measure retrieval, classification, sparsity and search cost",
        "stair.evaluate.open_set:evaluate",
        "evaluate",
    ),
    "calibrate": (
        "find the score below which no image matches a text",
        "stair.evaluate.calibrate:calibrate",
        "evaluate",
    ),
    "dictionary": ("show what each term of a model means", "stair.evaluate.dictionary:dictionary", "evaluate"),
    "export": (
        "export to SQLite, DuckDB, PostgreSQL, Qdrant, Milvus, a web page, ONNX, ...",
        {
            "sqlite": "stair.export.sql:sqlite",
            "duckdb": "stair.export.sql:duckdb",
            "postgres": "stair.export.sql:postgres",
            "qdrant": "stair.export.vectors:qdrant",
            "milvus": "stair.export.vectors:milvus",
            "web": "stair.export.web:web",
            "onnx": "stair.export.onnx:onnx",
            "sentence-transformers": "stair.export.sentence_transformers:sentence_transformers",
        },
        "export",
    ),
    "push": ("upload a model with its card to the Hugging Face Hub", "stair.hub:push", "search"),
    "consolidate": ("convert a checkpoint to a model folder", "lightning_modules.consolidate:consolidate", "train"),
}
_EPILOGUE = "Exit codes: 0 success, 1 error (doctor: training would stop), 2 invalid option, 70 watchdog, 128 + signal."
_COMPLETION = 'Shell completion: eval "$(stair --completion bash)" (or zsh, fish)'


def run(words: list[str]) -> None:
    """Runs a command; an option that cannot be used is one line and exit status 2. `--completion SHELL` prints a script."""
    command, *args = words
    try:
        if command == "--completion":
            print(_command_line("").generate_completion(shell=args[0] if args else "bash"))  # type: ignore[arg-type]
        else:
            _command_line(command).meta(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        name = f"stair {command}" if command in COMMANDS else "stair"
        print(f"{name}: {plain(_message(error))} `{name} --help` lists what is allowed", file=sys.stderr)
        sys.exit(2)


def _message(error: CycloptsError) -> str:
    if isinstance(error, MissingArgumentError) and error.argument is not None and not error.keyword:
        return f"{error.argument.name} is missing."
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or [])}: too many arguments."
    return str(error)


def reference() -> str:
    """All commands with their settings, as Markdown."""
    return _command_line("").generate_docs()


def _command_line(chosen: str) -> App:
    """The command line, with the settings of the chosen command, or of all. `--quiet` and `--json` belong to every one."""
    typed = Parameter(negative=(), consume_multiple=1, name_transform=str)
    app = App(
        "stair",
        help="STAIR: sparse, readable image and text embeddings.",
        help_format="plaintext",
        help_epilogue=_EPILOGUE if chosen in COMMANDS else f"{_EPILOGUE}\n{_COMPLETION}",
        version=__version__,
        default_parameter=typed,
        result_action="return_value",
    )
    if _is_there("main"):  # a wheel has no trainer
        for place, (name, about) in enumerate(TRAINER.items()):
            app.command(App(name, help=about, group="Training", sort_key=place))
    for place, (name, (about, target, _)) in enumerate(COMMANDS.items()):
        if isinstance(target, str) and not _is_there(target):
            continue
        if chosen not in (name, ""):
            app.command(App(name, help=about, sort_key=place))
        elif isinstance(target, dict):
            app.command(table := App(name, help=about, sort_key=place, default_parameter=typed))
            for number, (word, function) in enumerate(target.items()):
                table.command(_command(function), name=word, sort_key=number)
        else:
            app.command(_command(target), name=name, sort_key=place)

    @app.meta.default
    def run(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        quiet: bool = False,
        json: bool = False,
    ) -> None:
        """Runs a command.

        Args:
            quiet: print only errors.
            json: print only the result, as JSON.
        """
        if quiet or json:
            os.environ["TQDM_DISABLE"] = "1"
        with contextlib.redirect_stdout(io.StringIO()) if quiet or json else contextlib.nullcontext():
            result = app(tokens, exit_on_error=False, print_error=False)
        if json and isinstance(result, tuple):
            print(*(json_format.dumps(each, default=str) for each in result), sep="\n")
        elif json and result is not None:
            print(json_format.dumps(result, indent=1, default=str))
        if isinstance(result, dict) and result.get("stops"):
            raise SystemExit(1)

    return app


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _command(target: str) -> Callable[..., Any]:
    """The function `module:name`, imported when it is called. Parameters with a default are options."""
    module, _, name = target.partition(":")
    described = _described(module, name)

    @functools.wraps(described)
    def call(*args: Any, **options: Any) -> Any:
        if sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ:
            print("loading ...", file=sys.stderr, flush=True)  # imports alone take seconds
        return getattr(importlib.import_module(module), name)(*args, **options)

    signature = inspect.signature(described)
    parameters = [
        each.replace(kind=each.POSITIONAL_ONLY if each.default is each.empty else each.KEYWORD_ONLY)
        for each in signature.parameters.values()
    ]
    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    # without the line breaks of paragraphs and arguments, as the help has lines of its own
    call.__doc__ = re.sub(r"(?<![\n:])\n( {8,})?(?=[^\s-])", " ", inspect.cleandoc(described.__doc__ or ""))
    return call


def _described(module: str, name: str) -> Callable[..., Any]:
    """A function with the signature and docstring of another, from the source: importing torch takes seconds."""
    if module.startswith("stair.data.prepare"):  # needs no torch
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
    root, *inner = module.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], *inner).with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    (node,) = (each for each in body if isinstance(each, ast.FunctionDef) and each.name == name)
    light = {*sys.stdlib_module_names, "cyclopts"}
    imports = [each for each in body if isinstance(each, ast.ImportFrom) and (each.module or "").split(".")[0] in light]
    node.body, space = node.body[:1], dict[str, Any]()
    exec(compile(ast.Module([*imports, node], []), module, "exec"), space)
    return space[name]  # type: ignore[no-any-return]

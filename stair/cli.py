"""The commands `stair` and `lightning`.

Nothing heavy is imported before it is needed. Training lives in the checkout (main.py), not in the wheel.
"""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from stair.errors import install
from stair.launch import prepare
from stair.messages import reworded
from stair.plain import one_line, plain

TRAINER = {
    "fit": "train a stage: stair fit --config configs/stage1.yaml --data.train 'shards/train-{0000..0099}.tar'",
    "validate": "measure recall on the validation sets, as in training",
    "test": "measure recall on the test sets",
    "predict": "write embeddings of the test sets with the trainer",
}
# description, module, function or table of functions by a second word, extra that installs the packages it imports
_COMMANDS = {
    "embed": ("write sparse embeddings of images or texts", "stair.embed", "embed", "search"),
    "index": ("create or change a search index", "stair.index.commands", "index", "search"),
    "explain": ("show why two items match: terms and heat maps", "stair.explain_page", "explain_command", "search"),
    "export": (
        "export to SQLite, DuckDB, PostgreSQL, Qdrant, Milvus, a web page, ONNX, ...",
        "stair.export",
        "FORMATS",
        "search",
    ),
    "serve": ("serve a search page for the browser", "stair.serve.app", "serve", "search"),
    "push": ("upload a model with its card to the Hugging Face Hub", "stair.hub", "push", "search"),
    "search": ("find documents by text, image or weighted words", "stair.index.commands", "search", "search"),
    "evaluate": (
        "measure retrieval, classification, sparsity and search cost",
        "stair.evaluate.open_set",
        "evaluate",
        "evaluate",
    ),
    "dictionary": ("show what each term of a model means", "stair.evaluate.dictionary", "dictionary", "evaluate"),
    "consolidate": ("convert a checkpoint to a model folder", "lightning_modules.consolidate", "consolidate", "train"),
    "doctor": ("report problems in shards, with their remedies", "stair.data.doctor", "doctor", "train"),
    "prepare": (
        "create shards from folders, tables, COCO, Flickr, Hugging Face data sets and others",
        "stair.data.prepare",
        "SOURCES",
        "search",
    ),
}
_CHECKOUT = (
    f"needs a clone of the project, but this environment has only the package ({Path(__file__).parent}). Run "
    "`pip install -e '.[train]'` in a clone of the repository"
)
_MARK = "\u2060"  # invisible; jsonargparse reads `null` without it as no value, also where text is expected


def main() -> None:
    """`stair COMMAND …`."""
    import warnings

    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")  # here, as a library leaves filters alone
    command, *args = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        lines = {name: about for name, (about, module, *_) in _COMMANDS.items() if _is_there(module)}
        lines = {**TRAINER, **lines} if _is_there("main") else lines  # a wheel has no trainer
        print("usage: stair COMMAND ...\n\nSTAIR: sparse, readable image and text embeddings.\n")
        print("\n".join(f"  {name:12}{about}" for name, about in lines.items()))
        print("\n`stair COMMAND --help` shows its settings. `--quiet` prints only errors, `--json` only the result.")
        print(
            "Exit codes: 0 success, 1 error (`doctor`: training would stop), 2 invalid option, 70 watchdog, 128 + signal.\n"
        )
    elif command == "--version":
        from stair import __version__

        print(__version__)
    elif command == "--completion":
        _print_completion(args[0] if args else "bash")
    elif command in TRAINER:
        _train()
    elif command in _COMMANDS:
        try:
            _call(command, args)
        except ModuleNotFoundError as error:
            sys.exit(f"stair {command}: package {error.name} is missing; {install(_COMMANDS[command][3])}")
    else:
        known = ", ".join([*TRAINER, *_COMMANDS])
        sys.exit(f"stair: unknown command {command!r}; allowed: {known}. See `stair --help`")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


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


def _call(command: str, args: list[str]) -> None:
    """Runs a function whose signature and docstring are the command line; an error of the user is one line."""
    about, module, name, _ = _COMMANDS[command]
    if not _is_there(module):
        sys.exit(f"stair: `{command}` {_CHECKOUT}")
    if {"--quiet", "--json"} & set(args):
        os.environ["TQDM_DISABLE"] = "1"
    import inspect

    from jsonargparse import ArgumentParser, auto_cli, get_loader, set_loader
    from yaml import YAMLError

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            self.exit(2, f"stair {command}: {plain(reworded(self, message))}\n")

        def format_help(self, *args: Any) -> str:
            for action in self._actions:
                if not action.option_strings and action.metavar == "[ITEM,...]":
                    action.metavar = f"{action.dest.upper()} ..."
            return re.sub(r"<class\s+'Path'>", "path", super().format_help(*args))

    default = get_loader("yaml")  # reads `#sunset` and `~` as no value
    set_loader("yaml", lambda text: text if (value := default(text)) is None else value, exceptions=(YAMLError,))
    function: Any = _described(module, name)
    table = isinstance(function, dict)
    function = {key: _for_scripts(each) for key, each in function.items()} if table else _for_scripts(function)
    functions = list(function.values()) if table else [function]
    parameters = [p for each in functions for p in inspect.signature(each).parameters.values()]
    flags = {f"--{p.name}" for p in parameters if p.annotation is bool}
    args = [
        f"{arg}=true" if arg in flags and following.startswith("--") else arg
        for arg, following in zip(args, [*args[1:], "--"], strict=False)
    ]
    args = args if table else _with_list(args, parameters)
    # of a number, as in `--seed null`, it is no value
    texts = {f"--{p.name}" for p in parameters if re.search("str|Path", str(p.annotation))}
    options = [
        arg.split("=")[0] if arg.startswith("--") else last for last, arg in zip(["", *args], args, strict=False)
    ]
    is_text = [not option.startswith("--") or option in texts for option in options]
    marked = [re.sub(r"\A((--\w+=)?\s*null\s*)\Z", rf"\1{_MARK}", arg) for arg in args]
    args = [text if marks else arg for text, marks, arg in zip(marked, is_text, args, strict=True)]
    typed: Any = {key: _unmarked(each) for key, each in function.items()} if table else _unmarked(function)
    try:
        description = about if table else None  # a function's docstring describes it
        auto_cli(typed, args=args, prog=f"stair {command}", parser_class=Parser, description=description)
    except (ValueError, OSError) as error:
        sys.exit(f"stair {command}: {plain(str(error))}")


def _described(module: str, name: str) -> Any:
    """A function with the signature and docstring of another, or a table of such functions, by reading its source.

    Importing a module that imports torch takes seconds; that is left to the call.
    """
    root, *inner = module.split(".")
    spec = importlib.util.find_spec(root)
    assert spec is not None and spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0], *inner)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _stand_in(module, node, body)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Dict):
            sources = {a.name: n.module or "" for n in body if isinstance(n, ast.ImportFrom) for a in n.names}
            items = zip(node.value.keys, node.value.values, strict=True)
            names = {ast.literal_eval(key): ast.unparse(value) for key, value in items if key is not None}
            return {key: _described(sources[value], value) for key, value in names.items()}
    return getattr(importlib.import_module(module), name)


def _stand_in(module: str, node: ast.FunctionDef, body: list[ast.stmt]) -> Callable[..., Any]:
    def call(**given: Any) -> Any:
        return getattr(importlib.import_module(module), name)(**given)

    name, light = node.name, sys.stdlib_module_names
    if node.args.kwarg is not None:  # jsonargparse looks into the body for what these are
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
    imports = [n for n in body if isinstance(n, ast.ImportFrom) and (n.module or "").partition(".")[0] in light]
    node.body = node.body[:1]
    space: dict[str, Any] = {"__name__": "stair"}  # jsonargparse would import the module itself
    exec(compile(ast.Module([*imports, node], []), module, "exec"), space)
    return functools.update_wrapper(call, space[name])


def _for_scripts(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the setting `quiet`, and `json` if it returns something. A result with `stops` exits with 1."""
    import inspect
    import json as json_format

    signature = inspect.signature(function)
    about = {"quiet": "print only errors."}
    if signature.return_annotation is not None:
        about["json"] = "print only the result, as JSON."
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool) for name in about]
    parameters = sorted([*signature.parameters.values(), *more], key=lambda parameter: parameter.kind)

    @functools.wraps(function)
    def call(*, quiet: bool = False, json: bool = False, **given: Any) -> None:
        if (source := given.get("model") or given.get("captions")) and not (quiet or json) and sys.stderr.isatty():
            print(f"loading {one_line(str(source))} ...", file=sys.stderr, flush=True)  # imports alone take seconds
        with contextlib.redirect_stdout(io.StringIO()) if quiet or json else contextlib.nullcontext():
            result = function(**given)
        if json:
            if isinstance(result, tuple):
                print(*(json_format.dumps(each, default=str) for each in result), sep="\n")
            else:
                print(json_format.dumps(result, indent=1, default=str))
        if isinstance(result, dict) and result.get("stops"):
            raise SystemExit(1)

    call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    lines = "".join(f"        {name}: {text}\n" for name, text in about.items())
    call.__doc__ = (function.__doc__ or "").replace("    Args:\n", f"    Args:\n{lines}")
    return call


def _print_completion(shell: str) -> None:
    from jsonargparse import auto_parser

    if importlib.util.find_spec("shtab") is None:
        sys.exit(f"stair --completion: package shtab is missing; {install('completion')}")
    if shell not in ("bash", "zsh", "tcsh"):
        sys.exit(f"stair --completion: unknown shell {shell!r}; use bash, zsh or tcsh")
    functions = {}
    for name, (_, module, function, _) in _COMMANDS.items():
        with contextlib.suppress(ModuleNotFoundError):  # no completion for what is not installed
            functions[name] = getattr(importlib.import_module(module), function)
    print(auto_parser(functions, as_positional=True, prog="stair").get_completion_script(f"shtab-{shell}"))


def _unmarked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with `null` for the text that is marked on the command line."""

    @functools.wraps(function)
    def call(**given: Any) -> Any:
        marked = {key: value for key, value in given.items() if str(value).endswith(_MARK)}
        return function(**{**given, **{key: type(value)(str(value)[:-1]) for key, value in marked.items()}})

    return call


def _with_list(args: list[str], parameters: list[Any]) -> list[str]:
    """The arguments of a last positional parameter that is a list as one, which jsonargparse expects."""
    import json

    needed = [p for p in parameters if p.default is p.empty]
    if not needed or needed[-1].annotation != list[str]:
        return args
    if args and args[0].split("=")[0] in {f"--{p.name}" for p in parameters}:
        first = " ".join(p.name.upper() for p in needed)
        sys.exit(f"{args[0]} is before {first}, so the end of the list is unknown; put {first} first")
    end = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    start = len(needed) - 1
    return [*args[:start], json.dumps(args[start:end]), *args[end:]] if end > start else args


def _train() -> None:
    if not (_is_there("main") and _is_there("lightning_modules")):
        sys.exit(f"stair: training {_CHECKOUT}")
    if importlib.util.find_spec("lightning") is None:
        sys.exit("stair: lightning is not installed; run `pip install -e '.[train]'` in the checkout")
    prepare(sys.argv[1:])
    from main import run

    run()


if __name__ == "__main__":
    main()

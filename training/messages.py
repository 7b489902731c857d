"""Errors of the command line of training as one line: what was given, what is allowed, what to do."""

import difflib
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
_KINDS |= {"list": "a list such as [A, B]", "dict": "names and values, such as '{{NAME: {value}}}'"}
_NOISE = r"Does not validate against any of the Union subtypes|(Subtypes|Given value|Given value type): .*|Errors:"


def reworded(parser: ArgumentParser, message: str) -> str:
    """The message of a parser of jsonargparse, without its keys and names of Python types."""
    if found := re.match(r'Parser key "([^"]+)".*?(?:Got value|Given value): ?([^\n]*)', message, re.DOTALL):
        kinds = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\](?=\.|\n))", message)
        allowed = [_KINDS.get(kind, kind).format(value=found[2]) or f"one of {literals}" for kind, literals in kinds]
        reason = f"give {' or '.join(dict.fromkeys(allowed))}"
        if "class_path" in message or not kinds:
            reason = re.sub(rf"{_NOISE}|Parser key .*|\s*- Expected a .*", "", message)
        entry = re.search(r"NestedArg\(key='(.+?)'", message)  # one entry of a dictionary was given
        message = f"{_typed(found[1])}{f'.{entry[1]}' if entry else ''} {found[2]}: {reason}"
    elif found := re.match(r"unrecognized arguments: (--[^\s=]+)?(.*)", message):
        message = _unknown(found[1], parser) if found[1] else f"{found[2]}: one argument too many"
    elif found := re.match(r"Subcommand '(\w+)' does not accept option '(.+)'", message):
        commands = next(each.choices for each in parser._actions if hasattr(each, "_name_parser_map"))
        message = _unknown(f"--{found[2]}", commands[found[1]])  # type: ignore[index]
    elif found := re.match(r"Group '(\w+)' does not accept option '(.+)'", message):
        message = f"{found[1]}.{found[2]} is not a setting; `--print_config` lists all"
    elif found := re.match(r"argument (--[^\s/:]+)\S*: expected one argument", message):
        message = f"{found[1]}: give a value after it"
    return " ".join(re.sub(r'Parser key "(.*?)":', r"--\1:", message).split())


def _unknown(option: str, parser: ArgumentParser) -> str:
    typed = _typed(option[2:])
    names = [name[2:] for name in parser._option_string_actions if not name.endswith("+")]
    close = _close(option[2:], names, typed.removesuffix(option[2:]))
    return f"{typed} is not an option{close or ';'} `--help` lists them"


def _typed(key: str) -> str:
    """The option as typed: jsonargparse parses those of a class without the names before."""
    options = [arg.partition("=")[0] for arg in sys.argv if arg.startswith("--")]
    return next((option for option in options if f".{option[2:]}".endswith(f".{key}")), f"--{key}")


def _close(given: str, names: Iterable[str], prefix: str = "") -> str:
    return "".join(f"; did you mean {prefix}{name}?" for name in difflib.get_close_matches(given, names, 1))

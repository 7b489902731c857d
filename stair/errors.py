"""Exceptions of the project. Each names the setting or the file at fault, so that callers need not read the message."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class StairError(ValueError):
    """An input that cannot be used. The command line prints its message without a traceback."""


class SettingError(StairError):
    """A setting that is missing, out of range, or in conflict with another one.

    Args:
        message: the value given, the values allowed, what to do.
        setting: dotted name as on the command line, such as `data.global_batch_size`.
    """

    def __init__(self, message: str, setting: str) -> None:
        super().__init__(message)
        self.setting = setting

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.setting)


def require(holds: bool, name: str, value: object, allowed: str) -> None:
    """Checks a setting, by its dotted name; SettingError unless it holds."""
    if not holds:
        raise SettingError(f"{name} is {value!r}. Allowed: {allowed}", name)


class FileError(StairError):
    """A file or folder that is missing, damaged, or of another format.

    Args:
        message: what is wrong with it, what to do.
        path: the file or folder.
    """

    def __init__(self, message: str, path: Path | str) -> None:
        super().__init__(message)
        self.path = Path(path)

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.path)


class TrainingError(StairError, RuntimeError):
    """A training that cannot go on, whatever is restarted: weights or losses are not finite, or embeddings are empty."""


class EngineError(StairError):
    """An error of other software that a command calls: its name, and the reason it reported."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine}: {reason}")
        self.engine = engine


class MissingPackageError(StairError):
    """A package that only some commands need is not installed: its name on the package index, and our extra with it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"package {package} is missing; {install(extra)}")
        self.package, self.extra = package, extra


def install(extra: str) -> str:
    """What to do where packages of an extra are missing. The project is on no package index."""
    return f"run `pip install -e '.[{extra}]'` in the checkout"


def import_extra(module: str, package: str, extra: str) -> Any:
    """Imports a module of a package that is not always installed.

    Raises:
        MissingPackageError: if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(package, extra) from error


@contextmanager
def errors_name(what: str) -> Iterator[None]:
    """Begins the messages of errors inside it with `what`, such as "source 'coco'"; nothing if empty."""
    try:
        yield
    except (ValueError, OSError) as error:
        if what:
            error.args = (f"{what}: {error}",)
        raise

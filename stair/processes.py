"""Processes that are started by a fork server or anew."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_main() -> Iterator[None]:
    """Processes started meanwhile do not import the main module: that takes seconds, or runs an unguarded script.

    What they are given must not be defined in the main module.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main

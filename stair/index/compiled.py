"""Loops that numba compiles. The compiled code is cached on disk, so only their first use on a machine takes long."""

import functools
import os
import sys
from typing import Any

from stair.errors import import_extra


@functools.cache
def njit() -> Any:
    """numba's `njit`. On a terminal, one line states that loops are being compiled; none if they are in the cache.

    Raises:
        MissingPackageError: if numba is not installed.
    """
    numba: Any = import_extra("numba", "numba", "search")
    events: Any = import_extra("numba.core.event", "numba", "search")

    class Notice(events.Listener):
        stated = False

        def on_start(self, event: Any) -> None:
            ours = event.data["dispatcher"].py_func.__module__.startswith("stair.")
            if ours and not self.stated and sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ:
                print("compiling the search, once per machine, for up to a minute ...", file=sys.stderr, flush=True)
                self.stated = True

        def on_end(self, event: Any) -> None:
            pass

    events.register("numba:compile", Notice())
    return numba.njit

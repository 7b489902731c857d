"""Random tars for tests of damaged input, and how many cases a run tries."""

import io
import json
import os
import tarfile

import pytest
from hypothesis import HealthCheck, Phase, settings
from PIL import Image

from tests.support.shards import encode

#: so many times the cases in the slow form
MORE = int(os.environ.get("STAIR_FUZZ", "20"))


NEVER_SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


def fuzz(cases, slow):
    """The settings of a test: always the same few cases, or many new ones."""
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    how = {"deadline": None, "suppress_health_check": NEVER_SLOW, "database": None, "phases": phases}
    return settings(max_examples=MORE * cases if slow else cases, derandomize=not slow, **how)


BOTH = pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)])


#: the colour of sample n, and the caption that says so: a pairing can be checked after any damage
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)]


def coloured(samples: int) -> dict[str, bytes]:
    members = {}
    for n in range(samples):
        members[f"{n:03d}.png"] = encode(Image.new("RGB", (6, 5), COLOURS[n % 6]))
        members[f"{n:03d}.json"] = json.dumps({"caption": f"colour {n % 6}"}).encode()
    return members


def tar_of(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


WHOLE = tar_of(coloured(9))

"""Coverage-guided fuzzing (atheris) of the functions that read untrusted bytes.

pip install atheris && python -m benchmarks.fuzz FOLDER --seconds 60      # a table, and FOLDER/fuzz.json

Each target has its own process and starts from valid examples. Inputs that reach new code are kept in FOLDER/NAME. A target
may raise the errors that it names. Any other error ends its process, and the input is kept in the same folder.
"""

import argparse
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Target = Callable[[bytes], None]


def _tar(folder: Path) -> tuple[Target, list[bytes]]:
    """A shard: members, samples, captions."""
    from stair.data.samples import captions
    from stair.data.tars import read_samples, walk
    from stair.errors import FileError
    from tests.support.fuzzing import WHOLE

    path = folder / "a.tar"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(FileError):
            for sample in read_samples(str(path)):
                with suppress(ValueError):
                    captions(sample.members)
        with suppress(ValueError):
            list(walk(str(path), compressed=True))

    return target, [WHOLE[:4096], WHOLE[:1600]]


def _captions(folder: Path) -> tuple[Target, list[bytes]]:
    """The JSON and text of a sample, to tokens."""
    from stair import Vocabulary
    from stair.data.samples import captions
    from tests.support.models import write_vocabulary

    vocabulary = Vocabulary(write_vocabulary(folder / "vocab.txt"))

    def target(data: bytes) -> None:
        for kind in ("json", "txt"):
            with suppress(ValueError):
                vocabulary.tokenize(captions({kind: data}), 12)

    return target, [b'{"captions": ["a red dog", "two cats"]}', b'{"caption": "x"}', "naïve 犬".encode()]


def _query(folder: Path) -> tuple[Target, list[bytes]]:
    """What people type into a search: words, weights, conditions; halves of characters too."""
    from stair import SparseIndex
    from stair.index.query import parse_words
    from tests.support.rows import embeddings

    index = SparseIndex.build(folder / "i", embeddings(9, metadata=[{"n": n, "t": "x"} for n in range(9)]))

    def target(data: bytes) -> None:
        typed, _, where = data.decode("utf-8", "surrogateescape").partition("\0")  # as on a command line
        with suppress(ValueError):
            index.search(words=parse_words(typed), where=[where] if where else [], k=5)

    return target, [b"dog:2 beach -people\0n<=3", b"w9:-1e9\0t!=x", "\u00e9\u72ac".encode()]


def _index(folder: Path) -> tuple[Target, list[bytes]]:
    """The file of an index, with a checksum that agrees, as a stranger could write it."""
    import numpy as np

    from stair import SparseIndex
    from stair.index.storage import FILE, State
    from tests.support.rows import V, embeddings

    path = folder / "i" / FILE
    SparseIndex.build(folder / "i", embeddings(5, metadata=[{"n": n, "t": f"t{n % 2}"} for n in range(5)]))
    State.check_digest = lambda _: None  # type: ignore[method-assign]

    def target(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(ValueError):
            index = SparseIndex.open(folder / "i")
            index.verify()
            index.search(np.ones((1, V), np.float32), 5)

    return target, [path.read_bytes()]


def _model(folder: Path) -> tuple[Target, list[bytes]]:
    """The description in a model's folder."""
    from stair.model import StairConfig
    from stair.towers import read_description

    good = {"format": 1, "family": "stair", "vocabulary_fingerprint": "0", "training": {}}
    good["model"] = {"vocabulary": "vocab.txt", "image": {"name": "x", "options": {}}, "text": {"max_tokens": 9}}
    (folder / "model.safetensors").touch()

    def target(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        with suppress(ValueError):
            described = read_description(folder)["model"]
            with suppress(TypeError, KeyError, AttributeError):  # `from_pretrained` makes a ValueError of them
                StairConfig.from_dict(described)

    return target, [json.dumps(good).encode()]


def _request(folder: Path) -> tuple[Target, list[bytes]]:
    """A picture of a request: decoded, or refused."""
    from PIL import Image

    from stair.images import decode_image

    examples = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF"):
        Image.new("RGB", (5, 4), "red").save(file := io.BytesIO(), kind)
        examples.append(file.getvalue())

    def target(data: bytes) -> None:
        with suppress(ValueError):
            decode_image(data, max_pixels=1_000_000)

    return target, examples


TARGETS = {
    "shards": _tar,
    "captions": _captions,
    "queries": _query,
    "index": _index,
    "models": _model,
    "pictures": _request,
}


def inside(name: str, folder: Path, seconds: int) -> None:
    """Fuzzes one target; ends the process."""
    import atheris

    # numba cannot compile what is instrumented
    with atheris.instrument_imports(include=["datamodules", "stair"], exclude=["stair.index.scoring"]):
        target, examples = TARGETS[name](folder)
    kept = folder / "kept"
    kept.mkdir()
    for n, example in enumerate(examples):
        target(example)  # what is compiled at the first call takes longer than any input may
        (kept / f"example-{n}").write_bytes(example)
    limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=4096", "-max_len=8192"]
    atheris.Setup([name, *limits, "-print_final_stats=1", f"-artifact_prefix={folder}/", str(kept)], target)
    atheris.Fuzz()


def outside(name: str, folder: Path, seconds: int) -> dict[str, Any]:
    """Runs the process of a target and reads its output."""
    (folder / name).mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.fuzz", str(folder / name), "--seconds", str(seconds), "--target", name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (folder / name / "log.txt").write_text(done.stdout + done.stderr)
    tried = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    reached = re.findall(r" cov: (\d+)", done.stderr)
    raised = re.findall(r"=== Uncaught Python exception: ===\n(.*)", done.stdout + done.stderr)
    found = {"target": name, "seconds": seconds, "tried": int(tried[-1]) if tried else 0}
    return found | {"places": int(reached[-1]) if reached else 0, "ended": done.returncode, "raised": raised[:1]}


def main() -> None:
    """Fuzzes the chosen targets; prints and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the results; must not exist")
    parser.add_argument("--seconds", type=int, default=60, help="of each target")
    parser.add_argument("--only", nargs="*", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--target", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.target:
        inside(asked.target, asked.folder, asked.seconds)
        return
    results = []
    for name in asked.only:
        results.append(outside(name, asked.folder.resolve(), asked.seconds))
        print(results[-1], flush=True)
    (asked.folder / "fuzz.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(any(result["ended"] for result in results))


if __name__ == "__main__":
    main()

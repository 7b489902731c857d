"""What is installed: a wheel of `stair/` alone, two commands, and a `--help` that does not wait for torch."""

import ast
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from main import main as training_main
from stair.cli import main as stair_main

ROOT = Path(__file__).parents[1]
STAIR, LIGHTNING = "from stair.cli import main; main()", "from stair.cli import lightning_main; lightning_main()"


def run(code: str, *args: str, path: Path = ROOT, options: tuple[str, ...] = (), cwd: Path = ROOT):
    """Runs code as a console script would run it: `sys.argv` is the command's name and its words."""
    argv = f"import sys; sys.argv = {['stair', *args]!r}; "
    environment = {**os.environ, "PYTHONPATH": str(path)}
    command = [sys.executable, *options, "-c", argv + code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="builds the wheel; part of the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    return next(folder.glob("*.whl"))


def members(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))).decode()


def test_the_wheel_holds_the_package_and_nothing_else_of_the_checkout(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    packaged = {name for name in names if name.startswith("stair/")}
    assert packaged == {
        str(path.relative_to(ROOT))
        for path in (ROOT / "stair").rglob("*")
        if path.suffix in (".py", ".typed", ".css", ".html", ".js", ".md", ".txt", ".yaml")
    }
    assert {name.split("/")[0] for name in set(names) - packaged} == {wheel.name.rsplit("-", 3)[0] + ".dist-info"}


def test_the_wheel_gives_the_two_commands(wheel: Path):
    lines = set(members(wheel, "entry_points.txt").splitlines())
    assert {"stair = stair.cli:main", "lightning = stair.cli:lightning_main"} <= lines


def test_using_a_model_does_not_need_the_trainer(wheel: Path):
    metadata = Parser().parsestr(members(wheel, "METADATA"))
    needed = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert any(line.startswith("torch>") for line in needed)
    assert not any(line.startswith(("lightning", "tensorboard")) for line in needed)


#: extras that a folder or file may import from; the rest of stair/ has the requirements alone
EXTRAS = {
    "stair/serve": ["search"],
    "stair/index": ["search"],
    "stair/export": ["export"],
    "stair/evaluate": ["evaluate", "openclip"],
    "stair/data/prepare": ["prepare"],
    "stair/data/doctor.py": ["train"],
    "stair/cli.py": ["train"],
    **{path: ["train"] for path in ("callbacks", "datamodules", "lightning_modules", "training", "main.py", "demo.py")},
    "tests": ["dev", "export", "openclip", "engines"],
}
#: where the name differs and the package may not be installed; torch brings triton, and lightning-sdk is only looked for
NAMES = {"open_clip": "open-clip-torch", "triton": "torch", "lightning_sdk": "torch"}


def imports(folder: str) -> Iterator[tuple[str, str]]:
    """Each file of a folder with each top-level package it imports."""
    local = (
        {path.stem for path in ROOT.iterdir()} | {"support"} | {path.stem for path in ROOT.glob("benchmarks/**/*.py")}
    )
    for path in [ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for package in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - local:
                yield str(path.relative_to(ROOT)), package


@pytest.mark.parametrize("folder", ["stair", *(name for name in EXTRAS if not name.startswith("stair"))])
def test_every_imported_distribution_is_declared(wheel: Path, folder: str):
    requirements = [
        Requirement(line) for line in Parser().parsestr(members(wheel, "METADATA")).get_all("Requires-Dist")
    ]

    def declared(extra: str) -> set[str]:
        those = [one for one in requirements if not one.marker or one.marker.evaluate({"extra": extra})]
        nested = [declared(more) for one in those if one.name == "stair-embeddings" for more in one.extras]
        return {canonicalize_name(one.name) for one in those}.union(*nested)

    installed = packages_distributions()
    for path, package in imports(folder):
        extras = next((extras for start, extras in EXTRAS.items() if path.startswith(start)), [""])
        allowed = set().union(*map(declared, extras))
        names = [NAMES[package]] if package in NAMES else installed.get(package, [package])
        assert {canonicalize_name(name) for name in names} & allowed, (path, package, extras)


def test_training_without_a_checkout_is_refused_with_what_to_do(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # with -S no .pth file of site-packages is read, and so no editable install of this checkout
    path = Path(f"{tmp_path / 'site'}{os.pathsep}{sysconfig.get_path('purelib')}")
    done = run(STAIR, "fit", path=path, options=("-S",), cwd=tmp_path)
    assert done.returncode != 0 and "pip install -e '.[train]'" in done.stderr
    listed = run(STAIR, "--help", path=path, options=("-S",), cwd=tmp_path).stdout
    assert " search " in listed and not any(f" {word} " in listed for word in ("fit", "consolidate"))


COMMANDS = ("embed", "index", "explain", "export", "serve", "search", "evaluate", "doctor", "prepare")


@pytest.mark.parametrize("args", [("--help",), ("--version",), ("nonsense",), *((name, "--help") for name in COMMANDS)])
def test_help_imports_neither_torch_nor_lightning(args: tuple[str, ...]):
    seen = (
        "import atexit; atexit.register(lambda: print('LOADED', *sorted({'torch', 'lightning'} & set(sys.modules))));"
    )
    done = run(seen + STAIR, *args)
    assert done.stdout.splitlines()[-1] == "LOADED"


def test_the_help_of_all_commands_names_shell_completion():
    assert ["--completion" in run(STAIR, *args).stdout for args in (("--help",), ("embed", "--help"))] == [True, False]


def test_an_unknown_word_of_stair_is_refused_with_the_known_ones():
    done = run(STAIR, "train")
    assert done.returncode == 2 and 'Unknown command "train"' in done.stderr and "fit, validate" in done.stderr


@pytest.fixture
def sdk(tmp_path: Path) -> Path:
    """A folder with a package that owns the `lightning` command, as lightning-sdk does."""
    folder = tmp_path / "lightning_sdk" / "cli"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").touch()
    (folder / "entrypoint.py").write_text("import sys\ndef main_cli():\n    print('sdk got', *sys.argv[1:])\n")
    return tmp_path


def test_lightning_hands_words_that_are_not_ours_on_to_their_owner(sdk: Path):
    path = Path(f"{ROOT}{os.pathsep}{sdk}")
    assert run(LIGHTNING, "login", "--api-key", "x", path=path).stdout == "sdk got login --api-key x\n"


def test_lightning_keeps_the_trainers_words_whoever_else_is_installed(sdk: Path):
    path = Path(f"{ROOT}{os.pathsep}{sdk}")
    assert "Usage: stair" in run(LIGHTNING, "--help", path=path).stdout
    assert "sdk got" not in run(LIGHTNING, "fit", path=path, options=("-S",), cwd=sdk).stdout


def test_lightning_without_another_owner_refuses_unknown_words():
    if __import__("importlib.util").util.find_spec("lightning_sdk"):
        pytest.skip("lightning-sdk is installed here")
    done = run(LIGHTNING, "login")
    assert done.returncode == 2 and 'Unknown command "login"' in done.stderr


def test_an_index_is_read_and_the_dictionary_made_without_the_compiler_of_searches():
    code = (
        "import sys; sys.modules['numba'] = None; import stair.index.storage, stair.evaluate.dictionary; print('read')"
    )
    assert run(code).stdout == "read\n"


def test_a_command_without_its_packages_names_the_extra_that_installs_them():
    result = run("sys.modules['starlette'] = None; " + STAIR, "serve", "index", "model")
    assert result.returncode == 1 and "starlette" in result.stderr and "[search]" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_the_shell_completes_commands_and_options():
    script = run(STAIR, "--completion", "bash").stdout
    assert all(word in script for word in ("embed", "sqlite", "--where", "--quiet"))
    assert run(STAIR, "--completion", "sh").returncode == 1


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("embed m s o --budget abc", ["--budget", "abc", "int"]),
        ("embed m s o --threshold x", ["--threshold", "x", "float"]),
        ("embed m s o --side foo", ["--side", "foo", "images", "texts"]),
        ("embed m s o --budgets 5", ["--budgets", "Did you mean --budget?"]),
        ("embed m s o more", ["more", "too many"]),
        ("embed m s", ["OUT is missing"]),
        ("evaluate m", ["DATA is missing"]),
        ("push m me/x", ["LICENCE is missing"]),
        ("doctor s --configs", ["--configs", "requires"]),
        ("prepare foldr a b c", ["foldr", "coco", 'Did you mean "folder"?']),
        ("prepare folder a b", ["OUT is missing"]),
        ("prepare folder a b c --maxside 3", ["--maxside", "Did you mean --max_side?"]),
    ],
)
def test_a_mistake_is_one_line_with_what_was_given_and_what_is_allowed(args, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stair", *args.split()])
    with pytest.raises(SystemExit) as ended:
        stair_main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    assert all(part in error for part in [args.split()[0], *expected]) and "<class" not in error, error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--data.val shards/*.tar", ["--data.val shards/*.tar", "{NAME: shards/*.tar}"]),
        ("--data.global_batch_size abc", ["--data.global_batch_size abc", "a whole number"]),
        ("--data.val.photo []", ["--data.val.photo []", "text"]),
        ("--data.trian x", ["--data.trian", "did you mean --data.train?"]),
        ("--model.init_args.optimizer.name foo", ["--model.init_args.optimizer.name foo", "adamw", "lamb"]),
        ("--model.init_args.objectiv.flops_image 1", ["did you mean --model.init_args.objective.flops_image?"]),
        ("", ["configs/stage1.yaml"]),
    ],
)
def test_a_mistake_in_a_setting_is_one_line_with_the_setting_as_typed(args, expected, monkeypatch, capsys):
    stage = ["--config", str(ROOT / "configs/stage1.yaml")] if args else []
    monkeypatch.setattr(sys, "argv", ["lightning", "fit", *stage, *args.split()])
    with pytest.raises(SystemExit) as ended:
        training_main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1, error
    assert all(part in error for part in expected) and "<class" not in error, error


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("embed m fotos o", ["'fotos'", "a folder of images", ".csv"]),
        ("embed m empty o", ["'empty'", ".jpg", "sub-folders"]),
        ("prepare folder caption.csv empty o", ["caption.csv", "captions.csv"]),
        ("search i", ["--text", "--image", "--words", "--like"]),
        ("consolidate runs/bst.ckpt m", ["bst.ckpt", "best.ckpt"]),
        ("evaluate runs/no/stair empty", ["empty"]),
    ],
)
def test_a_file_that_is_not_there_is_named_with_what_is(args, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("empty/notes.docx", "runs/best.ckpt", "captions.csv"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).touch()
    Path("empty/notes.docx").unlink()
    monkeypatch.setattr(sys, "argv", ["stair", *args.split()])
    with pytest.raises(SystemExit) as ended:
        stair_main()
    assert "\n" not in str(ended.value.code) and all(part in str(ended.value.code) for part in expected), (
        ended.value.code
    )

"""The documentation agrees with the records, and its links lead somewhere."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*/README.md")]
FOLDERS = ("stair", "callbacks", "lightning_modules", "datamodules", "training")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, by GitHub's rule."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = [head.replace("`", "") for head in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_figures_are_those_of_the_records() -> None:
    """`python docs/figures/tables.py` would change nothing, and every table of measured figures comes from it."""
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "tables.py"))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert script["filled"](text) == text, page
        by_hand = re.sub(r"```.*?```", "", script["BLOCK"].sub("", text), flags=re.DOTALL)
        measured = re.findall(r"^\|.*\d\.\d+ / \d+\.\d.*$", by_hand, re.MULTILINE)
        assert not measured or page.name == "paper.md", page  # there: the paper's


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_between_pages_lead_to_a_file_and_a_heading(page: Path) -> None:
    """Relative links of a page, with their anchors."""
    broken = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (target.exists() and (not anchor or anchor in _anchors(target))):
            broken.append(link)
    assert not broken


def test_the_glossary_is_short_and_in_alphabetical_order() -> None:
    terms = re.findall(r"^- \*\*(.+?)\*\*: ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert 10 < len(terms) <= 40
    assert terms == sorted(terms, key=lambda term: term.lower().replace("λ", "lambda"))


def test_prose_is_wrapped_and_the_documentation_is_short() -> None:
    """At most 120 characters a line, but for tables, pictures and commands; docs/ has at most 15,000 words."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "paper_table"}
    assert sum(len(text.split()) for page, text in texts.items() if page.is_relative_to(ROOT / "docs")) <= 15_000
    for page, text in texts.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines()
        long = [line for line in prose if len(line) > 120 and not line.startswith(("|", "![", "[!["))]
        assert not long, page


def test_the_messages_that_a_page_explains_are_those_of_the_code() -> None:
    """Words of an error or a warning in docs/operations/errors.md; "…" stands for what varies."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    joined = [
        [getattr(part, "value", "…") for part in node.values] for node in nodes if isinstance(node, ast.JoinedStr)
    ]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += ["".join(part if isinstance(part, str) else "…" for part in parts) for parts in joined]
    texts.append((ROOT / "stair" / "data" / "diagnostics.yaml").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "operations" / "errors.md").read_text(encoding="utf-8")
    sections = page.partition("## Messages")[2].partition("## What a failure")[0]
    named = [
        name for row in re.findall(r"^\| (`.*?) \|", sections, re.MULTILINE) for name in re.findall("`(.+?)`", row)
    ]
    ours = [name for name in named if name not in ("CUDA out of memory", "Killed") and "/" not in name]
    pattern = {name: ".*?".join(map(re.escape, name.split("…"))) for name in ours}
    assert [name for name in ours if not any(re.search(pattern[name], text, re.DOTALL) for text in texts)] == []


@pytest.mark.slow
def test_the_settings_that_pages_name_exist() -> None:
    """Names such as `data.workers`, against the parsers of all commands."""
    pages = runpy.run_path(str(ROOT / "docs" / "figures" / "reference.py"))["pages"]()
    known = set(re.findall(r"^\| `(?:--|…)?([\w.]+)`", "\n".join(pages.values()), re.MULTILINE))
    groups = "data|objective|optimizer|transition|health|watchdog|trainer"
    for page in ROOT.glob("docs/**/*.md"):
        text = page.read_text(encoding="utf-8")
        named = set(re.findall(rf"`(?:--|…|--model\.init_args\.)?((?:{groups})\.[a-z_.]+?)(?:[ :=][^`]*)?`", text))
        assert named <= known, page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_site_builds_strictly_and_asks_no_other_host(tmp_path: Path) -> None:
    """Without network; every page, and no font, script or picture of another host."""
    if not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings")):
        pytest.skip("the extra `docs` is not installed")
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **proxies, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    built = {page.relative_to(tmp_path) for page in tmp_path.rglob("*.html")}
    for page in ROOT.glob("docs/**/*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        assert (name.with_name("index.html") if name.name == "index" else name / "index.html") in built
    settings = (tmp_path / "reference" / "settings" / "index.html").read_text(encoding="utf-8")
    assert "…objective.masked_loss_weight" in settings and "--trainer.max_steps" in settings
    commands = (tmp_path / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(
        f">stair {word}" in commands for word in ("embed", "index", "prepare folder", "export sqlite", "consolidate")
    )
    for page in built:
        loads = re.findall(
            r"<(?:link|script|img)[^>]*(?:href|src)=\"(https?:[^\"]*)", (tmp_path / page).read_text("utf-8")
        )
        assert not loads, page


def test_each_capability_and_fault_names_tests_that_exist() -> None:
    """The tables of operations/reliability.md."""
    text = (ROOT / "docs" / "operations" / "reliability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 30
    assert {name for name in named if not (ROOT / "tests" / f"{name}.py").exists()} == set()

"""Hooks of mkdocs: pages generated at build time, and links from docs/ to files beside it.

Generated: the reference of commands and settings (reference.py) and the tutorials, which are percent-format scripts.
A link to a file outside of docs/, such as a record in benchmarks/results, leads to a copy of it on the site.
"""

import os
import re
import runpy
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the files that pages link to."""
    generated = runpy.run_path(str(DOCS / "figures" / "reference.py"))["pages"]()
    generated |= {f"tutorials/{path.stem}.md": tutorial(path) for path in DOCS.glob("tutorials/*.py")}
    for name, text in generated.items():
        files.append(File.generated(config, name, content=text))
    for page in [*DOCS.rglob("*.md"), *_outside(DOCS.rglob("*.md"))]:
        for target in _targets(page):
            name = _name(target)
            if not target.is_relative_to(DOCS) and name not in files.src_uris:
                files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links to files outside of docs/ into links to their copies."""
    name = page.file.src_uri
    source = ROOT / name.removeprefix("repository/") if name.startswith("repository/") else DOCS / name
    here = Path(name).parent

    def link(match: re.Match[str]) -> str:
        target = _resolved(source, match[2])
        if target is not None and target.parent == DOCS / "tutorials" and source.parent != target.parent:
            return f"{match[1]}{match[2].removesuffix('.py')}.md{match[3]}"
        inside = target is None or (target.is_relative_to(DOCS) and source.is_relative_to(DOCS))
        return match[0] if inside else f"{match[1]}{os.path.relpath(_name(target), here)}{match[3]}"  # type: ignore[arg-type]

    return LINK.sub(link, markdown)


def tutorial(path: Path) -> str:
    """A percent-format script as Markdown: comments of a `[markdown]` cell are text, the rest is code."""
    cells = re.split(r"^# %%", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    parts = []
    for cell in cells:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            text = re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)
            parts.append(re.sub(r"\]\((\w+)\.py\)", r"](\1.md)", text))
        elif shell := re.fullmatch(r'sh\(\s*r?"""\n?(.*?)"""\s*\)', body.strip(), re.DOTALL):
            parts.append(f"```sh\n{shell[1].strip()}\n```")
        elif "[hidden]" not in head and body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    parts.append(f"The script of this page: [{path.relative_to(ROOT)}]({path.name}).")
    return "\n\n".join(parts) + "\n"


def _targets(page: Path) -> list[Path]:
    found = LINK.findall(page.read_text(encoding="utf-8"))
    targets = [_resolved(page, link) for _, link, _ in found]
    return [target for target in targets if target is not None]


def _resolved(page: Path, link: str) -> Path | None:
    """The file that a relative link means; of a folder, its README."""
    target = (page.parent / link).resolve()
    target = target / "README.md" if target.is_dir() else target
    return target if "://" not in link and target.is_file() and target.is_relative_to(ROOT) else None


def _outside(pages: Any) -> list[Path]:
    """Markdown outside of docs/ that pages link to; its own links count too."""
    found = {target for page in pages for target in _targets(page)}
    return [target for target in found if not target.is_relative_to(DOCS) and target.suffix == ".md"]


def _name(target: Path) -> str:
    """Where a file lies on the site, below docs/."""
    return str(target.relative_to(DOCS)) if target.is_relative_to(DOCS) else f"repository/{target.relative_to(ROOT)}"

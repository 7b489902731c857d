"""HTML pages from templates: each is one file, without a server or the network.

Images are embedded as data, the style is inline, and a content security policy forbids all requests. The templates escape
text, and spell out its control characters.
"""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from stair.files import write_text
from stair.plain import plain

_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def asset(name: str) -> Markup:
    """The text of a file of this folder, for use as markup."""
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


def image_source(data: bytes) -> str:
    """The `src` of an embedded image; ValueError if the bytes are no PNG, JPEG, WebP or GIF file."""
    image_format = next((name for start, name in _SIGNATURES.items() if data.startswith(start)), "")
    if not image_format or (image_format == "webp" and data[8:12] != b"WEBP"):
        raise ValueError(
            f"image begins with {data[:8]!r}; give the bytes of a PNG, JPEG, WebP or GIF file (`encode_png`)"
        )
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> Markup:
    """A template of this folder; text in the values is escaped where it is HTML."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def search_page(backend: str) -> tuple[Markup, str]:
    """The search page and its content security policy: it runs its own script alone, and contacts no other host.

    Args:
        backend: the script that answers it: `server.js` asks `stair serve`, `static.js` searches in the browser.
    """
    script = asset(backend) + asset("search.js")
    policy = (
        f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'self'"
    )
    return render("search.html", script=script, policy=policy, server=backend == "server.js"), policy


def document(title: str, notes: Sequence[str], sections: Iterable[str], script: str = "") -> str:
    """A page: its heading, notes below it, HTML of `render`, and a script of this folder, which the policy names."""
    code = asset(script) if script else Markup()
    digest = _digest(code) if script else ""
    html = [Markup(section) for section in sections]
    return render("page.html", title=title, notes=notes, sections=html, script=code, digest=digest)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def write_html(path: Path, title: str, notes: Sequence[str], sections: Iterable[str], script: str = "") -> None:
    """Writes a page atomically; other arguments as `document`."""
    write_text(path, document(title, notes, sections, script))


_TEMPLATES = Environment(
    loader=PackageLoader("stair", "pages"),
    autoescape=select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
)
_TEMPLATES.globals.update(asset=asset, image_source=image_source)

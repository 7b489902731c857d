"""HTML pages from templates: one file to open, mail or keep, without a server or the network.

Images are embedded as data, the style is inline, and a content security policy forbids all requests. Text that comes
from data is escaped by the templates, and its control characters are spelled out.
"""

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from stair.files import write_text
from stair.plain import plain

_MEDIA_TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))


def asset(name: str) -> Markup:
    """The text of a file of this folder, to be put into a page as it is."""
    return Markup((files(__package__) / name).read_text(encoding="utf-8"))


def image_source(data: bytes) -> str:
    """The `src` of an image within the page.

    Raises:
        ValueError: if the bytes are no PNG, JPEG, WebP or GIF file.
    """
    kind = next((kind for start, kind in _MEDIA_TYPES if data.startswith(start)), None)
    if kind is None and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise ValueError(
            f"{len(data)} bytes that begin with {data[:8]!r} are no PNG, JPEG, WebP or GIF; "
            "give the bytes of such a file (`encode_png` makes them from pixels)"
        )
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def render(template: str, **values: Any) -> Markup:
    """A template of this folder, with all text in the values escaped where it is HTML."""
    return Markup(_TEMPLATES.get_template(template).render(values))


def document(title: str, notes: Sequence[str], sections: Iterable[str]) -> str:
    """A page.

    Args:
        title: heading of the page.
        notes: what a reader must know to judge the rest.
        sections: HTML of `render`.
    """
    return render("page.html", title=title, notes=notes, sections=[Markup(section) for section in sections])


def write_html(path: Path, title: str, notes: Sequence[str], sections: Iterable[str]) -> None:
    """Writes a page atomically; arguments as `document`."""
    write_text(path, document(title, notes, sections))


_TEMPLATES = Environment(
    loader=PackageLoader("stair", "pages"),
    autoescape=select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
    finalize=lambda value: plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
)
_TEMPLATES.globals.update(asset=asset, image_source=image_source)

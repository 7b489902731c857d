"""The page itself: one HTML file to open, mail or keep, without a server or the network.

Images are embedded as data, styles are inline, there is no script, and a content security policy forbids all requests.
Captions and words come from data, so all of them are escaped.
"""

import base64
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from stair.files import write_text
from stair.plain import escape


def write_html(path: Path, title: str, notes: Sequence[str], sections: Iterable[str]) -> None:
    """Writes a page.

    Args:
        path: of the HTML file; written by temporary name and rename, its folder is created where missing.
        title: heading of the page.
        notes: what a reader must know to judge the rest.
        sections: HTML, with all that comes from data escaped; empty ones are left out.
    """
    style = (files(__package__) / "style.css").read_text(encoding="utf-8")
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{as_list("notes", map(escape, notes))}</header>
<main>{"".join(sections)}</main>
</body>
</html>
"""
    write_text(path, page)


def as_list(kind: str, items: Iterable[str]) -> str:
    """An HTML list of items that are HTML already; nothing for none."""
    content = "".join(f"<li>{item}</li>" for item in items)
    return f'<ul class="{kind}">{content}</ul>' if content else ""


_MEDIA_TYPES = ((b"\x89PNG", "png"), (b"\xff\xd8\xff", "jpeg"), (b"GIF8", "gif"))


def image_tag(data: bytes, text: str) -> str:
    """An image within the page.

    Args:
        data: bytes of a PNG, JPEG, WebP or GIF file.
        text: what the image shows, for who does not see it.

    Raises:
        ValueError: if the bytes are no such file.
    """
    kind = next((kind for start, kind in _MEDIA_TYPES if data.startswith(start)), None)
    if kind is None and data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        kind = "webp"
    if kind is None:
        raise ValueError(
            f"{len(data)} bytes that begin with {data[:8]!r} are no PNG, JPEG, WebP or GIF; "
            "give the bytes of such a file (`encode_png` makes them from pixels)"
        )
    return f'<img alt="{escape(text)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """An HTML table of cells that are HTML already; the first cell of a line names it."""
    head = "".join(f"<th scope=col>{cell}</th>" for cell in heads)
    body = "".join(
        f"<tr><th scope=row>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>" for first, *rest in lines
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

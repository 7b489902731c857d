"""Text from strangers (captions, keys, words, file names), made harmless to look at.

Escaping keeps text from being markup. It does not keep a terminal from obeying it, nor a bidirectional control from
turning the rest of a line around, so that `gpj.exe` reads as `exe.jpg`.
"""

import html
import re

# C0 and C1 controls but tab and line end, the controls of direction, invisible separators, halves of characters
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def plain(text: str) -> str:
    """The text with every control character spelled out, such as `\\x1b` or `\\u202e`; all else, any script, stays."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str) -> str:
    """As `plain`, with tabs and line ends spelled out too: for lines of a terminal or a log."""
    return plain(text).replace("\t", "\\t").replace("\n", "\\n")


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as `1 part` or `2 parts`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def escape(text: str) -> str:
    """As `plain`, and without markup: for pages."""
    return html.escape(plain(text))

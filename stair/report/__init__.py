"""Pages that show what a model learned: a file to open, mail or keep, without a server or the network."""

from stair.pages import write_html
from stair.report.parts import Hit, Picture, Search, StageRow, write_page
from stair.report.words import encode_png, shared_words, top_words

__all__ = [
    "Hit",
    "Picture",
    "Search",
    "StageRow",
    "encode_png",
    "shared_words",
    "top_words",
    "write_html",
    "write_page",
]

"""Pages that show what a model learned: a file to open, mail or keep, without a server or the network."""

from stair.report.page import as_list, image_tag, table, write_html
from stair.report.parts import Hit, Picture, Search, StageRow, gallery, write_page
from stair.report.words import encode_png, shared_words, top_words

__all__ = [
    "Hit",
    "Picture",
    "Search",
    "StageRow",
    "as_list",
    "encode_png",
    "gallery",
    "image_tag",
    "shared_words",
    "table",
    "top_words",
    "write_html",
    "write_page",
]

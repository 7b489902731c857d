"""Pages that show what a model learned: one HTML file, without a server or the network."""

from stair.report.page import Hit, Picture, Search, StageRow, write_model_page, write_page
from stair.report.terms import encode_png, shared_terms, top_terms

__all__ = [
    "Hit",
    "Picture",
    "Search",
    "StageRow",
    "encode_png",
    "shared_terms",
    "top_terms",
    "write_model_page",
    "write_page",
]

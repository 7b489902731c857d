"""The search page: one document without anything to fetch from elsewhere.

Words, captions and ids come from data; the script puts them in as text, never as markup.
"""

import base64
import hashlib

from stair.pages import asset, render

PAGE = render("search.html")
_HASH = base64.b64encode(hashlib.sha256(asset("search.js").encode()).digest()).decode()
#: nothing but this page's own script runs, and nothing is asked of any other host
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)

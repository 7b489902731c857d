"""The server behind the search page, and `stair serve`.

A query is weights by word, and lives in the page: the server turns texts and pictures into words, and words into hits.
Errors are problem JSON (RFC 9457). Pictures are decoded and encoded anew, so that no file is handed out as it is; their
paths cannot leave the collection; uploads are limited in bytes before they are read and in pixels before they are decoded.
"""

import base64
import hashlib
import io
import json
import threading
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from stair.data.folders import find_file
from stair.data.items import read_cell
from stair.embeddings import to_csr
from stair.explain import PictureReading, read_image, shares_on_patches
from stair.explain_page import overlay
from stair.images import decode_image
from stair.index import SparseIndex
from stair.model import Stair
from stair.pages import asset, render

MAX_UPLOAD_BYTES = 10 << 20
MAX_UPLOAD_PIXELS = 24_000_000
_SIDE, _SHOWN_WORDS, _MOST_HITS, _MOST_BYTES = 320, 40, 200, 1 << 28
_MOST_JSON = 1 << 21  # a query of every word of a vocabulary of 30,522 takes less than half
_LARGEST = 1e6  # weight of a word in a query; those of models are below 100

PAGE = render("search.html")
_HASH = base64.b64encode(hashlib.sha256(asset("search.js").encode()).digest()).decode()
#: nothing but this page's own script runs, and nothing is asked of any other host
POLICY = (
    f"default-src 'none'; script-src 'sha256-{_HASH}'; style-src 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)


class SearchPage:
    """What the routes do.

    Args:
        index: what is searched.
        model: encodes queries; must be the index's.
        pictures: folder that the `file` of documents is relative to; None shows no pictures.
    """

    def __init__(self, index: SparseIndex, model: Stair, pictures: Path | None) -> None:
        index.use(model)
        self.index, self.model = index, model
        self.root = pictures.resolve() if pictures is not None else None
        self._one_at_a_time = threading.Lock()  # more threads in one model are slower, not faster

    def routes(self) -> list[Route]:
        """Of the server."""
        return [
            Route("/", self.page),
            Route("/api/about", self.about),
            Route("/api/text", self.text, methods=["POST"]),
            Route("/api/image", self.image, methods=["POST"]),
            Route("/api/search", self.search, methods=["POST"]),
            Route("/api/words", self.words),
            Route("/picture", self.picture),
            Route("/heat", self.heat),
        ]

    async def page(self, request: Request) -> Response:
        """The page."""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    def about(self, request: Request) -> Response:
        """What is searched."""
        facts = {key: self.index.facts[key] for key in ("documents", "similarity")}
        return JSONResponse({**facts, "keys": self.index.keys, "pictures": self.root is not None})

    async def text(self, request: Request) -> Response:
        """The words of a text: `{"text": ...}`."""
        text = (await _json(request)).get("text")
        if not isinstance(text, str) or not text.strip():
            raise HTTPException(400, "text is empty; write some words")
        return JSONResponse({"words": await run_in_threadpool(self._encoded, text)})

    async def image(self, request: Request) -> Response:
        """The words of a picture, whose file is the body."""
        data = await _body(request, MAX_UPLOAD_BYTES)
        return JSONResponse({"words": await run_in_threadpool(self._encoded, data)})

    def _encoded(self, query: str | bytes) -> dict[str, float]:
        # a small file can take a second to decode: one at a time, and never on the event loop
        with self._one_at_a_time:
            if isinstance(query, str):
                encoded = self.model.encode_text([query])
            else:
                encoded = self.model.encode_image([decode_image(query, MAX_UPLOAD_PIXELS)])
        row = to_csr(encoded)
        weights = {self.index.space.tokens[v]: float(w) for v, w in zip(row.indices, row.data, strict=True)}
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    async def search(self, request: Request) -> Response:
        """Hits of weighted words: `{"words": {word: weight}, "k": 24, "where": ["split=test"]}`."""
        asked = await _json(request)
        words, k, where = _shares(asked.get("words")), asked.get("k", 24), asked.get("where", [])
        if not isinstance(k, int) or not 1 <= k <= _MOST_HITS:
            raise HTTPException(400, f"k must be a whole number from 1 to {_MOST_HITS}")
        if not isinstance(where, str) and not (isinstance(where, list) and all(isinstance(one, str) for one in where)):
            raise HTTPException(400, "where must be a text or a list of conditions")
        return JSONResponse({"hits": await run_in_threadpool(self._hits, words, k, where)})

    def _hits(self, words: dict[str, float], k: int, where: str | list[str]) -> list[dict[str, Any]]:
        if not words:
            return []
        return [
            {
                "id": hit.id,
                "score": hit.score,
                "words": [[term.token, term.contribution] for term in hit.terms[:_SHOWN_WORDS]],
                "metadata": hit.metadata,
                "source": hit.source,
            }
            for hit in self.index.search(words=words, k=k, where=where)
        ]

    def words(self, request: Request) -> Response:
        """The words of a document: `?id=`."""
        vector = self.index.vector(self._known(request))
        return JSONResponse({"words": vector})

    def picture(self, request: Request) -> Response:
        """The picture of a document: `?id=`."""
        picture = self._opened(self._known(request))
        picture.thumbnail((_SIDE, _SIDE))
        return _encoded_image(picture, "JPEG")

    def heat(self, request: Request) -> Response:
        """Where in a picture words lie: `?id=&words={"dog": 0.3}`, contributions by word."""
        name = self._known(request)
        shares = _shares(_parsed(request.query_params.get("words", "{}")))
        with self._one_at_a_time:
            reading: PictureReading = read_image(self.model, self._opened(name))
        return _encoded_image(overlay(reading.image, shares_on_patches(reading, shares), _SIDE), "PNG")

    def _known(self, request: Request) -> str:
        name = request.query_params.get("id", "")
        if name not in self.index:
            raise HTTPException(404, "no such document")
        return name

    def _opened(self, name: str) -> Image.Image:
        place = self.index.source(name)
        if self.root is None or not isinstance(place.get("file"), str):
            raise HTTPException(404, "no picture is known of this document")
        try:
            path = find_file(self.root, place["file"]).resolve()
            if not path.is_relative_to(self.root) or not path.is_file():
                raise HTTPException(404, "the picture is not in the collection")
            if "row_group" in place:
                data = read_cell(path, place["row_group"], place["row"], place["column"])
            else:
                with path.open("rb") as file:
                    file.seek(int(place.get("offset", 0)))
                    data = file.read(min(int(place.get("length", _MOST_BYTES)), _MOST_BYTES))
        except (OSError, ValueError, TypeError, OverflowError, LookupError) as error:
            raise HTTPException(404, "the picture cannot be read where its document says it is") from error
        return decode_image(data)


def _encoded_image(image: Image.Image, kind: str) -> Response:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
    return Response(buffer.getvalue(), media_type=f"image/{kind.lower()}", headers=headers)


async def _body(request: Request, most: int) -> bytes:
    """The body, unless it is too large; no more than `most` bytes are ever held."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413, f"the upload has more than {most} bytes")
        parts.append(part)
    return b"".join(parts)


async def _json(request: Request) -> dict[str, Any]:
    content = _parsed(await _body(request, _MOST_JSON))
    if not isinstance(content, dict):
        raise HTTPException(400, "the body must be a json object")
    return content


def _parsed(text: str | bytes) -> Any:
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # json can spell half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"that is no json: {error}") from error
    return content


def _shares(words: Any) -> dict[str, float]:
    numbers = isinstance(words, dict) and all(isinstance(w, (int, float)) for w in words.values())
    if not numbers or not all(abs(weight) <= _LARGEST for weight in words.values()):
        raise HTTPException(400, f"words must be an object of numbers by word, from -{_LARGEST:g} to {_LARGEST:g}")
    return {word: float(weight) for word, weight in words.items()}


def _problem(status: int, title: str, detail: str) -> Response:
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return _problem(error.status_code, "request refused", str(error.detail))
    if isinstance(error, ValueError):
        return _problem(400, "request refused", str(error))
    return _problem(500, "internal error", "the server failed; its log says why")


def application(index: SparseIndex, model: Stair, pictures: Path | None, hosts: list[str]) -> Starlette:
    """The server.

    Args:
        index: what is searched.
        model: encodes queries; must be the index's.
        pictures: folder that the `file` of documents is relative to; None shows no pictures.
        hosts: names under which it may be asked; any other is refused, so that no web site can reach it by a name of its
            own that points to this machine.
    """
    return Starlette(
        routes=SearchPage(index, model, pictures).routes(),
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={HTTPException: _refused, ValueError: _refused, Exception: _refused},
    )


def serve(index: Path, model: str, pictures: Path | None = None, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serves the search page, to this machine only unless told otherwise.

    Args:
        index: folder of the index.
        model: folder or hub name of the index's model.
        pictures: folder of the pictures: what `stair embed` was given, or the folder of its tars.
        host: address to listen on. There is no log-in: whoever reaches it can search and see all pictures.
        port: to listen on.
    """
    if pictures is not None and not pictures.is_dir():
        raise FileNotFoundError(f"{pictures}: no such folder of pictures")
    hosts = ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else ["*"]
    app = application(SparseIndex.open(index), Stair.from_pretrained(model), pictures, hosts)
    print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning")

"""`stair serve`: turns texts and pictures into terms, and terms into hits. Errors are problem JSON (RFC 9457).

Pictures are decoded and encoded again, so that no file is sent as it is; their paths cannot leave the collection.
"""

import io
import json
import threading
from contextlib import suppress
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

from stair.data.items import picture_bytes
from stair.embeddings import to_csr
from stair.errors import SettingError
from stair.explain import read_image
from stair.explain_page import overlay
from stair.images import decode_image
from stair.index import SparseIndex
from stair.model import Stair
from stair.pages import search_page

MAX_UPLOAD_BYTES = 10 << 20
MAX_UPLOAD_PIXELS = 24_000_000
_MAX_JSON_BYTES = 1 << 21  # a query of every term of a vocabulary of 30,522 takes less than half
_MAX_HITS, _MAX_WEIGHT = 200, 1e6  # weights of models are below 100
_SIDE, _SHOWN_TERMS = 320, 40

PAGE, _POLICY = search_page("server.js")
POLICY = f"{_POLICY}; frame-ancestors 'none'"


class _SearchPage:
    def __init__(self, index: SparseIndex, model: Stair, pictures: Path | None, max_error: float | None) -> None:
        index.use(model)
        self.index, self.model, self.max_error = index, model, max_error
        if max_error is not None:
            index.calibration.threshold(max_error)
        self.root = pictures.resolve() if pictures is not None else None
        self._one_at_a_time = threading.Lock()  # more threads in one model are slower, not faster

    async def page(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})

    def about(self, request: Request) -> Response:
        facts = {"documents": len(self.index), "similarity": self.index.space.similarity}
        facts |= {"keys": self.index.keys, "pictures": self.root is not None}
        with suppress(SettingError):
            facts["calibrated_on"] = self.index.calibration.data
            facts["max_error"] = self.max_error
        return JSONResponse(facts)

    async def text(self, request: Request) -> Response:
        """The terms of a text, `{"text": ...}`, the tokens of its words, and the words that no document has."""
        text: Any = (await _json(request)).get("text")
        _check(isinstance(text, str) and bool(text.strip()), "text is empty; write some words")
        own, missing = self.index.typed(text)
        return JSONResponse({"words": await run_in_threadpool(self._terms, text), "own": own, "missing": missing})

    async def image(self, request: Request) -> Response:
        """The terms of a picture, whose file is the body."""
        data = await _body(request, MAX_UPLOAD_BYTES)
        return JSONResponse({"words": await run_in_threadpool(self._terms, data)})

    def _terms(self, query: str | bytes) -> dict[str, float]:
        # a small file can take a second to decode: one at a time, and never on the event loop
        with self._one_at_a_time:
            if isinstance(query, str):
                row = to_csr(self.model.encode_text([query]))
            else:
                row = to_csr(self.model.encode_image([decode_image(query, MAX_UPLOAD_PIXELS)]))
        weights = {self.index.space.tokens[v]: float(w) for v, w in zip(row.indices, row.data, strict=True)}
        return dict(sorted(weights.items(), key=lambda item: -item[1]))

    async def search(self, request: Request) -> Response:
        """Hits of weighted terms: `{"words": {term: weight}, "k": 24, "where": ["split=test"], "max_error": 0.05}`.

        `max_error` holds for terms as `text` answers them. `"having": ["snow"]` keeps those of the best 1000 hits that have
        these terms. `"refine": 8` adds that number of `Hits.refine`. `"weighting"` is as in `SparseIndex.search`.
        """
        return JSONResponse(await run_in_threadpool(self._hits, await _json(request)))

    def _hits(self, body: dict[str, Any]) -> dict[str, Any]:
        weights, k, refine = _weights(body.get("words")), body.get("k", 24), body.get("refine", 0)
        where, having = body.get("where", []), body.get("having", [])
        max_error, weighting = body.get("max_error"), body.get("weighting", "plain")
        _check(isinstance(k, int) and 1 <= k <= _MAX_HITS, f"k must be a whole number from 1 to {_MAX_HITS}")
        _check(isinstance(refine, int) and 0 <= refine <= _MAX_HITS, f"refine must be from 0 to {_MAX_HITS}")
        _check(isinstance(where, str) or _are_texts(where), "where must be a text or a list of conditions")
        _check(_are_texts(having), "having must be a list of terms")
        is_number = max_error is None or isinstance(max_error, int | float)
        _check(is_number, "max_error must be a number between 0 and 1")
        _check(max_error is None or weighting == "plain", "max_error is calibrated without weighting; leave one out")
        threshold = 0.0 if max_error is None else self.index.calibration.threshold(max_error)
        answer: dict[str, Any] = {"hits": []} | ({"threshold": threshold} if threshold else {})
        if not weights:
            return answer
        taken = 1000 if having else max(k, 100 if refine else 0)
        found = self.index.search(words=weights, k=taken, where=where, weighting=weighting)
        found = found.only(lambda _: True, threshold).having(having)
        answer["hits"] = [
            {"id": hit.id, "score": hit.score, "metadata": hit.metadata, "source": hit.source}
            | {"words": [[term.token, term.contribution] for term in hit.terms[:_SHOWN_TERMS]]}
            for hit in found.first(k)
        ]
        return answer | ({"refine": [vars(part) for part in found.first(100).refine(refine)]} if refine else {})

    def document(self, request: Request) -> Response:
        """The terms of a document: `?id=`."""
        return JSONResponse({"words": self.index.vector(self._known(request))})

    def picture(self, request: Request) -> Response:
        """The picture of a document: `?id=`."""
        picture = self._picture(self._known(request))
        picture.thumbnail((_SIDE, _SIDE))
        return _image_response(picture, "JPEG")

    def heat(self, request: Request) -> Response:
        """The picture of a document with a heat map: `?id=&words={"dog": 0.3}`, contributions by term."""
        picture = self._picture(self._known(request))
        weights = _weights(_parsed(request.query_params.get("words", "{}")))
        with self._one_at_a_time:
            reading = read_image(self.model, picture)
        return _image_response(overlay(reading.image, reading.heat_of(weights), _SIDE), "PNG")

    def _known(self, request: Request) -> str:
        name = request.query_params.get("id", "")
        if name not in self.index:
            raise HTTPException(404, "no such document")
        return name

    def _picture(self, name: str) -> Image.Image:
        source = self.index.source(name)
        if self.root is None or not isinstance(source.get("file"), str):
            raise HTTPException(404, "this document has no image")
        try:
            data = picture_bytes(self.root, source)
        except FileNotFoundError as error:
            raise HTTPException(404, "the image of this document cannot be read") from error
        return decode_image(data)


def _image_response(image: Image.Image, kind: str) -> Response:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    headers = {"Cache-Control": "private, max-age=300", "X-Content-Type-Options": "nosniff"}
    return Response(buffer.getvalue(), media_type=f"image/{kind.lower()}", headers=headers)


async def _body(request: Request, limit: int) -> bytes:
    """The body, unless it is too large; no more than `limit` bytes are ever held."""
    body = bytearray()
    async for part in request.stream():
        if len(body) + len(part) > limit:
            raise HTTPException(413, f"the upload has more than {limit} bytes")
        body += part
    return bytes(body)


async def _json(request: Request) -> dict[str, Any]:
    content = _parsed(await _body(request, _MAX_JSON_BYTES))
    _check(isinstance(content, dict), "the body must be a JSON object")
    return dict(content)


def _parsed(text: str | bytes) -> Any:
    try:
        content = json.loads(text)
        json.dumps(content, ensure_ascii=False).encode()  # JSON can spell half a character, which no tokenizer takes
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    return content


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise HTTPException(400, message)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _weights(words: Any) -> dict[str, float]:
    numbers = isinstance(words, dict) and all(isinstance(weight, (int, float)) for weight in words.values())
    is_valid = numbers and all(abs(weight) <= _MAX_WEIGHT for weight in words.values())
    _check(is_valid, f"words must be an object of numbers by term, of -{_MAX_WEIGHT:g} to {_MAX_WEIGHT:g}")
    return {term: float(weight) for term, weight in words.items()}


async def _problem(request: Request, error: Exception) -> Response:
    status, title, detail = 500, "internal error", "the server failed; its log states why"
    if isinstance(error, (HTTPException, ValueError)):
        status, title = getattr(error, "status_code", 400), "request refused"
        detail = str(getattr(error, "detail", error))
    content = {"type": "about:blank", "title": title, "status": status, "detail": detail}
    return JSONResponse(content, status, media_type="application/problem+json")


def application(
    index: SparseIndex, model: Stair, pictures: Path | None, hosts: list[str], max_error: float | None = None
) -> Starlette:
    """The server of an index, its model, and the folder that the `file` of documents is relative to, if there is one.

    It answers under the names in `hosts` only, so that no web site can reach it by a name that points to this machine.
    """
    page = _SearchPage(index, model, pictures, max_error)
    posts = {"/api/text": page.text, "/api/image": page.image, "/api/search": page.search}
    gets = {"/": page.page, "/api/about": page.about, "/api/words": page.document}
    gets |= {"/picture": page.picture, "/heat": page.heat}
    routes = [Route(path, answer) for path, answer in gets.items()]
    routes += [Route(path, answer, methods=["POST"]) for path, answer in posts.items()]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={kind: _problem for kind in (HTTPException, ValueError, Exception)},
    )


def serve(
    index: Path,
    model: str,
    pictures: Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    max_error: float | None = None,
) -> None:
    """Serves the search page, by default only on this machine.

    Args:
        index: folder of the index.
        model: folder or hub name of the index's model.
        pictures: folder of the images: the one passed to `stair embed`, or the folder of its tars.
        host: address to listen on. There is no authentication: anyone who can reach it can search and see all images.
        port: port to listen on.
        max_error: start value of the page's setting, as in `stair search`.
    """
    if pictures is not None and not pictures.is_dir():
        raise FileNotFoundError(f"{pictures}: no such folder of images")
    hosts = ["127.0.0.1", "localhost", "[::1]"] if host in ("127.0.0.1", "localhost", "::1") else ["*"]
    app = application(SparseIndex.open(index), Stair.from_pretrained(model), pictures, hosts, max_error)
    print(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    uvicorn.run(app, host=host, port=port, log_level="warning")

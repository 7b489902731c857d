"""Search without a server, in headless Chromium over a static server of this machine: bytes, requests and time of a query.

    python -m benchmarks.web FOLDER                                 # 1,000,000 synthetic documents; FOLDER/site is kept
    python -m benchmarks.web FOLDER --documents 100000 --pictures photos/     # thumbnails of these images, in turns
    python -m benchmarks.web --recall runs/demo                     # what the lookup table keeps of the text encoder

A query has six terms of one document, drawn evenly, of random weights. Nothing of a query is in a cache when it is asked:
the page's own are emptied, and the server forbids Chromium's. Time is from the search to the last thumbnail on the page.
Bytes are those of the answers, with 300 for the headers of each. Hits and scores are compared with `SparseIndex`.
"""

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from playwright.sync_api import sync_playwright
from scipy import sparse

from stair import SparseIndex, Stair
from stair.data.pairs import EvaluationPairs
from stair.embeddings import Embeddings, EmbeddingSpace
from stair.export.target import Row
from stair.export.web import EXPANSION, _thumbnail, web
from stair.images import MAX_PIXELS

WORDS, TOPICS, TOPIC_WORDS = 30_522, 2_000, 400
TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{v}" for v in range(5, WORDS)))
LOADED = "performance.getEntriesByType('resource').filter(e => e.name.startsWith('http')).map(e => e.transferSize)"
ASK = """async given => {
  words = given;
  (await index).documents.clear();
  thumbnails.clear();
  performance.clearResourceTimings();
  performance.setResourceTimingBufferSize(1e5);
  const start = performance.now();
  await search();
  while ([...document.querySelectorAll('.hit img')].some(image => !image.src || !image.complete))
    await new Promise(done => setTimeout(done, 1));
  const time = performance.now() - start, sizes = LOADED;
  return [[time, sizes.reduce((sum, size) => sum + size, 0) / 1e3, sizes.length], hits.map(hit => [hit.id, hit.score])];
}""".replace("LOADED", LOADED)


def collection(documents: int) -> sparse.csr_matrix:
    """Half of a document's terms are of its topics; half are drawn from all terms, which are as frequent as Zipf says."""
    generator = np.random.default_rng(0)
    topical = sparse.vstack(list(_topical(documents)), "csr")
    share = np.arange(1, len(TOKENS) - 4) ** -0.8
    common = generator.choice(5 + generator.permutation(len(share)), (documents, 45), p=share / share.sum())
    weights = np.log1p(generator.gamma(2.0, 0.5, common.shape)).astype(np.float32)
    starts = np.arange(documents + 1) * 45
    frequent = sparse.csr_matrix((weights.ravel(), common.ravel(), starts), shape=(documents, len(TOKENS)))
    frequent.sum_duplicates()
    return topical.maximum(frequent).tocsr()


def _topical(documents: int) -> Iterator[sparse.csr_matrix]:
    """45 terms of three topics; terms of a topic, and topics, are as frequent as Zipf says, rarer terms weigh more."""
    generator = np.random.default_rng(0)
    words_TW = np.stack([generator.choice(WORDS, TOPIC_WORDS, replace=False) for _ in range(TOPICS)])
    zipf = 1 / np.arange(1, TOPIC_WORDS + 1) ** 0.8
    share = 1 / np.arange(1, TOPICS + 1) ** 0.6
    for first in range(0, documents, 50_000):
        shape = (min(50_000, documents - first), 45)
        topic = generator.choice(TOPICS, (shape[0], 3), p=share / share.sum())
        which = generator.choice(3, shape, p=[0.6, 0.3, 0.1])
        place = generator.choice(TOPIC_WORDS, shape, p=zipf / zipf.sum())
        word = words_TW[np.take_along_axis(topic, which, 1), place]
        weight = np.log1p(generator.gamma(2.0, 0.5, shape) * (1 + place / 80)).astype(np.float32)
        starts = np.arange(shape[0] + 1) * 45
        matrix = sparse.csr_matrix((weight.ravel(), word.ravel(), starts), shape=(shape[0], WORDS), dtype=np.float32)
        matrix.sum_duplicates()
        yield matrix


def build(folder: Path, documents: int) -> None:
    vectors, start = collection(documents), time.perf_counter()
    ids = [f"image-{n}" for n in range(documents)]
    source = [{"file": f"{name}.jpg"} for name in ids]
    space = EmbeddingSpace("s" * 64, "dot", TOKENS)
    SparseIndex.build(folder / "index", Embeddings(vectors, ids, space, source=source))
    web(folder / "index", folder / "site")
    print(f"index and export: {time.perf_counter() - start:.0f} s")


def write_thumbnails(site: Path, pictures: Path) -> None:
    """Thumbnails of the images of a folder, in turns: as the export writes them, without decoding one many times."""
    rows = (Row("", [], [], {"source": {"file": path.name}}) for path in sorted(pictures.iterdir())[:500])
    files = [file for row in rows if (file := _thumbnail(pictures, row))]
    places = np.fromfile(site / "places.bin", "<f8").reshape(-1, 2)
    with (site / "thumbnails.bin").open("wb") as file:
        for n, data in enumerate(islice(cycle(files), len(places) - 1), 1):
            file.write(data)
            places[n, 1] = file.tell()
    places.tofile(site / "places.bin")


class Handler(BaseHTTPRequestHandler):
    """Answers ranges of files as a host in C does: without a thread or a file opened for each."""

    protocol_version, disable_nagle_algorithm, files = "HTTP/1.1", True, dict[str, int]()

    def do_GET(self) -> None:
        """A file, or the range that is asked for."""
        file = self.files[self.path[1:] or "index.html"]
        first, end = 0, os.fstat(file).st_size
        if "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            end = min(last + 1, end)
        data = os.pread(file, end - first, first)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Range", f"bytes {first}-{end - 1}/{os.fstat(file).st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def served(site: Path) -> Iterator[str]:
    Handler.files = {path.name: os.open(path, os.O_RDONLY) for path in site.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def measure(folder: Path, count: int, times: int, seed: int = 7) -> None:
    index, generator = SparseIndex.open(folder / "index"), np.random.default_rng(seed)
    index.search(words={TOKENS[5]: 1.0})  # compiles
    holds, asked, answers, wrong = np.zeros(WORDS, np.int64), [], list[Any](), 0
    for part in index.content():
        holds += np.bincount(part.vectors.indices, minlength=WORDS)
    for n in generator.choice(len(index), count, replace=False):
        terms = generator.choice(list(index.vector(f"image-{n}")), 6, replace=False)
        asked.append(dict(zip(terms, np.log1p(generator.gamma(2.0, 0.5, 6)).tolist(), strict=True)))
    with served(folder / "site") as address, sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page()
        start = time.perf_counter()
        page.goto(address)
        while "documents" not in page.locator("#status").inner_text():
            time.sleep(0.005)
        milliseconds = 1e3 * (time.perf_counter() - start)
        size = sum(page.evaluate(LOADED)) + (folder / "site" / "index.html").stat().st_size
        for words in asked:
            measured, hits = min(page.evaluate(ASK, words) for _ in range(times))
            answers.append(measured)
            wrong += hits != [[hit.id, hit.score] for hit in index.search(words=words, k=10)]
        print(f"{len(index):,} documents, {holds.sum() / len(index):.0f} terms each")
        print(f"Chromium {chromium.version}; load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"the page itself: {size / 1e3:.0f} kB, {milliseconds:.0f} ms")
        chromium.close()
    spread = [[holds[index.space.term_ids[word]] for word in words] for words in asked]
    postings = np.percentile(np.sum(spread, axis=1), [50, 95, 100])
    print(f"{count} queries, {wrong} with other hits or scores than SparseIndex")
    print(f"documents that hold a term of a query: at most {np.max(spread):,}; sum over a query, p50 / p95 / max:")
    print(f"{' / '.join(f'{value:,.0f}' for value in postings)}\n")
    print("| a query | p50 | p95 | max |\n|---|---|---|---|")
    for name, values in zip(("ms", "kB", "requests"), zip(*answers, strict=True), strict=True):
        print(f"| {name} | {' | '.join(f'{value:.0f}' for value in np.percentile(values, [50, 95, 100]))} |")
    files = {path.name: path.stat().st_size for path in sorted((folder / "site").iterdir())}
    print("\n| file | MB |\n|---|---|\n" + "\n".join(f"| {name} | {size / 1e6:.1f} |" for name, size in files.items()))


def recall(run: Path) -> None:
    """Text to image recall of the demo's validation scenes, with the text encoder and with the lookup table."""
    model = Stair.from_pretrained(run / "stage3" / "stair")
    pairs = EvaluationPairs(str(run / "data" / "val-*.tar"), model.config.image.image_size, MAX_PIXELS)
    captions = [(n, caption) for n, pair in enumerate(pairs[i] for i in range(len(pairs))) for caption in pair.captions]
    image_NV = torch.cat([model.encode_image(pairs[n].pixels[None]) for n in range(len(pairs))])
    with tempfile.TemporaryDirectory() as folder:
        web(run / "index", Path(folder) / "site", str(run / "stage3" / "stair"))
        data = np.fromfile(
            Path(folder) / "site" / "lookup.bin", [("terms", "<u4", EXPANSION), ("weights", "<f4", EXPANSION)]
        )
    lookup_CV = torch.zeros(len(captions), len(model.vocabulary))
    alone_CV = torch.zeros_like(lookup_CV)
    for row, (_, caption) in enumerate(captions):
        for v in model.vocabulary.token_ids(caption):
            terms, weights = (
                torch.from_numpy(data[v]["terms"].astype(np.int64)),
                torch.from_numpy(data[v]["weights"].copy()),
            )
            lookup_CV[row] = torch.maximum(
                lookup_CV[row], torch.zeros(len(lookup_CV[row])).scatter_reduce(0, terms, weights, "amax")
            )
            alone_CV[row, v] = torch.log(1 + len(pairs) / ((image_NV[:, v] > 0).sum() + 1))
    encoder_CV = torch.cat([model.encode_text([caption]) for _, caption in captions])
    right = torch.tensor([n for n, _ in captions])[:, None]
    print(f"{len(pairs)} images, {len(captions)} captions\n\n| text side | R@1 | R@5 | R@10 |\n|---|---|---|---|")
    for name, text_CV in (("encoder", encoder_CV), ("lookup", lookup_CV), ("rarity of tokens", alone_CV)):
        score_CN = model.score(text_CV, image_NV)
        rank_C = (score_CN >= score_CN.gather(1, right)).sum(1)
        print(f"| {name} | {' | '.join(f'{100 * (rank_C <= k).float().mean():.1f}' for k in (1, 5, 10))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--times", type=int, default=1, help="ask each query so often; the fastest answer counts")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--recall", type=Path)
    given = parser.parse_args()
    if given.recall:
        return recall(given.recall)
    if not given.folder.exists():
        build(given.folder, given.documents)
    if given.pictures:
        write_thumbnails(given.folder / "site", given.pictures)
    measure(given.folder, given.queries, given.times)


if __name__ == "__main__":
    main()

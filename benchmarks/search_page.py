"""A load test of the search page: how many searches a second it answers, and how long each waits.

    python benchmarks/search_page.py http://127.0.0.1:8080 --text "a red heart" --clients 8 --seconds 10

Clients ask in turn for the words of a text and for its hits, as a person's search does, each over a connection of its own.
Start `stair serve` first; run both on one machine, and say so beside the figures.
"""

import argparse
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import numpy as np


def client(address: str, text: str, until: float, waits: dict[str, list[float]], lock: threading.Lock) -> None:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)

    def ask(path: str, body: dict) -> dict:
        start = time.perf_counter()
        connection.request("POST", path, json.dumps(body))
        answer = connection.getresponse()
        content = json.loads(answer.read())
        if answer.status != 200:
            raise RuntimeError(content["detail"])
        with lock:
            waits[path].append(time.perf_counter() - start)
        return content

    asked = False
    while not asked or time.perf_counter() < until:
        asked = True
        ask("/api/search", {"words": ask("/api/text", {"text": text})["words"]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("address")
    parser.add_argument("--text", default="a red heart")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    waits: dict[str, list[float]] = {"/api/text": [], "/api/search": []}
    try:
        client(options.address, options.text, 0.0, waits, threading.Lock())
    except OSError as error:
        raise SystemExit(f"nothing answers at {options.address} ({error}); start `stair serve` first") from error
    waits = {path: [] for path in waits}
    lock, until = threading.Lock(), time.perf_counter() + options.seconds
    threads = [
        threading.Thread(target=client, args=(options.address, options.text, until, waits, lock))
        for _ in range(options.clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for path, seconds in waits.items():
        p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
        print(f"{path:12} {len(seconds) / options.seconds:8.1f} a second   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms")


if __name__ == "__main__":
    main()

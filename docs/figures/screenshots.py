"""Takes the pictures of the pages in docs/start from a finished demo, in an installed Chromium.

python docs/figures/screenshots.py [runs/demo]      after `make demo`
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

OUT = Path(__file__).parents[1] / "start"
COLORS = 128  # of a palette, which makes files a third as large
QUERY = "three yellow mushrooms"
BIN = Path(sys.executable).parent


def main() -> None:
    """Writes report, explanation, search page (light; dark at 390 px) and a TensorBoard panel."""
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    model, address = run / "stage3" / "stair", "http://127.0.0.1:8097"
    image, text = _example(run / "data" / "val-0000.tar", run / "explain.png")
    subprocess.run(
        [BIN / "stair", "explain", model, run / "explain.html", "--image", image, "--text", text], check=True
    )
    served = [BIN / "stair", "serve", run / "index", model, "--pictures", run / "data", "--port", "8097"]
    server = subprocess.Popen(served, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout and server.stdout.readline()  # the address: it answers in a moment
        with sync_playwright() as play:
            chromium = play.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
            for name, url, width, scheme in (
                ("report", (run / "report.html").resolve().as_uri(), 1200, "light"),
                ("explain", (run / "explain.html").resolve().as_uri(), 1200, "light"),
                ("search", address, 1200, "light"),
                ("search_dark_390", address, 390, "dark"),
            ):
                page = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
                _open(page, url, url == address)
                _save(page.screenshot(), name)
            chromium.close()
    finally:
        server.terminate()
    events = EventAccumulator(str(run / "stage3" / "tensorboard"))
    events.Reload()
    _save(events.Images("val/scenes/panels")[-1].encoded_image_string, "panel")


def _example(shard: Path, image: Path) -> tuple[Path, str]:
    """The first sample: its picture, written to `image`, and a caption."""
    with tarfile.open(shard) as tar:
        members = {name.rpartition(".")[2]: tar.extractfile(name) for name in tar.getnames()[:2]}
        content = {kind: file.read() for kind, file in members.items() if file}
    Image.open(io.BytesIO(next(data for kind, data in content.items() if kind != "json"))).save(image)
    return image, json.loads(content["json"])["captions"][0]


def _open(page: Page, url: str, search: bool) -> None:
    page.goto(url, wait_until="networkidle")
    if search:
        page.fill("#text", QUERY)
        page.keyboard.press("Enter")
        page.wait_for_selector("#hits img")
        page.wait_for_function("[...document.querySelectorAll('#hits img')].slice(0, 6).every(img => img.naturalWidth)")


def _chromium() -> str:
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    return path or sys.exit("no Chromium: install one, or set CHROMIUM to its path")


def _save(png: bytes, name: str) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS).save(OUT / f"{name}.png", optimize=True)
    print(OUT / f"{name}.png")


if __name__ == "__main__":
    main()

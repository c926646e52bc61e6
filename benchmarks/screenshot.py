"""The README's pictures: a page of maps by MiniLM-L6, what the feed-forward block added to the last layer, and the map
that its ten lines draw; and the drawing of layers with the names of scopes.

    python benchmarks/screenshot.py [PNG]

Needs Chromium, and Playwright (`pip install playwright`).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent / "paper"))
from models import minilm

import ffattr
from ffattr.report.drawing import draw_layers

TEXT = "The Netherlands, a country below sea level, has many windmills; they pumped the water out of the land."
PICTURE = Path(__file__).parent / "results" / "page.png"
DRAWING = Path(__file__).parent / "results" / "layers.svg"
SMALL = PICTURE.with_name("layer3.png")


def main() -> None:
    program = shutil.which("chromium") or shutil.which("chrome")
    if program is None:
        raise SystemExit("needs chromium in PATH")
    looks = ' xmlns="http://www.w3.org/2000/svg" color="#1b2025" style="background: #fff" '
    DRAWING.write_text(draw_layers().replace(" ", looks, 1) + "\n")
    model, tokenizer = minilm()
    small = ffattr.attribute(model, "The cat sat on the mat.", tokenizer=tokenizer, scopes=["atb", "atb_ff", "layer"])
    small.plot("atb_ff", layer=3).savefig(SMALL)
    attribution = ffattr.attribute(model, TEXT, tokenizer=tokenizer, scopes="all")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "page.html"
        attribution.to_html(page, title="MiniLM-L6")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1080}, device_scale_factor=1.25)
        tab.goto(page.as_uri())
        tab.click("#reads .words >> text=windmill")
        tab.wait_for_timeout(1000)
        tab.screenshot(path=sys.argv[1] if len(sys.argv) > 1 else PICTURE)
        browser.close()


if __name__ == "__main__":
    main()

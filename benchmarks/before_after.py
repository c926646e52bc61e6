"""Pictures of an older version beside those of this one: the map of README's example and the page of a sentence.

    python benchmarks/before_after.py CHECKOUT

CHECKOUT is a folder with an older version of this repository; what its C++ cannot do is computed by PyTorch. Writes
``before_after_map.png`` and ``before_after_page.png`` to ``benchmarks/results``, the older version on the left. Needs
Chromium, Playwright and Pillow.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
DRAW = """
import sys
from models import minilm
import ffattr
model, tokenizer = minilm()
options = {"tokenizer": tokenizer, "backend": "torch"}
small = ffattr.attribute(model, "The cat sat on the mat.", scopes=["atb", "atb_ff", "layer"], **options)
small.plot("atb_ff", layer=3).savefig(sys.argv[1] + "/map.png", dpi=80)
text = "The Netherlands, a country below sea level, has many windmills; they pumped the water out of the land."
ffattr.attribute(model, text, scopes="all", **options).to_html(sys.argv[1] + "/page.html", title="MiniLM-L6")
"""


def draw(version: Path, folder: Path) -> None:
    """Has a version draw its map and write its page into a folder, and takes a picture of that."""
    search = os.pathsep.join(map(str, (version, HERE / "paper")))
    told = [sys.executable, "-c", DRAW, str(folder)]
    subprocess.run(told, env=os.environ | {"PYTHONPATH": search}, cwd=folder, check=True)  # where no version lies
    program = shutil.which("chromium") or shutil.which("chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1120})
        tab.goto((folder / "page.html").as_uri())
        tab.wait_for_timeout(2500)
        tab.screenshot(path=folder / "page.png")
        browser.close()


def join(left: Path, right: Path, width: int) -> Image.Image:
    """Puts two pictures side by side, ``width`` pixels wide in all."""
    both = [Image.open(path).convert("RGB") for path in (left, right)]
    height = max(one.height for one in both)
    found = Image.new("RGB", (sum(one.width for one in both) + 24, height), "white")
    found.paste(both[0], (0, 0))
    found.paste(both[1], (both[0].width + 24, 0))
    size = (width, round(found.height * width / found.width))
    return found.resize(size, Image.Resampling.LANCZOS)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        draw(Path(sys.argv[1]).resolve(), Path(before))
        draw(HERE.parent, Path(after))
        for name, width in (("map", 900), ("page", 1000)):
            picture = join(Path(before, f"{name}.png"), Path(after, f"{name}.png"), width)
            picture.save(HERE / "results" / f"before_after_{name}.png", optimize=True)


if __name__ == "__main__":
    main()

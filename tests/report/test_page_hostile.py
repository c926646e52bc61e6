"""Text of any kind stays inside its box on the page."""

import pytest
import torch
from browser import chromium, opened, running

from ffattr.report import Panel, render

ZALGO = "z" + "\u0301\u0335\u034a" * 80
WORDS = ["[CLS]", ZALGO, "w" * 10_000, "مرحبا\u202e", "mat", "[SEP]"]
OUTSIDE = """() => {
  const found = [];
  for (const card of document.querySelectorAll(".card, .names")) {
    if (card.hidden || !card.offsetParent) continue;
    const box = card.getBoundingClientRect();
    if (getComputedStyle(card).contain !== "paint" || box.right > innerWidth + 1 || box.height > 3 * innerHeight)
      found.push(card.id || card.className);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser():
    with running(chromium()) as browser:
        yield browser


def test_marks_and_endless_names_stay_in_their_boxes(browser, tmp_path):
    count = len(WORDS)
    maps = torch.rand(count, count, generator=torch.Generator().manual_seed(0))
    named = "n" * 10_000
    panel = Panel(named, WORDS, range(count), WORDS, range(count), False, [0], ["atb"], lambda scope, place: maps)
    path = tmp_path / "page.html"
    path.write_text("".join(render([panel], named, facts={"model": named, ZALGO: ZALGO})), encoding="utf-8")
    with opened(browser, path) as tab:
        assert tab.evaluate(OUTSIDE) == []
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth + 1")
        heights = tab.evaluate("[...document.querySelectorAll('h1, h2, #facts dd')].map(one => one.offsetHeight)")
        assert max(heights) <= 200

"""Scores and signed flow in a page: the data, and what a browser makes of it."""

import pytest
import torch
from browser import drawn, opened
from page_data import make_panel, make_scored, read_page

from ffattr.report import render

HOSTILE = '<img src=x onerror="window.flag=1">'
TOKENS = ["The", "ĠE", "iffel", "ĠTower", HOSTILE, "Ġof"]
SCORES = torch.tensor([[[2.0, -1, 0.5, 0, 0.25, 1], [1.0, 1, 1, -0.5, 0, 0.25], [0, 0, 0, 0, 0, 2.75]]]).double()
SCORES = torch.cat([SCORES, -SCORES])
FLOW = torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()


def write(path, panels):
    path.write_text("".join(render(panels, "A title")), encoding="utf-8")
    return path


def test_scores_are_in_the_page_beside_flow_or_alone():
    for flow in (None, FLOW):
        data, read = read_page("".join(render([make_scored(SCORES, flow, TOKENS)], "x")))
        panel = data["panels"][0]
        shown, sums = read(panel["scores"]["maps"]["number 1"], 6)
        torch.testing.assert_close(shown, SCORES[1], rtol=3e-4, atol=0)
        torch.testing.assert_close(sums.double(), SCORES[1].sum(1), rtol=1e-6, atol=1e-6)
        assert panel["scores"]["values"] == {"number 0": 3.0, "number 1": -2.5}
        assert panel["scores"]["rest"]["number 0"] == {"bias": [0.25] * 3}
        assert panel["scores"]["readAt"] == {"number 0": 5, "number 1": 5}
        assert panel["scores"]["boundaries"] == ["layer 0", "layer 1", "output"]
        assert bool(panel["maps"]) == (flow is not None)
        if flow is not None:
            torch.testing.assert_close(read(panel["maps"]["number 1"][1][0], 6)[0], FLOW[1, 1], rtol=3e-4, atol=0)


def test_scores_count_towards_the_limit():
    scores = torch.randn(1, 40, 3000, generator=torch.Generator().manual_seed(0))
    for limit in (350_000, 600_000):
        assert len("".join(render([make_scored(scores)], "x", limit=limit)).encode()) <= limit
    with pytest.raises(ValueError, match="larger than 200,000 bytes"):
        render([make_scored(scores)], "x", limit=200_000)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scores")
    plain = make_scored(SCORES, None, TOKENS)
    return {
        "flow": write(folder / "flow.html", [make_scored(SCORES, FLOW, TOKENS)]),
        "alone": write(folder / "alone.html", [plain]),
        "mixed": write(folder / "mixed.html", [plain, make_panel(torch.rand(2, 3, 3) + 0.1)]),
    }


def sums(tab):
    return [row.inner_text().split("\t") for row in tab.locator("#score-sum tr").all()]


def colours(tab):
    return tab.eval_on_selector_all(
        "#score-words .word", "words => words.map(word => word.style.background.match(/\\d+/g).map(Number))"
    )


def test_the_text_has_the_colours_of_its_scores_and_they_add_up(browser, pages):
    with opened(browser, pages["alone"]) as tab:
        assert tab.locator("#score-title").inner_text() == "What speaks for “number 0”, read at of5"
        words = tab.locator("#score-words .word")
        assert words.all_inner_texts() == ["The", "E", "iffel", "Tower", HOSTILE, "of"]
        found = colours(tab)
        for (red, _, blue), score in zip(found, SCORES[0, 0].tolist(), strict=True):
            assert (blue > red) == (score > 0) or score == 0
        assert found[0] == [11, 58, 107]  # the end of the scale
        assert [row[0] for row in sums(tab)] == ["For it", "Against it", "Bias", "The number"]
        assert [row[-1] for row in sums(tab)] == ["+3.750", "\u22121.000", "+0.2500", "+3.000"]
        top = [item.inner_text().split() for item in tab.locator("#score-top li").all()]
        assert [item[0] for item in top][:3] == ["The0", "E1", "of5"]
        assert tab.evaluate("window.flag") is None
        assert not tab.locator("#map-card").is_visible()
        assert not tab.locator("#scale").is_visible()


def test_a_click_on_a_layer_shows_it(browser, pages):
    with opened(browser, pages["flow"]) as tab:
        box = tab.locator("#score-map").bounding_box()
        tab.mouse.click(box["x"] + 62, box["y"] + 33)  # the second row, the first column
        drawn(tab)
        assert tab.locator("#layer").evaluate("layer => layer.selectedOptions[0].text") == "1"
        assert sums(tab)[0][-1] == "+3.250"
        assert tab.locator("#map-title").inner_text() == "What passes in layer 1 on its way to “number 0”"
        line = tab.locator("#score-readout")
        assert line.inner_text() == "The0 gives +1.000 at the input of layer 1"
        assert float(line.get_attribute("data-value")) == pytest.approx(1.0, rel=3e-4)
        tab.select_option("#layer", label="output")
        drawn(tab)
        assert sums(tab)[0][-1] == "+2.750"
        assert tab.locator("#map-title").inner_text() == "What passes in layer 1 on its way to “number 0”"
        tab.wait_for_timeout(400)  # addresses are written a little later
        address = tab.url.split("#")[1]
    with opened(browser, pages["flow"], address) as tab:
        assert sums(tab)[0][-1] == "+2.750"


def test_flow_keeps_its_signs(browser, pages):
    with opened(browser, pages["flow"], "layer=1&row=4&column=2") as tab:
        line = tab.locator("#readout")
        assert float(line.get_attribute("data-value")) == pytest.approx(float(FLOW[0, 1, 4, 2]), rel=3e-4)
        assert "takes from" in line.inner_text()
        assert not tab.locator("#values").is_visible()
        tab.select_option("#scope", label="number 1")
        drawn(tab)
        assert float(line.get_attribute("data-value")) == pytest.approx(float(FLOW[1, 1, 4, 2]), rel=3e-4)
        assert sums(tab)[-1][-1] == "\u22122.500"
        tab.select_option("#versus", label="number 0")
        drawn(tab)
        expected = float(FLOW[1, 1, 4, 2] - FLOW[0, 1, 4, 2])
        assert float(line.get_attribute("data-value")) == pytest.approx(expected, rel=1e-3)


def test_keys_move_through_layers_and_tokens(browser, pages):
    with opened(browser, pages["alone"]) as tab:
        tab.locator("#score-map").focus()
        for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
            tab.keyboard.press(key)
        assert tab.locator("#score-readout").inner_text() == "E1 gives +1.000 at the input of layer 1"
        tab.locator("#score-words").focus()
        tab.keyboard.press("ArrowRight")
        assert tab.locator("#score-words .other").inner_text() == "iffel"
        tab.locator("#score-top button").first.click()
        tab.keyboard.press("]")
        assert tab.locator("#score-readout").inner_text().endswith("the output of the last layer")
        name = tab.locator("#score-map").get_attribute("aria-label")
        assert name.startswith("What 6 tokens give to number 0 at 3 layers.")


@pytest.mark.parametrize("width", [360, 800, 1500])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, pages, width, theme):
    options = {"viewport": {"width": width, "height": 800}, "color_scheme": theme}
    with opened(browser, pages["flow"], **options) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        red, _, blue = colours(tab)[0]
        assert (red, blue) == ((11, 107) if theme == "light" else (198, 255))


def test_panels_with_and_without_scores_are_on_one_page(browser, pages):
    with opened(browser, pages["mixed"]) as tab:
        assert tab.locator("#score-card").is_visible()
        tab.select_option("#panel", index=1)
        drawn(tab)
        assert not tab.locator("#score-card").is_visible()
        assert tab.locator("#map-title").inner_text() == "atb, layer 0"
        assert tab.locator("#values").is_visible()
        tab.select_option("#panel", index=0)
        drawn(tab)
        assert tab.locator("#score-card").is_visible()
        assert not tab.locator("#map-card").is_visible()

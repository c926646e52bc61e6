"""The running text and the line below the map in a browser: what tokens read and who reads them."""

import re

import pytest
from browser import drawn, opened
from shown_page import (
    ACCURACY,
    HOSTILE,
    MAPS,
    PLAIN,
    WORDS,
    find_share,
    find_strength,
    point,
    press,
    read_said,
    read_shades,
)


def test_pointing_says_tokens_and_values(browser, page):
    with opened(browser, page, PLAIN) as tab:
        seen = set()
        for place in range(8):
            point(tab, 0.25 + 0.07 * place, 0.3 + 0.06 * place)
            row, column, value = read_said(tab)
            assert value == pytest.approx(float(MAPS["atb_ff"][2, row, column]), rel=ACCURACY)
            text = tab.locator("#readout").inner_text()
            assert f"{_plain(row)}{row}" in text.replace(" ", "").replace("\n", "")
            share = float(find_share("atb_ff", 2)[row, column])
            assert float(re.search(r"([\d.e-]+) % of its row", text)[1]) == pytest.approx(100 * share, rel=6e-3)
            seen.add((row, column))
        assert len(seen) >= 6


def _plain(place):
    return WORDS[place].removeprefix("##").replace(" ", "")


def test_a_click_on_a_token_shades_what_it_reads_and_who_reads_it(browser, page):
    with opened(browser, page, PLAIN) as tab:
        tab.locator("#reads .word").nth(6).click()
        drawn(tab)
        values = MAPS["atb_ff"][2]
        assert read_shades(tab, "reads") == pytest.approx(find_strength(values[6]).tolist(), abs=2e-3)
        assert read_shades(tab, "feeds") == pytest.approx(find_strength(values[:, 6]).tolist(), abs=2e-3)
        tops = tab.locator("#reads .top li").evaluate_all("items => items.map(item => Number(item.dataset.place))")
        assert tops == values[6].topk(5).indices.tolist()
        first = float(tab.locator("#feeds .top .value").first.inner_text())
        assert first == pytest.approx(float(values[:, 6].max()), rel=2e-3)
        assert tab.locator("#reads .own").inner_text() == "sat"
        press(tab, "Escape")
        assert set(read_shades(tab, "reads")) == {0}


def test_the_running_text_is_text_and_the_exact_tokens_are_at_hand(browser, page):
    with opened(browser, page, PLAIN) as tab:
        assert tab.locator("#reads .words").text_content().strip() == (
            f"[CLS] the cat unbelievably sat, {HOSTILE} </script> mat [SEP]"
        )
        assert "##believ" in tab.locator("#reads .word").nth(4).get_attribute("title")
        tab.select_option("#panel", label="cross")
        drawn(tab)
        assert tab.locator("#reads .words").text_content().replace("⏎", "") == "alpha\n beta gamma café"
        assert tab.locator("#feeds .words").text_content() == "a bc d"


def test_tokens_are_inert(browser, page):
    with opened(browser, page, "row=8&column=9") as tab:
        assert tab.evaluate("window.flag") is None
        assert tab.locator("img").count() == 0
        assert HOSTILE in tab.locator("#readout").inner_text()
        assert tab.locator("#feeds h3").inner_text().startswith("Where </script>")

"""The charts by layer in a browser, and the tables with their numbers."""

import torch
from browser import drawn, opened
from shown_page import CHANGES, PLAIN, write_page

from ffattr.report import Panel


def test_a_change_of_nothing_draws_no_axis_below_zero(browser, tmp_path):
    tokens, places = ["a", "b"], [0, 1]
    changes = [(0, "FF", 0.2), (1, "FF", -2e-16)]
    panel = Panel(
        *("1", tokens, places, tokens, places, True, [0, 1], ["atb"], lambda scope, place: torch.eye(2)),
        changes=changes,
    )
    with opened(browser, write_page(tmp_path / "one.html", [panel])) as tab:
        ticks = tab.eval_on_selector_all("#chart .tick[text-anchor=end]", "all => all.map(one => one.textContent)")
        assert ticks[0] == "0"
        assert all(float(tick) >= 0 for tick in ticks)


def test_the_chart_and_its_table(browser, page):
    with opened(browser, page, PLAIN) as tab:
        tab.locator("#chart-card summary").click()
        tab.wait_for_selector("#table tbody tr")
        rows = tab.eval_on_selector_all(
            "#table tbody tr", "rows => rows.map(row => Array.from(row.cells, cell => cell.textContent))"
        )
        assert [[float(cell) for cell in row] for row in rows] == [
            [layer, *(round(value, 3) for at, _, value in CHANGES if at == place)]
            for place, layer in enumerate([2, 4, 7])
        ]
        tab.locator("#table button").first.click()
        drawn(tab)
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 2"
        assert tab.locator("#table button:focus").inner_text() == "2"
        assert tab.locator("#table [aria-current] th").inner_text() == "2"
        box = tab.locator("#chart .dot.c1").nth(1).bounding_box()
        tab.mouse.click(box["x"] + 2, box["y"] + 12)
        drawn(tab)
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 4"
        assert tab.locator("#chart .line").count() == 3


def test_angles_are_drawn_below_zero_and_told_in_a_table(browser, page):
    with opened(browser, page, PLAIN) as tab:
        ticks = tab.eval_on_selector_all("#angle .tick[text-anchor=end]", "all => all.map(one => one.textContent)")
        assert {"0", "\u22120.5", "0.5"} <= set(ticks)
        tab.locator("#angle-card summary").click()
        rows = tab.eval_on_selector_all(
            "#angle-table tr", "rows => rows.map(row => Array.from(row.cells, cell => cell.textContent))"
        )
        assert rows[0] == ["Layer", "other pairs, median", "below 0", "own pairs, median", "below 0"]
        assert rows[1] == ["2", "\u22120.42", "100 %", "0.40", "10 %"]
        assert rows[3] == ["7", "0.05", "25 %", "\u2013", "\u2013"]
        assert tab.locator("#angle-table [aria-current] th").inner_text() == "7"
        zero, below = (tab.locator(f"#angle {what}").bounding_box()["y"] for what in (".zero", ".dot.c0 >> nth=0"))
        assert below > zero
        tab.locator("#angle-table button").nth(1).click()
        drawn(tab)
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 4"


def test_without_angles_there_is_no_card_of_them(browser, page):
    with opened(browser, page, "panel=1") as tab:
        assert tab.locator("#angle-card").is_hidden()

"""The page in a browser: what it opens on, its controls, its address, on paper and on other devices."""

import csv
import io
from xml.etree import ElementTree

import pytest
import torch
from browser import drawn, opened
from shown_page import (
    ACCURACY,
    HOSTILE,
    MAPS,
    PLAIN,
    SCOPES,
    WORDS,
    T,
    find_share,
    make_square,
    press,
    read_pixels,
    read_said,
    read_shades,
    write_page,
)


def test_a_page_opens_from_disk_offline(browser, page):
    with opened(browser, page) as tab:
        assert tab.title() == f"Title {HOSTILE}"
        assert tab.locator("h1").inner_text() == f"Title {HOSTILE}"
        assert "±0.02 %" in tab.locator("#exactness").inner_text()


def test_it_opens_on_what_the_feed_forward_block_added_and_its_strongest_change(browser, page):
    with opened(browser, page) as tab:
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 7, minus atb"
        assert tab.locator("#map-what").inner_text() == (
            "What the feed-forward block added to shares of rows (blue) and took (orange): attention block + FF, minus "
            "attention block"
        )
        change = (find_share("atb_ff", 2) - find_share("atb", 2)).fill_diagonal_(0)
        row, column = divmod(int(change.abs().argmax()), T)
        assert read_said(tab) == (row, column, pytest.approx(float(change[row, column]), abs=2 * ACCURACY))
        assert read_shades(tab, "reads") != read_shades(tab, "feeds")
        press(tab, "Escape")
        assert read_said(tab) is None
        tab.wait_for_timeout(400)  # the address follows a moment later
        address = tab.url.split("#")[1]
    with opened(browser, page, address) as tab:  # as it was left
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 7, minus atb"
        assert read_said(tab) is None


def test_one_scope_opens_on_its_strongest_pair(browser, tmp_path):
    values = torch.rand(9, 9) + 10 * torch.eye(9)
    values[3, 6] = 2.0
    with opened(browser, write_page(tmp_path / "one.html", [make_square(values)])) as tab:
        assert tab.locator("#map-title").inner_text() == "atb, layer 0"
        assert tab.locator("#map-what").inner_text() == "attention block"
        assert read_said(tab)[:2] == (3, 6)


def test_a_selection_moves_nothing(browser, page):
    with opened(browser, page, PLAIN) as tab:
        before = tab.locator("#reads .words").bounding_box()
        tab.locator("#reads .word").nth(6).click()
        drawn(tab)
        assert tab.locator("#reads .words").bounding_box() == before
        press(tab, "Escape")
        assert tab.locator("#reads .words").bounding_box() == before


def test_hints_fit_the_device(browser, page):
    with opened(browser, page, PLAIN) as tab:
        assert "Point at a cell" in tab.locator("#readout").inner_text()
        press(tab, "?")
        assert tab.locator(".keys").is_visible()
        assert tab.locator(".touch").is_hidden()
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with opened(browser, page, PLAIN, **phone) as tab:
        assert tab.locator("#readout").inner_text() == "Tap a cell, or a word of the text."
        tab.locator("#help-open").tap()
        assert tab.locator(".keys").is_hidden()
        assert tab.locator(".touch").is_visible()
        tab.get_by_role("button", name="Close").tap()


def test_what_is_in_sight_can_be_saved(browser, page):
    from PIL import Image

    def save(tab, kind):
        with tab.expect_download() as found:
            tab.locator(f"#save-{kind}").click()
        assert found.value.suggested_filename.endswith(f"atb_ff-layer-7-minus-atb.{kind}")
        return found.value.path().read_bytes()

    with opened(browser, page) as tab:
        rows = list(csv.DictReader(io.StringIO(save(tab, "csv").decode())))
        change = find_share("atb_ff", 2) - find_share("atb", 2)
        assert len(rows) == T * T
        for row in rows[:: T + 2]:
            query, key = int(row["query"]), int(row["key"])
            assert (row["query_token"], row["key_token"]) == (WORDS[query], WORDS[key])
            assert float(row["value"]) == pytest.approx(float(change[query, key]), abs=2 * ACCURACY)
        svg = ElementTree.fromstring(save(tab, "svg"))
        texts = [one.text for one in svg.iter("{http://www.w3.org/2000/svg}text")]
        assert {"atb_ff, layer 7, minus atb", "cat", HOSTILE[:40]} <= set(texts)
        assert len(list(svg.iter("{http://www.w3.org/2000/svg}rect"))) > T * T
        picture = Image.open(io.BytesIO(save(tab, "png")))
        assert picture.width >= 400
        assert len(picture.convert("RGB").getcolors(2**20)) > 50


def test_pickers_change_the_map(browser, page):
    with opened(browser, page, "row=3&column=5") as tab:
        assert tab.locator("#part-field").is_hidden()
        tab.select_option("#scope", str(SCOPES.index("attn_heads")))
        drawn(tab)
        for layer, place in (("2", 0), ("4", 1)):
            tab.select_option("#layer", label=layer)
            for head in (0, 1):
                tab.select_option("#part", label=str(head))
                drawn(tab)
                assert tab.locator("#map-title").inner_text() == f"attn_heads, head {head}, layer {layer}"
                assert read_said(tab)[2] == pytest.approx(float(MAPS["attn_heads"][place, head, 3, 5]), rel=ACCURACY)
        tab.get_by_text("Share of row", exact=True).first.click()
        drawn(tab)
        assert read_said(tab)[2] == pytest.approx(float(find_share("attn_heads", 1, 1)[3, 5]), rel=ACCURACY)
        before = read_pixels(tab)
        tab.get_by_text("Linear", exact=True).click()
        drawn(tab)
        tab.wait_for_timeout(50)
        assert (before != read_pixels(tab)).any(2).float().mean() > 0.1


def test_keys(browser, page):
    with opened(browser, page, PLAIN) as tab:
        tab.locator("#over").focus()
        press(tab, "ArrowDown ArrowDown ArrowRight")
        assert read_said(tab)[:2] == (1, 1)
        press(tab, "[ s s")
        assert tab.locator("#map-title").inner_text() == "atb, layer 4"
        press(tab, "S h")
        assert tab.locator("#map-title").inner_text() == "attn_heads, head 1, layer 4"
        press(tab, "] ] ] s c")
        assert tab.locator("#map-title").inner_text() == "atb_ff, layer 7, minus atb"
        press(tab, "c d")
        assert tab.locator("html").get_attribute("data-theme") == "dark"
        press(tab, "?")
        assert tab.get_by_role("dialog").is_visible()
        press(tab, "Escape")
        assert tab.get_by_role("dialog").count() == 0
        assert read_said(tab)[:2] == (1, 1)
        press(tab, "Escape")
        assert read_said(tab) is None
        tab.locator("#reads .words").focus()
        press(tab, "ArrowRight ArrowRight ArrowRight")
        assert read_said(tab)[:2] == (2, 2)


def test_the_address_reopens_the_view(browser, page):
    with opened(browser, page, PLAIN) as tab:
        tab.locator("#reads .word").nth(6).click()
        press(tab, "[ s h d")
        tab.get_by_text("Linear", exact=True).click()
        drawn(tab)
        tab.wait_for_timeout(400)  # the address follows a moment later
        address, title, said = tab.url.split("#")[1], tab.locator("#map-title").inner_text(), read_said(tab)
    with opened(browser, page, address) as tab:
        assert (tab.locator("#map-title").inner_text(), read_said(tab)) == (title, said)
        assert tab.locator("[name=scale]:checked").get_attribute("value") == "linear"
        assert tab.locator("html").get_attribute("data-theme") == "dark"
    with opened(browser, page, "panel=9&layer=x&scope=nothing&row=99&part=-3&versus=atb_ff&scale=<b>") as tab:
        assert tab.locator("#map-title").inner_text() == "atb, layer 0"


def test_everything_has_a_name(browser, page):
    with opened(browser, page, "scope=attn_heads") as tab:
        unnamed = tab.evaluate(
            """() => [...document.querySelectorAll("button, select, input, [tabindex]")].filter(control =>
                !control.getAttribute("aria-label") && !control.labels?.length && !control.textContent.trim()
            ).map(control => control.outerHTML)"""
        )
        assert unnamed == []
        for name in ("Sequence", "Layer", "Scope", "Head", "Compare with"):
            assert tab.get_by_role("combobox", name=name).is_visible(), name
        assert "Map of attn_heads, head 0, layer 7" in tab.locator("#over").get_attribute("aria-label")
        assert tab.get_by_role("status").count() == 1


@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_overflows(browser, page, width):
    with opened(browser, page, "row=6&column=2", viewport={"width": width, "height": 900}) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        wide = tab.evaluate(
            """() => [...document.querySelectorAll("main *, form *")].filter(one =>
                one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML)"""
        )
        assert wide == []


def test_dark_follows_the_system_and_paper_is_light(browser, page):
    def theme(tab):
        return tab.locator("html").get_attribute("data-theme")

    with opened(browser, page, PLAIN, color_scheme="dark") as tab:
        assert theme(tab) == "dark"
        assert read_pixels(tab).float().mean() < 110
        picture = """event => {
            if (event) dispatchEvent(new Event(event));
            return document.getElementById("map").toDataURL();
        }"""
        dark = tab.evaluate(picture, "")
        assert tab.evaluate(picture, "beforeprint") != dark  # at once: paper does not wait
        assert tab.evaluate(picture, "afterprint") == dark
        tab.emulate_media(media="print")
        tab.wait_for_selector("html[data-theme=light]")
        drawn(tab)
        for gone in ("#controls", ".buttons", "#fit", "footer"):
            assert tab.locator(gone).is_hidden(), gone
        for there in ("#map", "#reads", "#chart"):
            assert tab.locator(there).is_visible(), there
        assert read_pixels(tab).float().mean() > 120
        tab.emulate_media(media="screen")
        tab.wait_for_selector("html[data-theme=dark]")
        tab.get_by_role("button", name="Dark mode").click()
        assert theme(tab) == "light"

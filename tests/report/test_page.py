import json
import math
import re

import pytest
import torch
from page_data import Scripts, is_within, make_panel, read_page, spread_values

from ffattr.report import render
from ffattr.report.encode import Grid, Sample

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    '"><img src=x onerror=alert(1)>',
    "<!--",
    "\u2028",
    "&lt;b&gt;",
    "\ud800",
    "%DATA%",
]


def test_a_page_holds_every_map():
    heads, whole = spread_values(2, 3, 4, 7), spread_values(2, 4, 7, seed=1)
    maps = {"attn_heads": heads, "atb": whole}
    panel = make_panel(
        whole,
        scopes=["attn_heads", "atb"],
        parts={"attn_heads": ["head 0", "head 1", "head 2"]},
        read=lambda scope, place: maps[scope][place],
        layers=[3, 5],
        changes=[(3, "FF", 0.25), (5, "FF", math.nan)],
    )
    data, values = read_page("".join(render([panel, panel], "A title", facts={"model": "tiny"})))
    grid = Grid(data["accuracy"], data["floor"])
    assert (data["title"], data["facts"], grid.accuracy) == ("A title", [["model", "tiny"]], 0.0002)
    for shown in data["panels"]:
        assert shown["layers"] == [3, 5]
        assert shown["changes"] == [[3, "FF", 0.25]]
        for place in range(2):
            for head in range(3):
                found, sums = values(shown["maps"]["attn_heads"][place][head], 7)
                assert is_within(found, heads[place, head], grid)
                assert torch.allclose(sums.double(), heads[place, head].sum(1), rtol=1e-6)
            (entry,) = shown["maps"]["atb"][place]
            assert is_within(values(entry, 7)[0], whole[place], grid)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30], ids=["zeros", "ones", "tiny"])
def test_maps_of_one_value(value):
    data, values = read_page("".join(render([make_panel(torch.full((1, 3, 3), value))], "x")))
    shown, sums = values(data["panels"][0]["maps"]["atb"][0][0], 3)
    assert torch.allclose(shown.float(), torch.full((3, 3), value), rtol=1e-6, atol=0)
    assert torch.allclose(sums, torch.full((3,), 3 * value), rtol=1e-6, atol=0)


def test_low_precision_maps_and_those_with_a_gradient_are_read():
    values = torch.rand(1, 3, 3).bfloat16().requires_grad_()
    data, found = read_page("".join(render([make_panel(values)], "x")))
    shown, _ = found(data["panels"][0]["maps"]["atb"][0][0], 3)
    assert is_within(shown, values[0].detach().double(), Grid(data["accuracy"], data["floor"]))


def test_the_larger_the_data_the_fewer_the_levels_and_never_beyond_the_limit():
    """Uniform in the logarithm: nothing compresses. The ratio of data to limit is that of 4096 tokens and more."""
    panel = make_panel(spread_values(1, 400, 400, decades=9))
    fixed = len("".join(render([make_panel(torch.zeros(1, 400, 400))], "x")))
    accuracies = []
    for limit in (3_000_000, fixed + 300_000, fixed + 143_000, fixed + 110_000):
        page = "".join(render([panel], "x", limit=limit))
        assert len(page.encode()) <= limit
        data, values = read_page(page)
        grid = Grid(data["accuracy"], data["floor"])
        assert is_within(values(data["panels"][0]["maps"]["atb"][0][0], 400)[0], panel.read("atb", 0), grid)
        accuracies.append(grid.accuracy)
    assert accuracies == sorted(set(accuracies))
    assert accuracies[0] < 0.01 < 0.1 < accuracies[-1]


def test_the_limit_holds_also_where_the_estimate_is_wrong(monkeypatch):
    panel = make_panel(spread_values(1, 400, 400, decades=9))
    monkeypatch.setattr(Sample, "estimate_size", lambda sample, grid: 0)
    page = "".join(render([panel], "x", limit=300_000))
    assert len(page.encode()) <= 300_000


def test_what_does_not_fit_at_its_coarsest_is_refused():
    panel = make_panel(spread_values(1, 400, 400, decades=9))
    with pytest.raises(ValueError, match=r"larger than 100,000 bytes.*160,000 of them.*fewer layers.*Pool"):
        render([panel], "x", limit=100_000)


def test_tokens_and_title_are_inert():
    title = 'A </title><script>alert("t")</script> & more \ud800'
    panel = make_panel(torch.rand(1, 8, 8), HOSTILE, name="</script><b>")
    page = "".join(render([panel], title, facts={"<i>": "</script>"}))
    page.encode()  # a lone surrogate could not be written
    scripts = Scripts(page)
    plain = Scripts("".join(render([make_panel(torch.rand(1, 8, 8))], "x")))
    assert [tag for tag, _ in scripts.elements] == [tag for tag, _ in plain.elements]
    data = json.loads(scripts.texts["data"])
    assert data["panels"][0]["keys"] == HOSTILE
    assert data["title"] == title
    between = re.search(r'id="data">(.*?)</script>', page)[1]
    assert between.isascii()
    assert not set(between) & set("<>&")


def test_a_page_asks_for_nothing_from_outside_and_allows_nothing():
    page = "".join(render([make_panel(torch.rand(1, 4, 4))], "x"))
    without_data = re.sub(r'<script (type="text/plain"|type="application/json").*?</script>', "", page)
    assert "http" not in without_data.replace("http-equiv", "")
    assert not re.search(r"[\"'(]\s*//|\bimport\b|\bfetch\b|XMLHttp|\beval\b|innerHTML|insertAdjacent", without_data)
    for tag, attributes in Scripts(page).elements:
        assert not attributes.keys() & {"src", "srcset", "action", "style"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
    policy = next(of["content"] for tag, of in Scripts(page).elements if of.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_a_page_needs_a_panel():
    with pytest.raises(ValueError, match="at least one panel"):
        render([], "x")


def test_render_fails_before_its_first_piece():
    """Who writes the pieces to a file has not opened it yet."""
    pieces = render([make_panel(torch.rand(1, 2, 2))], "x")
    assert next(iter(pieces)).startswith("<!DOCTYPE html>")

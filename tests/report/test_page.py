import base64
import json
import math
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ffattr.errors import NonFiniteError
from ffattr.report import Panel, render
from ffattr.report.encode import GRIDS, Grid, Sample, encode_map

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


def _panel(values, tokens=None, **changed):
    """Of maps ``[layers, n, m]``, or ``[layers, parts, n, m]``."""
    n, m = values.shape[-2:]
    keys = tokens or [f"t{j}" for j in range(m)]
    panel = Panel(
        name="1: a panel",
        queries=keys[:n],
        query_positions=list(range(n)),
        keys=keys,
        key_positions=list(range(m)),
        same_tokens=True,
        layers=list(range(len(values))),
        scopes=["atb"],
        read=lambda scope, place: values[place],
        parts={"atb": [f"head {h}" for h in range(values.shape[1])]} if values.dim() == 4 else {},
    )
    return replace(panel, **changed)


class _Scripts(HTMLParser):
    """As a browser reads the page: its elements, and the text of each script by its id."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts, self._id = [], {}, None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._id = dict(attrs).get("id", tag)

    def handle_data(self, data):
        self.texts[self._id] = self.texts.get(self._id, "") + data


def _read(page):
    """What is in a page: its data, and a function from the entry of a map to its values and the sums of its rows."""
    scripts = _Scripts(page)
    data = json.loads(scripts.texts["data"])

    def values(entry, columns):
        number, top, levels, above = entry
        sums, low, *high = (base64.b64decode(part) for part in scripts.texts[f"map-{number}"].strip().split("."))
        codes = np.frombuffer(zlib.decompress(low), np.uint8).astype(np.int64)
        if high:
            codes += 256 * np.frombuffer(zlib.decompress(high[0]), np.uint8).astype(np.int64)
        codes = codes.reshape(-1, columns)
        codes = codes.cumsum(0) % (levels + 1) if above else codes
        shown = np.where(codes > 0, top * np.exp(data["step"] * (codes - levels)), 0)
        return torch.from_numpy(shown), torch.from_numpy(np.frombuffer(sums, "<f4").copy())

    return data, values


def _within(shown, true, grid):
    """Whether every value is kept as exactly as the grid says, and zeros as zeros."""
    assert torch.equal(shown == 0, true == 0)
    floor = true.amax() * grid.floor
    ratio = (shown / true.clamp_min(floor)).double()[true > 0].log().abs()
    return ratio.numel() == 0 or float(ratio.max()) <= math.log1p(grid.accuracy) * (1 + 1e-6) + 1e-6


def _spread(*shape, decades=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * -decades)
    return values * (torch.rand(shape, generator=generator) > 0.1)


def test_a_page_holds_every_map():
    heads, whole = _spread(2, 3, 4, 7), _spread(2, 4, 7, seed=1)
    maps = {"attn_heads": heads, "atb": whole}
    panel = _panel(
        whole,
        scopes=["attn_heads", "atb"],
        parts={"attn_heads": ["head 0", "head 1", "head 2"]},
        read=lambda scope, place: maps[scope][place],
        layers=[3, 5],
        changes=[(3, "FF", 0.25), (5, "FF", math.nan)],
    )
    data, values = _read("".join(render([panel, panel], "A title", facts={"model": "tiny"})))
    grid = Grid(data["accuracy"], data["floor"])
    assert (data["title"], data["facts"], grid.accuracy) == ("A title", [["model", "tiny"]], 0.0002)
    for shown in data["panels"]:
        assert shown["layers"] == [3, 5]
        assert shown["changes"] == [[3, "FF", 0.25]]
        for place in range(2):
            for head in range(3):
                found, sums = values(shown["maps"]["attn_heads"][place][head], 7)
                assert _within(found, heads[place, head], grid)
                assert torch.allclose(sums.double(), heads[place, head].sum(1), rtol=1e-6)
            (entry,) = shown["maps"]["atb"][place]
            assert _within(values(entry, 7)[0], whole[place], grid)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid.accuracy))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grid_keeps_its_word(grid, dtype):
    true = _spread(40, 30, decades=11).to(dtype)
    true[0] = 0
    true[1] = torch.linspace(1e-3, 1, 30)
    coded = encode_map(true.numpy(), grid)
    assert coded.levels < 2**16
    data = {"step": grid.step}
    page = f'<script id="data">{json.dumps(data)}</script><script id="map-0">{coded.text}</script>'
    _, values = _read(page)
    assert _within(values([0, coded.top, coded.levels, coded.above], 30)[0], true, grid)


@pytest.mark.parametrize("alike", [False, True])
def test_differences_between_rows_are_taken_where_they_are_shorter(alike):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1 if alike else 256, 256, generator=generator).exp()
    assert encode_map(rows.expand(256, 256).contiguous().numpy(), GRIDS[3]).above == alike


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30], ids=["zeros", "ones", "tiny"])
def test_maps_of_one_value(value):
    data, values = _read("".join(render([_panel(torch.full((1, 3, 3), value))], "x")))
    shown, sums = values(data["panels"][0]["maps"]["atb"][0][0], 3)
    assert torch.allclose(shown.float(), torch.full((3, 3), value), rtol=1e-6, atol=0)
    assert torch.allclose(sums, torch.full((3,), 3 * value), rtol=1e-6, atol=0)


def test_low_precision_maps_and_those_with_a_gradient_are_read():
    values = torch.rand(1, 3, 3).bfloat16().requires_grad_()
    data, found = _read("".join(render([_panel(values)], "x")))
    shown, _ = found(data["panels"][0]["maps"]["atb"][0][0], 3)
    assert _within(shown, values[0].detach().double(), Grid(data["accuracy"], data["floor"]))


def test_the_larger_the_data_the_fewer_the_levels_and_never_beyond_the_limit():
    """Uniform in the logarithm: nothing compresses. The ratio of data to limit is that of 4096 tokens and more."""
    panel = _panel(_spread(1, 400, 400, decades=9))
    fixed = len("".join(render([_panel(torch.zeros(1, 400, 400))], "x")))
    accuracies = []
    for limit in (3_000_000, fixed + 300_000, fixed + 143_000, fixed + 110_000):
        page = "".join(render([panel], "x", limit=limit))
        assert len(page.encode()) <= limit
        data, values = _read(page)
        grid = Grid(data["accuracy"], data["floor"])
        assert _within(values(data["panels"][0]["maps"]["atb"][0][0], 400)[0], panel.read("atb", 0), grid)
        accuracies.append(grid.accuracy)
    assert accuracies == sorted(set(accuracies))
    assert accuracies[0] < 0.01 < 0.1 < accuracies[-1]


def test_the_limit_holds_also_where_the_estimate_is_wrong(monkeypatch):
    panel = _panel(_spread(1, 400, 400, decades=9))
    monkeypatch.setattr(Sample, "estimate_size", lambda sample, grid: 0)
    page = "".join(render([panel], "x", limit=300_000))
    assert len(page.encode()) <= 300_000


def test_what_does_not_fit_at_its_coarsest_is_refused():
    panel = _panel(_spread(1, 400, 400, decades=9))
    with pytest.raises(ValueError, match=r"larger than 100,000 bytes.*160,000 of them.*fewer layers.*Pool"):
        render([panel], "x", limit=100_000)


def test_tokens_and_title_are_inert():
    title = 'A </title><script>alert("t")</script> & more \ud800'
    panel = _panel(torch.rand(1, 8, 8), HOSTILE, name="</script><b>")
    page = "".join(render([panel], title, facts={"<i>": "</script>"}))
    page.encode()  # a lone surrogate could not be written
    scripts = _Scripts(page)
    plain = _Scripts("".join(render([_panel(torch.rand(1, 8, 8))], "x")))
    assert [tag for tag, _ in scripts.elements] == [tag for tag, _ in plain.elements]
    data = json.loads(scripts.texts["data"])
    assert data["panels"][0]["keys"] == HOSTILE
    assert data["title"] == title
    between = re.search(r'id="data">(.*?)</script>', page)[1]
    assert between.isascii()
    assert not set(between) & set("<>&")


def test_a_page_asks_for_nothing_from_outside_and_allows_nothing():
    page = "".join(render([_panel(torch.rand(1, 4, 4))], "x"))
    without_data = re.sub(r'<script (type="text/plain"|type="application/json").*?</script>', "", page)
    assert "http" not in without_data.replace("http-equiv", "")
    assert not re.search(r"[\"'(]\s*//|\bimport\b|\bfetch\b|XMLHttp|\beval\b|innerHTML|insertAdjacent", without_data)
    for tag, attributes in _Scripts(page).elements:
        assert not attributes.keys() & {"src", "srcset", "action", "style"}, tag
        assert not any(name.startswith("on") for name in attributes), tag
        assert attributes.get("href", "#").startswith(("#", "data:")), tag
    policy = next(of["content"] for tag, of in _Scripts(page).elements if of.get("http-equiv"))
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"queries": ["a"]}, "'1: a panel' has 1 queries and 3 positions"),
        ({"keys": [], "key_positions": []}, "'1: a panel' has 0 keys"),
        ({"layers": []}, r"'1: a panel' has layers \[\]"),
        ({"layers": [0, 0]}, r"has layers \[0, 0\], expected one or more, each once"),
        ({"scopes": ["atb", "atb"]}, "has scopes"),
        ({"parts": {"attn": ["head 0"]}}, r"has parts of \['attn'\]"),
        ({"parts": {"atb": ["head 0", "head 1"]}}, r"atb, layer 0, of panel '1: a panel' has shape \[3, 3\]"),
        ({"read": lambda scope, place: torch.rand(3, 4)}, r"has shape \[3, 4\], expected \[3, 3\]"),
        ({"read": lambda scope, place: torch.full((3, 3), -0.5)}, "holds -0.5, expected norms"),
    ],
)
def test_panels_that_cannot_be_shown_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        render([_panel(torch.rand(1, 3, 3), **changed)], "x")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers_are_refused(value):
    with pytest.raises(NonFiniteError, match="atb, layer 0, of panel '1: a panel' holds NaN or infinity"):
        render([_panel(torch.full((1, 2, 2), value))], "x")


def test_a_page_needs_a_panel():
    with pytest.raises(ValueError, match="at least one panel"):
        render([], "x")


def test_render_fails_before_its_first_piece():
    """Who writes the pieces to a file has not opened it yet."""
    pieces = render([_panel(torch.rand(1, 2, 2))], "x")
    assert next(iter(pieces)).startswith("<!DOCTYPE html>")

"""Maps as text: how exactly, and how long."""

import base64
import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from page_data import is_within, make_panel, read_page, spread_values

from ffattr.errors import NonFiniteError
from ffattr.report import render
from ffattr.report.encode import GRIDS, Grid, Sample, array_of, encode_map


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid.accuracy))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_grid_keeps_its_word(grid, dtype):
    true = spread_values(40, 30, decades=11).to(dtype)
    true[0] = 0
    true[1] = torch.linspace(1e-3, 1, 30)
    coded = encode_map(true.numpy(), grid)
    assert coded.levels < 2**16
    data = {"step": grid.step}
    page = f'<script id="data">{json.dumps(data)}</script><script id="map-0">{coded.text}</script>'
    _, values = read_page(page)
    assert is_within(values([0, coded.top, coded.levels, coded.above], 30)[0], true, grid)


@pytest.mark.parametrize("alike", [False, True])
def test_differences_between_rows_are_taken_where_they_are_shorter(alike):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1 if alike else 256, 256, generator=generator).exp()
    assert encode_map(rows.expand(256, 256).contiguous().numpy(), GRIDS[3]).above == alike


def test_levels_are_steps_of_the_logarithm():
    grid = Grid(0.25, 1e-3)
    assert grid.step == pytest.approx(math.log(1.25**2))
    assert grid.count_levels(top=1.0, least=1.0) == 1
    assert grid.count_levels(top=1.0, least=1 / 1.25**2) == 2
    assert grid.count_levels(top=8.0, least=8 / 1.25**10) == 6
    assert (
        grid.count_levels(top=1.0, least=1e-30) == grid.count_levels(top=1.0, least=1e-3) == 16
    )  # 1 + log 1000 / step
    assert grid.count_levels(top=0.0, least=0.0) == 1


def test_grids_get_coarser():
    assert [grid.accuracy for grid in GRIDS] == sorted({grid.accuracy for grid in GRIDS})
    levels = [grid.count_levels(1.0, 1e-300) for grid in GRIDS]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] < 2**16
    assert levels[-1] == 10


def test_a_code_by_hand():
    """Values at whole steps below the top, one between them and nearer to the second, one too small, and a zero."""
    grid = Grid(math.sqrt(2) - 1, 1 / 8)  # a step is a factor of two
    coded = encode_map(np.array([[4.0, 2.0, 1.2], [0.0, 1e-3, 0.5]]), grid)
    sums, codes = (base64.b64decode(part) for part in coded.text.split("."))
    assert (coded.top, coded.levels, coded.above) == (4.0, 4, False)
    assert list(zlib.decompress(codes)) == [4, 3, 2, 0, 1, 1]
    assert np.frombuffer(sums, "<f4").tolist() == [np.float32(7.2), np.float32(0.501)]


def test_maps_of_zeros_and_of_one_entry():
    for value, levels in ((0.0, 1), (3.0, 1)):
        coded = encode_map(np.full((1, 1), value), GRIDS[0])
        assert (coded.top, coded.levels) == (value, levels)
        _, codes = coded.text.split(".")
        assert list(zlib.decompress(base64.b64decode(codes))) == [int(value > 0)]


@pytest.mark.parametrize("at_once", [1, 7 * 3, 2**20])
def test_a_map_is_the_same_however_it_is_worked_on(at_once, monkeypatch):
    values = spread_values(20, 7).numpy()
    whole = encode_map(values, GRIDS[2])
    monkeypatch.setattr("ffattr.report.encode._ROWS_AT_ONCE", at_once)
    assert encode_map(values, GRIDS[2]) == whole


def test_a_sample_of_all_rows_tells_the_size_and_one_of_some_about():
    values = spread_values(400, 50, decades=6).numpy()
    size = len(encode_map(values, GRIDS[3]).text)
    assert Sample.from_map(values, values.size).estimate_size(GRIDS[3]) == pytest.approx(size, abs=10)
    some = Sample.from_map(values, 8000)
    assert [band.shape for band in some.bands] == [(40, 50)] * 4
    assert (some.top, some.least, some.rows) == (values.max(), values[values > 0].min(), 400)
    # Each band has code tables of its own, of a few hundred bytes in three thousand.
    assert some.estimate_size(GRIDS[3]) == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.bfloat16, "float32"), (torch.float16, "float32"), (torch.float32, "float32"), (torch.float64, "float64")],
)
def test_values_are_read_as_exactly_as_they_are(dtype, kind):
    found = array_of(torch.tensor([[0.5, 3.0]], dtype=dtype, requires_grad=True), "a map")
    assert (found.dtype, found.tolist()) == (kind, [[0.5, 3.0]])
    assert array_of(torch.zeros(0, 3, dtype=dtype), "a map").shape == (0, 3)


def test_values_that_are_no_norms_are_named():
    with pytest.raises(ValueError, match=r"^map 3 holds -0\.25, expected norms: zero or more"):
        array_of(torch.tensor([1.0, -0.25]), "map 3")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFiniteError, match=r"^map 3 holds NaN or infinity"):
            array_of(torch.tensor([1.0, value]), "map 3")


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[5]])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 33)])
def test_signs_are_kept_with_the_sizes(grid, shape):
    sizes = spread_values(*shape)
    sizes[0, 0] = 1.0
    values = sizes * (1 - 2.0 * (torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5))
    values[0, 0] = -1.0
    panel = make_panel(values[None], tokens=[f"t{j}" for j in range(max(shape))], signed=True)
    panel = replace(panel, queries=[f"r{i}" for i in range(shape[0])], query_positions=range(shape[0]))
    panel = replace(panel, keys=[f"t{j}" for j in range(shape[1])], key_positions=range(shape[1]))
    coded = encode_map(values.numpy(), grid)
    assert coded.signed
    data, read = read_page("".join(render([panel], "x")))
    shown, sums = read(data["panels"][0]["maps"]["atb"][0][0], shape[1])
    assert torch.equal(shown.sign(), values.sign())
    assert is_within(shown.abs(), values.abs(), GRIDS[0])
    torch.testing.assert_close(sums, values.sum(1).float())


def test_the_size_of_signed_maps_is_told_beforehand():
    values = torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    for grid in (GRIDS[1], GRIDS[8]):
        told = Sample.from_map(values, values.size / 4).estimate_size(grid)
        assert told == pytest.approx(len(encode_map(values, grid).text), rel=0.05)


def test_negative_entries_are_refused_where_norms_are_expected():
    with pytest.raises(ValueError, match="m holds -1, expected norms"):
        array_of(torch.tensor([[-1.0]]), "m")
    assert array_of(torch.tensor([[-1.0]]), "m", signed=True).tolist() == [[-1.0]]

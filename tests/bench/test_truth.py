"""The definition of some rows, and results that are not it."""

from __future__ import annotations

import math

import pytest
import torch
from bench_cases import TINY, Off, pretend

from ffattr import NonFiniteError
from ffattr.bench.cases import Case
from ffattr.bench.run import compute_maps
from ffattr.bench.truth import TOLERANCE, Truth, WrongResult


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torch", Off(1.001))
    case = Case.draw_random(TINY["minilm"], 7)
    truth, found = Truth.from_case(case, case.wide_scopes), compute_maps(case, "torch", "direct", case.wide_scopes)
    with pytest.raises(WrongResult, match=r"^mine is wrong by 1.0e-03, expected less than 2e-05: not timed"):
        truth.verify_maps("mine", found, 2e-5)
    found["atb_ff"][0, 0] = torch.nan
    with pytest.raises(WrongResult, match=r"^mine is wrong by nan, expected less than 2e-05: not timed"):
        truth.verify_maps("mine", found, 2e-5)
    pretend(monkeypatch, "torch", Off(torch.nan, 1))
    with pytest.raises(NonFiniteError):  # the engine sees this one before
        compute_maps(case, "torch", "direct", case.wide_scopes)


def test_rows_are_the_first_the_last_and_two_between() -> None:
    for tokens, rows in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (7, [0, 2, 3, 6])):
        truth = Truth.from_case(Case.draw_random(TINY["minilm"], tokens), ("atb",))
        assert truth.rows.tolist() == rows
        assert truth.maps["atb"].shape == (len(rows), tokens)
        assert truth.maps["atb"].dtype == torch.float64


def test_the_error_is_in_parts_of_the_largest_entry_of_its_scope() -> None:
    rows = torch.tensor([0, 2])
    truth = Truth(rows, {"atb": torch.tensor([[1.0, 4.0], [2.0, 0.0]]), "atb_ff": torch.tensor([[0.1, 0.2]] * 2)})
    found = {scope: torch.zeros(3, 2).index_copy(0, rows, maps) for scope, maps in truth.maps.items()}
    assert truth.measure_error(found) == 0
    found["atb"][0, 0] += 1
    assert truth.measure_error(found) == 0.25
    found["atb_ff"][2, 1] = 0
    assert truth.measure_error(found) == 1
    assert truth.select_scopes(("atb",)).measure_error(found) == 0.25
    found["atb"][1] = 7  # no row of the definition
    assert truth.measure_error(found) == 1
    found["atb"][1, 0] = torch.inf  # which no result may have anywhere
    assert math.isnan(truth.measure_error(found))


def test_an_error_as_large_as_the_tolerance_is_refused() -> None:
    truth = Truth(torch.tensor([0]), {"atb": torch.tensor([[2.0]])})
    found = {"atb": torch.tensor([[2.5]])}
    assert truth.verify_maps("mine", found, 0.26) == 0.25
    with pytest.raises(WrongResult, match=r"mine is wrong by 2\.5e-01, expected less than 2e-01: not timed"):
        truth.verify_maps("mine", found, 0.25)


def test_narrower_dtypes_may_be_farther_off() -> None:
    found = [TOLERANCE[one] for one in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
    assert sorted(found) == found
    assert all(limit >= torch.finfo(dtype).eps for dtype, limit in TOLERANCE.items() if dtype != torch.float8_e4m3fn)

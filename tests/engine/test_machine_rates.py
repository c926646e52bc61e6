"""Measured speeds, and how they are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ffattr.engine import machine_rates
from ffattr.engine.machine_rates import Rates, calibrated, keep, key_of
from ffattr.ops import torch_kernels
from ffattr.ops.backends import BACKENDS

CPU = torch.device("cpu")
MADE = Rates(**{one.name: 1e9 + place for place, one in enumerate(fields(Rates))})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Operators:
        def __getattr__(self, name: str) -> Any:
            def call(alpha: torch.Tensor, *others: Any) -> Any:
                calls.append(name)
                assert alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                assert {x.dtype for x in others if isinstance(x, torch.Tensor)} == {torch.int64, dtype}
                return getattr(torch_kernels, name)(alpha, *others)

            return call

    monkeypatch.setitem(BACKENDS, "counting", replace(BACKENDS["torch"], name="counting", load=Operators))
    first = machine_rates.measured("counting", dtype, CPU, 1)
    assert min(first) > 1e6
    assert set(calls) == {"ff_norms", "operator_norms"}
    made = len(calls)
    assert machine_rates.measured("counting", dtype, CPU, 1) == first
    assert len(calls) == made  # once for a machine
    machine_rates.measured.cache_clear()


def test_seconds_add_up() -> None:
    made = replace(MADE, product=2.0, direct=4.0)
    assert made.seconds({"product": 3.0, "direct": 6.0}) == 3.0
    with pytest.raises(KeyError):
        made.seconds({"unheard of": 1.0})


def test_rates_are_kept_by_what_they_belong_to(cache: Path) -> None:
    assert calibrated("cpu", torch.float32, CPU, 2) is None
    keep(key_of("cpu", torch.float32, CPU, 2), MADE)
    keep(key_of("torch", torch.float32, CPU, 2), replace(MADE, product=5.0))
    assert calibrated("cpu", torch.float32, CPU, 2) == MADE
    assert calibrated("torch", torch.float32, CPU, 2) == replace(MADE, product=5.0)
    for other in (("cpu", torch.float64, CPU, 2), ("cpu", torch.float32, CPU, 1)):
        assert calibrated(*other) is None
    assert [file.name for file in cache.iterdir()] == ["rates.json"]


def test_what_another_process_writes_is_seen(cache: Path) -> None:
    key = key_of("cpu", torch.float32, CPU, 2)
    file = keep(key, MADE)
    assert calibrated("cpu", torch.float32, CPU, 2) == MADE
    file.write_text(json.dumps({key: asdict(replace(MADE, direct=7.0))}))
    assert calibrated("cpu", torch.float32, CPU, 2) == replace(MADE, direct=7.0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "[]",
        lambda text: text.replace('"product"', '"prodigy"'),
        lambda text: text.replace('"product": 1000000000.0', '"product": 0'),
        lambda text: text.replace('"product": 1000000000.0', '"product": "fast"'),
        lambda text: text.replace('"product": 1000000000.0', '"product": NaN'),
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(damage: Callable[[str], str]) -> None:
    key = key_of("cpu", torch.float32, CPU, 2)
    file = keep(key, MADE)
    text = damage(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    with pytest.warns(UserWarning, match=r"rates\.json is not what `ffattr bench --calibrate` writes .*: ignored"):
        assert calibrated("cpu", torch.float32, CPU, 2) is None
    keep(key, MADE)
    assert calibrated("cpu", torch.float32, CPU, 2) == MADE

"""Times as medians, and the rates of the machine."""

from __future__ import annotations

import time

import pytest
import torch

from ffattr.bench import timing

CPU = torch.device("cpu")


def test_timed_is_a_median_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    monkeypatch.setattr(timing, "seconds_of", lambda run, device, repeats=1: calls.append(run()) or calls[-1])
    values = iter([5.0, 1.0, 3.0])
    assert timing.time_median(lambda: next(values), CPU, 3) == 3.0
    values = iter([7.0, 1.0])
    assert timing.time_median(lambda: next(values), CPU, 3, limit=0.0) == 7.0  # one round at least
    monkeypatch.undo()
    assert 0.01 <= timing.seconds_of(lambda: time.sleep(0.01), CPU, 2) < 1


def test_what_the_machine_reaches() -> None:
    assert timing.copy_bandwidth(CPU, rounds=1, size=1 << 16) > 1e6
    run, flops = timing.make_product(CPU, torch.float32)
    assert flops == 2 * 4096 * 3072 * 768
    assert run().shape == (4096, 768)


def test_matrix_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(timing, "make_product", lambda device, dtype: (lambda: asked.append(dtype), 6.0))
    monkeypatch.setattr(timing, "time_median", lambda run, device, rounds: 2.0)
    assert timing.matrix_rate(CPU, torch.bfloat16) == (torch.float32, 3.0)
    assert timing.matrix_rate(torch.device("cuda"), torch.float8_e4m3fn) == (torch.bfloat16, 3.0)
    assert asked == [torch.float32, torch.bfloat16]  # run once before they are timed

"""Whether kernels are interpreted, and on which device they run."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guards import DEVICE

runtime = pytest.importorskip("ffattr.ops.triton.runtime")


def test_kernels_are_interpreted_where_there_is_no_gpu() -> None:
    assert (DEVICE.type == "cpu") == runtime.INTERPRETED


@pytest.mark.parametrize(("asked", "interpreted"), [("0", False), ("1", True), ("on", True), (None, False)])
def test_the_environment_decides(asked: str | None, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if asked is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", asked)
    assert runpy.run_path(runtime.__file__)["INTERPRETED"] is interpreted


def test_the_device_of_a_cuda_tensor_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []

    @contextmanager
    def device(number: Any) -> Iterator[None]:
        entered.append(number)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device", device)
    with runtime.on_device_of(SimpleNamespace(is_cuda=True, device="cuda:1")):
        assert entered == ["cuda:1"]
    assert entered == ["cuda:1", "left"]
    with runtime.on_device_of(torch.zeros(1)):  # on the CPU there is nothing to do
        assert entered == ["cuda:1", "left"]

"""benchmarks/gpu/launches.py: what whole layers ask of a GPU is counted, and does not grow."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import op_cases
import pytest
import torch
from paths import BENCHMARKS

from ffattr.bench.cases import SHAPES
from ffattr.ops.backends import BACKENDS
from ffattr.ops.contract import OPERATORS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")

SMALL = {name: replace(size, width=8 * size.heads, ff_width=64) for name, size in SHAPES.items()}

# Shape, backend: kernels of the feed-forward maps and of all maps at most.
MOST = {
    ("bert-base", "triton"): (72, 97),
    ("bert-base", "cuda"): (69, 91),
    ("gpt2", "triton"): (82, 107),
    ("gpt2", "cuda"): (79, 101),
    ("llama-7b", "triton"): (68, 91),
    ("llama-7b", "cuda"): (64, 84),
}


# Operator: kernels of Triton's, and with those of PyTorch's own.
OF_OPERATORS = {"ig_slope": (1, 1), "gram_norms": (1, 2), "ff_norms": (2, 4), "operator_norms": (2, 19)}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import launches

    return launches


@pytest.mark.parametrize(("shape", "backend"), MOST, ids="-".join)
def test_layers_start_no_more_kernels_than_they_did(shape: str, backend: str, launches: Any) -> None:
    for all_scopes, most in enumerate(MOST[shape, backend]):
        found = launches.count_layer(SMALL[shape], backend, all_scopes=bool(all_scopes))
        assert found.launches <= most, found.kernels.most_common()
        assert found.waits.total() == 1, found.waits  # whether all maps are finite
        assert not found.copies


@pytest.mark.parametrize("operator", OPERATORS)
def test_launches_of_operands_that_lie_ready_wait_for_nothing(
    operator: str, launches: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for numbers nor for memory of the CPU: so they can be captured in a CUDA graph."""

    def refuse(*_: Any) -> None:
        raise AssertionError("memory is pinned at a launch")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    given = [torch.ones(1, 20, 48), None, None, "gelu", "exact", 0]
    if operator != "ig_slope":
        given = list(op_cases.case(operator, 20, 20, 32, 48).values())
    arguments = [one.to(launches.DEVICE) if isinstance(one, torch.Tensor) else one for one in given]
    with launches.count_launches() as counts:
        getattr(BACKENDS["triton"].require_operators(), operator)(*arguments)
    assert not counts.waits
    assert not counts.copies
    ours = sum(count for name, count in counts.kernels.items() if name.startswith("triton::"))
    assert (ours, counts.launches) == OF_OPERATORS[operator], counts.kernels


def test_what_is_counted(launches: Any) -> None:
    with launches.count_launches() as counts:
        x = torch.empty(4, 6, device=launches.DEVICE)
        assert x.is_cuda
        x = x.view(6, 4).T[:, 1:]
        assert counts.launches == 0
        y = x.contiguous() + 1
        assert counts.kernels == {"aten::clone": 1, "aten::add.Tensor": 1}
        assert torch.empty(0, 6, device=launches.DEVICE).add(1).shape == (0, 6)
        torch.zeros(3, 2) @ torch.zeros(2, 3)  # on the CPU
        assert counts.launches == 2
        assert not counts.copies
        assert not counts.waits
        torch.arange(3).to(launches.DEVICE)
        assert counts.copies == [24]
        bool(y.isfinite().all())
        assert counts.waits == {"aten::_local_scalar_dense": 1}

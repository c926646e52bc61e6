"""The parameters of a module of experts, told by what it makes of a few tokens."""

from __future__ import annotations

import pytest
import torch
from tiny_models import build
from torch import Tensor, nn

from ffattr.models.detection.experts import match_experts
from ffattr.models.detection.parts import StackedPart
from ffattr.models.detection.watch import Call

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = torch.tensor([[0, 3], [2, 1], [3, 2]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call_of(module: nn.Module, x: Tensor, weight: Tensor) -> Call:
    with torch.no_grad():
        return Call("", module, x, module(x, INDEX, weight), (INDEX, weight))


class Separate(nn.Module):
    """Three parameters, ``[E, in, out]``, and a function that is no module."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(random(4, 6, 10)), nn.Parameter(random(4, 10, 6, seed=1))
        self.beside = nn.Parameter(random(4, 6, 10, seed=2)) if gated else None

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for place in range(index.shape[1]):
            for token, expert in enumerate(index[:, place].tolist()):
                hidden = nn.functional.gelu(x[token] @ self.first[expert])
                if self.beside is not None:
                    hidden = hidden * (x[token] @ self.beside[expert])
                out[token] += weight[token, place] * (hidden @ self.last[expert])
        return out


@pytest.mark.parametrize("gated", [True, False])
def test_separate_parameters(gated: bool) -> None:
    module = Separate(gated)
    found = match_experts(call_of(module, random(3, 6), random(3, 2, seed=3)), module, 1e-9, torch.float64)
    assert found is not None
    first, last = (StackedPart("", name, out_last=True) for name in ("first", "last"))
    beside = StackedPart("", "beside", out_last=True)
    assert (found["gate"], found["up"]) == ((first, beside) if gated else (None, first))
    assert (found["down"], found["active"], found["experts"]) == (last, 2, "")
    assert getattr(found["activation"], "name", None) == "gelu"


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "phimoe"])
def test_halves_of_one_parameter(name: str) -> None:
    experts = build(name).layers[1].mlp.experts
    width = experts.down_proj.shape[2]
    call = call_of(experts, random(3, experts.down_proj.shape[1]), random(3, 2, seed=3).abs())
    found = match_experts(call, experts, 1e-9, torch.float64)
    assert found is not None
    assert found["gate"] == StackedPart("", "gate_up_proj", None, 0, width)
    assert found["up"] == StackedPart("", "gate_up_proj", None, width, 2 * width)
    assert found["down"] == StackedPart("", "down_proj")


def test_what_is_no_module_of_experts() -> None:
    module = Separate(True)
    x, weight = random(3, 6), random(3, 2, seed=3)
    call = call_of(module, x, weight)
    assert match_experts(Call("", module, x, call.output), module, 1e-9, torch.float64) is None
    assert match_experts(Call("", module, x, call.output + 0.1, call.others), module, 1e-9, torch.float64) is None
    assert match_experts(Call("", nn.Linear(6, 6), x, x, call.others), module, 1e-9, torch.float64) is None

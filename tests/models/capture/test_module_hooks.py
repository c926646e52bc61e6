"""What is seen of modules other than attention: routing, and what value projections read."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr.decomposition.routing import Routing
from ffattr.errors import CaptureError
from ffattr.models.capture.module_hooks import (
    record_gains,
    record_router_scores,
    record_routings,
    record_values_read,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_kernel_in_the_place_of_the_experts() -> None:
    """What never calls the module of experts cannot be seen routing."""
    model, given = build("mixtral"), tiny_models.inputs("mixtral")
    block = model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        _, weights, index = block.gate(hidden.flatten(0, 1))
        return type(block.experts).forward(block.experts, hidden.flatten(0, 1), index, weights).view_as(hidden)

    block.forward = forward
    with pytest.raises(CaptureError, match=r"layer 1 of MixtralModel \(mixtral\) did not call its experts"):
        ffattr.attribute(model, given)


def test_experts_that_are_called_with_something_else() -> None:
    model, given = build("mixtral"), tiny_models.inputs("mixtral")
    block = model.layers[0].mlp

    def forward(hidden: Tensor) -> Tensor:
        _, weights, index = block.gate(hidden.flatten(0, 1))
        return block.experts(hidden.flatten(0, 1), index[:, :1], weights).view_as(hidden)

    block.forward = forward
    with pytest.raises(CaptureError, match=r"MixtralExperts was called with tensors of shape .*expected hidden states"):
        ffattr.attribute(model, given)


def test_what_a_projection_reads() -> None:
    module, seen = nn.Linear(3, 3), list[tuple[int, Tensor]]()
    x = torch.randn(2, 3)
    with record_values_read({7: module}, lambda index, given: seen.append((index, given))):
        module(input=x)
    module(2 * x)  # the hook is gone
    ((index, given),) = seen
    assert index == 7
    assert torch.equal(given, x)


def test_routing_is_told_by_its_kinds_of_numbers() -> None:
    class Experts(nn.Module):
        def forward(self, hidden: Tensor, weights: Tensor, index: Tensor) -> Tensor:
            return hidden

    module, seen = Experts(), list[Routing]()
    index, weights = torch.tensor([[1, 0], [2, 1]], dtype=torch.int32), torch.rand(2, 2)
    with record_routings({0: module}, lambda number, routing: seen.append(routing)):
        module(torch.randn(2, 5), weights, index=index)
        with pytest.raises(CaptureError, match="Experts was called with tensors of shape"):
            module(torch.randn(2, 5), weights[:1], index)
    (routing,) = seen
    assert (routing.index.dtype, routing.index.tolist()) == (torch.int64, [[1, 0], [2, 1]])
    assert torch.equal(routing.weight, weights)


class Returns(nn.Module):
    """Returns what it is given."""

    def forward(self, given: object) -> object:
        return given


def test_routing_from_the_scores_of_a_router() -> None:
    module, seen = Returns(), list[Routing]()
    scores = torch.tensor([[[0.0, 0.7, 0.0, -0.9], [0.2, 0.0, 0.1, 0.0], [0.0, 0.0, 0.4, 0.0]]])
    with record_router_scores({0: module}, {0: 2}, lambda number, routing: seen.append(routing)):
        module((scores, scores + 1))
        module(scores)
    module(scores)
    assert len(seen) == 2
    for routing in seen:
        assert routing.index[:2].tolist() == [[3, 1], [0, 2]]
        assert routing.weight[2, 0] == 0.4
        assert routing.weight[2, 1] == 0
        torch.testing.assert_close(routing.weight[:2], torch.tensor([[-0.9, 0.7], [0.2, 0.1]]))
    with (
        record_router_scores({0: module}, {0: 1}, lambda number, routing: seen.append(routing)),
        pytest.raises(CaptureError, match="Returns sends a token to 2 experts, expected 1 at most"),
    ):
        module(scores)


def test_a_gain_is_the_sigmoid_of_what_a_module_returns() -> None:
    module, seen = Returns(), list[Tensor]()
    given = torch.randn(2, 3, 1)
    with record_gains({4: module}, lambda number, gain: seen.append(gain)):
        module(given)
    torch.testing.assert_close(seen[0], torch.sigmoid(given).view(6))


def test_a_shared_expert_whose_gate_is_not_called() -> None:
    model, given = build("qwen2-moe"), tiny_models.inputs("qwen2-moe")
    block = model.layers[1].mlp

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.flatten(0, 1)
        _, weights, index = block.gate(flat)
        gain = torch.sigmoid(flat @ block.shared_expert_gate.weight.T)
        return (block.experts(flat, index, weights) + gain * block.shared_expert(flat)).view_as(hidden)

    block.forward = forward
    with pytest.raises(CaptureError, match=r"layer 1 of Qwen2MoeModel .* did not call its experts"):
        ffattr.attribute(model, given)

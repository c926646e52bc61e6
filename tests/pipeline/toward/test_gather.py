"""Numbers find their places: of sequences with padding, of some of the targets, at some of the layers."""

from __future__ import annotations

import tiny_models
import torch
from tiny_models import build

from ffattr.decomposition.adjoint.layer import Flow
from ffattr.pipeline.options import Options
from ffattr.pipeline.request import Request
from ffattr.pipeline.toward.gather import Gathered
from ffattr.results.keep import Dense


def gathered(layers: tuple[int, ...] = (1,), keep: Dense | None = None) -> Gathered:
    request = Request.from_options(build("llama"), tiny_models.inputs("llama", padding="left"), None, Options())
    return Gathered(request.stacks[0], layers, 3, torch.float64, keep, False)


def test_scores_lie_where_their_tokens_are():
    found = gathered()
    real = int(found.stack.mask[1].sum())
    scores = torch.arange(1.0, 2 * real + 1).double().view(2, real)
    constant, value = torch.tensor([1.0, 2.0]).double(), torch.zeros(2).double()
    found.add_boundary(slice(1, 3), 1, 1, scores, constant, None, value)
    assert torch.equal(found.scores[1:, 0, 1, -real:], scores)
    assert not found.scores[:, :, 0].any()
    assert not found.scores[0].any()
    assert not found.scores[1:, 0, 1, :-real].any()
    assert torch.equal(found.bias[1:, 0, 1], constant)
    assert (found.error[1:, 1] > 0.9).all()  # they do not add up to zero


def test_boundaries_that_nobody_asked_for_are_checked_and_left_out():
    found = gathered()
    real = int(found.stack.mask[0].sum())
    zero = torch.zeros(3).double()
    found.add_boundary(slice(0, 3), 0, 0, torch.ones(3, real).double(), zero, None, zero + real)
    assert not found.scores.any()
    assert not found.error.any()
    found.add_boundary(slice(0, 3), 2, 0, torch.ones(3, real).double(), zero, None, zero + real)  # the output
    assert found.scores[:, 1, 0].all()


def test_flow_lies_where_queries_and_keys_are():
    found = gathered(keep=Dense())
    real = int(found.stack.mask[1].sum())
    tile = torch.arange(1.0, 2 * real + 1).double().view(1, 2, real)
    rows = torch.tensor([0, real - 1])
    found.add_flow(slice(2, 3), 1, 1, rows, Flow({"own": tile}, torch.tensor([[5.0, 6.0]]).double()))
    found.add_flow(slice(2, 3), 1, 1, torch.arange(1, real - 1), None)
    found.add_flow(slice(2, 3), 0, 1, rows, None)  # not asked for
    kept = found.finish()["own"].whole_map("flow")
    assert kept.shape == (3, 2, 7, 7)
    assert torch.equal(kept[2, 1][[-real, -1]][:, -real:], tile[0])
    assert kept.count_nonzero() == tile.numel()
    assert found.residual is not None
    assert found.residual[2, 0, 1, [-real, -1]].tolist() == [5, 6]

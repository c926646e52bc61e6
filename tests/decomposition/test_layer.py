"""One layer's parameters: what runs in which order, which parts there are, and what they are called."""

from __future__ import annotations

import pytest
import torch
from random_layers import HEAD_DIM, HEADS, NEURONS, TOKENS, WIDTH, layer

from ffattr.decomposition.affine import Linear, Norm
from ffattr.decomposition.routing import Routing


def test_sizes_are_those_of_the_matrices() -> None:
    weights = layer(gated=False).weights
    assert (weights.width, weights.head_dim, weights.streams) == (WIDTH, HEAD_DIM, 1)
    assert layer(gated=True).weights.streams == 2
    assert weights.out.weight.shape == (HEADS * HEAD_DIM, WIDTH)
    assert (weights.mixture, layer(experts=3).weights.mixture) == (False, True)


def test_a_token_goes_through_the_neurons_of_its_experts() -> None:
    assert layer().weights.count_neurons(1) == layer().weights.count_neurons(3) == NEURONS
    assert layer(experts=5).weights.count_neurons(3) == 3 * NEURONS


def test_attention_to_the_own_tokens_comes_first() -> None:
    weights = layer(decoder=True).weights
    assert [source for source, _ in weights.attentions] == ["own", "cross"]
    assert weights.attentions[0][1] is weights
    assert weights.attentions[1][1] is weights.cross
    assert [source for source, _ in layer().weights.attentions] == ["own"]


def test_norms_on_the_way_to_a_point() -> None:
    """What the own tokens bring passes the norm behind cross-attention too; the encoder's only that one."""
    weights = layer(norms="post", decoder=True).weights
    assert weights.cross is not None
    first, second = weights.norm_after_attn, weights.cross.norm_after_attn
    assert weights.norms_before("attn") == weights.norms_before("attn_res") == ()
    for point in ("atb", "ff_input"):
        assert [id(norm) for norm in weights.norms_before(point)] == [id(first), id(second)]  # type: ignore[arg-type]
        assert [id(norm) for norm in weights.norms_before(point, "cross")] == [id(second)]  # type: ignore[arg-type]
    pre = layer(norms="pre").weights
    assert pre.norms_before("atb") == ()
    assert [id(norm) for norm in pre.norms_before("ff_input")] == [id(pre.norm_before_ff)]
    assert layer(norms="of").weights.norms_before("ff_input") == ()  # of what blocks return, not of the stream


def test_an_expert_is_a_dense_branch_in_the_dtype_asked_for() -> None:
    (branch,) = layer(experts=4).weights.branches
    third = branch.expert(3, torch.float32)
    assert (branch.routed, third.routed) == (True, False)
    assert branch.width == third.width == NEURONS
    assert len(third.projections) == 2
    assert third.gate is third.projections[0]
    assert torch.equal(third.up.weight, branch.up.weight[3].float())
    assert third.down.bias is not None
    assert branch.down.bias is not None
    assert torch.equal(third.down.bias, branch.down.bias[3].float())


def test_blocks_of_a_mixture_hold_every_choice_once() -> None:
    given = layer(experts=5, active=2)
    assert given.routing is not None
    seen = torch.zeros_like(given.routing.index)
    for block in given.weights.blocks(given.routing):
        assert block.tokens is not None
        assert block.slots is not None
        assert block.share is not None
        assert (given.routing.index[block.tokens, block.slots] == block.number).all()
        assert torch.equal(block.share, given.routing.weight[block.tokens, block.slots])
        seen[block.tokens, block.slots] += 1
    assert seen.tolist() == [[1, 1]] * TOKENS


def test_blocks_without_tokens_or_without_a_mixture() -> None:
    weights = layer(experts=3).weights
    assert not list(weights.blocks(Routing(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))))
    (dense,) = layer().weights.blocks(None)
    assert (dense.place, dense.number, dense.tokens, dense.slots, dense.share) == (0, None, None, None, None)


def test_parameters_have_readable_names() -> None:
    names = [name for name, _ in layer(norms="post", decoder=True).weights.tensors()]
    assert names == [
        *("value.weight", "value.bias", "out.weight", "out.bias"),
        *("up.weight", "up.bias", "gate.weight", "gate.bias", "down.weight", "down.bias"),
        *("norm_after_attn.weight", "norm_after_attn.bias", "norm_after_ff.weight", "norm_after_ff.bias"),
        *("cross.value.weight", "cross.value.bias", "cross.out.weight", "cross.out.bias"),
        *("cross.norm_after_attn.weight", "cross.norm_after_attn.bias"),
    ]
    assert "norm_before_attn.bias" not in dict(layer(norms="pre").weights.tensors())  # RMSNorm has none


@pytest.mark.parametrize("experts", [0, 3])
def test_every_parameter_is_mapped(experts: int) -> None:
    def halve(part: Linear | Norm) -> Linear | Norm:
        bias = None if part.bias is None else part.bias / 2
        if isinstance(part, Linear):
            return Linear(part.weight / 2, bias)
        assert part.weight is not None
        return Norm(part.kind, part.weight / 2, bias, part.eps)

    weights = layer(norms="post", decoder=True, experts=experts).weights
    before, after = dict(weights.tensors()), dict(weights.map_parameters(halve).tensors())
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name] * 2, before[name]) for name in before)

"""Queries on their own way through a layer, against the definition, which carries the vectors of all tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import random_layers
import torch
from made_packs import cut, define, pass_pack, sequences
from random_layers import HEADS, NEURONS, WIDTH

from ffattr.decomposition.activations import ACTIVATIONS
from ffattr.decomposition.clamp import Clamp
from ffattr.decomposition.reference import Path, Rule
from ffattr.engine.pack import Pack
from ffattr.engine.query_pass import Slopes
from ffattr.ops import torch_kernels

KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norms": "pre"},
    "post": {"norms": "post", "gated": False},
    "of": {"norms": "of"},
    "parallel": {"norms": "pre", "parallel": True},
    "mixture": {"norms": "of", "experts": 4},
    "clamped": {"clamp": Clamp(0.6, 1.0)},
    "decoder": {"norms": "post", "decoder": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_output_and_bias_are_the_definitions(kind: str) -> None:
    layer = random_layers.layer(**KINDS[kind])
    pack = Pack(tuple(sequences(layer)))
    given = pass_pack(layer, pack)
    for number, rows in given.queries.sequences():
        expected = define(layer, pack.sequences[number])
        if len(pack.sequences[number].query_tokens) == 0:
            continue
        last = expected[str(layer.weights.own_scopes[-1])].total
        torch.testing.assert_close(given.passed.output[rows], last, rtol=0, atol=1e-12)
        compared = 0
        for name, stream in expected.items():
            # In a parallel layer what the query itself brings on this way is carried as a vector, not as bias.
            if stream.bias.numel() and name in given.bias:
                torch.testing.assert_close(given.bias[name][rows], stream.bias, rtol=0, atol=1e-12, msg=name)
                compared += 1
        assert compared >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_without_slopes_the_output_is_the_same(kind: str) -> None:
    layer = random_layers.layer(**KINDS[kind])
    pack = Pack(tuple(sequences(layer)))
    whole, short = pass_pack(layer, pack).passed, pass_pack(layer, pack, ff=False).passed
    torch.testing.assert_close(short.output, whole.output, rtol=0, atol=1e-12)
    assert short.slopes == ()
    assert len(whole.slopes) == 1


def test_a_norm_of_attention_is_a_share_of_its_weights() -> None:
    """Rows then no longer add up to one."""
    for norms, scaled in (("pre", False), ("of", True)):
        layer = random_layers.layer(norms=norms)
        (alpha,) = pass_pack(layer, Pack((cut(layer, [0, 1, 2], [2, 0]),))).passed.alpha
        assert alpha.shape == (HEADS, 2, 3)
        assert torch.allclose(alpha.sum(-1), torch.ones(HEADS, 2).double()) != scaled


def test_scales_are_those_of_the_norms_that_vectors_pass() -> None:
    def norms(kind: str) -> tuple[bool, ...]:
        passed = pass_pack(*packed(kind)).passed
        found = (*passed.residual_scale, *passed.ff_scale, passed.norm_scale)
        return tuple(scale is not None for scale in found)

    def packed(kind: str) -> tuple[random_layers.RandomLayer, Pack]:
        layer = random_layers.layer(**KINDS[kind])
        return layer, Pack((cut(layer, [0, 1, 2], [1]),))

    assert norms("pre") == (False, True, False)
    assert norms("post") == (True, True, True)
    assert norms("of") == (False, False, False)
    assert norms("parallel") == (False, True, False)
    assert norms("decoder") == (True, True, True, True, True)


def test_slopes_of_a_mixture_carry_the_share_of_each_choice() -> None:
    layer = random_layers.layer(experts=4, active=2)
    assert layer.routing is not None
    layer.routing.weight[1, 0] = 0
    (slopes,) = pass_pack(layer, Pack((cut(layer, [0, 1, 2], [0, 1, 2]),))).passed.slopes
    assert slopes.shape == (2, 3, 2, NEURONS)
    assert slopes.any(-1).all(0).tolist() == [[True, True], [False, True], [True, True]]


def test_selected_queries_are_those_queries_alone() -> None:
    layer = random_layers.layer(norms="post")
    pack = Pack(tuple(sequences(layer)))
    some = torch.tensor([1, 3, 6])
    whole, alone = pass_pack(layer, pack).passed.select(some), pass_pack(layer, pack, some).passed
    assert torch.equal(whole.queries.token_in_pack, alone.queries.token_in_pack)
    torch.testing.assert_close(whole.alpha[0][..., :5], alone.alpha[0][..., :5], rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.slopes[0], alone.slopes[0], rtol=0, atol=1e-12)
    for one, other in (
        (whole.residual_scale[0], alone.residual_scale[0]),
        (whole.ff_scale[0], alone.ff_scale[0]),
        (whole.norm_scale, alone.norm_scale),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_no_queries() -> None:
    layer = random_layers.layer(experts=3)
    passed = pass_pack(layer, Pack((cut(layer, [0, 1], []),))).passed
    assert passed.output.shape == (0, WIDTH)
    assert passed.slopes[0].shape == (2, 0, 2, NEURONS)


def test_operators_compute_the_slopes_of_activations_that_they_know() -> None:
    asked: list[str] = []

    class Watched:
        @staticmethod
        def ig_slope(z: Any, base: Any, scale: Any, name: str, rule: str, steps: int) -> Any:
            asked.append(f"{name} {rule} {steps}")
            return torch_kernels.ig_slope(z, base, scale, name, rule, steps)

    (branch,) = random_layers.layer().weights.branches
    z = torch.linspace(-2, 2, 2 * 3 * NEURONS, dtype=torch.float64).view(2, 3, NEURONS)
    path, slopes = Path(z, z, None, z[:, :0]), Slopes(Rule("right", 3), Watched())  # type: ignore[arg-type]
    by_operator = slopes.compute(branch, path)
    assert asked == ["silu right 3"]
    renamed = replace(ACTIVATIONS["silu"], name="of the model's own")
    torch.testing.assert_close(slopes.compute(replace(branch, activation=renamed), path), by_operator)
    torch.testing.assert_close(slopes.compute(replace(branch, clamp=Clamp(1e9, 0.0)), path), by_operator)
    assert len(asked) == 1


def test_slopes_make_the_vectors_behind_the_block() -> None:
    """With the scale of a norm on what the block returns, whose linear part comes last."""
    layer = random_layers.layer(norms="of")
    one = cut(layer, list(range(5)), [3, 0])
    (slopes,) = pass_pack(layer, Pack((one,))).passed.slopes
    expected, (branch,), norm = define(layer, one), layer.weights.branches, layer.weights.norm_of_ff
    assert norm is not None
    read = expected["atb"].vectors
    hidden = sum((read @ part.weight) * slope for part, slope in zip(branch.projections, slopes, strict=True))
    found = norm.linear(hidden @ branch.down.weight)
    torch.testing.assert_close(found, expected["atb_ff"].vectors, rtol=0, atol=1e-12)

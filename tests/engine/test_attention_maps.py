"""Attention-level maps by quadratic forms, against norms of the definition's vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import random_layers
import torch
from made_packs import PassedPack, cut, define, define_vectors, pass_pack
from random_layers import HEADS, TOKENS, RandomLayer
from torch import Tensor

from ffattr.decomposition.scopes import Scope
from ffattr.engine.attention_maps import AttentionMaps, PairForms, add_up_heads, own_column_vectors
from ffattr.engine.key_blocks import cut_keys
from ffattr.engine.pack import Pack
from ffattr.engine.planning.costs import Blocks
from ffattr.ops.backends import BACKENDS

TORCH = BACKENDS["torch"]
ROWS = [4, 0, 8]
KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norms": "pre"},
    "post": {"norms": "post"},
    "of": {"norms": "of"},
    "decoder": {"norms": "post", "decoder": True},
    "parallel": {"norms": "pre", "parallel": True},
}


def maps_of(layer: RandomLayer, given: PassedPack, scopes: frozenset[Scope], within: Blocks) -> dict[Scope, Tensor]:
    found: dict[Scope, Tensor] = {}
    maps = AttentionMaps(layer.weights, given.sources, scopes, TORCH)
    itself = own_column_vectors(layer.weights, given.sources[0], given.passed) if layer.weights.parallel else {}
    for number, source in enumerate(given.sources):
        alpha = given.passed.alpha[number]
        for block in cut_keys(source, alpha, given.queries, within.keys):
            for scope, tile in maps.tiles(number, given.passed, itself, block, within):
                shape = (*tile.shape[:-1], alpha.shape[-1])
                block.put_tile(tile, found.setdefault(scope, torch.zeros(shape, dtype=tile.dtype)))
    return found


@pytest.mark.parametrize("within", [Blocks(9, 9, 9), Blocks(9, 4, 9), Blocks(9, 4, 9, grams=True)])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_norms_of_the_vectors(kind: str, within: Blocks) -> None:
    layer = random_layers.layer(**KINDS[kind])
    one = cut(layer, list(range(TOKENS)), ROWS)
    wanted = frozenset(scope for scope in layer.weights.all_scopes if not scope.needs_ff or layer.weights.parallel)
    found = maps_of(layer, pass_pack(layer, Pack((one,))), wanted, within)
    assert found.keys() == wanted
    for scope, tile in found.items():
        expected = define_vectors(layer, one, scope).norm(dim=-1)
        torch.testing.assert_close(tile, expected, rtol=1e-11, atol=1e-11, msg=lambda m, s=scope: f"{s}: {m}")


def test_only_what_is_wanted_comes() -> None:
    layer = random_layers.layer(norms="post", decoder=True)
    given = pass_pack(layer, Pack((cut(layer, list(range(TOKENS)), ROWS),)))
    for scope in layer.weights.all_scopes:
        assert set(maps_of(layer, given, frozenset({scope}), Blocks(9, 4, 9))) == (set() if scope.needs_ff else {scope})


def test_a_masked_key_is_exactly_zero() -> None:
    layer = random_layers.layer(norms="post")
    layer = replace(layer, attention=replace(layer.attention, causal=True))
    wanted = frozenset(scope for scope in layer.weights.all_scopes if not scope.needs_ff)
    given = pass_pack(layer, Pack((cut(layer, list(range(TOKENS)), ROWS),)))
    seen = torch.arange(TOKENS) <= torch.tensor(ROWS)[:, None]
    for tile in maps_of(layer, given, wanted, Blocks(9, 9, 9)).values():
        assert torch.equal(tile > 0, seen.expand_as(tile))


def test_a_group_is_the_norm_of_the_sum_of_its_vectors() -> None:
    layer = random_layers.layer(norms="post")
    one = cut(layer, list(range(TOKENS)), ROWS)
    groups = torch.tensor([0, 1, 1, 0, 0, -1, 2, 1, -1])
    wanted = frozenset(scope for scope in layer.weights.all_scopes if not scope.needs_ff)
    found = maps_of(layer, pass_pack(layer, Pack((replace(one, groups=groups),))), wanted, Blocks(9, 9, 9))
    for scope, tile in found.items():
        vectors = define_vectors(layer, one, scope)
        for column in range(3):
            expected = vectors[..., groups == column, :].sum(-2).norm(dim=-1)
            torch.testing.assert_close(tile[..., column], expected, rtol=1e-11, atol=1e-11)


def test_forms_of_some_heads_and_a_scale() -> None:
    """Two orthogonal heads and a residual of norms 3, 4 and 12, with weights of a half and one."""
    layer = random_layers.layer()
    given = pass_pack(layer, Pack((cut(layer, [0, 1], [1]),)))
    (block,) = cut_keys(given.sources[0], given.passed.alpha[0], given.queries, 9)
    block = replace(block, alpha=torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]]], dtype=torch.float64))
    gram = torch.diag(torch.tensor([9.0, 16.0, 144.0], dtype=torch.float64)).expand(2, 3, 3)
    forms = PairForms(block, 2, TORCH, "l2")
    assert forms.compute(gram).tolist() == [[13.0**0.5, 153.0**0.5]]
    assert forms.compute(gram, [0]).tolist() == [[3.0, 3.0]]
    assert forms.compute(gram, [1], torch.tensor([10.0], dtype=torch.float64)).tolist() == [[20.0, 0.0]]
    assert forms.itself.tolist() == [[False, True]]


def test_sums_of_vectors_by_hand() -> None:
    """The same two keys, whose vectors are along one axis each: 3, 4 and 12, the last its own; against (-2, 8, 12)."""
    layer = random_layers.layer(norms="post")
    given = pass_pack(layer, Pack((cut(layer, [3, 5], [1]),)))
    (block,) = cut_keys(given.sources[0], given.passed.alpha[0], given.queries, 9)
    block = replace(block, alpha=torch.tensor([[[1.0, 1.0]], [[0.5, 0.0]]], dtype=torch.float64))
    vectors = torch.diag(torch.tensor([3.0, 4.0, 12.0], dtype=torch.float64)).expand(2, 3, 3)
    whole = torch.tensor([[-2.0, 8.0, 12.0]], dtype=torch.float64)
    norms, alti = (PairForms(block, 2, TORCH, reduction) for reduction in ("l1", "alti"))
    assert norms.compute(vectors).tolist() == [[5.0, 15.0]]
    assert norms.compute(vectors, [0]).tolist() == [[3.0, 3.0]]
    assert norms.compute(vectors, [1], torch.tensor([10.0], dtype=torch.float64)).tolist() == [[20.0, 0.0]]
    assert alti.compute(vectors, total=whole).tolist() == [[0.0, 9.0]]  # -3 + 2 is below zero, -3 + 12 is not
    assert alti.compute(vectors, [1], torch.tensor([10.0], dtype=torch.float64), whole).tolist() == [[0.0, 0.0]]
    assert alti.compute(vectors, [1], torch.tensor([5.0], dtype=torch.float64), whole).tolist() == [[6.0, 0.0]]


def test_heads_add_up() -> None:
    layer = random_layers.layer(norms="of")
    one = cut(layer, list(range(TOKENS)), ROWS)
    given = pass_pack(layer, Pack((one,)))
    found = add_up_heads(given.sources[0], given.passed.alpha[0], given.queries)
    per_head = define_vectors(layer, one, layer.weights.own_scopes[0])
    torch.testing.assert_close(found, per_head.sum(-2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("ff", [True, False])
def test_own_columns_of_a_parallel_layer(ff: bool) -> None:
    """The query's own vector behind the norm; without slopes nothing behind the feed-forward block."""
    layer = random_layers.layer(norms="pre", parallel=True)
    one = cut(layer, list(range(TOKENS)), ROWS)
    given = pass_pack(layer, Pack((one,)), ff=ff)
    found = own_column_vectors(layer.weights, given.sources[0], given.passed)
    assert [str(scope) for scope in found] == (["atb_ln", "atb_ln_ff", "atb_ln_ff_res"] if ff else ["atb_ln"])
    expected = define(layer, one)
    for scope, vectors in found.items():
        itself = expected[str(scope)].vectors[torch.arange(3), torch.tensor(ROWS)]
        torch.testing.assert_close(vectors, itself, rtol=0, atol=1e-12)


def test_more_heads_than_kernels_for_gpus_take_go_to_pytorch() -> None:
    """As groups of many tokens have."""

    class Refusing:
        @staticmethod
        def gram_norms(*arguments: object) -> Tensor:
            raise AssertionError("a kernel was called")

    gpus = replace(TORCH, for_gpus=True, load=Refusing)
    layer = random_layers.layer()
    given = pass_pack(layer, Pack((cut(layer, [0, 1], [1]),)))
    (block,) = cut_keys(given.sources[0], given.passed.alpha[0], given.queries, 9)
    many = replace(block, alpha=torch.full((128, 1, 2), 0.5, dtype=torch.float64))
    gram = torch.eye(129, dtype=torch.float64).expand(2, 129, 129)
    found = PairForms(many, 128, gpus, "l2").compute(gram)[0].tolist()
    assert found == pytest.approx([32.0**0.5, 33.0**0.5])
    with pytest.raises(AssertionError, match="a kernel was called"):
        PairForms(block, HEADS, gpus, "l2").compute(torch.eye(HEADS + 1).expand(2, HEADS + 1, HEADS + 1))

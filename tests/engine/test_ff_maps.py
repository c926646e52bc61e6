"""Feed-forward maps of a pack, and what narrower projections make of them."""

from __future__ import annotations

from typing import Any

import pytest
import random_layers
import torch
from made_packs import cut, define_vectors, pass_pack
from random_layers import TOKENS, WIDTH, RandomLayer
from torch import Tensor

from ffattr.decomposition.scopes import Scope
from ffattr.engine.ff_maps import FFMaps
from ffattr.engine.ff_operands import FFOperands
from ffattr.engine.key_tokens import attention_paths
from ffattr.engine.pack import Pack
from ffattr.engine.planning.costs import Blocks, LayerShape, Method
from ffattr.engine.planning.plan import LayerPlan
from ffattr.ops.backends import BACKENDS

TORCH = BACKENDS["torch"]
ROWS = [4, 0, 8]
KINDS: dict[str, dict[str, Any]] = {
    "pre": {"norms": "pre"},
    "post": {"norms": "post", "gated": False},
    "of": {"norms": "of"},
    "mixture": {"norms": "pre", "experts": 4},
    "decoder": {"norms": "post", "decoder": True},
}


def operands(layer: RandomLayer, dtype: torch.dtype = torch.float64) -> FFOperands:
    return FFOperands(layer.weights, list(attention_paths(layer.weights)), TORCH, dtype)


def maps_of(
    layer: RandomLayer, ff: FFOperands, method: Method = "direct", ff_keys: int = 4
) -> tuple[dict[Scope, Tensor], dict[Scope, Tensor]]:
    """Every feed-forward map of a sequence, and the vectors that they are to be the norms of."""
    one = cut(layer, list(range(TOKENS)), ROWS)
    given = pass_pack(layer, Pack((one,)))
    scopes = [scope for scope in layer.weights.all_scopes if scope.needs_ff]
    if layer.weights.mixture:
        scopes.append(layer.weights.expert_scope)
    vectors = {scope: define_vectors(layer, one, scope) for scope in scopes}
    to = {scope: torch.zeros(part.shape[:-1], dtype=torch.float64) for scope, part in vectors.items()}
    shape = LayerShape.from_weights(layer.weights, 3, TOKENS, 3 * TOKENS)
    plan = LayerPlan(0, shape, method, Blocks(100, 100, ff_keys), ff.asked, "")
    FFMaps(ff, given.sources, frozenset(scopes)).fill(given.passed, given.routing, plan, to)
    return to, vectors


@pytest.mark.parametrize(("method", "ff_keys"), [("direct", 100), ("direct", 4), ("operator", 100), ("mixed", 100)])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_norms_of_the_vectors(kind: str, method: Method, ff_keys: int) -> None:
    layer = random_layers.layer(**KINDS[kind])
    found, vectors = maps_of(layer, operands(layer), method, ff_keys)
    for scope, rows in found.items():
        expected = vectors[scope].norm(dim=-1)
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-11, msg=lambda m, s=scope: f"{s}: {m}")


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("method", ["direct", "mixed"])
def test_projected_scopes_are_norms_of_projected_vectors(kind: str, method: Method) -> None:
    """One scope is narrowed to five directions; the others stay exact."""
    layer = random_layers.layer(**KINDS[kind])
    projection = torch.randn(WIDTH, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scopes = layer.weights.pairwise_scopes
    for narrowed in scopes:
        ff = operands(layer)
        ff.set_projections({narrowed: projection}, scopes)
        assert len(ff.targets) == 2
        found, vectors = maps_of(layer, ff, method)
        for scope in scopes:
            part = vectors[scope] @ projection if scope == narrowed else vectors[scope]
            torch.testing.assert_close(found[scope], part.norm(dim=-1), rtol=0, atol=1e-11)

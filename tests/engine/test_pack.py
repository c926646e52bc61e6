"""Several sequences side by side, and groups of keys: the same numbers as one by one, and as sums of vectors."""

from __future__ import annotations

import pytest
import random_layers
import torch
from made_packs import cut, sequences
from random_layers import RandomLayer
from torch import Tensor

from ffattr.decomposition.reference import Rule
from ffattr.decomposition.routing import Routing
from ffattr.decomposition.scopes import Scope
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.pack import OneSequence, Pack, shift_index
from ffattr.engine.planning.costs import Blocks, LayerShape, Method
from ffattr.engine.planning.plan import LayerPlan
from ffattr.engine.run import LayerResult, run_layer
from ffattr.ops.backends import BACKENDS

KINDS = {
    "post": {"norms": "post"},
    "gated": {"norms": "pre", "gated": True},
    "of": {"norms": "of"},
    "parallel": {"norms": "pre", "parallel": True},
    "mixture": {"norms": "pre", "gated": True, "experts": 4, "active": 2},
    "decoder": {"norms": "post", "decoder": True},
    "mixture decoder": {"norms": "pre", "decoder": True, "experts": 3, "active": 2},
}
BACKEND = [name for name in ("cpu", "torch") if BACKENDS[name].why_not(torch.device("cpu"), torch.float64) is None]


def run(
    layer: RandomLayer, pack: list[OneSequence], backend: str, method: Method = "direct", blocks: Blocks | None = None
) -> tuple[list[dict[str, Tensor]], LayerResult]:
    """The rows of every sequence by scope."""
    weights = layer.weights
    scopes = [*weights.all_scopes]
    if weights.mixture and method != "pairs":
        by_expert = weights.expert_scope
        scopes += [by_expert, *([by_expert.seen_from("cross")] if weights.cross is not None else [])]
    wanted = LayerTask(weights, scopes, Rule(), "token", BACKENDS[backend], torch.float64)
    together = Pack(tuple(pack))
    shape = LayerShape.from_weights(weights, len(together.query_tokens), len(together.x), 1)
    plan = LayerPlan(0, shape, method, blocks or Blocks(100, 100, 100), torch.float64, "")
    found: list[dict[str, Tensor]] = [{} for _ in pack]
    times: list[dict[int, int]] = [{} for _ in pack]

    def take(number: int, rows: Tensor, tiles: dict[Scope, Tensor]) -> None:
        for row in rows.tolist():
            times[number][row] = times[number].get(row, 0) + 1
        for scope, tile in tiles.items():
            count = len(pack[number].query_tokens)
            empty = tile.new_zeros(*tile.shape[:-2], count, tile.shape[-1])
            whole = found[number].setdefault(str(scope), empty)
            whole[..., rows, :] = tile

    done = run_layer(wanted, together, plan, take)
    for one, rows in zip(pack, times, strict=True):
        assert rows == dict.fromkeys(range(len(one.query_tokens)), 1)  # every row once
    return found, done


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(
                one[name], other[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("blocks", [Blocks(100, 100, 100), Blocks(2, 3, 3), Blocks(4, 2, 5, grams=True)])
@pytest.mark.parametrize("method", ["direct", "operator", "mixed", "pairs"])
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_side_by_side(kind: str, backend: str, method: Method, blocks: Blocks) -> None:
    layer = random_layers.layer(**KINDS[kind])
    pack = sequences(layer)
    expected, exact = run(layer, pack, "reference", method)
    found, done = run(layer, pack, backend, method, blocks)
    assert_same(found, expected)
    torch.testing.assert_close(done.output, exact.output, rtol=1e-11, atol=1e-11)
    for name, bias in exact.bias.items():
        torch.testing.assert_close(done.bias[name], bias, rtol=1e-11, atol=1e-11)


GROUPS = {
    5: [0, 0, -1, 1, 0],
    1: [0],
    9: [2, 2, 0, 0, 0, 0, 0, 1, 2],
    3: [1, 0, 1],
}


@pytest.mark.parametrize("blocks", [Blocks(100, 100, 100), Blocks(2, 3, 3, grams=True)])
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("kind", ["post", "gated", "of", "parallel", "mixture"])
def test_groups_are_sums_of_vectors(kind: str, backend: str, blocks: Blocks) -> None:
    layer = random_layers.layer(**KINDS[kind])
    pack = [
        OneSequence(one.x, one.attention, one.query_tokens, one.routing, None, torch.tensor(GROUPS[len(one.x)]))
        for one in (*sequences(layer), cut(layer, list(range(9)), [3, 8, 1]))
    ]
    expected, _ = run(layer, pack, "reference")
    for some in (slice(0, 5), slice(0, 1), slice(4, 5)):
        assert_same(run(layer, pack[some], backend, "direct", blocks)[0], expected[some])
    alone, _ = run(layer, [cut(layer, list(range(9)), [3, 8, 1])], "reference")
    for name, rows in expected[-1].items():  # the reference itself: never more than the sum of the norms
        sums = rows.new_zeros(rows.shape).index_add_(-1, torch.tensor(GROUPS[9]), alone[0][name])
        assert (rows <= sums + 1e-12).all()
        assert name != "attn" or not torch.allclose(rows, sums)


@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize("backend", BACKEND)
@pytest.mark.parametrize("kind", ["post", "gated", "parallel"])
def test_selected_keys_are_columns_of_the_whole(kind: str, backend: str, method: Method) -> None:
    layer = random_layers.layer(**KINDS[kind])
    pack = sequences(layer)
    whole, _ = run(layer, pack, "reference")
    picked = {5: [-1, 1, 0, -1, -1], 1: [0], 9: [-1] * 8 + [0], 3: [-1, 0, -1]}
    some = [
        OneSequence(one.x, one.attention, one.query_tokens, one.routing, None, torch.tensor(picked[len(one.x)]))
        for one in pack
    ]
    found, _ = run(layer, some, backend, method)
    for one, other, sequence in zip(found, whole, some, strict=True):
        assert sequence.groups is not None
        columns = [sequence.groups.tolist().index(column) for column in range(int(sequence.groups.max()) + 1)]
        for name in one:
            torch.testing.assert_close(one[name], other[name][..., columns], rtol=1e-11, atol=1e-11)


def test_a_mixture_keeps_sequences_apart() -> None:
    """Experts are prepared once for all sequences: their tokens in one set come from several."""
    layer = random_layers.layer(**KINDS["mixture"])
    assert layer.routing is not None
    same = Routing(torch.zeros_like(layer.routing.index) + torch.tensor([1, 3]), layer.routing.weight)
    pack = [
        OneSequence(one.x, one.attention, one.query_tokens, same.of(torch.arange(len(one.x))))
        for one in sequences(layer)
    ]
    assert Pack(tuple(pack)).expert_sets == 1
    assert_same(run(layer, pack, "torch")[0], run(layer, pack, "reference")[0])


def test_indices_are_shifted_only_where_that_changes_them() -> None:
    index = torch.arange(3)
    assert shift_index(index, 0) is index
    assert shift_index(index, -2).tolist() == [-2, -1, 0]

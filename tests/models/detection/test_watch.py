"""What is held of a run: one kind of layer once, where tokens were sent, positions that were looked up."""

from __future__ import annotations

import pytest
import torch
from own_modules import Block, ByProduct, Mine, Still, mine
from tiny_models import build, ids

import ffattr
from ffattr.models.detection.detect import detect_layers
from ffattr.models.detection.observe import observe_layers
from ffattr.models.detection.parts import Cut

pytestmark = pytest.mark.usefixtures("one_thread")


def test_calls_are_kept_of_the_last_layer_of_each_kind() -> None:
    model = build("qwen3-moe-mixed")
    observed = observe_layers(model)
    assert observed.runs[0].kind != observed.runs[1].kind
    assert all(run.calls for run in observed.runs)
    same = observe_layers(mine()).runs
    assert same[0].kind == same[1].kind
    assert not same[0].calls


def test_layers_that_do_not_attend_are_kept_apart() -> None:
    model = Mine([Block(), Still(), Block()]).double().eval()
    observed = observe_layers(model)
    assert observed.numbers == (0, 2)
    assert dict(observed.others) == {1: model.blocks[1]}


def test_where_tokens_were_sent() -> None:
    model = build("qwen2-moe")
    run = observe_layers(model).runs[1]
    block = model.layers[1].mlp
    assert run.routings[block.experts].index.shape == (10, 2)
    assert run.gains[block.shared_expert_gate].shape == (10,)
    assert not observe_layers(build("llama")).runs[0].routings


def test_positions_are_counted_of_a_table_that_is_read_in_order() -> None:
    assert observe_layers(mine()).positions == 16
    ids = torch.tensor([[4, 5, 6, 7]])  # tokens in order are no positions: only a table is read by all of them
    assert observe_layers(mine(), {"ids": ids}).positions in (16, 46)


@pytest.mark.parametrize("biased", [True, False])
def test_a_product_with_the_weight_of_a_module_that_is_not_called(biased: bool) -> None:
    model, tokens = mine(attention=lambda: ByProduct(biased)), ids() % 50
    (parts,) = detect_layers(model).parts
    assert parts["value"] == Cut("attention.qkv", 48, 72, bias="attention.v_bias" if biased else None)
    found = ffattr.attribute(model, tokens, scopes="all", backend="torch")
    expected = ffattr.attribute(model, tokens, scopes="all", backend="reference", dtype=torch.float64)
    assert float(found.error.max()) < 1e-12
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=0, atol=1e-10, msg=scope)
    vectors = ffattr.vectors(model, tokens, scope="layer", value_bias="separate")
    torch.testing.assert_close(vectors.values.sum(-2) + vectors.bias, vectors.total, rtol=0, atol=1e-12)

"""What is kept of a forward pass, in one run or in parts."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import build

import ffattr
from ffattr.decomposition.attention import QueryKey
from ffattr.pipeline.options import Options
from ffattr.pipeline.request import Request
from ffattr.pipeline.toward.records import Records

pytestmark = pytest.mark.usefixtures("one_thread")


def made(name: str = "llama", budget: int | None = None, padding: str | None = None) -> tuple[Request, Records]:
    model, inputs = build(name, num_hidden_layers=3), tiny_models.inputs(name, padding=padding)
    request = Request.from_options(model, inputs, None, Options())
    return request, Records(request, model, request.inputs, [0, 1], True, budget)


def test_layers_come_in_parts_from_the_last_and_share_what_is_the_same():
    request, records = made()
    (stack,) = request.stacks
    assert records.split_layers(stack) == [[2, 1, 0]]
    records.load_layers(stack, [2, 1, 0])
    first, second = records.read_layer(stack, 0, 1), records.read_layer(stack, 1, 1)
    assert first.output.data_ptr() == second.sequence.x.data_ptr()
    _, small = made(budget=1)
    assert small.split_layers(stack) == [[2], [1], [0]]
    small.load_layers(stack, [1])
    assert torch.equal(small.read_layer(stack, 1, 0).output, records.read_layer(stack, 1, 0).output)
    with pytest.raises(KeyError):
        small.read_layer(stack, 2, 0)


def test_a_mask_is_kept_once_and_not_at_all_where_it_masks_nothing():
    request, records = made("bert", padding="right")
    (stack,) = request.stacks
    records.load_layers(stack, [2, 1, 0])
    masks = [records.read_layer(stack, layer, 1).sequence.attention.mask for layer in range(3)]
    assert masks[0] is None or (masks[0] is masks[1] and masks[1] is masks[2])
    assert isinstance(records.read_layer(stack, 0, 0).sequence.attention, QueryKey)


def test_what_lies_between_layers_is_not_passed_over():
    request, records = made()
    (stack,) = request.stacks
    layer = request.description.layers[1].module
    layer.register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
    with pytest.raises(ffattr.UnsupportedModel, match="between layers 0 and 1 of LlamaModel something else"):
        records.load_layers(stack, [2, 1, 0])
    _, small = made(budget=1)
    small.model.layers[1].register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
    small.load_layers(stack, [2])
    small.load_layers(stack, [1])
    with pytest.raises(ffattr.UnsupportedModel, match="between layers 0 and 1"):
        small.load_layers(stack, [0])

"""What is asked of a stack of layers: places without padding, shapes of maps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build

from ffattr.models.inputs.groups import Groups
from ffattr.models.inputs.prepare import prepare_inputs
from ffattr.models.registry import resolve
from ffattr.pipeline.options import Options
from ffattr.pipeline.stack import Stack, build_stacks

PADDED = torch.tensor([[False, True, True, False, True], [True] * 5, [False] * 5])


def stacks_of(name: str, groups: Groups | None = None, **asked: Any) -> tuple[Stack, ...]:
    model = build(name)
    description = resolve(model)
    prepared = prepare_inputs(description, model, tiny_models.inputs(name))
    return build_stacks(description, prepared, Options(**asked), groups)


def stack(**changed: Any) -> Stack:
    (found,) = stacks_of("bert")
    return replace(found, mask=PADDED, **changed)


@pytest.mark.parametrize(
    ("batch", "tokens", "query_tokens", "result_rows"),
    [(0, [1, 2, 4], [2, 1], [0, 2]), (1, [0, 1, 2, 3, 4], [4, 0, 2], [0, 1, 2]), (2, [], [], [])],
)
def test_a_sequence_without_its_padding(
    batch: int, tokens: list[int], query_tokens: list[int], result_rows: list[int]
) -> None:
    found = stack(queries=(4, 0, 2)).index_sequence(batch)
    assert [part.tolist() for part in found] == [tokens, query_tokens, result_rows]


def test_no_queries_are_no_rows() -> None:
    found = stack(queries=()).index_sequence(1)
    assert found.tokens.tolist() == [0, 1, 2, 3, 4]
    assert found.query_tokens.dtype == torch.int64
    assert (len(found.query_tokens), len(found.result_rows)) == (0, 0)


def test_a_layer_goes_wherever_it_was_asked_for() -> None:
    (found,) = stacks_of("bert", layers=[1, 0, -1])
    assert found.layers == (1, 0, 1)
    assert [found.result_layers(layer) for layer in (0, 1, 2)] == [[1], [0, 2], []]


@pytest.mark.parametrize(
    ("name", "scope", "shape"),
    [
        ("bert", "atb", (2, 2, 3, 7)),
        ("bert", "attn_heads", (2, 2, 5, 3, 7)),
        ("mixtral", "atb_ln_ff_experts", (2, 2, 2, 3, 7)),
    ],
)
def test_maps_have_an_axis_for_heads_and_experts(name: str, scope: str, shape: tuple[int, ...]) -> None:
    (found,) = stacks_of(name, scopes=scope, queries=[0, 1, 2])
    assert found.map_shape(found.scopes[0]) == shape
    assert found.by_expert == (scope == "atb_ln_ff_experts")


def test_columns_are_groups_where_keys_are_added_up() -> None:
    groups = Groups(torch.zeros(2, 7, dtype=torch.int64), [["all"]] * 2, torch.tensor([[True], [False]]))
    (found,) = stacks_of("bert", groups)
    assert found.map_shape(found.scopes[0]) == (2, 2, 7, 1)
    assert torch.equal(found.key_mask("own"), groups.mask)
    assert found.encoder_positions(0) is None


def test_an_encoder_and_a_decoder() -> None:
    encoder, decoder = stacks_of("bart", scopes="all", layers=-1)
    assert [(one.name, one.first, one.layers) for one in (encoder, decoder)] == [
        ("encoder", 0, (len(encoder.specs) - 1,)),
        ("decoder", len(encoder.specs), (len(decoder.specs) - 1,)),
    ]
    assert decoder.label_layer(1) == "decoder layer 1"
    assert encoder.encoder_mask is None
    assert torch.equal(decoder.key_mask("cross"), encoder.mask)
    assert decoder.encoder_tokens == encoder.tokens
    own, across = (decoder.specs[0].scope_at("atb", source) for source in ("own", "cross"))
    queries = len(decoder.queries)
    assert decoder.map_shape(own) == (1, 2, queries, decoder.mask.shape[1])
    assert decoder.map_shape(across) == (1, 2, queries, encoder.mask.shape[1])
    # Both sources of keys come out of one pass.
    assert decoder.ff_scopes == encoder.ff_scopes == 3
    positions = decoder.encoder_positions(1)
    assert positions is not None
    assert positions.tolist() == encoder.mask[1].nonzero()[:, 0].tolist()


def test_only_stacks_of_which_a_scope_is_asked() -> None:
    assert [one.name for one in stacks_of("bart", scopes="cross.atb")] == ["decoder"]
    assert [one.ff_scopes for one in stacks_of("bart", scopes="attn")] == [0, 0]
    (only,) = stacks_of("bert")
    assert (only.name, only.label_layer(3)) == ("", "layer 3")


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("bert", {"layers": 2}, "^layers has 2, but there are 2"),
        ("bart", {"layers": 9}, "^encoder layers has 9, but there are"),
        ("bart", {"scopes": "decoder.atb", "queries": 99}, "^decoder queries has 99, but there are"),
    ],
)
def test_indices_are_counted_in_each_stack(name: str, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(IndexError, match=message):
        stacks_of(name, **asked)


def test_layers_whose_norms_differ() -> None:
    model = build("bert")
    description = resolve(model)
    first, second = description.layers
    mixed = replace(description, layers=[first, replace(second, norm_after_ff=None)])
    prepared = prepare_inputs(description, model, tiny_models.inputs("bert"))
    with pytest.raises(ValueError, match="the layers of this model differ in their norms; attribute them one kind"):
        build_stacks(mixed, prepared, Options(), None)

"""From what a layer left to rows of the result, and layers that are not what their adapter says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr import ArchitectureMismatch
from ffattr.decomposition.attention import LayerRecord
from ffattr.models import registry
from ffattr.models.registry import resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.pipeline.assemble import CapturedSequence, find_errors, layer_tolerance
from ffattr.pipeline.options import Options
from ffattr.pipeline.request import Request

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of adapters of its own."""
    monkeypatch.setattr(registry, "_registered", {})


LIES: list[tuple[str, str, Callable[[LayerSpec], LayerSpec]]] = [
    ("bert", "activation", lambda spec: replace(spec, activation=F.relu)),
    ("bert", "tanh instead of erf", lambda spec: replace(spec, activation=nn.GELU("tanh"))),
    ("bert", "norms swapped", lambda s: replace(s, norm_after_attn=s.norm_after_ff, norm_after_ff=s.norm_after_attn)),
    ("bert", "keys for values", lambda spec: replace(spec, value=spec.attention.key)),
    ("torch-pre", "post", lambda s: replace(s, norm_after_attn=s.norm_before_attn, norm_before_attn=None)),
    ("torch-pre", "no norm", lambda spec: replace(spec, norm_before_ff=None)),
    ("llama", "gate and up swapped", lambda spec: replace(spec, gate=spec.up, up=spec.gate)),
]


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, _, c in LIES], ids=[f"{n} {what}" for n, what, _ in LIES])
def test_an_adapter_that_lies_is_found_out(name: str, change: Callable[[LayerSpec], LayerSpec]) -> None:
    for dtype in (torch.float64, torch.float32):
        model = build(name, dtype=dtype)
        family = type(model).__name__
        given = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tiny_models.inputs(name).items()}
        layers = resolve(model).layers
        ffattr.register_adapter(family, lambda base, layers=layers: [change(spec) for spec in layers])
        with pytest.raises(ArchitectureMismatch, match=rf"layer 0, batch row 0: .* differs .*{family}.*check=False"):
            ffattr.attribute(model, given)
        attr = ffattr.attribute(model, given, check=False)
        assert (attr.error > 2e-5).all()
        assert attr["layer"].isfinite().all()
        registry._registered.clear()
        assert ffattr.attribute(model, given).error.max() < 1e-5


def test_a_lie_about_one_layer_names_it() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    first, second = resolve(model).layers
    ffattr.register_adapter("bert", lambda base: [first, replace(second, activation=F.relu)])
    with pytest.raises(ArchitectureMismatch, match=r"layer 1, batch row 0"):
        ffattr.attribute(model, given)
    assert ffattr.attribute(model, given, layers=0).error.max() < 1e-12


# ---- one sequence of a record


def captured(request: Request) -> list[LayerRecord]:
    """What the layers that were asked for leave in the model's forward pass."""
    found: list[LayerRecord] = []
    request.run_model(request.inputs, found.append)
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_sequence_is_its_row_without_padding(padding: str) -> None:
    model, given = build("bert"), tiny_models.inputs("bert", padding=padding)
    request = Request.from_options(model, given, None, Options(queries=[6, 0, 3], keys=[1, 5, 2]))
    (stack,) = request.stacks
    hidden = model(**given, output_hidden_states=True).hidden_states
    places = [2, 3, 4, 5, 6] if padding == "left" else [0, 1, 2, 3, 4]
    for record in captured(request):
        one = CapturedSequence.from_record(request, stack, record, 1, 1)
        assert one.token_positions.tolist() == places
        assert one.result_rows.tolist() == [row for row, query in enumerate((6, 0, 3)) if query in places]
        queries = [query for query in (6, 0, 3) if query in places]
        assert [places[token] for token in one.sequence.query_tokens] == queries
        torch.testing.assert_close(one.sequence.x, hidden[record.index][1, places], rtol=0, atol=0)
        torch.testing.assert_close(one.output, hidden[record.index + 1][1, queries], rtol=0, atol=0)
        # The keys 1, 5 and 2 are columns 0, 1 and 2; those that are padding have none.
        columns = [column for column, key in enumerate((1, 5, 2)) if key in places]
        assert one.columns.tolist() == columns
        groups = one.sequence.groups
        assert groups is not None
        expected = [columns.index((1, 5, 2).index(place)) if place in (1, 5, 2) else -1 for place in places]
        assert groups.tolist() == expected


def test_the_error_is_the_largest_of_any_query_of_a_sequence() -> None:
    output = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)

    def error(output: Tensor, recomputed: Tensor) -> float:
        return find_errors([output], recomputed).item()

    assert error(output, output.clone()) == 0
    off = torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    assert error(output, output + off) == pytest.approx(0.1)
    assert error(output, output + 1e-6) > 1e100  # of a token whose output is zero
    assert math.isnan(error(output, output * math.nan))
    assert error(output[:0], output[:0]) == 0
    of_each = find_errors([output[2:], output[:0], output[:1]], torch.cat([output[2:], (output + off)[:1]]))
    assert of_each.tolist() == pytest.approx([0, 0, 0.1])


@pytest.mark.parametrize(
    ("own", "computed", "rounding", "limit"),
    [
        (torch.float64, torch.float64, (), 1e-9),
        (torch.float64, torch.float64, ("norms",), 1e-6),
        (torch.float64, torch.float64, ("cross",), 1e-6),
        (torch.float64, torch.float32, ("norms", "cross"), 2e-5),
        (torch.bfloat16, torch.float32, (), 1e-1),
    ],
)
def test_what_rounding_explains(
    own: torch.dtype, computed: torch.dtype, rounding: tuple[str, ...], limit: float
) -> None:
    """Of the coarser dtype, and of anything in the layer that rounds to float32 on its own."""
    specs = [SimpleNamespace(rounds_to_float32=rounds, narrowest_dtype=None) for rounds in (False, "norms" in rounding)]
    stack: Any = SimpleNamespace(first=3, specs=specs)
    record: Any = SimpleNamespace(
        index=4,
        output=torch.zeros(1, dtype=own),
        computed=None,
        attention=SimpleNamespace(rounds_to_float32=False),
        cross=SimpleNamespace(rounds_to_float32=True) if "cross" in rounding else None,
    )
    assert layer_tolerance(stack, record, computed) == limit
    record.computed = torch.bfloat16
    assert layer_tolerance(stack, record, computed) == 0.1
    record.computed, specs[1].narrowest_dtype = None, torch.float16
    assert layer_tolerance(stack, record, computed) == max(limit, 2e-2)


def test_the_narrowest_dtype_of_a_layer_is_that_of_its_projections() -> None:
    """A 4-bit layer tells its own, whatever its hidden states are in."""
    model = build("llama", dtype=torch.float32)
    assert resolve(model).layers[0].narrowest_dtype == torch.float32
    model.layers[0].mlp.down_proj.compute_dtype = torch.bfloat16
    assert [spec.narrowest_dtype for spec in resolve(model).layers] == [torch.bfloat16, torch.float32]
    half = build("mixtral", dtype=torch.float16)
    assert resolve(half).layers[0].narrowest_dtype == torch.float16


# ---- the result


def test_a_layer_asked_for_twice_is_there_twice() -> None:
    model, given = build("bert"), tiny_models.inputs("bert", padding="right")
    alone = ffattr.attribute(model, given, scopes="all")
    found = ffattr.attribute(model, given, scopes="all", layers=[1, 0, 1])
    assert found.layers == (1, 0, 1)
    for scope in found.scopes:
        assert torch.equal(found.maps[scope], alone.maps[scope][[1, 0, 1]])
        assert torch.equal(found.bias[scope], alone.bias[scope][[1, 0, 1]])
    assert torch.equal(found.error, alone.error[[1, 0, 1]])


def test_columns_that_are_no_tokens_are_not_called_causal() -> None:
    model, given = build("gpt2"), tiny_models.inputs("gpt2")
    assert ffattr.attribute(model, given).arguments["causal"] is True
    found = ffattr.attribute(model, given, keys=[2, 0])
    assert found.arguments["causal"] is False
    assert found.key_tokens == [[tokens[2], tokens[0]] for tokens in found.tokens]
    assert found.groups is not None
    assert found.groups.tolist() == [[1, -1, 0, -1, -1, -1, -1]] * 2

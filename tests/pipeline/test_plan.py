"""The plan is that of the run, without one."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
from made_tokenizers import make_tokenizer
from tiny_models import build
from torch import nn

import ffattr

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options", [{}, {"method": "operator"}, {"queries": [1], "layers": -1}, {"scopes": "atb"}], ids=str
)
@pytest.mark.parametrize("name", ["bert", "torch-pre", "gpt2", "llama"])
def test_explain_is_the_plan_and_runs_nothing(name: str, options: dict[str, Any]) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    ran = ffattr.attribute(model, given, **options).plan
    calls: list[nn.Module] = []
    for module in model.modules():
        if next(module.parameters(), None) is not None:  # an activation is asked for its values
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
    plan = ffattr.plan(model, given, **options)
    assert not calls
    assert (plan.backend, plan.dtype, plan.device) == (ran.backend, ran.dtype, ran.device)  # type: ignore[attr-defined]
    assert plan.layers == ran.layers  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "padding", "queries", "pairs"),
    [
        ("bert", None, None, 2 * 7 * 7),
        ("gpt2", None, None, 2 * 28),  # 1 + 2 + ... + 7
        ("gpt2", None, [6, 0], 2 * (7 + 1)),
        ("gpt2", "left", None, 28 + 15),
        ("bert", "right", [6, 0], 2 * 7 + 5),  # the last query of the second is padding
    ],
)
def test_pairs_are_counted_without_the_model(name: str, padding: str | None, queries: Any, pairs: int) -> None:
    """Those of real tokens, in a causal model of a query and the keys up to it."""
    found = ffattr.plan(build(name), tiny_models.inputs(name, padding=padding), queries=queries)
    of_layer: dict[int, int] = {}
    for layer in found.layers:
        of_layer[layer.layer] = of_layer.get(layer.layer, 0) + layer.shape.pairs
    assert of_layer == {0: pairs, 1: pairs}


@pytest.mark.parametrize("layers", [[1, 0], [1, 0, 1], [-1, 1], []], ids=str)
def test_a_layer_is_computed_once_and_in_its_turn(layers: list[int]) -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    found = ffattr.plan(model, given, layers=layers)
    assert [layer.layer for layer in found.layers] == sorted({layer % 2 for layer in layers})
    assert found.layers == ffattr.attribute(model, given, layers=layers).plan.layers  # type: ignore[attr-defined]


def test_batches_of_text_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffattr.pipeline.request._TOKENS_AT_ONCE", 12)
    texts, tokenizer = ["the cat", "the cat sat on a mat", "a cat sat"], make_tokenizer()
    found = ffattr.plan(build("bert"), texts, tokenizer=tokenizer)
    assert [(layer.layer, layer.shape.queries) for layer in found.layers] == [(0, 9), (1, 9), (0, 2), (1, 2)]
    ran = ffattr.attribute(build("bert"), texts, tokenizer=tokenizer).plan
    assert found.layers == ran.layers  # type: ignore[attr-defined]


def test_layers_are_counted_in_their_stacks() -> None:
    found = ffattr.plan(build("bart"), tiny_models.inputs("bart"), layers=1)
    assert [(layer.stack, layer.layer) for layer in found.layers] == [("encoder", 1), ("decoder", 1)]

"""The mixed method through `ffattr.attribute`: the definition's norms, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from compare_results import BACKENDS, assert_same
from tiny_models import build

import ffattr

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

WIDE_HEADS = {"hidden_size": 20, "head_dim": 10, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS: dict[str, tuple[str, dict[str, int]]] = {
    "dense, post-LN": ("bert", {}),
    "dense, causal": ("gpt2", {}),
    "gated": ("llama", {}),
    "gated, grouped queries, heads twice as wide as the model": ("llama", WIDE_HEADS),
    "a window": ("mistral", {}),
    "ReLU, whose zeros are skipped": ("opt", {}),
    "norms of blocks, wide heads": ("gemma2", WIDE_HEADS),
    "experts": ("mixtral", {}),
    "encoder and decoder": ("bart", {}),
    "encoder and decoder, wide heads": ("t5", {"d_kv": 24}),
}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_against_the_definition(kind: str, backend: str, padding: str | None) -> None:
    name, overrides = KINDS[kind]
    if name in ("t5", "gemma2") and padding == "left":
        pytest.skip("in float64 the model itself makes NaN of tokens that may attend to none")
    model, given = build(name, **overrides), tiny_models.inputs(name, padding=padding)
    options: dict[str, Any] = {"scopes": "all", "layers": -1}
    expected = ffattr.attribute(model, given, backend="reference", **options)
    found = ffattr.attribute(model, given, backend=backend, method="mixed", dtype=torch.float64, **options)
    assert_same(found, expected, 1e-12)
    assert {"mixed"} == {layer.method for layer in ffattr.plan(model, given, backend=backend, method="mixed").layers}


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_float32_for_some_queries_in_small_blocks(backend: str) -> None:
    model, given = build("llama", **WIDE_HEADS), tiny_models.inputs("llama", length=9, padding="left")
    options: dict[str, Any] = {"scopes": "all", "queries": [8, 2, 5]}
    expected = ffattr.attribute(model, given, backend="reference", **options)
    least = 20_000
    found = ffattr.attribute(
        model, given, backend=backend, method="mixed", dtype=torch.float32, memory_budget=least, **options
    )
    assert found.plan.layers[0].blocks.queries < 3  # type: ignore[attr-defined]
    assert_same(found, expected)


@pytest.mark.usefixtures("rates")
def test_the_plan_says_that_heads_are_mixed_where_they_are_wider_than_the_model() -> None:
    given = {"input_ids": torch.zeros(1, 160, dtype=torch.long)}
    overrides = {"num_hidden_layers": 1, "intermediate_size": 80, "max_position_embeddings": 200}
    wide = ffattr.plan(build("llama", **WIDE_HEADS, **overrides), given, backend="torch")
    assert "mixed" in str(wide)
    assert wide.layers[0].method == "mixed"
    narrow = ffattr.plan(build("llama", **{**WIDE_HEADS, "head_dim": 4}, **overrides), given, backend="torch")
    assert narrow.layers[0].method == "operator"

"""The engine through `ffattr.attribute`: the norms of the definition's vectors, for every model, backend and method."""

from __future__ import annotations

import re
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import BACKENDS, assert_same
from tiny_models import FAMILIES, TORCH_FAMILIES, build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr import Attribution, GaussLegendre, Riemann

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

WAYS = [(backend, method) for backend in BACKENDS for method in ("direct", "operator")]
CAUSAL = ("bert-decoder", "gpt2", "opt", "opt-350m", "opt-no-affine", "llama", "llama-bias", "mistral", "qwen2")


def reference(model: nn.Module, given: Any, **options: Any) -> Attribution:
    attr = ffattr.attribute(model, given, scopes="all", backend="reference", **options)
    assert attr.plan.dtype == torch.float64  # type: ignore[attr-defined]
    return attr


def both_dtypes(
    model: nn.Module,
    given: Any,
    expected: Attribution,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    **options: Any,
) -> None:
    for backend, method in WAYS:
        for dtype in dtypes:
            found = ffattr.attribute(model, given, scopes="all", backend=backend, method=method, dtype=dtype, **options)
            assert (found.plan.backend, found.plan.layers[0].method) == (backend, method)
            assert all(found.maps[scope].dtype == dtype for scope in found.scopes)
            assert_same(found, expected)


# ---- every family


@pytest.mark.parametrize(
    ("name", "padding"),
    [(n, p) for n in FAMILIES for p in (None, "left", "right") if n not in TORCH_FAMILIES or p != "left"],
)
def test_every_family(name: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, padding=padding)
    dtypes = (torch.float64,) if padding == "right" else (torch.float32, torch.float64)
    both_dtypes(model, given, reference(model, given, layers=-1), dtypes, layers=-1)
    found = ffattr.attribute(model, given, scopes="all")
    pairs = found.mask[:, :, None] & found.mask[:, None, :]
    if name in CAUSAL:
        pairs = pairs.tril()
    for scope in found.scopes:
        shown = pairs[:, None] if scope == "attn_heads" else pairs
        assert (found.maps[scope][~shown.expand_as(found.maps[scope])] == 0).all()
        if name != "mistral":  # its window is shorter than the sequence
            assert (found.maps[scope][shown.expand_as(found.maps[scope])] > 0).all()
        assert (found.bias[scope][:, ~found.mask] == 0).all()


def test_a_sliding_window_is_exactly_zero_beyond() -> None:
    model = build("mistral")
    found = ffattr.attribute(model, tiny_models.inputs("mistral"), scopes="all")
    inside = torch.ones(7, 7).tril() - torch.ones(7, 7).tril(-3)
    for scope in found.scopes:
        assert ((found.maps[scope] > 0) == inside.bool()).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 17, 65])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_lengths(name: str, tokens: int) -> None:
    positions = {"gpt2": "n_positions"}.get(name, "max_position_embeddings")
    model = build(name, **{positions: 80})
    given = tiny_models.inputs(name, batch=1, length=tokens)
    both_dtypes(model, given, reference(model, given))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("torch-post", {"d_model": 21, "nhead": 3, "dim_feedforward": 17}),
        ("torch-pre", {"d_model": 13, "nhead": 13, "dim_feedforward": 9}),
        ("gpt2", {"n_embd": 33, "n_head": 1, "n_inner": 7}),
        ("llama", {"hidden_size": 21, "head_dim": 6, "num_attention_heads": 3, "num_key_value_heads": 1}),
        ("llama", {"hidden_size": 34, "head_dim": 2, "num_attention_heads": 17, "num_key_value_heads": 17}),
    ],
)
def test_odd_widths(name: str, overrides: dict[str, int]) -> None:
    model = build(name, **overrides)
    given = tiny_models.inputs(name)
    if name in TORCH_FAMILIES:
        given["src"] = given["src"][..., : overrides["d_model"]]
    both_dtypes(model, given, reference(model, given))


# ---- options


def baseline(name: str, kind: str) -> str | Tensor:
    generator = torch.Generator().manual_seed(4)
    width = 76 if name == "llama-bias" else 52
    shapes = {"tensor": (width,), "gate and up": (2, width)}
    return torch.randn(shapes[kind], generator=generator, dtype=torch.float64) if kind in shapes else kind


@pytest.mark.parametrize(
    ("name", "kind", "value_bias"),
    [
        *((name, kind, "separate") for name in ("bert", "gpt2", "llama-bias") for kind in ("zero", "bias", "tensor")),
        ("llama-bias", "gate and up", "separate"),
        ("gpt2", "bias", "token"),
        ("llama-bias", "tensor", "token"),
    ],
)
def test_baselines_and_value_bias(name: str, kind: str, value_bias: str) -> None:
    model, given = build(name), tiny_models.inputs(name, batch=1)
    options: dict[str, Any] = {"baseline": baseline(name, kind), "value_bias": value_bias}
    expected = reference(model, given, **options)
    both_dtypes(model, given, expected, **options)
    plain = reference(model, given, value_bias=value_bias)
    scope = next(s for s in plain.scopes if s.endswith("_ff"))
    assert torch.allclose(plain.maps[scope], expected.maps[scope], rtol=1e-3) == (kind == "zero")
    other = reference(model, given, value_bias="token" if value_bias == "separate" else "separate")
    assert not torch.allclose(plain.maps["attn"], other.maps["attn"], rtol=1e-3)


RULES = [Riemann(5, rule) for rule in ("right", "left", "midpoint", "trapezoid")]  # type: ignore[arg-type]


@pytest.mark.parametrize("ig", [*RULES, GaussLegendre(3)], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_ig_rules(name: str, ig: Riemann | GaussLegendre) -> None:
    model, given = build(name), tiny_models.inputs(name, batch=1)
    expected = reference(model, given, ig=ig)
    both_dtypes(model, given, expected, ig=ig)
    exact = reference(model, given)
    scope = next(s for s in exact.scopes if s.endswith("_ff"))
    gap = (exact.maps[scope] - expected.maps[scope]).abs().max()
    assert 1e-6 < gap / exact.maps[scope].max() < 0.5


@pytest.mark.parametrize("ig", ["exact", Riemann(4)], ids=str)
@pytest.mark.parametrize("kind", ["zero", "bias"])
def test_an_activation_without_closed_form(ig: Any, kind: str) -> None:
    model, given = build("torch-layer", activation=F.mish), tiny_models.inputs("torch-layer")
    with pytest.warns(UserWarning, match="no closed form for the activation 'mish'"):
        expected = reference(model, given, ig=ig, baseline=kind)
    with pytest.warns(UserWarning, match="no closed form for the activation 'mish'"):
        both_dtypes(model, given, expected, ig=ig, baseline=kind)


# ---- blocks


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "mistral"])
def test_blocks_do_not_show(name: str, backend: str, method: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, length=9, padding=padding)
    options: dict[str, Any] = {"scopes": "all", "layers": 1, "backend": backend, "method": method}
    whole = ffattr.attribute(model, given, memory_budget=1 << 30, **options)
    assert whole.plan.layers[0].blocks.queries == whole.mask.sum()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="memory_budget") as caught:
        ffattr.plan(model, given, memory_budget=1, **options)
    least = int(re.findall(r"\d+", str(caught.value))[-1])
    seen = set()
    for budget in (least, 3 * least):
        blocked = ffattr.attribute(model, given, memory_budget=budget, **options)
        blocks = blocked.plan.layers[0].blocks  # type: ignore[attr-defined]
        seen.add((blocks.queries, blocks.keys, blocks.ff_keys))
        assert_same(blocked, whole)
        assert (blocked.error < 1e-12).all()
    assert min(seen)[0] == 1
    assert len(seen) > 1


# ---- selections


SELECTIONS: list[Any] = [
    3,
    -1,
    [5],
    [0, 2, 6],
    [6, 1, 3],
    [-1, 0],
    [2, 2, -5],
    slice(1, None, 2),
    slice(None, None, -1),
    [],
]


@pytest.mark.parametrize("queries", SELECTIONS, ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_queries_are_rows_of_the_whole(name: str, queries: Any) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="left")
    whole = ffattr.attribute(model, given, scopes="all", method="direct")
    some = ffattr.attribute(model, given, scopes="all", method="direct", queries=queries)
    rows = torch.arange(7).tolist()[queries] if isinstance(queries, slice) else queries
    rows = [r % 7 for r in ([rows] if isinstance(rows, int) else rows)]
    assert some.queries == tuple(rows)
    for scope in whole.scopes:
        torch.testing.assert_close(some.maps[scope], whole.maps[scope][..., rows, :], rtol=0, atol=1e-12)
        torch.testing.assert_close(some.bias[scope], whole.bias[scope][..., rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "layers", [1, -1, [0, 1], [1, 0], [-1, 0], [1, 1, 0], slice(None, None, -1), slice(1), []], ids=str
)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_layers_are_layers_of_the_whole(backend: str, layers: Any) -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    whole = ffattr.attribute(model, given, scopes="all", backend=backend)
    some = ffattr.attribute(model, given, scopes="all", backend=backend, layers=layers)
    chosen = [0, 1][layers] if isinstance(layers, slice) else layers
    chosen = [layer % 2 for layer in ([chosen] if isinstance(chosen, int) else chosen)]
    assert some.layers == tuple(chosen)
    for scope in whole.scopes:
        torch.testing.assert_close(some.maps[scope], whole.maps[scope][chosen], rtol=0, atol=1e-12)
        torch.testing.assert_close(some.bias[scope], whole.bias[scope][chosen], rtol=0, atol=1e-12)
    torch.testing.assert_close(some.error, whole.error[chosen], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["direct", "operator"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "torch-no-bias"])
def test_each_scope_alone_is_the_scope_among_all(name: str, method: str) -> None:
    model, given = build(name), tiny_models.inputs(name)
    whole = ffattr.attribute(model, given, scopes="all", method=method)
    for scope in whole.scopes:
        alone = ffattr.attribute(model, given, scopes=scope, method=method)
        assert alone.scopes == (scope,)
        assert set(alone.maps) == set(alone.bias) == {scope}
        torch.testing.assert_close(alone.maps[scope], whole.maps[scope], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.bias[scope], whole.bias[scope], rtol=0, atol=1e-12)

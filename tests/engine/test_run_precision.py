"""Wide products in narrow dtypes: how far maps are from the definition, what stays in float32, what overflows."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import FAMILIES, build
from torch import Tensor

import ffattr
from ffattr import Attribution, NonFiniteError
from ffattr.engine.planning import choose as planning
from ffattr.ops import availability, backends, torch_kernels

FLOAT8 = torch.float8_e4m3fn
# Of a scope's largest entry. A sum of rounded products is off by about one rounding of its largest terms, 2^-9 in
# bfloat16 and 2^-12 in float16, and a few of them follow each other; float8 rounds the last matrix by up to 2^-4, at
# random in each of its many rows.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, FLOAT8: 2e-2}
WAYS = [
    (dtype, method)
    for dtype in LIMITS
    for method in ("direct", "operator", "mixed")
    if dtype != FLOAT8 or method == "direct"
]

# Every family with every dtype and with both methods: in bfloat16 and float16 in turns.
WAYS_OF_FAMILIES = [
    (name, dtype, "direct" if dtype == FLOAT8 or (i + j) % 2 else "operator")
    for i, name in enumerate(FAMILIES)
    for j, dtype in enumerate(LIMITS)
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch may have float8 too, which its operators compute."""
    monkeypatch.setitem(availability.DTYPES, "torch", (*availability.DTYPES["torch"], FLOAT8))


def far(found: Attribution, expected: Attribution, scope: str) -> float:
    """Largest difference of a scope's maps in parts of its largest entry."""
    one, other = found.maps[scope].double(), expected.maps[scope]
    return float(((one - other).abs().flatten(1).amax(1) / other.flatten(1).amax(1)).max())


@pytest.mark.parametrize(("name", "dtype", "method"), WAYS_OF_FAMILIES, ids=str)
def test_narrow_products(name: str, dtype: torch.dtype, method: str) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    found = ffattr.attribute(model, given, scopes="all", backend="torch", dtype=dtype, method=method)
    assert found.plan.dtype == dtype  # type: ignore[attr-defined]
    assert found.arguments["dtype"] == str(dtype).removeprefix("torch.")
    assert str(found.plan).startswith(f"torch backend, {found.arguments['dtype']} on cpu")
    assert 0 < found.error.max() < 1e-5  # the tokens' own stream is not narrow
    for scope in found.scopes:
        assert found.maps[scope].dtype == found.bias[scope].dtype == torch.float32
        torch.testing.assert_close(found.bias[scope].double(), expected.bias[scope], rtol=1e-4, atol=1e-5)
        assert far(found, expected, scope) < (LIMITS[dtype] if "_ff" in scope else 1e-5), scope


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_half_products_of_a_half_model(name: str, dtype: torch.dtype) -> None:
    model, given = build(name, dtype=dtype), tiny_models.inputs(name)
    single = ffattr.attribute(model, given, scopes="all")
    half = ffattr.attribute(model, given, scopes="all", dtype=dtype)
    multiplies = dtype == torch.bfloat16 and availability.describe_product("cpu", dtype)
    assert single.arguments["dtype"] == "float32"
    assert half.plan.backend == ("cpu" if multiplies else "torch")  # type: ignore[attr-defined]
    assert torch.equal(single.error, half.error)
    for scope in half.scopes:
        assert far(half, single, scope) < LIMITS[dtype]
        assert torch.equal(half.maps[scope], single.maps[scope]) == ("_ff" not in scope)


@pytest.mark.parametrize(("dtype", "method"), [*WAYS, (torch.float32, "direct"), (torch.float64, "operator")], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_operators_get_the_dtypes_of_their_contract(
    name: str, dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = torch.float64 if dtype == torch.float64 else torch.float32
    wide = torch.bfloat16 if dtype == FLOAT8 else dtype
    seen: set[str] = set()

    class Checked:
        def __getattr__(self, operator: str) -> Any:
            def call(*arguments: Any) -> Any:
                names = inspect.signature(getattr(torch_kernels, operator)).parameters
                given = {key: value for key, value in zip(names, arguments, strict=False) if isinstance(value, Tensor)}
                for key in ("z", "alpha", "residual_scale", "gamma", "norm_scale", "row_scale", "down_scale"):
                    assert key not in given or given[key].dtype == result, key
                for key in ("features", "residual", "values", "maps", "own", "slope"):
                    assert key not in given or given[key].dtype == wide, key
                assert "gram" not in given or given["gram"].dtype == torch.float64
                if "down" in given:
                    assert given["down"].dtype == dtype
                    assert ("down_scale" in given) == (dtype == FLOAT8)
                    assert given["down"].is_contiguous()
                seen.add(operator)
                return getattr(torch_kernels, operator)(*arguments)

            return call

    checked = replace(backends.BACKENDS["torch"], load=Checked)
    monkeypatch.setitem(backends.BACKENDS, "torch", checked)
    ffattr.attribute(build(name), tiny_models.inputs(name), scopes="all", backend="torch", dtype=dtype, method=method)
    assert seen == {"ig_slope", "gram_norms", "operator_norms" if method == "operator" else "ff_norms"}


def test_float8_has_only_the_direct_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measured", lambda *key: (1e9, 1e9))
    model, given = build("bert", max_position_embeddings=128), tiny_models.inputs("bert", batch=1, length=120)
    assert ffattr.plan(model, given, backend="torch").layers[0].method == "operator"
    (first, _) = ffattr.plan(model, given, backend="torch", dtype=FLOAT8).layers
    assert first.method == "direct"
    assert first.reason.startswith("the only method in float8")
    for call in (ffattr.attribute, ffattr.plan):
        with pytest.raises(ValueError, match=r"method='operator' does not run in torch.float8_e4m3fn; 'direct' is the"):
            call(model, given, backend="torch", dtype=FLOAT8, method="operator")


def test_float16_that_overflows() -> None:
    model, given = build("gpt2"), tiny_models.inputs("gpt2")
    model.get_parameter("h.1.mlp.c_proj.weight").data.mul_(1e6)
    with pytest.raises(
        NonFiniteError,
        match=r"layer 1, atb_ln_ff_res: .* range of float16; pass dtype=torch.bfloat16 or dtype=torch.fl",
    ):
        ffattr.attribute(model, given, dtype=torch.float16)
    expected = ffattr.attribute(model, given, backend="reference")
    found = ffattr.attribute(model, given, dtype=torch.bfloat16)
    assert far(found, expected, found.scopes[-1]) < LIMITS[torch.bfloat16]


@pytest.mark.parametrize("backend", ["torch", "cpu", "reference"])
@pytest.mark.parametrize("scope", ["attn", "atb", "layer"])
def test_norms_beyond_the_range_of_squares_are_right_or_an_error_by_layer_and_scope(backend: str, scope: str) -> None:
    model = build("llama", dtype=torch.float32)
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what attention and the block add is of the order of 1e21
        for part in (model.layers[1].self_attn.o_proj, model.layers[1].mlp.down_proj):
            part.weight.mul_(1e21)
    options = {"scopes": scope, "layers": [1], "check": False}  # the model's own norms overflow as well
    exact = ffattr.attribute(copy.deepcopy(model).double(), {"inputs_embeds": hidden.double()}, **options)
    assert exact[scope].isfinite().all()
    said = rf"layer 1, {exact.scope(scope)}: squares of what .* float32 \(3.4e38\).* pass dtype=torch.float64"

    def compute() -> Tensor | str:
        try:
            return ffattr.attribute(model, {"inputs_embeds": hidden}, **options, backend=backend)[scope]
        except NonFiniteError as error:
            return str(error)

    found = compute()
    if isinstance(found, str):
        assert re.fullmatch(said, found)
    else:
        assert torch.allclose(found.double(), exact[scope], rtol=1e-3, atol=0)


def test_projections_beyond_the_range_of_float32_are_an_error_by_layer_and_scope() -> None:
    model, given = build("bert", dtype=torch.float32), tiny_models.inputs("bert")
    direction = torch.full((40,), 3e38)
    said = r"layer 0, atb_ff_res_ln: products with the direction exceed the range of float32 .* dtype=torch.float64"
    with pytest.raises(NonFiniteError, match=said):
        ffattr.attribute(model, given, toward=direction)
    found = ffattr.attribute(model, given, toward=direction, dtype=torch.float64)
    assert found["layer"].isfinite().all()

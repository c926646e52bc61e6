"""Activations are recognised by their values."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from activation_cases import NAMES, OFFICIAL, check, derivative, path_integrals
from torch import Tensor, nn

from ffattr.decomposition import integrated_gradients as ig
from ffattr.models.spec.activation import _make_grid, identify_activation

MODULES = {
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "relu": nn.ReLU(inplace=True),
    "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_recognised(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert identify_activation(MODULES[name]) is ig.ACTIVATIONS[name]


@pytest.mark.parametrize("name", NAMES)
def test_functions_are_recognised(name: str) -> None:
    assert identify_activation(OFFICIAL[name]) is ig.ACTIVATIONS[name]
    assert identify_activation(ig.ACTIVATIONS[name]) is ig.ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("gelu", "gelu"),
        ("gelu_python", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_fast", "gelu_tanh"),
        ("gelu_accurate", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("quick_gelu", "quick_gelu"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("tanh", "tanh"),
        ("sigmoid", "sigmoid"),
        ("gelu_10", None),
        ("relu6", None),
        ("mish", None),
        ("laplace", None),
        ("leaky_relu", None),
    ],
)
def test_transformers_activations(key: str, name: str | None) -> None:
    table = pytest.importorskip("transformers.activations").ACT2FN
    if key not in table:
        pytest.skip(f"this transformers has no {key}")
    if name is None:
        with pytest.warns(UserWarning, match="64 nodes"):
            assert identify_activation(table[key]).slope is None
    else:
        assert identify_activation(table[key]) is ig.ACTIVATIONS[name]


@pytest.mark.parametrize(
    ("fn", "g", "value_tolerance"),
    [
        (F.mish, F.mish, 1e-12),
        (F.softplus, F.softplus, 1e-8),  # PyTorch's own is linear beyond 20
        (nn.ELU(), F.elu, 1e-12),
        (nn.PReLU(), lambda x: F.leaky_relu(x, 0.25), 1e-6),  # its parameter is float32
        (nn.PReLU(dtype=torch.bfloat16), lambda x: F.leaky_relu(x, 0.25), 1e-2),
    ],
)
def test_unknown_activation_warns_and_falls_back_to_quadrature(
    fn: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], value_tolerance: float
) -> None:
    with pytest.warns(UserWarning, match="falls back to Gauss-Legendre quadrature with 64 nodes"):
        activation = identify_activation(fn)
    assert activation.slope is None
    assert activation.gated is None
    u = torch.tensor([1e-3, 2.0, -3.0, 19.0, -20.0], dtype=torch.float64)
    v = torch.full_like(u, 1.5)
    expected = [path_integrals(g, 0.0, x, 0.0, 1.5) for x in u.tolist()]
    right = sum(derivative(g, u * k / 3) for k in (1, 2, 3)) / 3
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            c_u, c_v = ig.gated_slopes(u, v, activation)
            assert not c_u.requires_grad
            assert not c_v.requires_grad
            check(ig.slope(u, activation), [e[0] for e in expected], 1e-12)
            check(c_u, [e[1] for e in expected], 1e-12)
            check(c_v, [e[2] for e in expected], value_tolerance)
            torch.testing.assert_close(ig.slope(u, activation, "right", 3), right)


@pytest.mark.parametrize(
    "fn",
    [
        nn.Softmax(-1),
        nn.GLU(),
        nn.LayerNorm(32),
        nn.Dropout(0.5),
        lambda x: x - x.mean(),
        lambda x: x.cumsum(-1),
        lambda x: x * torch.arange(32),
        lambda x: x.sum(),
        lambda x: [x],
        nn.Linear(7, 7),
    ],
)
def test_functions_that_are_not_elementwise_are_refused(fn: Callable[[Tensor], Tensor]) -> None:
    name = type(fn).__name__ if isinstance(fn, nn.Module) else "lambda"
    with pytest.raises(ValueError, match=name):
        identify_activation(fn)


class Steep(nn.Module):
    """An activation that can be changed after it was recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.silu = 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.silu(x) if self.silu else F.relu(x)


def test_a_function_is_looked_at_once_while_its_values_are_the_same() -> None:
    fn = Steep()
    assert identify_activation(fn) is ig.ACTIVATIONS["relu"]
    first, fn.calls = fn.calls, 0
    assert identify_activation(fn) is ig.ACTIVATIONS["relu"]
    assert 1 == fn.calls < first
    fn.silu = True
    assert identify_activation(fn) is ig.ACTIVATIONS["silu"]
    assert identify_activation(fn) is ig.ACTIVATIONS["silu"]
    gone = weakref.ref(fn)
    del fn
    assert gone() is None


class Unhashable:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_a_callable_that_cannot_be_remembered() -> None:
    fn = Unhashable()
    assert identify_activation(fn) is identify_activation(fn) is ig.ACTIVATIONS["relu"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    _make_grid.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert [identify_activation(fn).name for fn in (F.gelu, nn.SiLU(), lambda x: F.relu(x))] == [
            "gelu",
            "silu",
            "relu",
        ]
    finally:
        torch.set_default_dtype(torch.float32)
        _make_grid.cache_clear()


def test_hooks_of_the_user_are_passed_by() -> None:
    module = nn.GELU()
    module.register_forward_hook(lambda module, args, output: output[..., :3])
    assert identify_activation(module).name == "gelu"

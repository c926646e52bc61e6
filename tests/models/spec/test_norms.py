"""Norms, told by what they make of random rows."""

from __future__ import annotations

import pytest
import torch
from plain_layers import WIDTH, spec
from torch import Tensor, nn

from ffattr.errors import UnsupportedModel
from ffattr.models.spec.norms import is_norm, read_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_norm_that_computes_something_else_is_refused() -> None:
    class OddRMSNorm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    with pytest.raises(UnsupportedModel, match=r"OddRMSNorm that computes neither a LayerNorm nor an RMSNorm"):
        spec(norm_before_ff=OddRMSNorm(WIDTH)).weights(torch.float32)


@pytest.mark.parametrize("one", [0, 1])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_is_what_it_computes(kind: type[nn.Module], one: int) -> None:
    """T5LayerNorm does not centre; Gemma's and Nemotron's gains are one more than their weights."""

    class MisnamedLayerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(random(WIDTH)), 1e-3

        def forward(self, x: Tensor) -> Tensor:
            norm = kind(WIDTH, eps=self.eps, elementwise_affine=False)
            return norm(x) * (self.weight + one)

    module = MisnamedLayerNorm()
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    p = random(5, WIDTH)
    torch.testing.assert_close(norm(p), module(p))


def test_a_module_that_is_no_norm_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"a norm is a .*GroupNorm that does not run on \[2, 2, 12\]"):
        spec(norm_before_ff=nn.GroupNorm(1, WIDTH)).weights(torch.float32)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_parts(kind: str, affine: bool) -> None:
    module = (nn.LayerNorm if kind == "layer" else nn.RMSNorm)(WIDTH, eps=0.1, elementwise_affine=affine).double()
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random(WIDTH, seed=seed)
    norm = spec(norm_before_ff=module).weights(torch.float64).norm_before_ff
    assert norm is not None
    assert norm.kind == kind
    p, q, matrix = random(5, WIDTH, seed=4), random(5, WIDTH, seed=5), random(7, WIDTH, seed=6)
    torch.testing.assert_close(norm(p), module(p))
    torch.testing.assert_close(norm.affine(p, norm.scale(p)), module(p))
    torch.testing.assert_close(p[:, :7] @ norm.linear(matrix), norm.linear(p[:, :7] @ matrix))
    torch.testing.assert_close(norm.linear(p + q), norm.linear(p) + norm.linear(q))
    # Completeness with frozen statistics: the parts of a sum, and the shift once.
    scale = norm.scale(p + q)
    torch.testing.assert_close(norm.linear(p) * scale[:, None] + norm.affine(q, scale), module(p + q))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_norm_with_its_default_eps(dtype: torch.dtype, affine: bool) -> None:
    module = nn.RMSNorm(WIDTH, elementwise_affine=affine, dtype=dtype)
    norm = spec(norm_before_ff=module).weights(dtype).norm_before_ff
    assert norm is not None
    p = random(3, WIDTH).to(dtype) * torch.finfo(dtype).eps ** 0.5  # where eps weighs as much as the input
    torch.testing.assert_close(norm(p), module(p))


# ---- norms that are called anything


class HomeMade(nn.Module):
    """The formula written out, with parameters and eps under names of its own."""

    def __init__(self, kind: str, shifts: bool, eps: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.kind, self.tiny = kind, eps
        self.g = nn.Parameter(random(WIDTH, seed=2).to(dtype))
        self.shift = nn.Parameter(random(WIDTH, seed=3).to(dtype)) if shifts else None

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        y = centred / (centred.square().mean(-1, keepdim=True) + self.tiny).sqrt() * self.g
        return y if self.shift is None else y + self.shift


@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.3])
@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_home_made_norm_is_what_it_computes(kind: str, shifts: bool, eps: float) -> None:
    module = HomeMade(kind, shifts, eps)
    found = read_norm(module, None, WIDTH)
    assert found is not None
    assert (found.kind, found.bias is not None) == (kind, shifts)
    assert found.eps == pytest.approx(eps, rel=1e-6)
    for size in (1.0, 0.01, 30.0):
        p = random(5, WIDTH, seed=7) * size
        torch.testing.assert_close(found(p), module(p), rtol=1e-10, atol=1e-12)


class ByDeviation(HomeMade):
    """Divides by a standard deviation, to which it adds eps, as in "The Annotated Transformer"."""

    unbiased = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.g * (x - x.mean(-1, keepdim=True)) / (x.std(-1, self.unbiased, keepdim=True) + self.tiny)
        return y if self.shift is None else y + self.shift


class ByRoot(HomeMade):
    def forward(self, x: Tensor) -> Tensor:
        return self.g * x / (x.square().mean(-1, keepdim=True).sqrt() + self.tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-3])
@pytest.mark.parametrize("unbiased", [True, False])
def test_a_norm_by_the_standard_deviation(unbiased: bool, eps: float, dtype: torch.dtype) -> None:
    module = ByDeviation("layer", True, eps, dtype)
    module.unbiased = unbiased
    found = read_norm(module, torch.float64, WIDTH)
    assert found is not None
    assert found.kind == "layer"
    limit = 1e-9 if dtype == torch.float64 else 64 * torch.finfo(dtype).eps
    for size in (1.0, 0.02, 30.0):
        p = (random(5, WIDTH, seed=7) * size).to(dtype)
        torch.testing.assert_close(found(p.double()), module(p).double(), rtol=limit, atol=limit)


def test_what_is_added_to_the_root_is_told_from_what_is_added_to_the_square() -> None:
    root, square = (
        read_norm(ByRoot("rms", False, 1e-3), None, WIDTH),
        read_norm(HomeMade("rms", False, 1e-3), None, WIDTH),
    )
    assert root is not None
    assert square is not None
    assert (root.kind, root.eps) == (square.kind, square.offset) == ("rms", 0.0)
    assert root.offset == pytest.approx(1e-3, rel=1e-6)
    p = random(5, WIDTH, seed=7) / 100
    torch.testing.assert_close(root(p), ByRoot("rms", False, 1e-3)(p), rtol=1e-10, atol=1e-12)


def test_a_refused_norm_is_said_to_be_off_by_what_it_is() -> None:
    class Nearly(HomeMade):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y + 1e-3 * y.square()

    with pytest.raises(UnsupportedModel, match=r"the nearest one is off by \d\.\de-04 .* than the 1e-05 that rounding"):
        read_norm(Nearly("layer", False, 1e-5), None, WIDTH)


def test_one_that_computes_in_float32_and_has_no_parameters() -> None:
    """OLMo's."""

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x.float(), (WIDTH,), eps=1e-5).to(x.dtype)

    found = read_norm(Bare(), torch.float64, WIDTH)
    assert found is not None
    assert found.kind == "layer"
    p = random(5, WIDTH)
    torch.testing.assert_close(found(p), Bare()(p), rtol=1e-5, atol=1e-6)
    with pytest.raises(UnsupportedModel, match=r"Bare without a weight, of which nobody says how wide it is"):
        read_norm(Bare(), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_narrow_dtypes(dtype: torch.dtype) -> None:
    module = HomeMade("rms", True, 1e-5, dtype)
    found = read_norm(module, torch.float32, WIDTH)
    assert found is not None
    assert found.kind == "rms"
    p = random(5, WIDTH).to(dtype)
    limit = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found(p.float()), module(p).float(), rtol=limit, atol=limit)


def test_parameters_under_their_usual_names_are_read_and_not_measured() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.epsilon = nn.Parameter(random(WIDTH)), 1e-4

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, (WIDTH,), self.weight, self.epsilon)

    module = Named()
    found = read_norm(module, None)
    assert found is not None
    assert found.eps == 1e-4
    assert found.weight is not None
    assert found.weight.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize(
    "module",
    [nn.Tanh(), nn.Identity(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Softmax(-1), nn.GroupNorm(1, WIDTH)],
)
def test_what_is_no_norm(module: nn.Module) -> None:
    assert not is_norm(module, WIDTH)


def test_what_is_one() -> None:
    assert is_norm(nn.LayerNorm(WIDTH), WIDTH)
    assert is_norm(HomeMade("layer", True, 1e-5), WIDTH)
    assert read_norm(None, None) is None

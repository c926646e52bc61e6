"""The Triton kernel of ``ig_slope``, on the GPU or in Triton's interpreter, against `ffattr.ig` in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from test_ig_slope_op import EXTREMES, expected, random
from torch import Tensor

from ffattr import ig

ig_slope = pytest.importorskip("ffattr.triton_ops.ig_slope").ig_slope
INTERPRETED = pytest.importorskip("ffattr.triton_ops.runtime").INTERPRETED

# A lane that is not selected may well divide by zero: the interpreter's NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = (torch.bfloat16, torch.float16)
QUADRATURES = [("right", 7), ("left", 1), ("midpoint", 4), ("trapezoid", 5), ("gauss-legendre", 9)]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` is full of NaN, so that what a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Guards:
    """Tensors inside larger buffers full of NaN (zeros for integers): reads and writes beyond them show.

    ``margin``: elements on either side; if it is odd, pointers are aligned to no more than an element.
    """

    def __init__(self, margin: int = 64) -> None:
        self.margin = margin
        self.guarded: list[tuple[Tensor, Tensor]] = []

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        fill = math.nan if dtype.is_floating_point else 0
        buffer = torch.full((size + 2 * self.margin,), fill, dtype=dtype, device=DEVICE)
        self.guarded.append((buffer, buffer.clone()))
        return buffer[self.margin : self.margin + size].view(shape)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        view = self.empty(tensor.shape, tensor.dtype).copy_(tensor)
        buffer, _ = self.guarded.pop()
        self.guarded.append((buffer, buffer.clone()))
        return view

    def check(self, *written: Tensor) -> None:
        """Nothing has changed but what lies in ``written``."""
        for buffer, before in self.guarded:
            for tensor in written:
                if tensor.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                    inside = slice(self.margin, self.margin + tensor.numel())
                    before[inside] = buffer[inside]
            assert torch.equal(buffer.view(torch.uint8), before.view(torch.uint8))


def run(
    z: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    name: str,
    rule: str = "exact",
    steps: int = 0,
    margin: int = 64,
) -> Tensor:
    guards = Guards(margin)
    arguments = [guards.copy(t) for t in (z, base, scale)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda t: guards.empty(t.shape, t.dtype))
        out = ig_slope(*arguments, name, rule, steps)
    guards.check(out)
    assert out.shape == z.shape
    assert out.dtype == z.dtype
    return out.cpu()


def check(
    z: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    name: str,
    rule: str = "exact",
    steps: int = 0,
    margin: int = 64,
) -> None:
    out = run(z, base, scale, name, rule, steps, margin).double()
    reference = expected(z, base, scale, name, rule, steps)
    size = reference.abs().clamp_min(1)
    if len(z) == 2:  # one rounding of the gate's factor is eps times the up stream times the derivative
        gate, up = (z if base is None else torch.maximum(z.abs(), base.abs())).double().abs()
        size = torch.maximum(size, up * gate.clamp_min(1) if name == "relu2" else up)
    if scale is not None:
        size = size * scale.double().abs().clamp_min(1)[:, None]
    # 2 roundings for the argument, 5 for the function, and those of a sum of `steps` terms
    limit = (1e-6 if rule == "exact" else 2e-6) * size
    if z.dtype != torch.float32:
        kind = torch.finfo(z.dtype)
        truncates = INTERPRETED and z.dtype == torch.bfloat16  # the interpreter, where a GPU rounds
        limit = (
            limit + kind.eps * (1 if truncates else 0.5) * (reference.abs() + limit) + kind.smallest_normal * kind.eps
        )
    error = (out - reference).abs()
    worst = (error / limit).flatten(1).sum(0).argmax()
    assert (error <= limit).all(), f"{(error / limit).max():.2f} times the limit at {z.flatten(1)[:, worst].tolist()}"


# ---- values


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize(("rule", "steps"), [("exact", 0), *QUADRATURES])
@pytest.mark.parametrize("name", ig.ACTIVATIONS)
def test_every_activation_and_rule(name: str, rule: str, steps: int, streams: int) -> None:
    z, scale = random(streams, 5, 56), random(5, seed=1)
    check(z, None, None, name, rule, steps)
    check(z, random(streams, 1, 56, seed=2), scale, name, rule, steps)
    check(z, random(streams, 5, 56, seed=3), scale, name, rule, steps)


@pytest.mark.parametrize("name", ig.ACTIVATIONS)
def test_extreme_values(name: str) -> None:
    u = torch.tensor(EXTREMES)
    v = torch.linspace(-3, 3, len(u))
    check(u.view(1, 1, -1), None, None, name)
    check(torch.stack([u, v])[:, None], None, None, name)
    # One row of `u` for each start of the path.
    gate, up = u.expand(5, -1), v.expand(5, -1)
    start = torch.stack([u + torch.tensor([0.0, 1e-6, 0.999, -1.001, 25.0])[:, None], -up])
    check(gate[None], start[:1], None, name)
    check(torch.stack([gate, up]), start, None, name)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
def test_left_tail_keeps_its_digits(name: str) -> None:
    z = torch.linspace(-12, 0, 500)
    out = run(z.view(1, 1, -1), None, None, name).flatten().double()
    reference = ig.slope(z.double(), ig.ACTIVATIONS[name])
    # The argument of the exponential has a rounding error of its own.
    known = (out / reference - 1).abs() <= (4 - reference.log()) * 4 * torch.finfo(torch.float32).eps
    assert (known | (reference < torch.finfo(torch.float32).tiny)).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("name", ig.ACTIVATIONS)
def test_half_types_are_rounded_once(name: str, streams: int, dtype: torch.dtype) -> None:
    z, base = random(streams, 3, 40).to(dtype), random(streams, 3, 40, seed=2).to(dtype)
    scale = random(3, seed=1)
    for rule, steps in (("exact", 0), ("right", 5)):
        check(z, None, scale, name, rule, steps)
        check(z, base, scale.to(dtype), name, rule, steps)


# ---- sizes and memory


@pytest.mark.parametrize("margin", [64, 67])
@pytest.mark.parametrize(
    ("rows", "neurons"), [(1, 1), (33, 1), (1, 56), (5, 56), (33, 56), (5, 200), (33, 200), (2, 1024), (3, 1100)]
)
def test_sizes(rows: int, neurons: int, margin: int) -> None:
    for streams in (1, 2):
        z, scale = random(streams, rows, neurons), random(rows, seed=1)
        check(z, None, scale, "silu", "right", 2, margin)
        for base_rows in (1, rows):
            check(z, random(streams, base_rows, neurons, seed=2), scale, "relu", "exact", 0, margin)


@pytest.mark.parametrize("shape", [(1, 0, 7), (2, 0, 7), (1, 3, 0), (2, 3, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    z = torch.empty(shape, device=DEVICE)
    assert ig_slope(z, z, torch.empty(shape[1], device=DEVICE), "gelu", "exact", 0).shape == shape


def test_inputs_that_are_not_contiguous() -> None:
    z, base, scale = random(56, 5, 2), random(2, 56, 5, seed=1), random(10, seed=2)
    for rule, steps, one_row in (("exact", 0, False), ("midpoint", 3, True)):
        slanted = [z.to(DEVICE).permute(2, 1, 0), base.to(DEVICE).transpose(1, 2), scale.to(DEVICE)[::2]]
        if one_row:
            slanted[1] = slanted[1][:, ::5]
        assert not any(t.is_contiguous() for t in slanted)
        straight = [t.contiguous() for t in slanted]
        assert torch.equal(ig_slope(*slanted, "silu", rule, steps), ig_slope(*straight, "silu", rule, steps))


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("rule", "steps"), [("exact", 0), ("right", 3)])
@pytest.mark.parametrize("name", ig.ACTIVATIONS)
def test_nan_goes_through_and_harms_no_neighbour(name: str, rule: str, steps: int, with_base: bool) -> None:
    for streams in (1, 2):
        z = random(streams, 3, 37)
        z[0, 1, 5] = math.nan
        out = run(z, random(streams, 1, 37, seed=1) if with_base else None, None, name, rule, steps)
        assert torch.equal(out.isnan().nonzero()[:, 1:].unique(dim=0), torch.tensor([[1, 5]]))
        assert out[:, 1, 5].isnan().all()


# ---- errors


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"activation": "swiglu"}, "swiglu.*expected one of 'gelu'"),
        ({"rule": "simpson"}, "simpson"),
        ({"rule": "right"}, "right.*>= 1, got 0"),
        ({"rule": "trapezoid", "steps": 1}, "trapezoid.*>= 2, got 1"),
        ({"z": torch.ones(2, 3, 8).double()}, 'z has dtype torch.float64.*backend="torch"'),
        ({"z": torch.ones(2, 3, 8).int()}, "z has dtype torch.int32.*float16$"),
        ({"z": torch.ones(3, 8)}, r"z has shape \[3, 8\], expected \[S, N, F\]"),
        ({"z": torch.ones(3, 3, 8)}, r"z has shape \[3, 3, 8\], expected \[S, N, F\]"),
        ({"base": torch.ones(2, 2, 8)}, r"base has shape \[2, 2, 8\], expected \[2, 3, 8\]"),
        ({"base": torch.ones(1, 1, 8)}, r"base has shape \[1, 1, 8\], expected \[2, 1, 8\]"),
        ({"base": torch.ones(2, 3, 8).half()}, "base has dtype torch.float16, expected torch.float32"),
        ({"row_scale": torch.ones(8)}, r"row_scale has shape \[8\], expected \[3\]"),
        ({"row_scale": torch.ones(3).half()}, "row_scale has dtype torch.float16, expected torch.float32"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, object], named: str) -> None:
    given = {
        "z": torch.ones(2, 3, 8),
        "base": None,
        "row_scale": None,
        "activation": "gelu",
        "rule": "exact",
        "steps": 0,
    }
    with pytest.raises(ValueError, match=named):
        ig_slope(**{**given, **changed})

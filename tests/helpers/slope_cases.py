"""Cases of ``ig_slope``, their definition by `ffattr.decomposition.integrated_gradients` in float64, and what every
kernel for GPUs promises of them."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from guards import Guards
from torch import Tensor

from ffattr.decomposition import integrated_gradients as ig

HALVES = (torch.bfloat16, torch.float16)
QUADRATURES = [("right", 7), ("left", 1), ("midpoint", 4), ("trapezoid", 5), ("gauss-legendre", 9)]
CLOSED_FORMS = [(name, "exact", 0, streams) for name in ig.ACTIVATIONS for streams in (1, 2)]
# Every activation with every rule, in turns for one stream and for two: a rule knows nothing of the activation.
SUMS = [
    (name, *quadrature, 1 + (i + j) % 2)
    for i, name in enumerate(ig.ACTIVATIONS)
    for j, quadrature in enumerate(QUADRATURES)
]
EXTREMES = [0, 1e-12, -1e-12, 1e-3, -1e-3, 0.999, 1.001, -0.999, -1.001, 3, -3, 6.99, 7.01, -6.99, -7.01, 30, -30]
EXTREMES += [100, -100, 1e4, -1e4]


def expected(z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str, steps: int) -> Tensor:
    """Returns the definition of ``ig_slope``, in float64."""
    activation = ig.ACTIVATIONS[name]
    start = None if base is None else base.double().unbind(0)
    if len(z) == 1:
        out = ig.slope(z[0].double(), activation, rule, steps, base=None if start is None else start[0])[None]
    else:
        out = torch.stack(ig.gated_slopes(z[0].double(), z[1].double(), activation, rule, steps, base=start))
    return out if scale is None else out * scale.double()[:, None]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, size: float = 4) -> Tensor:
    """Returns normal numbers with standard deviation ``size``, the same ones for the same ``seed``."""
    return torch.randn(shape, generator=torch.manual_seed(seed), dtype=dtype) * size


class Promises:
    """A subclass has a kernel."""

    device: torch.device
    refused: type[Exception]
    truncates = False  # to bfloat16, where a GPU rounds

    def kernel(self, z: Tensor, base: Tensor | None, scale: Tensor | None, name: str, rule: str, steps: int) -> Tensor:
        raise NotImplementedError

    def allocations(self, guards: Guards) -> contextlib.AbstractContextManager[None]:
        """In it, what the kernel allocates comes from ``guards``."""
        raise NotImplementedError

    def run(
        self,
        z: Tensor,
        base: Tensor | None,
        scale: Tensor | None,
        name: str,
        rule: str = "exact",
        steps: int = 0,
        margin: int = 64,
    ) -> Tensor:
        guards = Guards(margin, self.device)
        arguments = [guards.copy(t) for t in (z, base, scale)]
        with self.allocations(guards):
            out = self.kernel(*arguments, name, rule, steps)
        guards.check(out)
        assert guards.has(out)
        assert out.shape == z.shape
        assert out.dtype == z.dtype
        return out.cpu()

    def check(
        self,
        z: Tensor,
        base: Tensor | None,
        scale: Tensor | None,
        name: str,
        rule: str = "exact",
        steps: int = 0,
        margin: int = 64,
    ) -> None:
        out = self.run(z, base, scale, name, rule, steps, margin).double()
        reference = expected(z, base, scale, name, rule, steps)
        size = reference.abs().clamp_min(1)
        if len(z) == 2:  # one rounding of the gate's factor is eps times the up stream times the derivative
            gate, up = (z if base is None else torch.maximum(z.abs(), base.abs())).double().abs()
            size = torch.maximum(size, up * gate.clamp_min(1) if name == "relu2" else up)
        if scale is not None:
            size = size * scale.double().abs().clamp_min(1)[:, None]
        # 2 roundings for the argument, 5 for the function, and those of a sum of `steps` terms
        limit = (1e-6 if rule == "exact" else max(2e-6, 1e-8 * steps)) * size
        if z.dtype != torch.float32:
            kind = torch.finfo(z.dtype)
            roundings = 1 if self.truncates and z.dtype == torch.bfloat16 else 0.5
            limit = limit + kind.eps * roundings * (reference.abs() + limit) + kind.smallest_normal * kind.eps
        error = (out - reference).abs()
        worst = (error / limit).flatten(1).sum(0).argmax()
        values = z.flatten(1)[:, worst].tolist()
        assert (error <= limit).all(), f"{(error / limit).max():.2f} times the limit at {values}"

    # ---- values

    @pytest.mark.parametrize(("name", "rule", "steps", "streams"), [*CLOSED_FORMS, *SUMS])
    def test_every_activation_and_rule(self, name: str, rule: str, steps: int, streams: int) -> None:
        z, scale = random(streams, 5, 56), random(5, seed=1)
        self.check(z, None, None, name, rule, steps)
        self.check(z, random(streams, 1, 56, seed=2), scale, name, rule, steps)
        self.check(z, random(streams, 5, 56, seed=3), scale, name, rule, steps)

    @pytest.mark.parametrize("streams", [1, 2])
    @pytest.mark.parametrize("name", ig.ACTIVATIONS)
    def test_long_paths(self, name: str, streams: int) -> None:
        """All of them, which a kernel may tell from short ones, and then some of a row."""
        z = random(streams, 2, 40)
        for base in (z - 25, z + 1.25, torch.where(torch.arange(40) < 24, z + 3, z - 0.5)):
            self.check(z, base, None, name)

    @pytest.mark.parametrize(
        ("rule", "steps", "streams"),
        [("trapezoid", 64, 1), ("trapezoid", 64, 2), ("right", 256, 2), ("gauss-legendre", 300, 1)],
    )
    def test_many_steps(self, rule: str, steps: int, streams: int) -> None:
        z, base = random(streams, 2, 9), random(streams, 1, 9, seed=1)
        self.check(z, base, None, "silu", rule, steps)

    @pytest.mark.parametrize("name", ig.ACTIVATIONS)
    def test_extreme_values(self, name: str) -> None:
        u = torch.tensor(EXTREMES)
        v = torch.linspace(-3, 3, len(u))
        self.check(u.view(1, 1, -1), None, None, name)
        self.check(torch.stack([u, v])[:, None], None, None, name)
        # One row of `u` for each start of the path.
        gate, up = u.expand(5, -1), v.expand(5, -1)
        start = torch.stack([u + torch.tensor([0.0, 1e-6, 0.999, -1.001, 25.0])[:, None], -up])
        self.check(gate[None], start[:1], None, name)
        self.check(torch.stack([gate, up]), start, None, name)

    @pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu"])
    def test_left_tail_keeps_its_digits(self, name: str) -> None:
        z = torch.linspace(-12, 0, 500)
        out = self.run(z.view(1, 1, -1), None, None, name).flatten().double()
        reference = ig.slope(z.double(), ig.ACTIVATIONS[name])
        # The argument of the exponential has a rounding error of its own.
        known = (out / reference - 1).abs() <= (4 - reference.log()) * 4 * torch.finfo(torch.float32).eps
        assert (known | (reference < torch.finfo(torch.float32).tiny)).all()

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("streams", [1, 2])
    @pytest.mark.parametrize("name", ig.ACTIVATIONS)
    def test_half_types_are_rounded_once(self, name: str, streams: int, dtype: torch.dtype) -> None:
        z, base = random(streams, 3, 40).to(dtype), random(streams, 3, 40, seed=2).to(dtype)
        scale = random(3, seed=1)
        for rule, steps in (("exact", 0), ("right", 5)):
            self.check(z, None, scale, name, rule, steps)
            self.check(z, base, scale.to(dtype), name, rule, steps)

    # ---- sizes and memory

    @pytest.mark.parametrize("margin", [64, 67])
    @pytest.mark.parametrize(
        ("rows", "neurons"), [(1, 1), (33, 1), (1, 56), (5, 56), (33, 56), (5, 200), (33, 200), (2, 1024), (3, 1100)]
    )
    def test_sizes(self, rows: int, neurons: int, margin: int) -> None:
        for streams in (1, 2):
            z, scale = random(streams, rows, neurons), random(rows, seed=1)
            self.check(z, None, scale, "silu", "right", 2, margin)
            for base_rows in (1, rows):
                self.check(z, random(streams, base_rows, neurons, seed=2), scale, "relu", "exact", 0, margin)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize(("margin", "neurons"), [(64, 1048), (64, 1045), (67, 1048)])
    def test_sizes_of_half_types(self, margin: int, neurons: int, dtype: torch.dtype) -> None:
        z, scale = random(2, 3, neurons).to(dtype), random(3, seed=1).to(dtype)
        for base_rows in (1, 3):
            base = random(2, base_rows, neurons, seed=2).to(dtype)
            self.check(z, base, scale, "relu", "exact", 0, margin)

    @pytest.mark.parametrize("shape", [(1, 0, 7), (2, 0, 7), (1, 3, 0), (2, 3, 0)])
    def test_nothing_to_do(self, shape: tuple[int, ...]) -> None:
        z = torch.empty(shape, device=self.device)
        assert self.kernel(z, z, torch.empty(shape[1], device=self.device), "gelu", "exact", 0).shape == shape

    def test_inputs_that_are_not_contiguous(self) -> None:
        z, base, scale = random(56, 5, 2), random(2, 56, 5, seed=1), random(10, seed=2)
        for rule, steps, one_row in (("exact", 0, False), ("midpoint", 3, True)):
            slanted = [z.to(self.device).permute(2, 1, 0), base.to(self.device).transpose(1, 2)]
            slanted.append(scale.to(self.device)[::2])
            if one_row:
                slanted[1] = slanted[1][:, ::5]
            assert not any(t.is_contiguous() for t in slanted)
            straight = [t.contiguous() for t in slanted]
            assert torch.equal(self.kernel(*slanted, "silu", rule, steps), self.kernel(*straight, "silu", rule, steps))

    @pytest.mark.parametrize("with_base", [False, True])
    @pytest.mark.parametrize(("rule", "steps"), [("exact", 0), ("right", 3)])
    @pytest.mark.parametrize("name", ig.ACTIVATIONS)
    def test_nan_goes_through_and_harms_no_neighbour(self, name: str, rule: str, steps: int, with_base: bool) -> None:
        for streams in (1, 2):
            z = random(streams, 3, 37)
            z[0, 1, 5] = math.nan
            out = self.run(z, random(streams, 1, 37, seed=1) if with_base else None, None, name, rule, steps)
            assert torch.equal(out.isnan().nonzero()[:, 1:].unique(dim=0), torch.tensor([[1, 5]]))
            assert out[:, 1, 5].isnan().all()

    # ---- errors

    @pytest.mark.parametrize(
        ("changed", "named"),
        [
            ({"name": "swiglu"}, "unknown activation 'swiglu', expected one of '?gelu"),
            ({"rule": "simpson"}, "simpson"),
            ({"rule": "right"}, "right.*>= 1, got 0"),
            ({"rule": "trapezoid", "steps": 1}, "trapezoid.*>= 2, got 1"),
            ({"z": torch.ones(2, 3, 8).double()}, 'z has dtype .*float64.*backend="torch"'),
            ({"z": torch.ones(2, 3, 8).int()}, "z has dtype .*int32.*float16$"),
            ({"z": torch.ones(3, 8)}, r"z has shape \[3, 8\], expected \[S, N, F\]"),
            ({"z": torch.ones(3, 3, 8)}, r"z has shape \[3, 3, 8\], expected \[S, N, F\]"),
            ({"base": torch.ones(2, 2, 8)}, r"base has shape \[2, 2, 8\], expected \[2, 3, 8\]"),
            ({"base": torch.ones(1, 1, 8)}, r"base has shape \[1, 1, 8\], expected \[2, 1, 8\]"),
            ({"base": torch.ones(2, 3, 8).half()}, "base has dtype .*float16, expected .*float32"),
            ({"scale": torch.ones(8)}, r"row_scale has shape \[8\], expected \[3\]"),
            ({"scale": torch.ones(3).half()}, "row_scale has dtype .*float16, expected .*float32"),
        ],
    )
    def test_bad_arguments_are_named(self, changed: dict[str, object], named: str) -> None:
        given = {"z": torch.ones(2, 3, 8), "base": None, "scale": None, "name": "gelu", "rule": "exact", "steps": 0}
        given = {name: t.to(self.device) if isinstance(t, Tensor) else t for name, t in {**given, **changed}.items()}
        with pytest.raises(self.refused, match=named):
            self.kernel(**given)

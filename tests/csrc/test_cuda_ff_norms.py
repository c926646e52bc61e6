"""The CUDA kernels of ``ff_norms``, on the GPU or emulated, against plain PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated import DEVICE, EMULATED
from guards import Guards
from op_cases import case
from torch import Tensor
from wide_cases import FLOAT8, LIMITS, DirectPromises, definition, error, last_pair, narrowed, needs_memory

pytestmark = pytest.mark.usefixtures("poisoned")

HOPPER = EMULATED or torch.cuda.get_device_capability() == (9, 0)
KERNELS = ("sm90", "sm80") if HOPPER else ("sm80",)

# queries, keys, width, neurons, heads, streams. In the first row everything is smaller than a tile; queries and keys
# beyond one, columns beyond one and two, which on Hopper are 192 where these leave less unused and else 256, heads that
# the residual is one more of for nothing or not, and rows that are not aligned.
CASES = [
    (1, 1, 40, 56, 1, 1),
    (5, 5, 216, 56, 5, 1),
    (65, 2, 40, 56, 12, 1),
    (1, 33, 40, 56, 1, 2),
    (130, 3, 136, 72, 3, 1),
    (3, 5, 456, 136, 16, 2),
    (3, 3, 264, 136, 16, 2),
    (2, 4, 520, 264, 15, 1),
    (2, 2, 448, 264, 15, 1),
    (5, 2, 72, 200, 17, 2),
    (3, 4, 200, 200, 33, 1),
    (2, 3, 40, 56, 48, 2),
    (2, 2, 40, 72, 128, 1),
    (2, 3, 40, 56, 80, 1),  # on Hopper, heads for one launch and too many for the other
    (5, 5, 41, 57, 5, 2),
    (33, 1, 41, 56, 1, 1),
    (2, 5, 233, 57, 12, 2),
]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two kernels runs where both can."""
    monkeypatch.setenv("FFATTR_CUDA_SM90", "1" if request.param == "sm90" else "0")
    return str(request.param)


class CudaPromises(DirectPromises):
    device = DEVICE
    refused = (ValueError, RuntimeError)  # C++ raises the latter

    def kernel(self, *arguments: Any) -> Tensor:
        out: Tensor = torch.ops.ffattr_cuda.ff_norms(*arguments)
        return out

    def run(self, given: dict[str, Any], margin: int = 64) -> Tensor:
        guards = Guards(margin, DEVICE)
        guarded = {
            name: guards.copy(value) if isinstance(value, Tensor) and name != "sequences" else value
            for name, value in given.items()
        }
        out = self.kernel(*guarded.values())
        guards.check()
        assert out.shape == (2 if given["norm_scale"] is None else 3, *given["alpha"].shape[1:])
        assert out.dtype == torch.float32
        return out.cpu()


class TestHopper(CudaPromises):
    """By products of warpgroups; float32 goes to the other kernel everywhere."""

    @pytest.fixture(autouse=True)
    def choose(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not HOPPER:
            pytest.skip("a GPU of compute capability 9.0")
        monkeypatch.setenv("FFATTR_CUDA_SM90", "1")


class TestAmpere(CudaPromises):
    """By products of warps."""

    @pytest.fixture(autouse=True)
    def choose(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FFATTR_CUDA_SM90", "0")

    def needs_float8(self, dtype: torch.dtype) -> None:
        if dtype == FLOAT8:
            pytest.skip("the kernel has no float8")


CHECKS = CudaPromises()


@pytest.mark.parametrize("sizes", CASES, ids=str)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_small_and_odd_sizes(dtype: torch.dtype, sizes: tuple[int, ...], kernel: str) -> None:
    queries, keys, width, neurons, heads, streams = sizes
    if kernel == "sm90" and dtype == torch.float32:
        return
    if dtype == FLOAT8 and (kernel == "sm80" or heads >= 48):
        return
    CHECKS.check(case("ff_norms", queries, keys, width, neurons, heads, streams=streams), dtype)


@pytest.mark.parametrize("sizes", [CASES[3], CASES[9], (1, 2, 8, 8, 128, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not EMULATED, reason="the GPU's shared memory is what it is")
def test_little_shared_memory(dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPUs for desktops, 99 KiB: one stage at a time, and a plain error where even that does not fit."""
    monkeypatch.setenv("FFATTR_CUDA_SM90", "0")
    queries, keys, width, neurons, heads, streams = sizes
    needed = {(torch.float32, 128): 200 << 10, (torch.bfloat16, 128): 160 << 10}.get((dtype, heads), 72 << 10)
    monkeypatch.setenv("FFATTR_EMULATED_SHARED", str(needed))
    CHECKS.check(case("ff_norms", queries, keys, width, neurons, heads, streams=streams), dtype)
    monkeypatch.setenv("FFATTR_EMULATED_SHARED", str(32 << 10))
    with pytest.raises(
        RuntimeError, match=r"ff_norms: so many heads take \d+ KiB of shared memory, this GPU has 32; use"
    ):
        CHECKS.check(case("ff_norms", queries, keys, width, neurons, heads, streams=streams), dtype)


@pytest.mark.parametrize("heads", [3, 16])
def test_what_has_no_weight_and_what_has(heads: int, kernel: str) -> None:
    """The residual alone, a NaN alone, and no weight for a key whose features are NaN."""
    given = case("ff_norms", 3, 4, 24, 40, heads)
    given = narrowed(given, torch.bfloat16)
    alone = given | {"alpha": torch.zeros_like(given["alpha"]), "position": torch.tensor([1, 3, 0])}
    out = CHECKS.run(alone)
    assert torch.equal((out[1] != 0).nonzero(), torch.tensor([[0, 1], [1, 3], [2, 0]]))
    nan = alone | {"alpha": alone["alpha"].clone(), "position": torch.full((3,), -1)}
    nan["alpha"][1, 2, 1] = torch.nan
    assert all(torch.equal(scope.isnan().nonzero(), torch.tensor([[2, 1]])) for scope in CHECKS.run(nan))
    given["alpha"][:, 1, 2] = 0
    given["position"] = torch.full((3,), -1)
    given["features"][0, 2] = torch.nan
    out = CHECKS.run(given)
    assert (out[:, 1, 2] == 0).all()
    assert out[0].isnan().sum() == 2


def test_many_neurons_in_float32() -> None:
    """The matrix unit cuts sums off: long ones have to be made of parts."""
    given = case("ff_norms", 3, 2, 24, 4096, 3)
    expected = definition("ff_norms", given)
    assert error(CHECKS.run(given), expected) <= 1e-6


@pytest.mark.parametrize("margin", [67, 1])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_pointers_that_are_not_aligned(dtype: torch.dtype, margin: int, kernel: str) -> None:
    """To more than an element, in a float8 `down` to an odd byte."""
    if dtype == FLOAT8 and kernel == "sm80":
        return
    CHECKS.check(case("ff_norms", 3, 2, 72, 80, 3, streams=2), dtype, margin)


@pytest.mark.parametrize("heads", [3, 16])
@pytest.mark.parametrize("tokens", [9, 67])
def test_own_keys_of_a_causal_layer(tokens: int, heads: int, kernel: str) -> None:
    """With 16 heads the pairs around the diagonal are a launch of their own."""
    given = case("ff_norms", tokens, tokens, 24, 40, heads)
    given["alpha"] = given["alpha"].tril()
    given["position"] = torch.arange(tokens)
    found = CHECKS.check(given, torch.bfloat16)
    assert torch.equal(found[1] != 0, torch.ones(tokens, tokens).tril().bool())


def test_more_sequences_than_a_launch_takes(kernel: str) -> None:
    """With different keys for each: 70 of them, of one or two tokens."""
    sizes = [1 + b % 2 for b in range(70)]
    tokens = sum(sizes)
    given = case("ff_norms", tokens, tokens, 24, 40, 2)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    given["alpha"] = given["alpha"][..., :2].contiguous()
    given["position"] = torch.zeros(tokens, dtype=torch.int64)
    given["sequences"] = starts[:, None].expand(-1, 2).contiguous()
    for token, size in zip(starts.tolist(), sizes, strict=False):
        given["alpha"][:, token : token + size, size:] = torch.nan  # not to be read
    found = CHECKS.run(narrowed(given, torch.bfloat16))
    assert error(found, definition("ff_norms", given)) <= LIMITS[torch.bfloat16]


@pytest.mark.parametrize("size", [1e-6, 1e-9, 1e-20])
def test_float8_of_small_features(size: float) -> None:
    """What the rows are divided by is no smaller than the residual beside it allows."""
    if not HOPPER:
        pytest.skip("a GPU of compute capability 9.0")
    given = case("ff_norms", 3, 4, 24, 40, 3, tail="none")
    given["features"] *= size
    given["slope"] *= size
    found = CHECKS.run(narrowed(given, FLOAT8))[1]
    expected = definition("ff_norms", narrowed(given, FLOAT8))[1]
    torch.testing.assert_close(found, expected.float(), rtol=3e-2, atol=0)


def test_float8_where_there_is_none() -> None:
    given = case("ff_norms", 2, 2, 24, 24, heads=64, streams=2)
    with pytest.raises(RuntimeError, match=r"no CUDA kernel for float8 with 64 heads.*pass dtype=torch\.bfloat16"):
        CHECKS.check(given, FLOAT8)


def test_no_neurons() -> None:
    with pytest.raises(RuntimeError, match=r"ff_norms: features has shape \[1, 5, 6, 0\], .* at least one neuron"):
        CHECKS.kernel(*case("ff_norms", neurons=0).values())


@pytest.mark.parametrize("reduction", ["l1", "alti"])
def test_other_reductions_are_refused(reduction: str) -> None:
    with pytest.raises(RuntimeError, match=f"ff_norms: reduction is '{reduction}', the CUDA kernels have 'l2' alone"):
        CHECKS.kernel(*case("ff_norms", reduction=reduction).values())


def test_tensors_on_several_devices() -> None:
    """The kernel would read whatever lies at their addresses."""
    if EMULATED:
        pytest.skip("two devices")
    given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in case("ff_norms").items()}
    with pytest.raises(RuntimeError, match="ff_norms: gamma is on another device than alpha"):
        CHECKS.kernel(*{**given, "gamma": given["gamma"].cpu()}.values())


def test_opcheck() -> None:
    given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in case("ff_norms", 3, 2, 24, 24).items()}
    torch.library.opcheck(torch.ops.ffattr_cuda.ff_norms.default, tuple(given.values()))


# ---- offsets beyond 32 bits


@pytest.mark.parametrize("huge", [False, needs_memory(24, DEVICE)])
@pytest.mark.parametrize("what", ["features", "slope", "alpha"])
def test_many(what: str, huge: bool, kernel: str) -> None:
    """Nothing but the last query's weight for the last key is there, behind 2^31 elements of some argument."""
    neurons = (1 << 20 if huge else 40) if what != "alpha" else 24
    queries = {"slope": 2100 if huge else 40, "alpha": 33_000 if huge else 35, "features": 1}[what]
    keys = {"features": 129 if huge else 3, "alpha": queries, "slope": 1}[what]
    heads = 15 if what == "features" else 2
    few = case("ff_norms", 1, 1, 16, neurons, heads)
    given = {**few, "alpha": torch.zeros(heads, queries, keys, device=DEVICE)}
    given["alpha"][:, -1, -1] = few["alpha"][:, 0, 0]
    given["position"] = torch.full((queries,), -1)
    given["residual_scale"] = given["norm_scale"] = torch.ones(queries)
    for name, axis, size in (("features", 1, keys), ("residual", 0, keys), ("slope", 1, queries)):
        shape = list(few[name].shape)
        shape[axis] = size
        given[name] = torch.zeros(shape, dtype=torch.bfloat16, device=DEVICE)
        given[name].narrow(axis, size - 1, 1).copy_(few[name])
    given["down"] = few["down"].bfloat16()
    given = {name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in given.items()}
    out = CHECKS.kernel(*given.values())
    expected = definition("ff_norms", last_pair(given))
    assert error(out[..., -1:, -1:], expected) <= LIMITS[torch.bfloat16]
    assert out.count_nonzero() == expected.numel()


@pytest.mark.skipif(EMULATED, reason="a GPU")
def test_cuda_graph(kernel: str) -> None:
    """Nothing in the operator waits for the GPU, or copies from memory of the CPU."""
    given = case("ff_norms", 5, 6, 40, 56, 16)
    given = narrowed(given, torch.bfloat16)
    arguments = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in given.values()]
    expected = CHECKS.kernel(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = CHECKS.kernel(*arguments)
    graph.replay()
    assert torch.equal(found, expected)

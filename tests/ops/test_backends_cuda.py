"""When the CUDA backend runs, and that nothing picks it by itself. None runs on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from compare_results import assert_same
from op_cases import arguments
from pretended import Cuda

import ffattr
from ffattr import ops
from ffattr.errors import BackendUnavailable
from ffattr.ops import availability, backends, torch_kernels
from ffattr.ops.library import Binary

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    backends._warn_of_untried_kernels.cache_clear()
    yield Cuda(monkeypatch)
    backends._warn_of_untried_kernels.cache_clear()


def why_not(device: torch.device, dtype: torch.dtype = torch.float32, heads: int = 1) -> str | None:
    return backends.BACKENDS["cuda"].why_not(device, dtype, heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, FLOAT8])
def test_it_runs_on_a_gpu_after_its_self_check(dtype: torch.dtype, cuda: Cuda) -> None:
    assert why_not(GPU, dtype, 128) is None
    assert cuda.checked == [(torch.ops.ffattr_cuda, GPU, dtype)]


@pytest.mark.parametrize(
    ("given", "heads", "dtype", "reason"),
    [
        ({}, 129, torch.bfloat16, "up to 128 attention heads, the model has 129; use backend='torch'$"),
        ({"capability": (7, 5)}, 1, torch.bfloat16, "cuda:0 has .* 7.5, .* needs 8.0; use backend='torch'$"),
        ({"capability": (7, 5)}, 1, FLOAT8, "7.5, .* needs 9.0 exactly; use backend='torch'$"),
        ({"capability": (8, 6)}, 1, FLOAT8, "8.6, .* needs 9.0 exactly; pass dtype=torch.bfloat16$"),
        (
            {"capability": (10, 0)},
            1,
            FLOAT8,
            "10.0, .*float8_e4m3fn needs 9.0 exactly; pass dtype=torch.bfloat16 or use backend='triton'$",
        ),
        ({"failure": "ff_norms is off"}, 1, torch.float32, "on cuda:0 failed: ff_norms is off; use backend='torch'$"),
    ],
)
def test_why_it_does_not_run(given: dict[str, Any], heads: int, dtype: torch.dtype, reason: str, cuda: Cuda) -> None:
    for name, value in given.items():
        setattr(cuda, name, value)
    with pytest.raises(BackendUnavailable, match=f"'cuda' cannot run: cuda: .*{reason}"):
        backends.select_backend("cuda", GPU, dtype, heads)
    assert bool(cuda.checked) == ("failure" in given)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_dtypes_than_float8_need_no_certain_gpu(capability: tuple[int, int], cuda: Cuda) -> None:
    cuda.capability = capability
    assert why_not(GPU, torch.bfloat16) is None


@pytest.mark.parametrize("device", [GPU, CPU, META])
@pytest.mark.parametrize(
    ("binary", "reason"),
    [
        (Binary(None, "no compiler was found"), "the C++ library is not there: no compiler was found"),
        (
            Binary(object(), "built", {"cuda": False, "cuda_reason": "no nvcc"}),
            "without CUDA kernels (no nvcc): build it where nvcc is",
        ),
        (
            Binary(object(), "built", {"cpu": True}),
            "without CUDA kernels (its build record says nothing of CUDA): build it where nvcc is",
        ),
    ],
)
def test_why_there_are_no_kernels(
    binary: Binary, reason: str, device: torch.device, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.kinds = ()
    monkeypatch.setattr(availability, "binary", binary)
    assert str(why_not(device)).endswith(reason)


def test_on_another_device_it_says_what_was_built(cuda: Cuda) -> None:
    for device in (CPU, META):
        assert why_not(device) == (
            f"its kernels (sm_80, sm_90a, sm_100) run on CUDA devices, not on {device}; "
            "move the model or use backend='torch'"
        )
    del cuda.record["architectures"]
    assert str(why_not(CPU)).startswith("its kernels run on CUDA devices")


def test_kernels_that_are_compiled_for_the_cpu(cuda: Cuda) -> None:
    """They run there, in every dtype and without a self-check, for who asks for them."""
    cuda.kinds = ("cpu",)
    for dtype in availability.DTYPES["cuda"]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backends.select_backend("cuda", CPU, dtype).operators is torch.ops.ffattr_cuda
    assert not cuda.checked
    assert backends.select_backend("auto", CPU, torch.bfloat16).name == "torch"
    assert "not there" in str(why_not(GPU)) or "without CUDA kernels" in str(why_not(GPU))


def test_auto_never_picks_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.kinds = ("cpu", "cuda")
    for device in (CPU, GPU):
        for backend in ("cpu", "triton"):  # that it is no matter of order
            monkeypatch.setattr(availability, f"check_{backend}", lambda *_: "no")
        for dtype in (torch.float32, torch.bfloat16):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert backends.select_backend("auto", device, dtype).name != "cuda"


def test_who_asks_for_it_is_told_once_what_it_was_not_tried_on(cuda: Cuda) -> None:
    cuda.failure = "wrong"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BackendUnavailable):  # where it does not run there is nothing to say
            backends.select_backend("cuda", GPU, torch.float32)
        assert why_not(GPU) is not None
        assert ("cuda", False) in [(name, runs) for name, runs, _ in backends.report_backends(GPU)]
    cuda.failure = None
    with pytest.warns(UserWarning, match="emulation and compilation only, never on a GPU.*self-check"):
        assert backends.select_backend("cuda", GPU, torch.float32).name == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.bfloat16):
            assert backends.select_backend("cuda", GPU, dtype).name == "cuda"


def test_what_info_shows(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.build_info()["CUDA"] == "nvcc 13.0; sm_80, sm_90a, sm_100"
    rows = {name: (runs, text) for name, runs, text in backends.report_backends(GPU)}
    assert rows["cuda"] == (True, "CUDA C++ kernels; cuda:0: float32, bfloat16, float16, float8_e4m3fn")
    cuda.capability = (8, 6)
    assert backends.report_backends(GPU)[list(backends.BACKENDS).index("cuda")][2].endswith(
        "cuda:0: float32, bfloat16, float16"
    )
    cuda.kinds = ()
    cuda.record |= {"cuda": False, "cuda_reason": "FFATTR_CUDA=0", "architectures": []}
    assert backends.build_info()["CUDA"] == "FFATTR_CUDA=0"
    rows = {name: (runs, text) for name, runs, text in backends.report_backends(GPU)}
    assert rows["cuda"] == (
        False,
        "the library was built without CUDA kernels (FFATTR_CUDA=0): build it where nvcc is",
    )


# ---- the operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8])
def test_whole_maps(dtype: torch.dtype) -> None:
    """By kernels for the CPU where there are any, otherwise by stand-ins: it is asked for, and nothing is measured."""
    library = torch.library.Library("ffattr_cuda", "IMPL")
    try:
        if not availability.has_cuda_kernels("cpu"):
            for operator in ("ig_slope", "gram_norms", "ff_norms"):
                library.impl(operator, getattr(torch_kernels, operator), "CPU")
        model, given = tiny_models.build("bert"), tiny_models.inputs("bert")
        found = ffattr.attribute(model, given, scopes="all", backend="cuda", dtype=dtype)
    finally:
        library._destroy()
    assert str(found.plan).startswith(f"cuda backend, {str(dtype).removeprefix('torch.')} on cpu")
    assert "measured here" not in str(found.plan)
    expected = ffattr.attribute(model, given, scopes="all", backend="reference")
    assert_same(found, expected, {torch.float32: 1e-5, torch.bfloat16: 2e-2, FLOAT8: 4e-2}[dtype])


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_without_a_kernel_pytorch_runs(operator: str) -> None:
    if availability.has_cuda_kernels("cpu") and operator != "operator_norms":
        pytest.skip("there is a kernel")
    given = arguments(operator, torch.float32, torch.float32)
    found = getattr(torch.ops.ffattr_cuda, operator)(*given)
    assert torch.equal(found, getattr(torch_kernels, operator)(*given))
    fake = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in given]
    assert getattr(torch.ops.ffattr_cuda, operator)(*fake).shape == found.shape


@pytest.mark.parametrize("operator", ops.OPERATORS)
def test_the_schemas_are_those_of_every_backend(operator: str) -> None:
    schemas = [str(getattr(space, operator).default._schema) for space in (torch.ops.ffattr, torch.ops.ffattr_cuda)]
    assert schemas[1] == schemas[0].replace("ffattr::", "ffattr_cuda::")

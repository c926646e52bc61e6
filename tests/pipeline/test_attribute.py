"""`attribute`: what it refuses, what it promises, and that the model stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny_models
import torch
from recording import state
from tiny_models import build
from torch import Tensor, nn

import ffattr
from ffattr import BackendUnavailable, CaptureError, Sketch, UnsupportedModel
from ffattr.models import registry
from ffattr.ops import availability
from ffattr.ops.library import Binary

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of adapters of its own."""
    monkeypatch.setattr(registry, "_registered", {})


def attribute(name: str = "bert", model: nn.Module | None = None, padding: str | None = None, **options: Any) -> Any:
    given = tiny_models.inputs(name, padding=padding)
    return ffattr.attribute(build(name) if model is None else model, given, **options)


# ---- arguments


def test_training_mode() -> None:
    with pytest.raises(CaptureError, match=r"BertModel is in training mode.*model\.eval\(\)"):
        attribute(model=build("bert").train())


def test_unknown_architecture() -> None:
    with pytest.raises(UnsupportedModel, match=r"no adapter knows Linear, and its .*register_adapter"):
        ffattr.attribute(nn.Linear(2, 2), torch.ones(1, 2, 2))


POST = r"attn_heads, attn, attn_res, atb, atb_ff, atb_ff_res, atb_ff_res_ln"
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scopes": "atb_ln"}, ValueError, rf"unknown scope 'atb_ln'; this architecture has: {POST} \('layer'.*'all'"),
    ({"scopes": ["atb", "ffn"]}, ValueError, rf"unknown scope 'ffn'.*{POST}"),
    ({"scopes": []}, ValueError, rf"no scope given.*{POST}"),
    ({"scopes": 3}, TypeError, "scopes.*3"),
    ({"scopes": ["atb", 3]}, (TypeError, ValueError), "scope.*3"),
    ({"layers": 2}, IndexError, "layers has 2, but there are 2: expected -2 to 1"),
    ({"layers": [0, -3]}, IndexError, "layers has -3, but there are 2"),
    ({"queries": 7}, IndexError, "queries has 7, but there are 7: expected -7 to 6"),
    ({"layers": True}, TypeError, "layers has True, expected integers, a slice or None"),
    ({"queries": [0.0]}, TypeError, "queries has 0.0, expected integers"),
    ({"queries": 1.5}, TypeError, "queries.*1.5"),
    ({"layers": "all"}, TypeError, "layers is 'all', expected an integer"),
    ({"ig": "riemann"}, ValueError, r"unknown Integrated-Gradients rule 'riemann', expected \"exact\", Riemann"),
    ({"ig": 20}, ValueError, "unknown Integrated-Gradients rule 20"),
    ({"value_bias": "none"}, ValueError, "unknown value_bias 'none', expected 'token' or 'separate'"),
    ({"method": "sketch"}, ValueError, "unknown method 'sketch', expected 'auto', 'direct', 'operator'"),
    ({"backend": "gpu"}, ValueError, "unknown backend 'gpu', expected 'auto' or one of 'cpu', 'triton', 'cuda'"),
    ({"dtype": torch.bfloat16, "backend": "reference"}, BackendUnavailable, "float32 or float64, not torch.bfloat16; "),
    ({"dtype": torch.int32}, BackendUnavailable, "bfloat16 or float16, not torch.int32; pass dtype=torch.float32"),
    ({"dtype": "float32"}, TypeError, "dtype.*'float32'"),
    ({"baseline": "one"}, ValueError, r"unknown baseline 'one', expected 'zero', 'bias' or a tensor \[F\]"),
    ({"baseline": 0.0}, TypeError, "baseline.*0.0"),
    ({"baseline": torch.zeros(40)}, ValueError, r"baseline has shape \[40\], expected \[52\]$"),
    ({"baseline": torch.zeros(2, 52)}, ValueError, r"baseline has shape \[2, 52\], expected \[52\]$"),
    ({"baseline": torch.zeros(52).fill_(math.nan)}, ValueError, "baseline has entries that are NaN or infinite"),
    ({"baseline": torch.zeros(52).fill_(math.inf)}, ValueError, "baseline has entries that are NaN or infinite"),
    ({"memory_budget": 1000}, ValueError, r"memory_budget=1000 bytes is too small for layer 0 .*at least \d+"),
    ({"memory_budget": "1G"}, TypeError, "memory_budget.*'1G'"),
    ({"reduce": "L1"}, ValueError, "unknown reduce 'L1', expected one of 'l2', 'l1', 'alti'"),
    ({"reduce": "l1", "method": Sketch()}, ValueError, r"method=Sketch\(.*with reduce='l1': a sketch keeps Euclidean"),
    ({"reduce": "alti", "backend": "cuda"}, BackendUnavailable, "CUDA C.. kernels have no reduce='alti'; use backend="),
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=[str(options)[:40] for options, *_ in WRONG])
def test_a_wrong_argument_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    for call in (ffattr.attribute, ffattr.plan):
        with pytest.raises(error, match=words):
            call(build("bert"), tiny_models.inputs("bert"), **options)


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "binary", Binary(None, "it was not built"))
    with pytest.raises(BackendUnavailable, match=r"backend 'cpu' cannot run: .* it was not built"):
        attribute(backend="cpu")
    assert attribute().plan.backend == "torch"


# ---- progress, interrupts, the model


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(None, [(1, 2), (2, 2)]), ([1], [(1, 1)]), ([1, 0], [(1, 2), (2, 2)]), ([1, 1, 0], [(1, 3), (3, 3)]), ([], [])],
)
def test_progress(layers: Any, expected: list[tuple[int, int]]) -> None:
    seen: list[tuple[int, int]] = []
    attribute(layers=layers, progress=lambda done, total: seen.append((done, total)))
    assert seen == expected


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "torch-post"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_stays_as_it_was(name: str, interrupted: bool) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    before, copies = state(model), {key: tensor.clone() for key, tensor in given.items()}
    parameters = [parameter.clone() for parameter in model.parameters()]

    def stop(done: int, total: int) -> None:
        if interrupted:
            raise KeyboardInterrupt

    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            ffattr.attribute(model, given, progress=stop)
    else:
        ffattr.attribute(model, given, scopes="all", progress=stop)
    assert state(model) == before
    assert all(map(torch.equal, parameters, model.parameters()))
    assert all(torch.equal(given[key], tensor) for key, tensor in copies.items())
    ffattr.attribute(model, given)  # and it can be attributed again


# ---- the result


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("name", tiny_models.FAMILIES)
def test_error_and_causal(name: str, dtype: torch.dtype, limit: float) -> None:
    for padding in (None, "right") if name in tiny_models.TORCH_FAMILIES else (None, "right", "left"):
        attr = attribute(name, dtype=dtype, padding=padding)
        assert attr.error.shape == (len(attr.layers), 2)
        assert 0 < attr.error.max() < limit
        decoder = name.startswith(("gpt2", "opt", "llama", "mistral", "qwen2")) or name == "bert-decoder"
        assert attr.arguments["causal"] is decoder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    attr = attribute(model=build("bert", dtype=dtype))
    assert attr.plan.dtype == attr["layer"].dtype == torch.float32
    exact = attribute(model=build("bert", dtype=dtype).double())
    assert 0 < attr.error.max() < (2e-2 if dtype == torch.float16 else 1e-1)
    torch.testing.assert_close(attr["layer"][0].double(), exact["layer"][0], rtol=0.05, atol=0.05)


def test_the_result_carries_no_gradient() -> None:
    src: Tensor = tiny_models.inputs("torch-pre")["src"].requires_grad_()
    attr = ffattr.attribute(build("torch-pre"), src, scopes="all")
    assert not any(m.requires_grad for m in (*attr.maps.values(), *attr.bias.values(), attr.error))

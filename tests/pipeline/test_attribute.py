"""`attribute`, `vectors` and `explain`: what they refuse, what they promise, and that the model stays as it was."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from recording import state
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr import ArchitectureMismatch, BackendUnavailable, CaptureError, NonFiniteError, UnsupportedModel
from ffattr.models import registry
from ffattr.models.registry import resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.ops import availability
from ffattr.pipeline import vectors

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
    with pytest.raises(UnsupportedModel, match=r"Linear is an architecture that no adapter knows.*register_adapter"):
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
]


@pytest.mark.parametrize(("options", "error", "words"), WRONG, ids=[str(options)[:40] for options, *_ in WRONG])
def test_a_wrong_argument_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    for call in (ffattr.attribute, ffattr.plan):
        with pytest.raises(error, match=words):
            call(build("bert"), tiny_models.inputs("bert"), **options)


def test_baseline_of_a_gated_block() -> None:
    for shape in ((52,), (3, 76), (1, 76)):
        with pytest.raises(ValueError, match=r"expected \[76\] \(gate, with up at zero\) or \[2, 76\] \(gate and up\)"):
            attribute("llama", baseline=torch.zeros(shape))


def test_a_backend_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "binary", availability.Binary(None, "it was not built"))
    with pytest.raises(BackendUnavailable, match=r"backend 'cpu' cannot run: .* it was not built"):
        attribute(backend="cpu")
    assert attribute().plan.backend == "torch"


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("output.dense.weight", "down.weight"),
        ("attention.self.value.bias", "value.bias"),
        ("attention.output.LayerNorm.weight", "norm_after_attn.weight"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(path: str, part: str, value: float) -> None:
    model = build("bert")
    model.get_parameter(f"encoder.layer.1.{path}").data.view(-1)[3] = value
    for call in (ffattr.plan, ffattr.attribute, ffattr.vectors):
        with pytest.raises(NonFiniteError, match=rf"layer 1: {part} has entries that are NaN or infinite"):
            call(model, tiny_models.inputs("bert"))


# ---- adapters that lie


LIES: list[tuple[str, str, Callable[[LayerSpec], LayerSpec]]] = [
    ("bert", "activation", lambda spec: replace(spec, activation=F.relu)),
    ("bert", "tanh instead of erf", lambda spec: replace(spec, activation=nn.GELU("tanh"))),
    ("bert", "norms swapped", lambda s: replace(s, norm_after_attn=s.norm_after_ff, norm_after_ff=s.norm_after_attn)),
    ("bert", "keys for values", lambda spec: replace(spec, value=spec.attention.key)),
    ("torch-pre", "post", lambda s: replace(s, norm_after_attn=s.norm_before_attn, norm_before_attn=None)),
    ("torch-pre", "no norm", lambda spec: replace(spec, norm_before_ff=None)),
    ("llama", "gate and up swapped", lambda spec: replace(spec, gate=spec.up, up=spec.gate)),
]


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, _, c in LIES], ids=[f"{n} {what}" for n, what, _ in LIES])
def test_an_adapter_that_lies_is_found_out(name: str, change: Callable[[LayerSpec], LayerSpec]) -> None:
    for dtype in (torch.float64, torch.float32):
        model = build(name, dtype=dtype)
        family = type(model).__name__
        given = {k: t.to(dtype) if t.is_floating_point() else t for k, t in tiny_models.inputs(name).items()}
        layers = resolve(model).layers
        ffattr.register_adapter(family, lambda base, layers=layers: [change(spec) for spec in layers])
        with pytest.raises(ArchitectureMismatch, match=rf"layer 0, batch row 0: .* differs .*{family}.*check=False"):
            ffattr.attribute(model, given)
        attr = ffattr.attribute(model, given, check=False)
        assert (attr.error > 2e-5).all()
        assert attr["layer"].isfinite().all()
        registry._registered.clear()
        assert ffattr.attribute(model, given).error.max() < 1e-5


def test_a_lie_about_one_layer_names_it() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    first, second = resolve(model).layers
    ffattr.register_adapter("bert", lambda base: [first, replace(second, activation=F.relu)])
    with pytest.raises(ArchitectureMismatch, match=r"layer 1, batch row 0"):
        ffattr.attribute(model, given)
    assert ffattr.attribute(model, given, layers=0).error.max() < 1e-12


# ---- vectors


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-bias"])
def test_vectors(name: str, padding: str | None) -> None:
    model, given = build(name), tiny_models.inputs(name, padding=padding)
    options: dict[str, Any] = {"layers": [1, 0, 1], "queries": [6, 0, 3], "value_bias": "separate", "baseline": "bias"}
    attr = ffattr.attribute(model, given, scopes="all", **options)
    for scope in (*attr.scopes, "layer"):
        found = ffattr.vectors(model, given, scope=scope, **options)
        assert (found.layers, found.queries, found.scope) == ((1, 0, 1), (6, 0, 3), attr.scope(scope))
        torch.testing.assert_close(found.values.norm(dim=-1), attr[scope], rtol=1e-10, atol=1e-12)
        if scope == "attn_heads":
            summed = found.values.sum(2)
            torch.testing.assert_close(summed, ffattr.vectors(model, given, scope="attn", **options).values)
            continue
        torch.testing.assert_close(found.bias.norm(dim=-1), attr.bias[found.scope], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found.values.sum(-2) + found.bias, found.total, rtol=0, atol=1e-11)
        assert (found.total[:, ~attr.mask[:, [6, 0, 3]]] == 0).all()
        assert found.mask.equal(attr.mask)
        assert found.key_mask is None


def test_vectors_of_the_layer_are_its_output() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    expected = model(**given, output_hidden_states=True).hidden_states[1:]
    found = ffattr.vectors(model, given)
    torch.testing.assert_close(found.total, torch.stack(expected).detach(), rtol=0, atol=1e-12)


def test_vectors_of_several_scopes() -> None:
    model, given = build("bert"), tiny_models.inputs("bert")
    found = ffattr.vectors(model, given, scope=["atb_ff", "layer"], queries=[3, 0])
    assert list(found) == ["atb_ff", "atb_ff_res_ln"]
    for name, several in found.items():
        alone = ffattr.vectors(model, given, scope=name, queries=[3, 0])
        assert several.scope == alone.scope == name
        for part in ("values", "bias", "total"):
            assert torch.equal(getattr(several, part), getattr(alone, part))
    with pytest.raises(ValueError, match=r"scope='all' names 7 scopes, expected one of them, or a list of names"):
        ffattr.vectors(model, given, scope="all")


def test_vectors_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2 * 2 * 7 * 7 * 40 * 8
    monkeypatch.setattr(vectors.psutil, "virtual_memory", lambda: SimpleNamespace(available=size - 1))
    model, given = build("bert"), tiny_models.inputs("bert")
    with pytest.raises(ValueError, match=r"would take 0\.0 GiB, more than is free; ask for fewer layers or queries"):
        ffattr.vectors(model, given)
    assert ffattr.vectors(model, given, queries=[0, 1]).values.shape == (2, 2, 2, 7, 40)
    monkeypatch.setattr(vectors.psutil, "virtual_memory", lambda: SimpleNamespace(available=size))
    assert ffattr.vectors(model, given).values.shape == (2, 2, 7, 7, 40)


# ---- explain


@pytest.mark.parametrize(
    "options", [{}, {"method": "operator"}, {"queries": [1], "layers": -1}, {"scopes": "atb"}], ids=str
)
@pytest.mark.parametrize("name", ["bert", "torch-pre", "gpt2", "llama"])
def test_explain_is_the_plan_and_runs_nothing(name: str, options: dict[str, Any]) -> None:
    model, given = build(name), tiny_models.inputs(name, padding="right")
    ran = ffattr.attribute(model, given, **options).plan
    calls: list[nn.Module] = []
    for module in model.modules():
        if next(module.parameters(), None) is not None:  # an activation is asked for its values
            module.register_forward_pre_hook(lambda module, args: calls.append(module))
    plan = ffattr.plan(model, given, **options)
    assert not calls
    assert (plan.backend, plan.dtype, plan.device) == (ran.backend, ran.dtype, ran.device)  # type: ignore[attr-defined]
    assert plan.layers == ran.layers  # type: ignore[attr-defined]


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

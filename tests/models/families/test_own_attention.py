"""Modules that compute attention by themselves: their weights are seen when a softmax makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run, state
from tiny_models import build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
from ffattr.decomposition.attention import LayerRecord
from ffattr.errors import ArchitectureMismatch, CaptureError, ForwardError, UnsupportedModel
from ffattr.models.capture.recorder import record_layers
from ffattr.models.registry import ModelDescription, resolve
from ffattr.models.spec.layer import LayerSpec


class Own(nn.Module):
    """Attention of no library, which applies a softmax in one of the ways that there are."""

    def __init__(self, softmax: Callable[[Tensor], Tensor], flat: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.router = (nn.Linear(24, 24) for _ in range(5))
        self.softmax, self.flat = softmax, flat

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, 6)).transpose(1, 2) for part in (self.q, self.k, self.v))
        logits = q @ k.mT + torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        weights = self.softmax(logits.flatten(0, 1) if self.flat else logits).view_as(logits)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        assert self.router(x).softmax(-1).shape == x.shape  # of no keys
        return self.o(mixed)


class OwnLayer(nn.Module):
    def __init__(self, softmax: Callable[[Tensor], Tensor], flat: bool) -> None:
        super().__init__()
        self.attention = Own(softmax, flat)
        self.up, self.down = nn.Linear(24, 30), nn.Linear(30, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(F.gelu(self.up(x)))


def run_own(softmax: Callable[[Tensor], Tensor], flat: bool = False) -> tuple[ModelDescription, list[LayerRecord]]:
    layer = OwnLayer(softmax, flat).double().eval()
    parts = layer.attention
    spec = LayerSpec(layer, parts, 4, 4, parts.v, parts.o, layer.up, layer.down, F.gelu)
    records: list[LayerRecord] = []
    x = torch.randn(4, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    description = ModelDescription(layer, (spec,), "own")
    before = state(layer)
    try:
        record_layers(description, {"x": x}, records.append)
    finally:
        assert state(layer) == before
    return description, records


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "softmax",
    [
        nn.Softmax(dim=-1),
        lambda logits: F.softmax(logits, dim=logits.dim() - 1),
        lambda logits: torch.softmax(logits, -1),
        lambda logits: logits.softmax(dim=-1),
        lambda logits: torch.softmax(input=logits, dim=-1),
    ],
)
def test_softmax_of_a_module_of_its_own(softmax: Callable[[Tensor], Tensor], flat: bool) -> None:
    description, records = run_own(softmax, flat)
    assert records[0].attention.shape == (4, 4, 7, 7)
    assert_recomputed(description, records, torch.ones(4, 7, dtype=torch.bool), tolerance=1e-12)


@pytest.mark.parametrize(
    ("softmax", "message"),
    [
        (lambda logits: logits.softmax(-1).softmax(-1), r"layer 0 of OwnLayer \(own\) called its attention.* twice"),
        (lambda logits: logits.mT.softmax(-2).mT, r"layer 0 of OwnLayer \(own\) handed over no attention.*\(Own\)"),
        (lambda logits: logits.exp() / logits.exp().sum(-1, keepdim=True), r"handed over no.*a softmax over the keys"),
        (lambda logits: F.pad(logits, (0, 1)).softmax(-1)[..., :-1], "7 queries but 8 keys"),
    ],
)
def test_attention_of_its_own_that_is_not_seen_once(softmax: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        run_own(softmax)


def test_an_error_in_attention_of_its_own() -> None:
    def fail(logits: Tensor) -> Tensor:
        logits.softmax(-1)
        raise RuntimeError("of the model")

    with pytest.raises(ForwardError, match=r"OwnLayer does not run on .*: of the model") as found:
        run_own(fail)
    assert isinstance(found.value.__cause__, RuntimeError)


@pytest.mark.parametrize("name", ["gptj", "bloom", "falcon-7b"])
def test_nothing_changes_where_the_interface_is_not_called(name: str) -> None:
    """Falcon asks its configuration for "sdpa" by name."""
    model = build(name)
    seen = []
    model.h[1].register_forward_pre_hook(lambda module, args: seen.append(model.config._attn_implementation))
    before = state(model)
    run(name, model)
    assert seen == [model.config._attn_implementation] * 2
    assert state(model) == before


def test_cache_of_a_model_with_attention_of_its_own() -> None:
    from transformers import DynamicCache

    model = build("gptj")
    cache = DynamicCache()
    model(input_ids=tiny_models.ids(), past_key_values=cache)
    with pytest.raises(CaptureError, match=r"layer 0 of GPTJModel.*7 queries but 14 keys.*past_key_values"):
        record_layers(resolve(model), {"input_ids": tiny_models.ids(), "past_key_values": cache}, print, verify=False)


@pytest.mark.parametrize(("name", "causal"), [("gptj", True), ("gpt-neo", True), ("deberta-v2", False)])
def test_rows_of_padding_do_not_look_ahead(name: str, causal: bool) -> None:
    """Those of a causal model are even where they have no key."""
    found = ffattr.attribute(build(name), tiny_models.inputs(name, padding="left"))
    assert found.arguments["causal"] == causal
    assert (found["layer"][:, 1, :, :2] == 0).all()
    assert (found["layer"][:, 1, :2] == 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
        ("roformer", {"rotary_value": True}, "rotary_value"),
    ],
)
def test_variants_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        resolve(build(name, **options))


def test_values_that_are_cut_off_are_mapped_where_none_is() -> None:
    """The family refuses them, the structure is found: and what each layer returns is compared every time."""
    found = ffattr.attribute(build("mpt", attn_config={"clip_qkv": 6.0}), tiny_models.inputs("mpt"))
    assert found.error.max() < 1e-10
    with pytest.raises((ArchitectureMismatch, UnsupportedModel)):
        ffattr.attribute(build("mpt", attn_config={"clip_qkv": 0.01}), tiny_models.inputs("mpt"))


def test_talking_heads_are_no_attention_rows() -> None:
    """DeBERTa may mix the weights of its heads after the softmax."""
    with pytest.raises(ArchitectureMismatch, match=r"layer 0.*'deberta' adapter does not describe this layer"):
        ffattr.attribute(build("deberta", talking_head=True), tiny_models.inputs("deberta"))

"""Which models are known, how each is described, and how a user adds one."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed
from tiny_models import EVERY_FAMILY, FAMILIES, build
from torch import Tensor, nn
from torch.nn import functional as F
from versions import RESTRUCTURED, is_older

import ffattr.models.registry as adapters
from ffattr.decomposition.attention import LayerRecord
from ffattr.errors import CaptureError, UnsupportedModel
from ffattr.models.capture.recorder import record_layers
from ffattr.models.families.table import FAMILIES as BUILT_IN
from ffattr.models.inputs.prepare import prepare_inputs
from ffattr.models.registry import known_models, register_adapter, resolve
from ffattr.models.spec.layer import LayerSpec
from ffattr.models.spec.weights import Columns

POST = ("attn_heads", "attn", "attn_res", "atb", "atb_ff", "atb_ff_res", "atb_ff_res_ln")
PRE = ("attn_heads", "attn", "atb", "atb_ln", "atb_ln_ff", "atb_ln_ff_res")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


def test_every_family_is_tested() -> None:
    there = [name for name in EVERY_FAMILY if name not in RESTRUCTURED or not is_older()]
    built_in = set(BUILT_IN) - ({"granitemoe", "granitemoeshared"} if is_older() else set())
    assert {resolve(build(name)).family for name in there} == built_in


@pytest.mark.parametrize("name", FAMILIES)
def test_description(name: str) -> None:
    model = build(name)
    description = resolve(model)
    pre = name.startswith(("gpt2", "llama", "mistral", "qwen2")) or name in (
        "opt",
        "opt-no-affine",
        "torch-pre",
        "torch-no-bias",
    )
    assert len(description.layers) == (1 if name == "torch-layer" else 2)
    assert description.batch_first == (name != "torch-seq-first")
    for spec in description.layers:
        weights = spec.weights(torch.float64)
        assert weights.scopes == (PRE if pre else POST)
        assert weights.value.weight.shape[1] * weights.heads == weights.kv_heads * weights.out.weight.shape[0]
        assert (weights.branches[0].gate is not None) == name.startswith(("llama", "mistral", "qwen2"))
        assert callable(spec.activation)
        assert callable(weights.branches[0].activation.value)
        if name in ("opt-no-affine", "torch-no-bias"):
            assert weights.branches[0].up.bias is None
            assert weights.norm_before_ff is not None
            assert (weights.norm_before_ff.weight is None) == (name == "opt-no-affine")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "ForSequenceClassification"),
        ("bert", "ForMaskedLM"),
        ("roberta", "ForTokenClassification"),
        ("distilbert", "ForMaskedLM"),
        ("electra", "ForPreTraining"),
        ("gpt2", "LMHeadModel"),
        ("opt", "ForCausalLM"),
        ("llama", "ForCausalLM"),
        ("llama", "ForSequenceClassification"),
        ("qwen2", "ForCausalLM"),
    ],
)
def test_heads_are_left_out(name: str, head: str) -> None:
    model = build(name, head=head)
    description = resolve(model)
    assert description.base is model.base_model is not model
    records: list[LayerRecord] = []
    called: list[nn.Module] = []
    for module in (model, *(child for child in model.children() if child is not description.base)):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    record_layers(description, prepare_inputs(description, model, tiny_models.inputs(name)).kwargs, records.append)
    assert len(records) == 2
    assert not called


def test_an_unknown_architecture_is_named_with_a_way_on() -> None:
    advice = r".*ffattr\.register_adapter.*ffattr\.known_models"
    with pytest.raises(UnsupportedModel, match=rf"^no adapter knows Linear, and its structure was not found{advice}"):
        resolve(nn.Linear(2, 2))
    transformers: Any = sys.modules["transformers"]
    config = transformers.FNetConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(UnsupportedModel, match=r"FNetModel \(model_type 'fnet'\), and .*no attention was seen"):
        resolve(transformers.FNetModel(config).eval())


def test_not_a_model() -> None:
    with pytest.raises(TypeError, match="model is a str, expected a loaded"):
        resolve("bert-base-uncased")  # type: ignore[arg-type]


def test_registered_adapter_wins_over_built_in() -> None:
    seen: list[nn.Module] = []

    def describe(base: nn.Module) -> Iterator[LayerSpec]:
        seen.append(base)
        return iter(known)

    model = build("bert", head="ForMaskedLM")
    known = resolve(model).layers[1:]
    register_adapter("bert", describe)  # type: ignore[arg-type]
    description = resolve(model)
    assert description.layers == known
    assert seen == [model.base_model]
    assert description.family == "bert"
    assert resolve(build("roberta")).family == "roberta"


def test_known_models_includes_registered_ones() -> None:
    assert {"bert", "gpt2", "opt", "llama", "TransformerEncoder"} <= set(known_models())
    register_adapter("mine", lambda base: [])
    assert "mine" in known_models()


class Attention(nn.Module):
    """A module of no library, with a fused projection and grouped heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 24 + 2 * 12)
        self.out = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((24, 12, 12), -1)
        q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.up, self.down = nn.Linear(24, 30), nn.Linear(30, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def describe(base: nn.Module) -> list[LayerSpec]:
    assert isinstance(base, Mine)
    return [
        LayerSpec(
            module=block,
            attention=block.attention,
            heads=4,
            kv_heads=2,
            value=Columns(block.attention.qkv, 36, 48),
            out=block.attention.out,
            up=block.up,
            down=block.down,
            activation=F.gelu,
            norm_before_attn=block.norm1,
            norm_before_ff=block.norm2,
        )
        for block in base.blocks
    ]


def test_registered_adapter_for_a_module_of_no_library() -> None:
    register_adapter("Mine", describe)
    model = Mine().double().eval()
    description = resolve(model)
    prepared = prepare_inputs(description, model, torch.arange(14).view(2, 7))
    records: list[LayerRecord] = []
    record_layers(description, prepared.kwargs, records.append)
    assert records[0].attention.causal
    assert records[0].attention.key.shape == (2, 2, 7, 6)
    assert_recomputed(description, records, prepared.mask)


def test_registered_adapter_for_transformers_without_attention() -> None:
    transformers: Any = sys.modules["transformers"]
    model = transformers.FNetModel(
        transformers.FNetConfig(vocab_size=61, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    ).eval()
    layer = model.encoder.layer[0]
    spec = LayerSpec(
        module=layer,
        attention=layer.fourier.self,
        heads=2,
        kv_heads=2,
        value=layer.intermediate.dense,
        out=layer.output.dense,
        up=layer.intermediate.dense,
        down=layer.output.dense,
        activation=F.gelu,
    )
    register_adapter("fnet", lambda base: [spec])
    with pytest.raises(CaptureError, match=r"layer 0 of FNetModel \(fnet\) handed over no.*FNetBasicFourierTransform"):
        record_layers(resolve(model), {"input_ids": tiny_models.ids()}, lambda recorded: None)


@pytest.mark.parametrize(("name", "fn"), [("", describe), (3, describe), ("bert", "describe")])
def test_bad_registration(name: Any, fn: Any) -> None:
    with pytest.raises(TypeError, match="expected"):
        register_adapter(name, fn)


def test_bad_adapter() -> None:
    register_adapter("Linear", lambda base: [base])  # type: ignore[list-item]
    with pytest.raises(
        TypeError, match=r"adapter registered for 'Linear' returned .* expected one LayerSpec per layer"
    ):
        resolve(nn.Linear(2, 2))


def test_transformers_is_not_imported() -> None:
    code = (
        "import sys, torch, ffattr.models.registry, ffattr.models.capture.recorder, ffattr.models.inputs.prepare as i; "
        "m = torch.nn.TransformerEncoderLayer(8, 2).eval(); a = ffattr.models.registry.resolve(m); "
        "p = i.prepare_inputs(a, m, torch.randn(3, 8)); "
        "ffattr.models.capture.recorder.record_layers(a, p.kwargs, print, verify=False); "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_a_variant_of_a_known_family_is_tried_by_structure() -> None:
    """Where the module that its family is known by is called otherwise; a registered adapter has the last word."""
    model = build("llama")
    for layer in model.layers:
        layer.renamed = layer.post_attention_layernorm
        del layer.post_attention_layernorm
        layer.forward = types.MethodType(_forward_renamed, layer)
    description = resolve(model)
    assert description.family == "structure of LlamaModel"
    assert description.layers[1].norm_before_ff is model.layers[1].renamed

    def refuse(base: nn.Module) -> list[LayerSpec]:
        raise UnsupportedModel("not this one")

    register_adapter("llama", refuse)
    with pytest.raises(UnsupportedModel, match="not this one"):
        resolve(model)


def _forward_renamed(layer: Any, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
    hidden_states = hidden_states + attended
    return hidden_states + layer.mlp(layer.renamed(hidden_states))  # type: ignore[no-any-return]

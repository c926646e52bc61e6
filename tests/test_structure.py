"""Models that no adapter knows: their layers are found by structure, or what was found is said."""

from __future__ import annotations

import gc
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import tiny_models
import torch
from recording import assert_recomputed, run, state
from tiny_models import VOCABULARY, build
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
import ffattr.adapters as adapters
from ffattr.adapters import Adapted, resolve, structure
from ffattr.adapters.template import template, tree
from ffattr.errors import CaptureError, UnsupportedModel
from ffattr.parameters import Columns

KNOWN = (
    "bert",
    "roberta",
    "distilbert",
    "gpt2",
    "opt",
    "opt-350m",
    "opt-no-affine",
    "llama",
    "llama-bias",
    "mistral",
    "qwen3",
    "gemma",
    "gemma3",
    "olmo2",
    "phi",
    "phi3",
    "gpt-neox",
    "gpt-neox-sequential",
    "glm4",
    "starcoder2",
    "stablelm",
    "stablelm-parallel",
    "modernbert",
    "mpnet",
    "codegen",
    "falcon-40b",
    "vit",
    "dinov2",
)
HALF = ("bert", "gpt2", "llama", "gemma3", "olmo2", "phi3", "gpt-neox")
_DECODER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 76,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
NEW: dict[str, dict[str, Any]] = {
    "Helium": _DECODER,
    "SeedOss": _DECODER,
    "HunYuanDenseV1": _DECODER,
    "Persimmon": {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")},
    "Exaone4": _DECODER,
    "Jais2": _DECODER,
}
"""Families of transformers without data of their own here."""


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def renamed(model: Any) -> Any:
    for part in (model, model.base_model):
        part.config.model_type = "unknown"
    return model


def transformers_model(prefix: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(vocab_size=VOCABULARY, **settings)
    model = getattr(transformers, f"{prefix}Model")(config)
    tiny_models._randomise(model)
    model = renamed(model.to(dtype).eval())
    if dtype == torch.float64:
        tiny_models._exact_norms(model)
    return model


def assert_same_layers(found: Adapted, expected: Adapted) -> None:
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for field in fields(layer):
            a, b = getattr(layer, field.name), getattr(other, field.name)
            assert a is b or a == b, field.name


@pytest.mark.parametrize("name", KNOWN)
def test_known_families_are_found(name: str) -> None:
    """Every part is the very module that the family's data name."""
    model = build(name)
    expected = resolve(model)
    found = resolve(renamed(model))
    assert found.family == f"structure of {type(model).__name__}"
    assert_same_layers(found, expected)
    assert found.batch_first == expected.batch_first
    # OPT's table computes its own positions, from a mask.
    assert found.max_positions == (None if name.startswith("opt") else expected.max_positions)


@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str) -> None:
    model = build(name, dtype=torch.bfloat16)
    expected = resolve(model)
    assert_same_layers(resolve(renamed(model)), expected)


@pytest.mark.parametrize("name", NEW)
def test_unknown_families_are_reproduced(name: str) -> None:
    model = transformers_model(name, **NEW[name])
    inputs = {"input_ids": tiny_models.ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    adapted, records, mask = run(name, model, inputs)
    assert adapted.family == f"structure of {name}Model"
    assert_recomputed(adapted, records, mask)
    single = transformers_model(name, torch.float32, **NEW[name])
    attr = ffattr.attribute(single, inputs)
    assert attr.arguments["model"] == f"structure of {name}Model"
    assert attr.error.max() < 1e-5


class Attention(nn.Module):
    """Grouped heads from one projection."""

    heads = 4

    def __init__(self, own_softmax: bool = False, times: int = 1) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 24 + 2 * 12)
        self.out = nn.Linear(24, 24)
        self.own_softmax, self.times = own_softmax, times

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split((24, 12, 12), -1)
        q, k, v = (t.unflatten(-1, (-1, 6)).transpose(1, 2) for t in (q, k, v))
        for _ in range(self.times):
            if self.own_softmax:
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
                mixed = (q @ k.mT).softmax(-1) @ v
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.both = nn.Linear(24, 60)
        self.down = nn.Linear(30, 24)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(self.function(both[..., ::2]) * both[..., 1::2])


class Torch(nn.Module):
    """nn.MultiheadAttention of ``[T, B, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class HiddenEps(nn.LayerNorm):
    """A norm that no attribute describes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-3)


class Block(nn.Module):
    def __init__(
        self,
        attention: Callable[[], nn.Module] = Attention,
        ff: Callable[[], nn.Module] = FeedForward,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        residual: float = 1.0,
    ) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2, self.ff = attention(), norm(24), norm(24), ff()
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        x = self.residual * x + self.attention(self.norm1(x))
        return x + self.ff(self.norm2(x))


class Mine(nn.Module):
    def __init__(self, blocks: list[nn.Module], sequence_first: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.positions = nn.Embedding(16, 24)
        self.blocks = nn.Sequential(*blocks)
        self.sequence_first = sequence_first
        tiny_models._randomise(self)
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.blocks(x.transpose(0, 1) if self.sequence_first else x)


def mine(**options: Any) -> Mine:
    torch.manual_seed(3)
    return Mine([Block(**options) for _ in range(2)])


@pytest.mark.parametrize("own_softmax", [False, True])
def test_a_module_of_no_library(own_softmax: bool) -> None:
    model = mine(attention=lambda: Attention(own_softmax), ff=lambda: FeedForward(F.gelu))
    adapted, records, mask = run("", model, torch.arange(14).view(2, 7))
    assert_recomputed(adapted, records, mask)
    assert (adapted.family, adapted.max_positions, adapted.batch_first) == ("structure of Mine", 16, True)
    spec, block = adapted.layers[1], model.blocks[1]
    assert spec.attention is block.attention
    assert (spec.heads, spec.kv_heads, spec.parallel) == (4, 2, False)
    assert spec.value == Columns(block.attention.qkv, 36, 48)
    assert spec.gate == Columns(block.ff.both, 0, 1, groups=30)
    assert spec.up == Columns(block.ff.both, 1, 2, groups=30)
    assert spec.weights(torch.float64).activation.name == "gelu"
    assert (spec.norm_before_attn, spec.norm_before_ff) == (block.norm1, block.norm2)


def test_multihead_attention_with_the_sequence_first() -> None:
    torch.manual_seed(3)
    model = Mine([Block(attention=Torch) for _ in range(2)], sequence_first=True)
    adapted, records, mask = run("", model, torch.arange(14).view(2, 7))
    assert not adapted.batch_first
    assert_recomputed(adapted, records, mask)
    attention = model.blocks[0].attention.inner
    assert adapted.layers[0].value == Columns(attention, 48, 72)
    assert adapted.layers[0].out is attention.out_proj


def test_features_instead_of_ids() -> None:
    layer = nn.TransformerEncoderLayer(24, 4, 30, activation="gelu", batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(10, 24), nn.TransformerEncoder(layer, 2)).double().eval()
    adapted = resolve(model)
    assert len(adapted.layers) == 2
    assert adapted.layers[1].norm_after_ff is model[1].layers[1].norm2
    assert adapted.layers[0].activation is F.gelu


class Experts(nn.Module):
    def __init__(self, stacked: bool) -> None:
        super().__init__()
        if stacked:
            self.weight = nn.Parameter(torch.empty(3, 24, 24))
        else:
            self.experts = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Still(nn.Module):
    """A layer that does not attend."""

    def __init__(self) -> None:
        super().__init__()
        self.ff = FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ff(x)


class Skipping(Block):
    """A layer of the same class that does."""

    def __init__(self, attends: bool) -> None:
        super().__init__()
        self.attends = attends

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.attends else x + self.ff(x)


class TwoStacks(Mine):
    def __init__(self) -> None:
        super().__init__([Block()])
        self.more = nn.ModuleList(Block() for _ in range(2)).double()

    def forward(self, ids: Tensor) -> Tensor:
        return self.more[1](self.more[0](super().forward(ids)))


class Broken(Mine):
    def forward(self, ids: Tensor) -> Tensor:
        raise KeyError("needs a cache")


class Recurrent(nn.Module):
    """One block, run twice, beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled residual": (lambda: mine(residual=0.99), "output is not the sum of its input, attention and feed-forward"),
    "one scaled residual": (lambda: Mine([Block(residual=0.99), Block()]), "layer 0 of 'blocks' is not reproduced"),
    "norm": (lambda: mine(norm=HiddenEps), r"not reproduced by what was found: .* differs by \d"),
    "activation": (lambda: mine(ff=lambda: FeedForward(lambda x: x.sin())), "no feed-forward block"),
    "linear": (lambda: transformers_model("Mamba", hidden_size=32, num_hidden_layers=2), "no attention was seen"),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), "no nn.ModuleList"),
    "attention twice": (lambda: mine(attention=lambda: Attention(times=2)), "layer 0 of 'blocks' attends 2 times"),
    "two lists": (TwoStacks, "attends in more than one list of layers: 'blocks', 'more'"),
    "layers without": (lambda: Mine([Skipping(True), Skipping(False)]), "layer 1 of 'blocks' does not attend"),
    "mixed layers": (lambda: Mine([Block(), Still()]), "no nn.ModuleList or nn.Sequential of layers that are all"),
    "broken": (
        lambda: Broken([Block()]),
        r"could not be run on a small input .ids \[2, 5\]: KeyError: 'needs a",
    ),
    "recurrent": (lambda: Recurrent().double().eval(), "2 layers of 'layers' ran 4 times"),
    "experts": (lambda: mine(ff=lambda: Experts(False)), "mixture of experts: 'ff.experts' is a list of 3 FeedForward"),
    "stacked experts": (lambda: mine(ff=lambda: Experts(True)), r"experts: 'ff.weight' is \[3, 24, 24\]"),
    "cross-attention": (
        lambda: renamed(build("bert", is_decoder=True, add_cross_attention=True)),
        "cross-attention .config.add_cross_attention is True",
    ),
    "encoder and decoder": (
        lambda: transformers_model("Marian", d_model=32, encoder_layers=1, decoder_layers=1, pad_token_id=0),
        "an encoder and a decoder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """With the reason, the modules, and a description to complete."""
    make, reason = REFUSED[name]
    model = make().eval()
    before = state(model)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        resolve(model)
    assert state(model) == before
    head, modules, code = str(caught.value).split("\n\n", 2)
    assert "Known: TransformerEncoder" in head
    code = code.split(":\n\n", 1)[1]
    compile("\n".join(line.removeprefix("    ") for line in code.splitlines()), "template", "exec")
    assert "module=layer" in code
    assert modules


def test_what_was_found_before_it_failed_is_filled_in() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        resolve(mine(residual=0.99))
    text = str(caught.value)
    for part in (
        "attention=layer.attention, heads=4, kv_heads=2,",
        "value=ffattr.Columns(layer.attention.qkv, 36, 48), out=layer.attention.out,",
        "up=ffattr.Columns(layer.ff.both, 1, 2, groups=30), down=layer.ff.down,",
        "activation=ffattr.activations.ACTIVATIONS['silu'].value,",
        "norm_before_attn=layer.norm1,",
        "norm_before_ff=...,",
        "for layer in base.blocks",
        'ffattr.register_adapter("Mine", adapter)',
        "    attention: Attention\n",
        "qkv: Linear weight [48, 24]",
    ):
        assert part in text, part


@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt-neox", "olmo2", "dinov2"])
def test_a_description_that_was_found_works_as_an_adapter(name: str) -> None:
    model = build(name)
    found = structure.detect(model)
    expected = Adapted(model, structure.specs(model, found), "")
    exec(template(model.config.model_type, found.layers, found.parts), {"ffattr": ffattr})
    adapted = resolve(model)
    assert adapted.family == model.config.model_type
    assert_same_layers(adapted, expected)


def test_a_description_of_numbered_modules() -> None:
    found = structure.detect(nn.Sequential(nn.Embedding(50, 24), mine().blocks).double().eval())
    code = template("Sequential", found.layers, {**found.parts, "activation": "ff.0.act"})
    assert "for layer in base[1]" in code
    assert "activation=layer.ff[0].act," in code


def test_the_tree_is_short() -> None:
    lines = tree(nn.ModuleDict({f"m{i}": nn.Linear(2, 3) for i in range(40)})).splitlines()
    assert len(lines) == 25
    assert lines[:2] == ["ModuleDict", "  m0: Linear weight [3, 2]"]
    assert lines[-1] == "  ... and 17 more"
    assert "experts: ModuleList\n      0: FeedForward (and 2 more)\n" in tree(Block(ff=lambda: Experts(False)))


def test_training_mode() -> None:
    model = mine().train()
    before = state(model)
    with pytest.raises(CaptureError, match=r"Mine is in training mode.*model\.eval"):
        resolve(model)
    assert state(model) == before


def test_the_model_is_left_as_it_was() -> None:
    model = renamed(build("bert"))
    before = state(model)
    resolve(model)
    assert state(model) == before


def test_what_a_model_does_to_itself_is_undone() -> None:
    """BigBird, given a few tokens, replaces its sparse attention."""
    heads = {k: v for k, v in _DECODER.items() if k not in ("num_key_value_heads", "head_dim")}
    model = transformers_model("BigBird", **heads)
    modules, kind = list(model.modules()), model.attention_type
    resolve(model)
    assert list(model.modules()) == modules
    assert model.attention_type == kind == "block_sparse"


def test_a_model_is_run_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mine()
    runs: list[nn.Module] = []
    model.register_forward_hook(lambda module, args, output: runs.append(module))
    with caplog.at_level(logging.INFO, "ffattr"):
        first, second = resolve(model), resolve(model)
    assert len(runs) == len(caplog.records) == 1
    assert "structure of Mine: layers at 'blocks'" in caplog.text
    assert_same_layers(second, first)
    del first, second
    runs.clear()
    caplog.clear()
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_known_models_are_not_run() -> None:
    model = build("bert")
    model.register_forward_pre_hook(lambda module, args: pytest.fail("ran"))
    resolve(model)


def test_a_layer_that_lacks_a_part_is_named() -> None:
    model = mine()
    found = structure.detect(model)
    del model.blocks[0].norm2
    with pytest.raises(structure.Undetected, match="layer 0 of 'blocks' has no 'norm2'"):
        structure.specs(model, found)

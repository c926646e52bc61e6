"""Every adapter that is printed runs as printed: with the maps that its description has, or naming what it lacks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from own_modules import (
    Attention,
    Block,
    ByProduct,
    FeedForward,
    Gained,
    Mine,
    NormedValues,
    Skipping,
    Still,
    Torch,
    mine,
    renamed,
    transformers_model,
)
from tiny_models import _randomise, build, ids
from torch import Tensor, nn
from torch.nn import functional as F

import ffattr
import ffattr.models.registry as adapters
from ffattr.errors import UnsupportedModel
from ffattr.models.detection import detect
from ffattr.models.detection.probe import Undetected
from ffattr.models.registry import resolve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "_registered", {})


class ByDeviation(nn.Module):
    """A norm under no name that anybody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.b


class Scaled(Block):
    """What both blocks return is multiplied, by features and by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.ff_scale = nn.Parameter(torch.ones(24)), 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma * self.attention(self.norm1(x))
        return x + self.ff_scale * self.ff(self.norm2(x))


class Post(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.ff(x))  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gate = Attention(), nn.Linear(24, 24)
        self.out, self.inner.out = self.inner.out, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) * self.gate(x).sigmoid())  # type: ignore[no-any-return]


class Crossing(nn.Module):
    """Attends to what it is given, by modules of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.across = (nn.MultiheadAttention(24, 4, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(3))
        self.ff = FeedForward()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        read = self.norms[0](x)
        x = x + self.own(read, read, read)[0]
        x = x + self.across(self.norms[1](x), memory, memory)[0]
        return x + self.ff(self.norms[2](x))  # type: ignore[no-any-return]


class Decoder(Mine):
    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, memory)
        return x


class ByName(nn.Module):
    """Layers in a ModuleDict."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.layers = nn.ModuleDict({"first": Block(), "second": Block()})
        _randomise(self)
        self.double().eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers.values():
            x = layer(x)
        return x


def blocks(*layers: nn.Module, cls: Callable[..., nn.Module] = Mine) -> nn.Module:
    return cls(list(layers))


SHAPES: dict[str, Callable[[], nn.Module]] = {
    "grouped heads": mine,
    "its own softmax": lambda: mine(attention=lambda: Attention(own_softmax=True)),
    "sequence first": lambda: mine(sequence_first=True, attention=Torch),
    "norms behind": lambda: blocks(Post(), Post()),
    "a norm by deviation": lambda: mine(norm=ByDeviation),
    "swish written out": lambda: mine(ff=lambda: FeedForward(lambda x: x * (1.7 * x).sigmoid())),
    "scaled blocks": lambda: blocks(Scaled(), Scaled()),
    "a gate of attention": lambda: mine(attention=Gated),
    "a product without a module": lambda: mine(attention=ByProduct),
    "a norm of values": lambda: mine(attention=lambda: NormedValues("rms")),
    "a gain at last": lambda: blocks(Gained(1), Gained(1)),
    "layers that do not attend": lambda: blocks(Skipping(True), Still(), Skipping(True)),
    "layers by name": ByName,
    "a memory": lambda: blocks(Crossing(), Crossing(), cls=Decoder),
    "latent attention": lambda: transformers_model(
        "DeepseekV3",
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=40,
        kv_lora_rank=12,
        q_lora_rank=16,
        first_k_dense_replace=1,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=12,
        max_position_embeddings=32,
    ),
    "a mixture": lambda: renamed(build("mixtral")),
}


def given(name: str) -> Any:
    tokens = ids(2, 5) % 50
    if name == "a memory":
        return tokens, torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tokens


def print_adapter(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the error prints of a model whose description was found, and did not pass."""

    def refuse(run: Any, spec: Any, where: str, batch_first: bool) -> None:
        raise Undetected(f"{where} is not reproduced by what was found")

    with monkeypatch.context() as patch:
        patch.setattr(detect, "_verify_layer", refuse)
        patch.setattr(detect, "_known", type(detect._known)())
        with pytest.raises(UnsupportedModel) as caught:
            ffattr.attribute(model, inputs)
    text = str(caught.value)
    assert "What was found, which does not reproduce every layer; to correct" in text
    lines = text.split("to run before ffattr is called:\n\n")[1].splitlines()
    return "\n".join(line.removeprefix("    ") for line in lines)


@pytest.mark.parametrize("name", SHAPES)
def test_a_printed_adapter_has_the_maps_of_its_description(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = SHAPES[name]().eval(), given(name)
    code = print_adapter(model, inputs, monkeypatch)
    expected = ffattr.attribute(model, inputs, scopes="all", dtype=torch.float64)
    exec(code, {})
    found = ffattr.attribute(model, inputs, scopes="all", dtype=torch.float64)
    assert not resolve(model).family.startswith("structure of ")
    assert found.maps.keys() == expected.maps.keys()
    for scope, tile in expected.maps.items():
        torch.testing.assert_close(found.maps[scope], tile, rtol=1e-12, atol=1e-14)


def test_in_a_program_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing of ffattr loaded before."""
    code = print_adapter(blocks(Scaled(), Scaled()), given(""), monkeypatch)
    here = Path(__file__)
    program = (
        f"import sys; sys.path[:0] = [{str(here.parents[2] / 'helpers')!r}, {str(here.parent)!r}]\n{code}\n"
        "from test_template_runs import Scaled, blocks, given\n"
        "print(float(ffattr.attribute(blocks(Scaled(), Scaled()), given('')).error.max()))\n"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    ran = subprocess.run([sys.executable, str(path)], check=True, capture_output=True, text=True, timeout=120)
    assert float(ran.stdout) < 1e-12


@pytest.mark.parametrize("residual", [0.99])
def test_one_to_complete_says_what_it_lacks(residual: float) -> None:
    model = mine(residual=residual)
    with pytest.raises(UnsupportedModel, match="To complete, without the norms that it does not have") as caught:
        resolve(model)
    lines = str(caught.value).split("to run before ffattr is called:\n\n")[1].splitlines()
    exec("\n".join(line.removeprefix("    ") for line in lines), {})
    with pytest.raises(UnsupportedModel, match=r"registered for 'Mine' leaves out what is norm_before_ff in layer 0"):
        ffattr.attribute(model, given(""))


def test_an_activation_that_nothing_covers_is_left_open() -> None:
    model = mine(ff=lambda: FeedForward(lambda x: F.silu(x) - x.square()))
    with pytest.raises(UnsupportedModel, match="no feed-forward block") as caught:
        resolve(model)
    assert "activation=...," in str(caught.value)

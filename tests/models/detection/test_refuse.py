"""Layers that no description covers, and which of their modules says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from own_modules import GEMMA4, Attention, Block, Experts, FeedForward, Mine, mine, transformers_model
from torch import Tensor, nn
from torch.nn import functional as F
from versions import PINNED, needs

from ffattr.errors import UnsupportedModel
from ffattr.models.detection.probe import Undetected
from ffattr.models.detection.refuse import refuse_experts
from ffattr.models.registry import resolve


class NormedNeurons(FeedForward):
    """A norm behind the activation, as EVA-02 and Kosmos have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(30)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(self.norm(F.silu(both[..., ::2]) * both[..., 1::2]))  # type: ignore[no-any-return]


class NormedHeads(Attention):
    """A norm behind all heads (BitNet), or one with a bias on the values of each."""

    def __init__(self, of_values: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6 if of_values else 24)
        self.of_values = of_values

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (-1, 6)) for part in self.qkv(x).split((24, 12, 12), -1))
        v = self.norm(v) if self.of_values else v
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
        return self.out(mixed if self.of_values else self.norm(mixed))  # type: ignore[no-any-return]


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Stages(Mine):
    """Two tokens of a stage become one of the next."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for stage in self.blocks:
            x = F.avg_pool1d(stage(x).mT, 2).mT
        return x


class Streams(Mine):
    """Several streams of hidden states, of which a layer works on one."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)[None].repeat(3, 1, 1, 1)
        for block in self.blocks:
            x = block(x)
        return x


class OfStreams(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super().forward(x[0])[None], x[1:] + x[:1]])


class OfFeatures(Attention):
    """Attention of each head's features to one another (XCiT)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 6)).permute(0, 2, 3, 1) for part in self.qkv(x).split(24, -1))
        return self.out(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 72)


class Behind(Block):
    """One more gated network behind the feed-forward block (Gemma 3n and 4, per-layer embeddings)."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.back = nn.Linear(24, 8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.back(F.silu(self.late(x)))  # type: ignore[no-any-return]


class SharedAttention(nn.Module):
    """Attention to given keys and values, or to its own, which it leaves."""

    heads = 4

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(24, 24) for _ in range(4))
        self.given: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = self.made = (k, v) if self.given is None else self.given
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Shared(Block):
    def __init__(self) -> None:
        super().__init__(SharedAttention)


class Sharing(Mine):
    def forward(self, ids: Tensor) -> Tensor:
        x, made = self.embedding(ids), None
        for block in self.blocks:
            block.attention.given = made
            x = block(x)
            made = block.attention.made
        return x


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "norm of neurons": (lambda: mine(ff=NormedNeurons), "a norm, 'ff.norm', lies between the activation of the feed-"),
    "norm of heads": (
        lambda: mine(attention=lambda: NormedHeads(False)),
        "a norm, 'attention.norm', lies between what the heads return and the output projection 'attention.out'",
    ),
    "norm of values": (
        lambda: mine(attention=lambda: NormedHeads(True)),
        r"attention mixes what 'attention.norm' .LayerNorm. makes of every head's values",
    ),
    "features": (
        lambda: mine(attention=OfFeatures),
        r"attends from features to features, with weights of \[2, 4, 6, 6\] where the layer reads \[2, 5, 24\]",
    ),
    "stages": (
        lambda: Stages([Stage(), Stage()]),
        r"modules of 'blocks' are stages, each with blocks that attend .*pass model.blocks.0 .structure of Stage.",
    ),
    "streams": (
        lambda: Streams([OfStreams(), OfStreams()]),
        r"takes \[3, 2, 5, 24\], expected \[B, T, d\] in and out: 3 streams of every token, which the layer mixes",
    ),
    "a network behind": (lambda: Mine([Behind(), Behind()]), "'late' reads the stream behind the feed-forward block"),
    "keys of another layer": (
        lambda: Sharing([Shared(), Shared()]),
        "layer 1 attends to keys and values that layer 0 made of its own input",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_module_is_named(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=reason):
        resolve(make().eval())


def test_experts_that_nothing_records() -> None:
    refuse_experts(Block())
    with pytest.raises(Undetected, match="is a list of 3 FeedForward"):
        refuse_experts(Experts(False))


GEMMA4_REFUSED = {
    "per-layer embeddings": ({"hidden_size_per_layer_input": 8}, "'per_layer_input_gate' reads the stream behind the"),
    "experts": (
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
        "what the experts at 'experts' return passes a norm of its own, 'post_feedforward_layernorm_2'",
    ),
    "shared keys": (
        {
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "layer 3 attends to keys and values that layer 1 made of its own input",
    ),
}


@pytest.mark.parametrize("name", GEMMA4_REFUSED)
def test_what_is_refused_of_gemma_4(name: str) -> None:
    needs(str(PINNED), "that has the family, of those that are tested")
    settings, reason = GEMMA4_REFUSED[name]
    model = transformers_model("Gemma4Text", **{**GEMMA4, **settings}, experts_implementation="eager")
    with pytest.raises(UnsupportedModel, match=reason):
        resolve(model)

"""Layers that no description covers, and which of their modules says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from own_modules import Attention, Block, Experts, FeedForward, Mine, mine
from torch import Tensor, nn
from torch.nn import functional as F

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
    """A norm behind all heads (BitNet), or on the values of each (Gemma 4)."""

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
    "stages": (
        lambda: Stages([Stage(), Stage()]),
        r"modules of 'blocks' are stages, each with blocks that attend .*pass model.blocks.0 .structure of Stage.",
    ),
    "streams": (lambda: Streams([OfStreams(), OfStreams()]), r"takes \[3, 2, 5, 24\], .*or several streams"),
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

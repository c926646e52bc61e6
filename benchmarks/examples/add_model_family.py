"""A Transformer of one's own (RMSNorm, SwiGLU, fused projections) made known to ffattr, checked, and described wrongly.

A description says which module plays which part, as data. (ffattr would find the parts of this model by itself, from
its structure; where it cannot, this is what to write.) Every run compares the layer outputs that follow from it with
the model's own, so that one that does not fit is an error. Run: ``python benchmarks/examples/add_model_family.py``
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

import ffattr

WIDTH, HEADS, FF = 32, 4, 48


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.back = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.back(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_a, self.norm_b, self.mixer = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6), Mixer()
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * FF, bias=False), nn.Linear(FF, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Any:
        x = x + self.mixer(self.norm_a(x))
        gate, up = self.wide(self.norm_b(x)).chunk(2, -1)
        return x + self.narrow(silu(gate) * up)


class TinyLlama(nn.Sequential):
    """Blocks one after the other, on vectors ``[B, T, d]``."""


def describe(block: Any, activation: Callable[[Tensor], Tensor] = silu) -> ffattr.LayerSpec:
    return ffattr.LayerSpec(
        module=block,
        attention=block.mixer,
        heads=HEADS,
        kv_heads=HEADS,
        value=ffattr.Columns(block.mixer.qkv, 2 * WIDTH, 3 * WIDTH),  # the last third
        out=block.mixer.back,
        gate=ffattr.Columns(block.wide, 0, FF),
        up=ffattr.Columns(block.wide, FF, 2 * FF),
        down=block.narrow,
        activation=activation,
        norm_before_attn=block.norm_a,
        norm_before_ff=block.norm_b,
    )


def main() -> None:
    torch.manual_seed(0)
    model, x = TinyLlama(Block(), Block(), Block()).eval(), torch.randn(1, 6, WIDTH)
    ffattr.register_adapter("TinyLlama", lambda model: [describe(block) for block in model.children()])  # by class name
    attr = ffattr.attribute(model, x, scopes="all")
    print(f"{attr}\nlayers reproduced to {float(attr.error.max()):.0e}")
    ffattr.register_adapter("TinyLlama", lambda model: [describe(block, gelu) for block in model.children()])  # wrong
    try:
        ffattr.attribute(model, x)
    except ffattr.ArchitectureMismatch as refused:
        print(f"\nrefused: {refused}")


if __name__ == "__main__":
    main()

"""Models that no adapter knows, for tests: families of transformers under another name, and modules of no library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DECODER = {
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


def renamed(model: Any) -> Any:
    for part in (model, model.base_model):
        part.config.model_type = "unknown"
    return model


def transformers_model(prefix: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(vocab_size=tiny_models.VOCABULARY, **settings)
    model = getattr(transformers, f"{prefix}Model")(config)
    tiny_models._randomise(model)
    model = renamed(model.to(dtype).eval())
    if dtype == torch.float64:
        tiny_models._exact_norms(model)
    return model


class Attention(nn.Module):
    """Grouped heads from one projection."""

    heads = 4

    def __init__(self, own_softmax: bool = False, times: int = 1, sequence_first: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 24 + 2 * 12)
        self.out = nn.Linear(24, 24)
        self.own_softmax, self.times, self.sequence_first = own_softmax, times, sequence_first

    def forward(self, x: Tensor) -> Tensor:
        order = (1, 2, 0, 3) if self.sequence_first else (0, 2, 1, 3)
        q, k, v = self.qkv(x).split((24, 12, 12), -1)
        q, k, v = (t.unflatten(-1, (-1, 6)).permute(order) for t in (q, k, v))
        for _ in range(self.times):
            if self.own_softmax:
                k, v = (t.repeat_interleave(2, 1) for t in (k, v))
                mixed = (q @ k.mT).softmax(-1) @ v
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.permute((2, 0, 1, 3) if self.sequence_first else (0, 2, 1, 3)).flatten(2))


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


def mine(sequence_first: bool = False, **options: Any) -> Mine:
    torch.manual_seed(3)
    return Mine([Block(**options) for _ in range(2)], sequence_first)


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


VALUE_NORMS = {
    "rms": lambda: nn.RMSNorm(6, eps=1e-3),
    "rms, no gain": lambda: nn.RMSNorm(6, eps=1e-3, elementwise_affine=False),
    "layer": lambda: nn.LayerNorm(6, eps=1e-3, bias=False),
}


class NormedValues(Attention):
    """A norm of every head's values."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm = VALUE_NORMS[kind]()

    def project(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and normed values, ``[B, T, heads, dh]``."""
        q, k, v = (part.unflatten(-1, (-1, 6)) for part in self.qkv(x).split((24, 12, 12), -1))
        return [q, k, self.norm(v)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.project(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Gained(Block):
    """What the layer returns is multiplied at last, by a number or by one for each feature."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class ByProduct(nn.Module):
    """Queries, keys and values by a product with the weight of a module that is never called, and biases beside it: how
    timm writes BEiT and EVA-02."""

    heads = 4

    def __init__(self, biased: bool = True) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72, bias=False), nn.Linear(24, 24)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(24)) for _ in range(2))
        self.biased = biased

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]) if self.biased else None
        q, k, v = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, 4, 6)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


GEMMA4 = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
}
"""Sizes of a small Gemma 4 text model, without per-layer embeddings."""

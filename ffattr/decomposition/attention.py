"""What a forward pass leaves of a layer: its input, its output, and its attention.

Attention is kept as what determines its weights (`QueryKey`) wherever that can be seen, and as the weights themselves
(`AttentionWeights`) where a model makes them in its own way.

Shapes: ``B`` sequences of ``T`` tokens, ``H`` query heads, ``Hkv`` key/value heads of width ``dh``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .layer import Edit
from .routing import Routing

__all__ = [
    "Attention",
    "AttentionWeights",
    "GatedAttention",
    "LayerRecord",
    "NormedValues",
    "QueryKey",
    "allows_attention",
]


class Attention(Protocol):
    """What is asked of a recorded attention, whatever is kept of it: `QueryKey` or `AttentionWeights`.

    `sequence` gives one batch entry without its padding; its tensors lose the batch dimension. `attention_weights`,
    `pairs` and `looks_ahead` are asked of such a sequence.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, H, queries, keys)`` of the whole batch."""
        ...

    @property
    def rounds_to_float32(self) -> bool:
        """Whether the weights may differ from the model's by rounding to float32, whatever the model's dtype."""
        ...

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> Attention:
        """Batch entry ``batch`` restricted to the token indices ``tokens`` ``[T']``, in ``dtype``.

        ``keys``: the indices of its keys, where they are the tokens of another sequence.
        """
        ...

    def attention_weights(self, rows: Tensor) -> Tensor:
        """Attention weights ``[H, N, T]`` of the query tokens ``rows`` ``[N]``, exactly 0 where masked."""
        ...

    def pairs(self, rows: Tensor) -> int:
        """How many (query, key) pairs are not masked for all heads."""
        ...

    @property
    def looks_ahead(self) -> bool:
        """Whether any token may attend to a later one."""
        ...


@dataclass(frozen=True)
class QueryKey:
    """What determines attention weights, without the weights: ``softmax(scale * query @ key^T + bias + mask)``.

    With a ``softcap`` c, ``c tanh(. / c)`` of the scaled products; with ``sinks`` ``[H]``, one more logit for each head
    that takes part in the softmax and belongs to no token.

    ``query`` ``[B, H, T, dh]`` and ``key`` ``[B, Hkv, T, dh]`` are taken after any position rotation. ``mask`` is
    broadcastable to ``[B, H, T, T]``, boolean (True: may attend) or additive, or None; ``causal`` masks besides the
    keys after the query. ``bias`` (of relative positions) is broadcastable in the same way and masks nothing.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    rounds_to_float32: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, _ = self.query.shape
        return batch, heads, queries, self.key.shape[-2]

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> QueryKey:
        keys = tokens if keys is None else keys
        return replace(
            self,
            query=self.query[batch].index_select(1, tokens).to(dtype),
            key=self.key[batch].index_select(1, keys).to(dtype),
            mask=_take_entry(self.mask, batch, tokens, keys),
            sinks=None if self.sinks is None else self.sinks.to(dtype),
            bias=_take_entry(self.bias, batch, tokens, keys),
        )

    def attention_weights(self, rows: Tensor) -> Tensor:
        logits = self.logits(rows)
        if self.sinks is None:
            alpha = logits.softmax(-1)
            if self.mask is not None and bool(alpha[..., 0].isnan().any()):
                # A query that may attend to nothing: scaled_dot_product_attention gives it nothing.
                alpha.masked_fill_((logits == -torch.inf).all(-1, keepdim=True), 0)
            return alpha
        sinks = self.sinks[:, None, None].expand(-1, len(rows), 1)
        return torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of one sequence ``[H, N, T]`` for the query tokens ``rows`` ``[N]``."""
        query = self.query.index_select(1, rows)
        heads, kv_heads = query.shape[0], self.key.shape[0]
        grouped = query.reshape(kv_heads, -1, query.shape[-1])  # query heads of one key/value head are neighbours
        logits: Tensor = (grouped @ self.key.mT).reshape(heads, len(rows), self.key.shape[1]).mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        bias = _take_rows(self.bias, rows)
        if bias is not None:
            logits.add_(bias.to(logits.dtype))
        mask = _take_rows(self.mask, rows)
        if mask is not None and mask.dtype != torch.bool:
            logits.add_(mask.to(logits.dtype))
        elif mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        if self.causal:
            logits.masked_fill_(self._keys_after_query(rows), -torch.inf)
        return logits

    def pairs(self, rows: Tensor) -> int:
        allowed = ~self._keys_after_query(rows) if self.causal else None
        mask = _take_rows(self.mask, rows)
        if mask is not None:
            attends = allows_attention(mask)
            attends = attends.flatten(0, -3).any(0) if attends.dim() > 2 else attends
            allowed = attends if allowed is None else attends & allowed
        tokens = self.key.shape[1]
        return len(rows) * tokens if allowed is None else int(allowed.expand(len(rows), tokens).sum())

    @property
    def looks_ahead(self) -> bool:
        if self.causal or self.query.shape[-2] == 1:
            return False
        if self.mask is None or self.mask.shape[-2] == 1:
            return True
        return bool(allows_attention(self.mask).triu(1).any())

    def _keys_after_query(self, rows: Tensor) -> Tensor:
        return torch.arange(self.key.shape[1], device=rows.device) > rows[:, None]


@dataclass(frozen=True)
class AttentionWeights:
    """The attention weights ``alpha`` ``[B, H, T, T]`` themselves, as the model computed and applied them.

    As many numbers as the model itself made of them, held while its layer runs.
    """

    alpha: Tensor

    @property
    def rounds_to_float32(self) -> bool:
        return False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, heads, queries, keys = self.alpha.shape
        return batch, heads, queries, keys

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> AttentionWeights:
        rows = self.alpha[batch].index_select(1, tokens)
        return replace(self, alpha=rows.index_select(2, tokens if keys is None else keys).to(dtype))

    def attention_weights(self, rows: Tensor) -> Tensor:
        return self.alpha.index_select(1, rows)

    def pairs(self, rows: Tensor) -> int:
        return int((self.attention_weights(rows) != 0).any(0).sum())

    @property
    def looks_ahead(self) -> bool:
        return bool(self.alpha.triu(1).any())


@dataclass(frozen=True)
class _WeighedAttention:
    """Another attention whose weights are multiplied by ``gain``, which leaves what is masked as it is."""

    attention: Attention
    gain: Tensor

    @property
    def rounds_to_float32(self) -> bool:
        return self.attention.rounds_to_float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.attention.shape

    def pairs(self, rows: Tensor) -> int:
        return self.attention.pairs(rows)

    @property
    def looks_ahead(self) -> bool:
        return self.attention.looks_ahead


@dataclass(frozen=True)
class GatedAttention(_WeighedAttention):
    """Attention whose heads a gate multiplies before the output projection, by ``gain`` ``[B, T, G]`` of a query token:
    a number for each head (``G`` = ``H``), or for each feature of each head (``G`` = ``H * dh``).

    The gate frozen, a feature has weights of its own, ``gain[i, h, f] alpha[h, i, j]``: it is mixed as if it were a
    head. So there are ``G`` heads here.
    """

    @property
    def shape(self) -> tuple[int, int, int, int]:
        batch, _, queries, keys = self.attention.shape
        return batch, self.gain.shape[-1], queries, keys

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> GatedAttention:
        gain = self.gain[batch].index_select(0, tokens).to(dtype)
        return GatedAttention(self.attention.sequence(batch, tokens, dtype, keys), gain)

    def attention_weights(self, rows: Tensor) -> Tensor:
        alpha = self.attention.attention_weights(rows)
        gain = self.gain.index_select(0, rows).T.unflatten(0, (len(alpha), -1))  # [H, G / H, N]
        gated: Tensor = alpha[:, None] * gain[..., None]
        return gated.flatten(0, 1)


@dataclass(frozen=True)
class NormedValues(_WeighedAttention):
    """Attention to values that a norm divides head by head (Gemma 4), times ``gain`` ``[B, T, Hkv]``: a number for each
    key and key/value head.

    The norm's statistics frozen, ``gain[j, h] alpha[h, i, j]`` are the weights of values that were not divided.
    """

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> NormedValues:
        gain = self.gain[batch].index_select(0, tokens if keys is None else keys).to(dtype)
        return NormedValues(self.attention.sequence(batch, tokens, dtype, keys), gain)

    def attention_weights(self, rows: Tensor) -> Tensor:
        alpha = self.attention.attention_weights(rows)
        groups = len(alpha) // self.gain.shape[1]
        weighed: Tensor = alpha * self.gain.T.repeat_interleave(groups, 0)[:, None]
        return weighed


def allows_attention(mask: Tensor) -> Tensor:
    """Returns where a mask, boolean (True: may attend) or additive, lets a query attend to a key, in the mask's shape.

    Models forbid with the lowest number of a dtype or with what is added to it: anything below half of it is masked.
    """
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _take_entry(mask: Tensor | None, batch: int, tokens: Tensor, keys: Tensor) -> Tensor | None:
    """One batch entry of what is broadcastable to ``[B, H, T, T]``, restricted to some queries and keys."""
    if mask is None:
        return None
    mask = mask[min(batch, mask.shape[0] - 1)]
    if mask.shape[-2] > 1:
        mask = mask.index_select(-2, tokens)
    return mask.index_select(-1, keys)


def _take_rows(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[-2] == 1 else mask.index_select(-2, rows)


@dataclass(frozen=True)
class LayerRecord:
    """What one forward pass left of one layer: its input and output ``[B, T, d]`` and its attention.

    Where it is a mixture of experts, the ``routing`` of all sequences one after the other, ``[B * T, k]``. Where it
    has cross-attention: what that reads of the encoder, ``states`` ``[B, T', d]``, and the attention to it.
    ``computed`` is the narrowest dtype that autocast or a projection was seen to compute in. ``edits`` are what hooks
    of the user have made of the layer's parts, the same for every token; ``changed`` says in words what hooks have
    changed inside the layer, in whatever way.
    """

    index: int
    input: Tensor
    output: Tensor
    attention: Attention
    routing: Routing | None = None
    states: Tensor | None = None
    cross: Attention | None = None
    computed: torch.dtype | None = None
    edits: tuple[Edit, ...] = ()
    changed: tuple[str, ...] = ()

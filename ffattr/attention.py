"""What a forward pass leaves of a layer: its input, its output, and its attention without the attention weights.

Shapes: ``B`` sequences of ``T`` tokens, ``H`` query heads, ``Hkv`` key/value heads of width ``dh``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Attention", "LayerRecord"]


@dataclass(frozen=True)
class Attention:
    """What determines attention weights, without the weights: ``softmax(scale * query @ key^T + mask)``.

    With a ``softcap`` c, ``c tanh(. / c)`` of the scaled products; with ``sinks`` ``[H]``, one more logit for each head
    that takes part in the softmax and belongs to no token.

    ``query`` ``[B, H, T, dh]`` and ``key`` ``[B, Hkv, T, dh]`` are taken after any position rotation. ``mask`` is
    broadcastable to ``[B, H, T, T]``, boolean (True: may attend) or additive, or None; ``causal`` masks besides the
    keys after the query. `sequence` gives one batch entry without its padding; its tensors lose the batch dimension.
    """

    query: Tensor
    key: Tensor
    scale: float
    mask: Tensor | None = None
    causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    single: bool = False
    """Whether the model may have rounded the weights to float32, whatever its own dtype."""

    def sequence(self, batch: int, tokens: Tensor, dtype: torch.dtype) -> Attention:
        """Batch entry ``batch`` restricted to the token indices ``tokens`` ``[T']``, in ``dtype``."""
        mask = self.mask
        if mask is not None:
            mask = mask[min(batch, mask.shape[0] - 1)]
            if mask.shape[-2] > 1:
                mask = mask.index_select(-2, tokens)
            mask = mask.index_select(-1, tokens)
        return replace(
            self,
            query=self.query[batch].index_select(1, tokens).to(dtype),
            key=self.key[batch].index_select(1, tokens).to(dtype),
            mask=mask,
            sinks=None if self.sinks is None else self.sinks.to(dtype),
        )

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of one sequence ``[H, N, T]`` for the query tokens ``rows`` ``[N]``."""
        query = self.query.index_select(1, rows)
        heads, kv_heads = query.shape[0], self.key.shape[0]
        grouped = query.reshape(kv_heads, -1, query.shape[-1])  # query heads of one key/value head are neighbours
        logits: Tensor = (grouped @ self.key.mT).reshape(heads, len(rows), -1).mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        mask = self._mask_rows(rows)
        if mask is not None and mask.dtype != torch.bool:
            logits.add_(mask.to(logits.dtype))
        elif mask is not None:
            logits.masked_fill_(~mask, -torch.inf)
        if self.causal:
            logits.masked_fill_(self._later(rows), -torch.inf)
        return logits

    def pairs(self, rows: Tensor) -> int:
        """How many (query, key) pairs of one sequence are not masked for all heads."""
        allowed = ~self._later(rows) if self.causal else None
        mask = self._mask_rows(rows)
        if mask is not None:
            attends = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            attends = attends.flatten(0, -3).any(0) if attends.dim() > 2 else attends
            allowed = attends if allowed is None else attends & allowed
        tokens = self.key.shape[1]
        return len(rows) * tokens if allowed is None else int(allowed.expand(len(rows), tokens).sum())

    @property
    def looks_ahead(self) -> bool:
        """Whether any token may attend to a later one."""
        if self.causal:
            return False
        if self.mask is None or self.mask.shape[-2] == 1:
            return True
        allowed = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        return bool(allowed.triu(1).any())

    def _mask_rows(self, rows: Tensor) -> Tensor | None:
        if self.mask is None or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask.index_select(-2, rows)

    def _later(self, rows: Tensor) -> Tensor:
        return torch.arange(self.key.shape[1], device=rows.device) > rows[:, None]


@dataclass(frozen=True)
class LayerRecord:
    """What one forward pass left of one layer: its input and output ``[B, T, d]`` and its attention."""

    index: int
    input: Tensor
    output: Tensor
    attention: Attention

"""Attention-level maps: norms before the feed-forward block, by quadratic forms in the attention weights.

The vectors that a key brings by every head, and as one more head by itself, have a Gram matrix; the norm of their sum
with any weights follows from it, without work of the model's width for a pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.scopes import Scope
from ..ops import torch_kernels
from ..ops.backends import Backend
from ..ops.contract import MOST_HEADS
from .costs import Blocks
from .key_blocks import KeyBlock
from .key_tokens import KeyTokens, StreamMap
from .pack import QueryBlock
from .query_pass import QueryPass

__all__ = ["AttentionMaps", "own_column_vectors"]


class AttentionMaps:
    """The attention-level maps of a pack."""

    def __init__(
        self, weights: LayerWeights, sources: Sequence[KeyTokens], scopes: frozenset[Scope], backend: Backend
    ) -> None:
        self.weights, self.sources, self.scopes, self.backend = weights, sources, scopes, backend
        self._grams: dict[tuple[int, str], Tensor] = {}  # of all keys

    def tiles(
        self, number: int, passed: QueryPass, itself: Mapping[Scope, Tensor], block: KeyBlock, within: Blocks
    ) -> Iterator[tuple[Scope, Tensor]]:
        """Tiles ``(scope, [..., n, M])`` of a block of keys of source ``number``, of those scopes that are wanted.

        ``itself``: see `own_column_vectors`.
        """
        path = self.sources[number].path
        itself = {scope: vectors for scope, vectors in itself.items() if scope in self.scopes}
        wanted = {(scope.point, scope.axis): scope for scope in self.scopes if scope.source == path.source}
        per_head, attn, atb = (wanted.get(key) for key in (("attn", "head"), ("attn", None), ("atb", None)))
        unnormed = path.residual is path.raw
        summed = atb if unnormed else wanted.get(("attn_res", None))
        forms = GramNorms(block, path.weights.heads, self.backend)
        if per_head or attn or summed or itself:
            raw = self._gram(number, block, "raw", within)
            if per_head:
                yield per_head, torch.stack([forms.compute(raw, [head]) for head in range(forms.heads)])
            if attn:
                yield attn, forms.compute(raw, range(forms.heads))
            if summed or itself:
                whole = forms.compute(raw)
                if summed:
                    yield summed, whole
                yield from self._own_columns(forms, whole, itself)
        if atb and not unnormed:
            yield atb, forms.compute(self._gram(number, block, "residual", within), scale=passed.residual_scale[number])
        normed = wanted.get(("ff_input", None))
        if normed and not self.weights.parallel:
            yield normed, forms.compute(self._gram(number, block, "ff_input", within), scale=passed.ff_scale[number])

    def _own_columns(
        self, forms: GramNorms, whole: Tensor, itself: Mapping[Scope, Tensor]
    ) -> Iterator[tuple[Scope, Tensor]]:
        """Tiles of a parallel layer behind the norm: to its output others come by attention alone."""
        for scope, vectors in itself.items():
            elsewhere = whole if scope == self.weights.all_scopes[-1] else torch.zeros_like(whole)
            yield scope, torch.where(forms.itself, vectors.norm(dim=-1)[:, None], elsewhere)

    def _gram(self, number: int, block: KeyBlock, point: str, within: Blocks) -> Tensor:
        """Products ``[m, G, G]`` of all vectors that a key brings to a point of its path."""
        source = self.sources[number]
        stream_map: StreamMap = getattr(source.path, point)

        def make(tokens: slice | Tensor) -> Tensor:
            own = source.residual_at(stream_map, tokens)
            vectors = block.head_vectors(source.values[tokens], stream_map.matrix, own).double()
            return vectors @ vectors.mT  # in float32 a squared norm would lose half the digits

        if not within.grams or block.size > 1:
            return make(block.tokens)
        whole = self._grams.get((number, point))
        if whole is None:
            parts = (slice(start, start + within.keys) for start in range(0, len(source.values), within.keys))
            whole = self._grams[number, point] = torch.cat([make(part) for part in parts])
        return whole[block.tokens]


@dataclass(frozen=True)
class GramNorms:
    """Norms of what the keys of a block bring before the feed-forward block: quadratic forms in their weights."""

    block: KeyBlock
    heads: int
    backend: Backend

    def compute(self, gram: Tensor, heads: Sequence[int] | None = None, scale: Tensor | None = None) -> Tensor:
        """Norms ``[n, M]``; ``heads``: of these alone, without the residual."""
        block = self.block
        alpha = block.alpha
        if heads is not None:
            every = [token * (self.heads + 1) + head for token in range(block.size) for head in heads]
            alpha, gram = alpha[every], gram[:, every][:, :, every]
        too_many = self.backend.for_gpus and len(alpha) >= MOST_HEADS
        operators = torch_kernels if too_many else self.backend.require_operators()
        return operators.gram_norms(alpha, block.position, gram, scale, block.sequences)

    @property
    def itself(self) -> Tensor:
        """Whether the query is one of the tokens of the key, ``[n, M]``."""
        alpha, position = self.block.alpha, self.block.position
        last = torch.arange(alpha.shape[-1], device=alpha.device) == position[:, None]
        return last | alpha[self.heads :: self.heads + 1].any(0)


def own_column_vectors(weights: LayerWeights, source: KeyTokens, passed: QueryPass) -> dict[Scope, Tensor]:
    """The vectors ``[n, d]`` that the columns of queries themselves hold in a parallel layer, by scope from the norm
    on; without feed-forward scopes where ``passed`` has no slopes."""
    names = weights.own_scopes[weights.own_scopes.index(weights.scope_at("atb")) + 1 :]
    found = [passed.ff_input.vectors[:, 0]] if weights.norm_before_ff is not None else []
    if passed.slopes:
        (alpha,), queries = passed.alpha, passed.queries
        parts = [_keep_own_column(alpha, queries, b, some) for b, some in queries.sequences()]
        read = source.read_context(torch.cat(parts, 1), queries)
        block = read.flatten(1) @ source.path.raw.matrix + queries.pack.x[queries.token_in_pack]
        found += [passed.ff.vectors[:, 0], block + passed.ff.vectors[:, 0]]
    return dict(zip(names, found, strict=False))


def _keep_own_column(alpha: Tensor, queries: QueryBlock, sequence: int, some: slice) -> Tensor:
    """The weights ``[H, n, M]`` that queries of one sequence give to the tokens of their own columns alone."""
    groups, token = queries.pack.sequences[sequence].groups, queries.token_in_sequence[some]
    if groups is None:
        groups = torch.arange(alpha.shape[-1], device=token.device)
    same = (groups == groups[token][:, None]) & (groups >= 0)
    return alpha[:, some] * torch.nn.functional.pad(same, (0, alpha.shape[-1] - same.shape[-1]))

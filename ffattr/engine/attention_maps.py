"""Attention-level maps: norms before the feed-forward block, by quadratic forms in the attention weights.

The vectors that a key brings by every head, and as one more head by itself, have a Gram matrix; the norm of their sum
with any weights follows from it, without work of the model's width for a pair. That is so of Euclidean norms alone: for
what else vectors are reduced to, they are added up for every pair, by the operator of the direct method without a
neuron.
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
from ..ops.contract import MOST_HEADS, Epilogue
from ..ops.reduction import Reduction, reduce_vectors
from .key_blocks import KeyBlock
from .key_tokens import KeyTokens, StreamMap
from .pack import QueryBlock
from .planning.costs import Blocks
from .query_pass import QueryPass

__all__ = ["AttentionMaps", "add_up_heads", "own_column_vectors"]


class AttentionMaps:
    """The attention-level maps of a pack."""

    def __init__(
        self,
        weights: LayerWeights,
        sources: Sequence[KeyTokens],
        scopes: frozenset[Scope],
        backend: Backend,
        reduction: Reduction = "l2",
    ) -> None:
        self.weights, self.sources, self.scopes, self.backend = weights, sources, scopes, backend
        self.reduction = reduction
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
        forms = PairForms(block, path.weights.heads, self.backend, self.reduction)
        totals = passed.totals
        if per_head or attn or summed or itself:
            raw = self._form(number, block, "raw", within)
            if per_head:
                features = path.weights.head_features
                wholes = totals.get(per_head, [None] * (forms.heads // features))
                tiles = [
                    forms.compute(raw, range(head * features, (head + 1) * features), total=whole)
                    for head, whole in enumerate(wholes)
                ]
                yield per_head, torch.stack(tiles)
            if attn:
                yield attn, forms.compute(raw, range(forms.heads), total=totals.get(attn))
            if summed:
                yield summed, forms.compute(raw, total=totals.get(summed))
            for scope, vectors in itself.items():
                yield scope, self._fill_own_columns(forms, raw, scope, vectors, totals.get(scope))
        if atb and not unnormed:
            form, scale = self._form(number, block, "residual", within), passed.residual_scale[number]
            yield atb, forms.compute(form, scale=scale, total=totals.get(atb))
        normed = wanted.get(("ff_input", None))
        if normed and not self.weights.parallel:
            form, scale = self._form(number, block, "ff_input", within), passed.ff_scale[number]
            yield normed, forms.compute(form, scale=scale, total=totals.get(normed))

    def _fill_own_columns(
        self, forms: PairForms, raw: Tensor, scope: Scope, vectors: Tensor, total: Tensor | None
    ) -> Tensor:
        """The tile of a parallel layer behind the norm: to its output others come by attention alone."""
        last = scope == self.weights.all_scopes[-1]
        own = reduce_vectors(vectors, self.reduction, total)[:, None]
        return torch.where(forms.itself, own, forms.compute(raw, total=total) if last else 0)

    def _form(self, number: int, block: KeyBlock, point: str, within: Blocks) -> Tensor:
        """What `PairForms` computes with: of all vectors that a key brings to a point of its path the products
        ``[m, G, G]``, or the vectors themselves ``[m, G, d]``."""
        if self.reduction == "l2":
            return self._gram(number, block, point, within)
        source = self.sources[number]
        stream_map: StreamMap = getattr(source.path, point)
        own = source.residual_at(stream_map, block.tokens)
        return block.head_vectors(source.values[block.tokens], stream_map.matrix, own)

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
class PairForms:
    """What the keys of a block bring before the feed-forward block, reduced: to Euclidean norms by quadratic forms in
    the weights, to anything else by the sums of vectors themselves."""

    block: KeyBlock
    heads: int
    backend: Backend
    reduction: Reduction

    def compute(
        self,
        form: Tensor,
        heads: Sequence[int] | None = None,
        scale: Tensor | None = None,
        total: Tensor | None = None,
    ) -> Tensor:
        """Numbers ``[n, M]`` from Gram matrices ``[m, G, G]`` or vectors ``[m, G, d]``, times ``scale`` ``[n]``.

        ``heads``: of these alone, without the residual. ``total`` ``[n, d]``: what the vectors are compared with.
        """
        block, alpha, position = self.block, self.block.alpha, self.block.position
        rows = None
        if heads is not None:
            rows = [token * (self.heads + 1) + head for token in range(block.size) for head in heads]
            alpha = alpha[rows] if len(rows) < len(alpha) else alpha
        too_many = self.backend.for_gpus and len(alpha) >= MOST_HEADS
        operators = torch_kernels if too_many else self.backend.require_operators()
        if self.reduction == "l2":
            gram = form if rows is None else form[:, rows][:, :, rows]
            return operators.gram_norms(alpha, position, gram, scale, block.sequences)
        if rows is not None:  # the last vector is of the residual, which then no query has
            form = form[:, [*rows, -1]] if len(rows) < form.shape[1] - 1 else form
            position = torch.full_like(position, -1)
        keys, mixed, width = form.shape
        features, slope = form.new_empty(1, keys, mixed, 0), form.new_empty(1, len(position), 0)
        totals = None if total is None else total.expand(2, *total.shape)
        epilogue = Epilogue(form, scale, sequences=block.sequences, reduction=self.reduction, totals=totals)
        return operators.ff_norms(alpha, position, features, slope, form.new_empty(0, width), None, *epilogue)[1]

    @property
    def itself(self) -> Tensor:
        """Whether the query is one of the tokens of the key, ``[n, M]``."""
        alpha, position = self.block.alpha, self.block.position
        last = torch.arange(alpha.shape[-1], device=alpha.device) == position[:, None]
        return last | alpha[self.heads :: self.heads + 1].any(0)


def add_up_heads(source: KeyTokens, alpha: Tensor, queries: QueryBlock) -> Tensor:
    """What all keys bring by each head, ``[H, n, d]``, for the weights ``alpha`` ``[H, n, M]`` of a pass."""
    read = source.read_context(alpha, queries).transpose(0, 1)
    found: Tensor = read @ source.path.raw.matrix.unflatten(0, (len(read), -1))
    features = source.path.weights.head_features
    return found if features == 1 else found.unflatten(0, (-1, features)).sum(1)


def own_column_vectors(weights: LayerWeights, source: KeyTokens, passed: QueryPass) -> dict[Scope, Tensor]:
    """The vectors ``[n, d]`` that the columns of queries themselves hold in a parallel layer, by scope from the norm
    on; without feed-forward scopes where ``passed`` has no slopes."""
    names = weights.own_scopes[weights.own_scopes.index(weights.scope_at("atb")) + 1 :]
    found = [passed.ff_input.vectors] if weights.norm_before_ff is not None else []
    if passed.slopes:
        (alpha,), queries = passed.alpha, passed.queries
        parts = [_keep_own_column(alpha, queries, b, some) for b, some in queries.sequences()]
        read = source.read_context(torch.cat(parts, 1), queries)
        block = read.flatten(1) @ source.path.raw.matrix + queries.pack.x[queries.token_in_pack]
        found += [passed.ff.vectors, block + passed.ff.vectors]
    return dict(zip(names, found, strict=False))


def _keep_own_column(alpha: Tensor, queries: QueryBlock, sequence: int, some: slice) -> Tensor:
    """The weights ``[H, n, M]`` that queries of one sequence give to the tokens of their own columns alone."""
    groups, token = queries.pack.sequences[sequence].groups, queries.token_in_sequence[some]
    if groups is None:
        groups = torch.arange(alpha.shape[-1], device=token.device)
    same = (groups == groups[token][:, None]) & (groups >= 0)
    return alpha[:, some] * torch.nn.functional.pad(same, (0, alpha.shape[-1] - same.shape[-1]))

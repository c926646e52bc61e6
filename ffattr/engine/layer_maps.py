"""All maps of one layer, a block of query tokens at a time.

Data flow. The query tokens' own way through the layer (`query_pass`) yields attention weights, the norms' scales,
slopes, the bias, and the output that is compared with the model's. Then, for each source of keys (`key_tokens`) and a
block of them (`key_blocks`): head vectors, operators, a tile of each map, of those before the feed-forward block
(`attention_maps`) and of those behind it (`ff_maps`). Nothing of size ``[N, T, d]`` exists.

Precision. The operands of feed-forward maps are rounded once each to the dtype of the plan, by the C++ kernels only the
down matrix and what is multiplied by it; attention, streams, statistics and norms are in that of ``x``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.reference import Rule
from ..decomposition.scopes import Scope
from ..decomposition.sketch import Sketch, fit
from ..decomposition.walk import Stream
from ..ops.backends import Backend
from ..ops.reduction import Reduction, normalise_rows, reduce_vectors
from .attention_maps import AttentionMaps, add_up_heads, own_column_vectors
from .ff_maps import FFMaps
from .ff_operands import FFOperands
from .key_blocks import count_columns, cut_keys
from .key_tokens import Recall, attention_paths, make_anew
from .pack import Pack, QueryBlock
from .pair_vectors import PairRows, sample_pair_vectors
from .planning.choose import SAMPLED
from .planning.plan import LayerPlan
from .query_pass import Pairs, QueryPass, Slopes, pass_queries

__all__ = ["LayerMaps", "LayerTask", "MapRows"]

_JUDGES = 8  # one vector in so many judges a sketch: 512 tell a median to a tenth


class LayerTask:
    """One layer and what is wanted of it: what all packs of sequences share."""

    def __init__(
        self,
        weights: LayerWeights,
        scopes: Collection[Scope],
        rule: Rule,
        value_bias: str,
        backend: Backend,
        dtype: torch.dtype,
        recall: Recall = make_anew,
        reduction: Reduction = "l2",
    ) -> None:
        self.recall, self.reduction = recall, reduction
        self.weights, self.value_bias, self.backend, self.dtype = weights, value_bias, backend, dtype
        self.rule, self.asked = rule, tuple(scopes)
        self.scopes = self.asked
        if reduction == "alti":  # rows are divided by the sums of all parts
            parts = itertools.chain.from_iterable(map(self._parts_of_row, self.asked))
            self.scopes = tuple(dict.fromkeys((*self.asked, *parts)))
        self.paths = tuple(attention_paths(weights, recall))
        pairwise = (*weights.pairwise_scopes, weights.expert_scope)
        self.needs_slopes = any(scope.needs_ff for scope in scopes)
        self.attention_level = any(scope.seen_from("own") not in pairwise for scope in scopes)
        self.pairwise = frozenset(scope for scope in self.scopes if scope.seen_from("own") in pairwise)

    @cached_property
    def ff(self) -> FFOperands:
        return FFOperands(self.weights, self.paths, self.backend, self.dtype, self.recall, self.reduction)

    def finish_rows(self, maps: dict[Scope, Tensor], bias: dict[Scope, Tensor]) -> None:
        """Divide complete rows of ALTI by their sums, and each ``bias`` by the same; leave out what was not asked
        for."""
        if self.reduction == "alti":
            for parts in dict.fromkeys(map(self._parts_of_row, self.asked)):
                sums = normalise_rows([maps[part] for part in parts])
                for part in parts:
                    if part.axis is None:
                        bias[part] /= sums
        for scope in {*self.scopes} - {*self.asked}:
            del maps[scope]
            bias.pop(scope, None)

    def _parts_of_row(self, scope: Scope) -> tuple[Scope, ...]:
        """The scopes whose vectors add up to one stream: behind both attentions, those of both sources of keys."""
        if self.weights.cross is None or scope.point in ("attn", "attn_res"):
            return (scope,)
        return scope.seen_from("own"), scope.seen_from("cross")

    def release(self) -> None:
        """Forget what can be made again."""
        self.__dict__.pop("ff", None)


@dataclass(frozen=True)
class MapRows:
    """Complete rows of the maps of ``n`` queries.

    ``maps[scope]`` ``[..., n, C]``, of which a sequence has the first ``columns`` of its source; ``bias[scope]``
    ``[n]`` (none in a scope per head or expert); the layer's ``output`` ``[n, d]``, recomputed.
    """

    queries: QueryBlock
    maps: dict[Scope, Tensor]
    bias: dict[Scope, Tensor]
    output: Tensor
    columns: tuple[list[int], ...] = ()

    def of_sequence(self, scope: Scope, sequence: int, queries: slice) -> Tensor:
        """Some rows of a map, all of one sequence of the pack, in the columns that this has."""
        found = self.maps[scope][..., queries, :]
        return found[..., : self.columns[scope.source == "cross"][sequence]] if self.columns else found


class LayerMaps:
    """A pack of sequences at one layer."""

    def __init__(self, task: LayerTask, pack: Pack, plan: LayerPlan) -> None:
        self.task, self.pack, self.weights = task, pack, task.weights
        self.sources = [path.key_tokens(pack, task.value_bias) for path in task.paths]
        self.columns = [count_columns(source, pack) for source in self.sources]
        self.slopes = Slopes(task.rule, task.backend.require_operators())
        self.sketch_error: dict[Scope, float] = {}
        scopes = frozenset(task.scopes)
        self.attention_maps = AttentionMaps(self.weights, self.sources, scopes, task.backend, task.reduction)
        self.ff_maps: FFMaps | None = None
        if task.pairwise and plan.method != "pairs":
            if plan.shape.rotated:
                task.ff.rotate(task.scopes)
            else:
                task.ff.set_projections({} if plan.sketch is None else self._fit_sketch(plan.sketch), task.scopes)
            self.ff_maps = FFMaps(task.ff, self.sources, scopes)

    def compute_rows(self, queries: QueryBlock, plan: LayerPlan) -> MapRows:
        """All maps of a block of queries."""
        task, weights = self.task, self.weights
        maps = self._make_zeros(queries)
        bias: dict[Scope, Tensor] = {}
        totals: dict[Scope, Tensor] = {}
        wanted = set(task.scopes)

        def take(scope: Scope, stream: Stream) -> None:
            if task.reduction == "alti":
                totals[scope] = stream.total
            if scope in wanted:
                bias[scope] = reduce_vectors(stream.bias, task.reduction, stream.total)
            if pairs is not None:
                pairs.take_stream(scope, stream, some)

        routing = None if self.pack.routing is None else self.pack.routing.of(queries.token_in_pack)
        slopes = self.slopes if task.needs_slopes else None
        by_expert = task.reduction == "alti" and any(scope.axis == "expert" for scope in task.scopes)
        alpha = [source.alpha(queries) for source in self.sources]
        to = {scope: rows for scope, rows in maps.items() if scope in task.pairwise}
        pairs: PairRows | None = None
        parts: Iterable[list[Pairs]] = [[]]
        if to and self.ff_maps is None:
            pairs = PairRows(self.sources, alpha, queries, to, task.reduction)
            parts = pairs.cut_pairs(plan.blocks.queries * plan.blocks.ff_keys)
        for some in parts:
            passed = pass_queries(weights, self.sources, queries, routing, slopes, take, by_expert, alpha, some)
        if task.reduction == "alti":
            passed = replace(passed, totals={**totals, **self._add_up_apart(passed)})
        itself = own_column_vectors(weights, self.sources[0], passed) if weights.parallel else {}
        for number, source in enumerate(self.sources):
            if task.attention_level:
                for block in cut_keys(source, passed.alpha[number], queries, plan.blocks.keys):
                    for scope, tile in self.attention_maps.tiles(number, passed, itself, block, plan.blocks):
                        block.place_tile(tile, maps, scope)
        if self.ff_maps is not None:
            self.ff_maps.fill(passed, routing, plan, to)
            maps.update(to)
        task.finish_rows(maps, bias)
        return MapRows(queries, maps, bias, passed.output, tuple(self.columns))

    def _make_zeros(self, queries: QueryBlock) -> dict[Scope, Tensor]:
        """Empty maps of a block of queries, those of one shape next to each other."""
        shapes: dict[tuple[int, ...], list[Scope]] = {}
        for scope in self.task.scopes:
            columns = max(self.columns[scope.source == "cross"][b] for b, _ in queries.sequences())
            shapes.setdefault((*self._axes_before_queries(scope), len(queries), columns), []).append(scope)
        made = {
            scope: one
            for shape, scopes in shapes.items()
            for scope, one in zip(scopes, self.pack.x.new_zeros(len(scopes), *shape), strict=True)
        }
        return {scope: made[scope] for scope in self.task.scopes}

    def _add_up_apart(self, passed: QueryPass) -> dict[Scope, Tensor]:
        """What the vectors of scopes that are told apart by head or expert add up to, ``[H, n, d]`` or
        ``[k, n, d]``."""
        found = {}
        for scope in self.task.scopes:
            if scope.axis == "head":
                number = [source.path.source for source in self.sources].index(scope.source)
                found[scope] = add_up_heads(self.sources[number], passed.alpha[number], passed.queries)
            elif scope.axis == "expert" and passed.expert_sums is not None:
                found[scope] = passed.expert_sums
        return found

    def _fit_sketch(self, sketch: Sketch) -> dict[Scope, Tensor]:
        """What the vectors of each scope are narrowed by: fitted to those of a few pairs, judged by those of
        others. Scopes for which that would be no narrower are left out."""
        generator = torch.Generator().manual_seed(sketch.seed)
        vectors = sample_pair_vectors(self.weights, self.pack, self.sources, self.slopes, SAMPLED, generator)
        found = {}
        asked = {scope.seen_from("own") for scope in self.task.scopes}
        for scope in (scope for scope in self.weights.pairwise_scopes if scope in asked):
            order = torch.randperm(len(vectors[scope]), generator=generator).to(vectors[scope].device)
            held, rows = order.tensor_split((len(order) // _JUDGES,))
            projection = fit(vectors[scope][rows], sketch, vectors[scope][held])
            self.sketch_error[scope] = projection.error
            if not projection.exact:
                found[scope] = projection.matrix
        return found

    def _axes_before_queries(self, scope: Scope) -> tuple[int, ...]:
        """The axes of a map before the queries."""
        if scope.axis == "head":
            weights = self.task.paths[scope.source == "cross"].weights
            return (weights.heads // weights.head_features,)
        if scope.axis == "expert":
            assert self.pack.routing is not None
            return (self.pack.routing.index.shape[1] + self.weights.shared,)
        return ()

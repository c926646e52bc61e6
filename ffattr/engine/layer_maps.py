"""All maps of one layer, a block of query tokens at a time, tile by tile.

Data flow. The query tokens' own way through the layer (`queries`) yields attention weights, the norms' scales, slopes,
the bias, and the output that is compared with the model's. Then, for each source of keys (`sources`) and a block of
them (`columns`): features, operators, a tile of each map. Nothing of size ``[N, T, d]`` exists.

Precision. The wide operands (`wide`) are rounded once each to the dtype of the plan; attention, streams, statistics and
norms are in that of ``x``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..decomposition.layer import LayerWeights
from ..decomposition.reference import Rule, Stream
from ..decomposition.routing import Routing
from ..decomposition.scopes import CROSS
from ..decomposition.sketch import Sketch, fit
from ..ops import torch_kernels
from ..ops.backends import Backend
from ..ops.contract import MOST_HEADS
from .ff_maps import Given, Wide, WideKeys
from .key_blocks import KeyBlock, blocks, columns_of
from .key_tokens import Level, routes
from .pack import Pack, Part
from .pair_vectors import reach, sampled, vectors
from .plan import SAMPLED, Blocks, LayerPlan
from .query_pass import Arrived, Fed, Slopes, arrive, feed, output

__all__ = ["Layer", "Rows", "Tiled"]

_JUDGES = 8  # one vector in so many judges a sketch: 512 tell a median to a tenth


class Layer:
    """One layer and what is wanted of it: what all packs of sequences share."""

    def __init__(
        self,
        weights: LayerWeights,
        scopes: Collection[str],
        rule: Rule,
        value_bias: str,
        backend: Backend,
        dtype: torch.dtype,
    ) -> None:
        self.weights, self.value_bias, self.backend, self.dtype = weights, value_bias, backend, dtype
        self.rule, self.scopes = rule, tuple(scopes)
        self.routes = tuple(routes(weights))
        wide = (*weights.wide_scopes, weights.expert_scope)
        self.fed = any("_ff" in name for name in scopes)
        self.narrow = any(name.removeprefix(CROSS) not in wide for name in scopes)
        self.pairwise = any(name.removeprefix(CROSS) in wide for name in scopes)

    @cached_property
    def wide(self) -> Wide:
        return Wide(self.weights, self.routes, self.backend, self.dtype)

    def release(self) -> None:
        """Forget what can be made again."""
        self.__dict__.pop("wide", None)


@dataclass(frozen=True)
class Rows:
    """Complete rows of the maps of ``n`` queries ``part``.

    ``maps[scope]`` ``[..., n, C]``, of which a sequence has the first ``columns`` of its source; ``bias[scope]``
    ``[n]`` (zero where a scope is told apart by head or expert); the layer's ``output`` ``[n, d]``, recomputed.
    """

    part: Part
    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    output: Tensor
    columns: tuple[list[int], ...] = ()

    def of(self, name: str, sequence: int, rows: slice) -> Tensor:
        """Some rows of a map, all of one sequence of the pack, in the columns that this has."""
        found = self.maps[name][..., rows, :]
        return found[..., : self.columns[name.startswith(CROSS)][sequence]] if self.columns else found


class Tiled:
    """A pack of sequences at one layer."""

    def __init__(self, layer: Layer, pack: Pack, plan: LayerPlan) -> None:
        self.layer, self.pack = layer, pack
        self.weights, self.scopes, self.operators = layer.weights, frozenset(layer.scopes), layer.backend.operators
        self.sources = [route.source(pack, layer.value_bias) for route in layer.routes]
        self.columns = [columns_of(source, pack) for source in self.sources]
        self.slopes = Slopes(layer.rule, self.operators)
        self.sketch_error: dict[str, float] = {}
        if layer.pairwise and plan.method != "pairs":
            layer.wide.aim({} if plan.sketch is None else self._fitted(plan.sketch), self.scopes)
        self.keys = [
            WideKeys(layer.wide, number, source)
            for number, source in enumerate(self.sources)
            if layer.pairwise and plan.method != "pairs"
        ]
        self._grams: dict[tuple[int, str], Tensor] = {}  # of all keys

    def rows(self, part: Part, plan: LayerPlan) -> Rows:
        """All maps of a block of queries."""
        weights, n = self.weights, len(part)
        found = Rows(part, {}, {}, self.pack.x.new_empty(n, weights.width), tuple(self.columns))
        for name in self.layer.scopes:
            columns = max(self.columns[name.startswith(CROSS)][b] for b, _ in part.sequences())
            found.maps[name] = self.pack.x.new_zeros(*self._apart(name), n, columns)
            found.bias[name] = self.pack.x.new_zeros(n)

        def keep(name: str, stream: Stream) -> None:
            if name in self.scopes:
                found.bias[name].copy_(stream.bias.norm(dim=-1))

        arrived = arrive(weights, self.sources, part, keep)
        routing = None if self.pack.routing is None else self.pack.routing.of(part.rows)
        fed = feed(weights, self.sources, arrived, routing, self.slopes, keep) if self.layer.fed else None
        found.output.copy_(output(weights, arrived, routing) if fed is None else fed.output)
        itself = self._itself(arrived, fed) if weights.parallel else {}
        for number, source in enumerate(self.sources):
            if self.layer.narrow:
                for block in blocks(source, arrived.alpha[number], part, plan.blocks.keys):
                    for name, tile in self._narrow(number, arrived, itself, block, plan.blocks):
                        if name in self.scopes:
                            block.put(tile, found.maps[name])
        if fed is not None and self.layer.pairwise:
            names = (*weights.wide_scopes, weights.expert_scope)
            maps = {name: rows for name, rows in found.maps.items() if name.removeprefix(CROSS) in names}
            if plan.method == "pairs":
                self._pairs(arrived, fed, routing, plan.blocks, maps)
            else:
                self._by_set(arrived, fed, routing, plan, maps)
                self.layer.wide.rest()
        return found

    def _fitted(self, sketch: Sketch) -> dict[str, Tensor]:
        """What the vectors of each scope are narrowed by: fitted to those of a few pairs, judged by those of
        others. Scopes for which that would be no narrower are left out."""
        generator = torch.Generator().manual_seed(sketch.seed)
        given = (self.weights, self.pack, self.sources, self.slopes)
        vectors = sampled(*given, SAMPLED, generator)
        found = {}
        asked = {scope.removeprefix(CROSS) for scope in self.scopes}
        for name in (scope for scope in self.weights.wide_scopes if scope in asked):
            order = torch.randperm(len(vectors[name]), generator=generator).to(vectors[name].device)
            held, rows = order.tensor_split((len(order) // _JUDGES,))
            projection = fit(vectors[name][rows], sketch, vectors[name][held])
            self.sketch_error[name] = projection.error
            if not projection.exact:
                found[name] = projection.matrix
        return found

    def _apart(self, name: str) -> tuple[int, ...]:
        """The axes of a map before the queries."""
        if name.endswith("attn_heads"):
            return (self.layer.routes[name.startswith(CROSS)].weights.heads,)
        if name.endswith("_experts"):
            assert self.pack.routing is not None
            return (self.pack.routing.index.shape[1],)
        return ()

    def _by_set(
        self, arrived: Arrived, fed: Fed, routing: Routing | None, plan: LayerPlan, to: dict[str, Tensor]
    ) -> None:
        """The wide maps of a dense block; of a mixture, those of queries together that go to the same experts."""
        if routing is None:
            self._wide(arrived.queries, arrived, fed.slope.squeeze(2), fed.norm_scale, plan, to)
            return
        for experts, tokens, slots in routing.by_set():
            self.layer.wide.take(experts)
            slope = fed.slope[:, tokens[:, None], slots].flatten(2)
            norm_scale = None if fed.norm_scale is None else fed.norm_scale[tokens]
            some = {name: rows[..., tokens, :] for name, rows in to.items()}
            self._wide(arrived.queries.only(tokens), arrived.only(tokens), slope, norm_scale, plan, some, slots)
            for name, rows in to.items():
                rows[..., tokens, :] = some[name]

    def _wide(
        self,
        part: Part,
        arrived: Arrived,
        slope: Tensor,
        norm_scale: Tensor | None,
        plan: LayerPlan,
        to: dict[str, Tensor],
        slots: Tensor | None = None,
    ) -> None:
        """The wide maps of queries which share a feed-forward block; with ``slots`` ``[n, k]`` also those of its
        experts, each of which has its place among the experts of a token."""
        weights, direct = self.weights, plan.method == "direct"
        for number, source in enumerate(self.sources):
            prefix, ff_scale = source.route.prefix, arrived.ff_scale[number]
            scaled = (slope if ff_scale is None else slope * ff_scale[:, None]).to(self.layer.wide.dtype)
            given = Given(part.rows, scaled, arrived.residual_scale[number], norm_scale)
            for block in blocks(source, arrived.alpha[number], part, plan.blocks.wide_keys):
                tiles = self.keys[number].tiles(block, direct)
                if not self.scopes.isdisjoint(prefix + name for name in weights.wide_scopes):
                    for name, tile in tiles.norms(given).items():
                        if prefix + name in self.scopes:
                            block.put(tile, to[prefix + name])
                if slots is None or prefix + weights.expert_scope not in self.scopes:
                    continue
                rows, by_expert = torch.arange(len(part), device=slots.device), to[prefix + weights.expert_scope]
                for which, slot in enumerate(slots.T):
                    neurons = slice(which * weights.ff_width, (which + 1) * weights.ff_width)
                    tile = by_expert[slot, rows]
                    block.put(tiles.norms(given, neurons)[weights.wide_scopes[0]], tile)
                    by_expert[slot, rows] = tile

    def _pairs(
        self, arrived: Arrived, fed: Fed, routing: Routing | None, within: Blocks, to: dict[str, Tensor]
    ) -> None:
        """The wide maps, a vector for every pair."""
        for number, source in enumerate(self.sources):
            place = self._places(arrived.queries, arrived.alpha[number].shape[-1])
            query, column = (reach(source, number, arrived) & (place >= 0)).nonzero(as_tuple=True)
            step = within.queries * within.wide_keys
            for some, keys in zip(query.split(step), column.split(step), strict=True):
                given = (self.weights, source, number, arrived, fed, routing, some, keys)
                for name, found in vectors(*given).items():
                    if source.route.prefix + name in self.scopes:
                        to[source.route.prefix + name][some, place[some, keys]] = found.norm(dim=-1)

    def _places(self, part: Part, keys: int) -> Tensor:
        """``[n, M]``: the column of every key of a query's sequence, where each has its own; -1 for none."""
        whole = torch.arange(keys, device=part.rows.device)
        places = whole.repeat(len(part), 1)
        for b, rows in part.sequences():
            groups = self.pack.sequences[b].groups
            if groups is not None:
                places[rows, : len(groups)] = groups
        return places

    def _itself(self, arrived: Arrived, fed: Fed | None) -> dict[str, Tensor]:
        """Of a parallel layer: the vectors ``[n, d]`` that the columns of queries themselves hold of their own scopes
        from the norm on."""
        names = self.weights.own_scopes[self.weights.own_scopes.index("atb") + 1 :]
        found = [arrived.ff_input.vectors[:, 0]] if self.weights.norm_before_ff is not None else []
        if fed is not None:
            (source,), (alpha,), part = self.sources, arrived.alpha, arrived.queries
            read = source.read(
                torch.cat([self._of_own_column(alpha, part, b, rows) for b, rows in part.sequences()], 1), part
            )
            block = read.flatten(1) @ source.route.raw.matrix + self.pack.x[part.rows]
            found += [fed.ff.vectors[:, 0], block + fed.ff.vectors[:, 0]]
        return dict(zip(names, found, strict=False))

    def _of_own_column(self, alpha: Tensor, part: Part, sequence: int, rows: slice) -> Tensor:
        """The weights ``[H, n, M]`` that queries of one sequence give to the tokens of their own columns alone."""
        groups, local = self.pack.sequences[sequence].groups, part.local[rows]
        if groups is None:
            groups = torch.arange(alpha.shape[-1], device=local.device)
        same = (groups == groups[local][:, None]) & (groups >= 0)
        return alpha[:, rows] * torch.nn.functional.pad(same, (0, alpha.shape[-1] - same.shape[-1]))

    def _gram(self, number: int, block: KeyBlock, name: str, within: Blocks) -> Tensor:
        """``[m, G, G]``: products of all vectors that a key brings to the level ``name`` of its route."""
        source = self.sources[number]
        level: Level = getattr(source.route, name)

        def made(tokens: slice | Tensor) -> Tensor:
            vectors = block.features(source.values[tokens], level.matrix, source.own(level, tokens)).double()
            return vectors @ vectors.mT  # in float32 a squared norm would lose half the digits

        if not within.grams or block.size > 1:
            return made(block.tokens)
        whole = self._grams.get((number, name))
        if whole is None:
            parts = (slice(start, start + within.keys) for start in range(0, len(source.values), within.keys))
            whole = self._grams[number, name] = torch.cat([made(part) for part in parts])
        return whole[block.tokens]

    def _narrow(
        self, number: int, arrived: Arrived, itself: dict[str, Tensor], block: KeyBlock, within: Blocks
    ) -> Iterator[tuple[str, Tensor]]:
        """Tiles ``(scope, [..., n, M])`` of a source's attention-level scopes, by quadratic forms."""
        weights, scopes, route = self.weights, self.scopes, self.layer.routes[number]
        of_heads, attn, atb = (route.prefix + name for name in ("attn_heads", "attn", "atb"))
        summed = atb if route.residual is route.raw else f"{route.prefix}attn_res"
        form = _Forms(block, route.weights.heads, self.layer.backend)
        if not scopes.isdisjoint((of_heads, attn, summed, *itself)):
            raw = self._gram(number, block, "raw", within)
            if of_heads in scopes:
                yield of_heads, torch.stack([form.norms(raw, [head]) for head in range(form.heads)])
            if attn in scopes:
                yield attn, form.norms(raw, range(form.heads))
            if not scopes.isdisjoint((summed, *itself)):
                whole = form.norms(raw)
                yield summed, whole
                for name, vectors in itself.items():  # to a parallel layer's output others come by attention alone
                    elsewhere = whole if name == weights.scopes[-1] else torch.zeros_like(whole)
                    yield name, torch.where(form.itself, vectors.norm(dim=-1)[:, None], elsewhere)
        if atb != summed and atb in scopes:
            gram = self._gram(number, block, "residual", within)
            yield atb, form.norms(gram, scale=arrived.residual_scale[number])
        if weights.norm_before_ff is not None and not weights.parallel:
            normed = route.prefix + weights.own_scopes[weights.own_scopes.index("atb") + 1]
            if normed in scopes:
                gram = self._gram(number, block, "ff_input", within)
                yield normed, form.norms(gram, scale=arrived.ff_scale[number])


@dataclass(frozen=True)
class _Forms:
    """Norms of what the keys of a block bring before the feed-forward block: quadratic forms in their weights."""

    block: KeyBlock
    heads: int
    backend: Backend

    def norms(self, gram: Tensor, heads: Sequence[int] | None = None, scale: Tensor | None = None) -> Tensor:
        """``[n, M]``; ``heads``: of these alone, without the residual."""
        block = self.block
        alpha = block.alpha
        if heads is not None:
            every = [token * (self.heads + 1) + head for token in range(block.size) for head in heads]
            alpha, gram = alpha[every], gram[:, every][:, :, every]
        operators = torch_kernels if self.backend.for_gpus and len(alpha) >= MOST_HEADS else self.backend.operators
        out: Tensor = operators.gram_norms(alpha, block.position, gram, scale, block.sequences)
        return out

    @property
    def itself(self) -> Tensor:
        """``[n, M]``: whether the query is one of the tokens of the key."""
        alpha, position = self.block.alpha, self.block.position
        last = torch.arange(alpha.shape[-1], device=alpha.device) == position[:, None]
        return last | alpha[self.heads :: self.heads + 1].any(0)

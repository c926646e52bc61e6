"""All maps of one layer and sequence for one block of query tokens, tile by tile.

Data flow. The query tokens' own way through the layer (`queries`) yields attention weights, the norms' scales, slopes,
the bias, and the output that is compared with the model's. Then, for each source of keys (`sources`) and a block of
them: features, operators, a tile of each map. Nothing of size ``[N, T, d]`` exists.

Precision. The wide operands (`wide`) are rounded once each to the dtype of the plan; attention, streams, statistics and
norms are in that of ``x``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import Attention
from .backends import Backend
from .experts import Routing
from .layer import CROSS, LayerWeights
from .plan import LayerPlan
from .queries import Arrived, Fed, Slopes, arrive, feed, output
from .reference import Encoder, Rule, Stream
from .sources import Level, Source, features, sources
from .wide import Wide

__all__ = ["Layer", "LayerMaps", "Places"]

Places = slice | Tensor
"""Rows of a map: where a block's queries go."""


@dataclass(frozen=True)
class LayerMaps:
    """Norms of one layer and one sequence, the layer output ``[N, d]`` recomputed on the way, and the plan that ran.

    ``maps[scope]`` ``[N, T]`` (``attn_heads``: ``[H, N, T]``, by expert: ``[k, N, T]``), ``bias[scope]`` ``[N]`` (zero
    where a scope is told apart by head or expert).
    """

    maps: dict[str, Tensor]
    bias: dict[str, Tensor]
    output: Tensor
    plan: LayerPlan


_Tiles = Iterator[tuple[str, Tensor]]


class Layer:
    """What all blocks of one layer and sequence share."""

    def __init__(
        self,
        weights: LayerWeights,
        x: Tensor,
        attention: Attention,
        scopes: Collection[str],
        rule: Rule,
        value_bias: str,
        backend: Backend,
        plan: LayerPlan,
        routing: Routing | None,
        encoder: Encoder | None,
    ) -> None:
        self.weights, self.x, self.plan, self.routing = weights, x, plan, routing
        self.operators = backend.operators
        self.slopes = Slopes(rule, backend.operators)
        self.scopes = frozenset(scopes)
        self.sources = tuple(sources(weights, x, attention, encoder, value_bias))
        self.fed = any("_ff" in name for name in scopes)
        wide = (*weights.wide_scopes, weights.expert_scope)
        self.narrow = any(name.removeprefix(CROSS) not in wide for name in scopes)
        found = any(name.removeprefix(CROSS) in wide for name in scopes)
        self.wide = Wide(weights, self.sources, backend, plan) if found else None

    def run(self, rows: Tensor, places: Places, result: LayerMaps) -> None:
        """All maps of the queries ``rows`` ``[n]``, which are the rows ``places`` of the maps."""
        weights = self.weights

        def keep(name: str, stream: Stream) -> None:
            if name in self.scopes:
                result.bias[name][places] = stream.bias.norm(dim=-1)

        arrived = arrive(weights, self.sources, self.x, rows, keep)
        routing = None if self.routing is None else self.routing.of(rows)
        fed = feed(weights, self.sources, arrived, routing, self.slopes, keep) if self.fed else None
        result.output[places] = output(weights, arrived, routing) if fed is None else fed.output
        itself = self._itself(arrived, fed) if weights.parallel else {}
        for number, source in enumerate(self.sources):
            if self.narrow:
                for keys, alpha, position in self._blocks(source, arrived.alpha[number], rows, self.plan.blocks.keys):
                    for name, tile in self._narrow(number, arrived, itself, keys, alpha, position):
                        if name in self.scopes:
                            result.maps[name][..., places, keys] = tile
        if self.wide is not None:
            assert fed is not None
            self._run_wide(self.wide, arrived, fed, routing, places, result)

    def _blocks(self, source: Source, alpha: Tensor, rows: Tensor, step: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(keys, alpha [H, n, m], position [n])`` of every block of a source's keys that any query gives weight to.

        The maps begin as zeros, so that blocks without weight need no work.
        """
        for start in range(0, source.tokens, step):
            keys = slice(start, min(start + step, source.tokens))
            part = alpha[..., keys]
            position = rows - start if source.own else torch.full_like(rows, -1)
            # To ask would stop a GPU at every block; its kernels skip what is empty.
            if alpha.is_cuda or _in_reach(part, position):
                yield keys, part.contiguous(), position

    def _run_wide(
        self, wide: Wide, arrived: Arrived, fed: Fed, routing: Routing | None, places: Places, result: LayerMaps
    ) -> None:
        if routing is None:
            slope = fed.slope.squeeze(2)
            self._wide(wide, arrived, slope, fed.norm_scale, slice(None), places, result)
            return
        assert isinstance(places, Tensor)
        for experts, tokens, slots in routing.by_set():
            wide.load([self.weights.expert(number) for number in experts])
            slope = fed.slope[:, tokens[:, None], slots].flatten(2)
            norm_scale = None if fed.norm_scale is None else fed.norm_scale[tokens]
            self._wide(wide, arrived, slope, norm_scale, tokens, places[tokens], result, slots)

    def _wide(
        self,
        wide: Wide,
        arrived: Arrived,
        slope: Tensor,
        norm_scale: Tensor | None,
        tokens: slice | Tensor,
        places: Places,
        result: LayerMaps,
        slots: Tensor | None = None,
    ) -> None:
        """The wide maps of the block's queries ``tokens``, which share a feed-forward block; with ``slots`` ``[n, k]``
        also those of its experts, each of which has its place among the experts of a token."""
        rows = arrived.rows[tokens]
        for number, source in enumerate(self.sources):
            ff_scale, residual_scale = arrived.ff_scale[number], arrived.residual_scale[number]
            scaled = (slope if ff_scale is None else slope * ff_scale[tokens, None]).to(wide.dtype)
            of_stream = None if residual_scale is None else residual_scale[tokens]
            alpha = arrived.alpha[number][:, tokens]
            for keys, part, position in self._blocks(source, alpha, rows, self.plan.blocks.wide_keys):
                tiles, given = wide.of_keys(number, keys), (part, rows, position, scaled, of_stream, norm_scale)
                if not self.scopes.isdisjoint(source.prefix + name for name in self.weights.wide_scopes):
                    for name, tile in zip(self.weights.wide_scopes, tiles.norms(*given), strict=True):
                        if source.prefix + name in self.scopes:
                            result.maps[source.prefix + name][..., places, keys] = tile
                if slots is None or source.prefix + self.weights.expert_scope not in self.scopes:
                    continue
                for which, slot in enumerate(slots.T):
                    neurons = slice(which * self.weights.ff_width, (which + 1) * self.weights.ff_width)
                    tile = tiles.norms(*given, neurons)[0]
                    result.maps[source.prefix + self.weights.expert_scope][slot, places, keys] = tile

    def _itself(self, arrived: Arrived, fed: Fed | None) -> dict[str, Tensor]:
        """Of a parallel layer: the vectors ``[n, d]`` that queries bring to their own scopes from the norm on."""
        names = self.weights.own_scopes[self.weights.own_scopes.index("atb") + 1 :]
        found = [arrived.ff_input.vectors[:, 0]] if self.weights.norm_before_ff is not None else []
        if fed is not None:
            (source,), (alpha,), rows = self.sources, arrived.alpha, arrived.rows
            weight = alpha.gather(-1, rows.expand(len(alpha), -1)[..., None]).transpose(0, 1)  # [n, H, 1]
            block = (weight * source.values[rows]).flatten(1) @ source.raw.matrix + self.x[rows]
            found += [fed.ff.vectors[:, 0], block + fed.ff.vectors[:, 0]]
        return dict(zip(names, found, strict=False))

    def _narrow(
        self, number: int, arrived: Arrived, itself: dict[str, Tensor], keys: slice, alpha: Tensor, position: Tensor
    ) -> _Tiles:
        """Tiles ``(scope, [n, m])`` of a source's attention-level scopes, by quadratic forms."""
        weights, source, scopes = self.weights, self.sources[number], self.scopes

        def gram(level: Level) -> Tensor:
            mixed = self.x.new_empty(keys.stop - keys.start, source.values.shape[1] + 1, weights.width)
            wide = features(source.values[keys], level.matrix, level.own[keys], mixed).double()
            return wide @ wide.mT  # in float64: in float32 a squared norm would lose half the digits

        def norms(gram: Tensor, scale: Tensor | None) -> Tensor:
            out: Tensor = self.operators.gram_norms(alpha, position, gram, scale)
            return out

        heads, attn, atb = (source.prefix + name for name in ("attn_heads", "attn", "atb"))
        summed = atb if source.residual is source.raw else f"{source.prefix}attn_res"
        if not scopes.isdisjoint((heads, attn, summed, *itself)):
            raw = gram(source.raw)
            of_heads = raw[:, :-1, :-1]
            if heads in scopes:
                head_norms = of_heads.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().to(alpha.dtype)  # [m, H]
                yield heads, alpha * head_norms.T[:, None]
            if attn in scopes:
                yield attn, norms(of_heads, None)
            if not scopes.isdisjoint((summed, *itself)):
                whole = norms(raw, None)
                yield summed, whole
                # To a parallel layer's output other tokens come by attention alone.
                here = torch.arange(alpha.shape[-1], device=alpha.device) == position[:, None]
                for name, vectors in itself.items():
                    elsewhere = whole if name == weights.scopes[-1] else torch.zeros_like(whole)
                    yield name, torch.where(here, vectors.norm(dim=-1)[:, None], elsewhere)
        if atb != summed and atb in scopes:
            yield atb, norms(gram(source.residual), arrived.residual_scale[number])
        if weights.norm_before_ff is not None and not weights.parallel:
            normed = source.prefix + weights.own_scopes[weights.own_scopes.index("atb") + 1]
            if normed in scopes:
                yield normed, norms(gram(source.ff_input), arrived.ff_scale[number])


def _in_reach(alpha: Tensor, position: Tensor) -> bool:
    """Whether any pair of a block has weight: none does beyond the causal diagonal or outside a window."""
    return bool(((position >= 0) & (position < alpha.shape[-1])).any()) or bool(alpha.any())

"""The walk through a layer transposed: directions pulled back from its output to its input.

Freeze a layer at one forward pass: its output is affine in the vectors of its tokens. Let ``g_i`` be the direction in
which a number ``y`` reads output token ``i``, ``y = sum_i <g_i, layer(x)_i> + const``. Then

    g'_j = sum_i F_ij^T g_i                  the direction in which y reads the layer's input token j
    flow[i, j] = <g_i, F_i(x_j)>             what passes from token j to token i on its way to y
    constant = sum_i <g_i, bias_i>           what comes from no token

and ``sum_j <g'_j, x_j> + constant = sum_i <g_i, layer(x)_i>``. It costs what the layer costs, for each direction:
``v_i = W_O J_i^T g_i``, the direction pulled back through norms and feed-forward block to what the heads read, takes
no pair of tokens; with it, all pairs are ``alpha[h, i, j] <v_ih, value_jh>``, a product like that of queries and keys.

Shapes: ``K`` directions, ``T`` tokens of one sequence, ``n`` query tokens of a block, ``d`` model width, ``H`` query
heads of width ``dh``, ``F`` feed-forward width, ``S`` pre-activations of a neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..affine import Norm
from ..attention import Attention
from ..layer import Block, Branch, LayerWeights
from ..reference import Encoder, Path, Rule
from ..routing import Routing
from ..scopes import Point, Scope, Source
from ..walk import Station, Stream, walk
from .pieces import KeySide, add_constant, transpose_linear, transpose_norm

__all__ = ["Flow", "LayerAdjoint", "Through", "paths_of_point"]

Through = Literal["both", "bypass", "ff"]
"""Which way directions are pulled back past the feed-forward block: through it, along the residual connection that
bypasses it, or both."""

_AT_ONCE = 1 << 24
"""Numbers of the largest tensors of a block of queries: above 32 MiB, what malloc gives back at once."""

_NORM_BEFORE: dict[Point, str] = {
    "attn": "norm_of_attn",
    "ff_input": "norm_before_ff",
    "ff": "norm_of_ff",
    "ff_res_ln": "norm_after_ff",
}

Slopes = Callable[[Branch, Path], Tensor]
"""Returns the factors of Integrated Gradients ``[S, n, F]`` of a path."""


@dataclass(frozen=True)
class Flow:
    """What passes from every token to ``n`` query tokens, for ``K`` directions.

    ``tiles``: for each source of keys ``[K, n, T]``, by head ``[K, H, n, T]``. ``residual`` ``[K, n]`` is what the
    query tokens keep of themselves along the residual connection: part of the diagonal of the own tokens' tile, but of
    no head's.
    """

    tiles: dict[Source, Tensor]
    residual: Tensor


@dataclass(frozen=True)
class _Network:
    """A feed-forward network frozen at some tokens: its ``slope`` ``[S, m, F]``, and what its neurons have where no
    input is present, ``start`` ``[m or 1, F]``, None: nothing."""

    block: Block
    slope: Tensor
    start: Tensor | None


@dataclass
class _Frozen:
    """What ``n`` query tokens leave on their way through a layer, in the order of the way.

    ``scales``: ``1 / s_i`` ``[n]`` of each norm, by its name in the weights and the attention it belongs to;
    ``totals``: the stream ``[n, d]`` at every point.
    """

    alpha: dict[Source, Tensor] = field(default_factory=dict)
    totals: dict[Scope, Tensor] = field(default_factory=dict)
    scales: dict[tuple[str, Source], Tensor] = field(default_factory=dict)
    networks: list[_Network] = field(default_factory=list)


class LayerAdjoint:
    """One layer of one sequence, frozen; takes directions for its output, block of queries by block.

    ``own`` ``[K, T, d]`` and ``encoder`` ``[K, T', d]`` (where cross-attention reads an encoder's states) are the
    directions in which the layer's inputs are read, and ``constant`` ``[K]`` what comes from no token; all are whole
    after `join_blocks`.
    """

    def __init__(
        self,
        weights: LayerWeights,
        x: Tensor,
        attention: Attention,
        directions: int,
        rule: Rule,
        value_bias: str = "token",
        routing: Routing | None = None,
        encoder: Encoder | None = None,
        slopes: Slopes | None = None,
    ) -> None:
        self.weights, self.x, self.rule, self.routing = weights, x, rule, routing
        self._slopes = slopes or (lambda branch, path: reference.slopes(branch, path, rule))
        self._sides: dict[Source, KeySide] = {"own": KeySide.from_keys(weights, x, attention, value_bias)}
        if weights.cross is not None and encoder is not None:
            self._sides["cross"] = KeySide.from_keys(weights.cross, encoder.states, encoder.attention, value_bias)
        self.own = x.new_zeros(directions, *x.shape)
        self.encoder: Tensor | None = None
        self.constant = x.new_zeros(directions)

    def cut_rows(self, rows: Tensor) -> Iterator[Tensor]:
        """Cuts the query tokens ``rows`` into blocks whose largest tensors are bounded, whatever the length."""
        neurons = max(branch.width * len(branch.projections) for branch in self.weights.branches)
        keys = sum(len(side.keys) for side in self._sides.values())
        numbers = max(self.weights.heads * keys, len(self.own) * max(neurons, keys), 1)
        yield from rows.split(max(1, _AT_ONCE // numbers))

    def pull_back(self, rows: Tensor, directions: Tensor) -> tuple[Tensor, _Frozen]:
        """Takes the directions ``[K, n, d]`` of the query tokens ``rows`` ``[n]``.

        Returns the layer's output ``[n, d]`` there, as recomputed, and what `trace_flow` needs.
        """
        frozen, output = self.freeze_queries(rows)
        attended, residual = self._pull_through(self.weights, frozen, directions, "both", self.constant)
        self.own.index_add_(1, rows, residual)
        for source, read in attended.items():
            self._sides[source].gather_directions(frozen.alpha[source], read)
        return output, frozen

    def trace_flow(
        self, rows: Tensor, directions: Tensor, frozen: _Frozen, through: Through, residual: bool, by_head: bool
    ) -> Flow:
        """Returns what passes to the query tokens ``rows``; ``frozen`` is what `pull_back` returned of them.

        Without ``residual``, what bypasses attention as well is left out.
        """
        attended, itself = self._pull_through(self.weights, frozen, directions, through, None)
        return self._multiply_values(rows, frozen, attended, itself if residual else None, by_head)

    def project_vectors(self, rows: Tensor, direction: Tensor, frozen: _Frozen, scope: Scope) -> tuple[Flow, Tensor]:
        """Returns ``<direction, F_i(x_j)>`` of the vectors of a scope, seen from every source, to the query tokens
        ``rows``; and what of the stream there comes from no token, ``[n]`` (zero by head).

        ``direction`` ``[d]`` is the same for all; ``frozen`` is what `freeze_queries` returned of the tokens.
        """
        point, (through, residual) = scope.point, paths_of_point(scope.point)
        weights = _cut_behind(self.weights, scope)
        directions = direction.to(self.x).expand(1, len(rows), -1)
        attended, itself = self._pull_through(weights, frozen, directions, through, None, point == "ff_input")
        if point == "attn":
            attended = {scope.source: attended[scope.source]}
        by_head = scope.axis == "head"
        flow = self._multiply_values(rows, frozen, attended, itself if residual else None, by_head)
        if by_head:
            return flow, flow.residual.new_zeros(len(rows))
        total = frozen.totals[scope if point in ("attn", "attn_res") else scope.seen_from("own")]
        return flow, total @ direction.to(total) - torch.cat(list(flow.tiles.values()), -1).sum(-1)[0]

    def _multiply_values(
        self, rows: Tensor, frozen: _Frozen, attended: dict[Source, Tensor], itself: Tensor | None, by_head: bool
    ) -> Flow:
        """Multiplies the directions in which heads, and beside them the layer's own input, are read with these."""
        first = next(iter(attended.values()))
        kept = first.new_zeros(first.shape[:2]) if itself is None else (itself * self.x[rows]).sum(-1)
        tiles: dict[Source, Tensor] = {}
        for source, read in attended.items():
            values, alpha = self._sides[source].values.transpose(0, 1), frozen.alpha[source]
            if by_head:
                tiles[source] = self._multiply_by_head(source, alpha, read)
                continue
            tile = tiles[source] = values.new_zeros(*read.shape[:2], values.shape[1])
            for head in range(len(alpha)):  # one by one: of all of them it would be the largest tensor
                tile.addcmul_(read[:, :, head] @ values[head].T, alpha[head])
            if source == "own":
                tile[:, torch.arange(len(rows), device=rows.device), rows] += kept
        return Flow(tiles, kept)

    def _multiply_by_head(self, source: Source, alpha: Tensor, read: Tensor) -> Tensor:
        """Returns the flow ``[K, H, n, T]`` by each of the model's heads, which are read in the directions ``read``."""
        side = self._sides[source]
        tile = (read.transpose(1, 2) @ side.values.transpose(0, 1).mT).mul_(alpha)
        features = side.weights.head_features
        return tile if features == 1 else tile.unflatten(1, (-1, features)).sum(2)

    def join_blocks(self) -> None:
        """Brings together what all blocks have given."""
        for source, side in self._sides.items():
            if side.pulled is None:  # no query was read
                pulled = self.own.new_zeros(len(self.own), *side.keys.shape)
            else:
                pulled = side.pull_to_keys(self.constant)
            if source == "own":
                self.own += pulled
            else:
                self.encoder = pulled
            side.pulled = None

    def freeze_queries(self, rows: Tensor) -> tuple[_Frozen, Tensor]:
        """Carries the query tokens through the layer, and returns what stays frozen and their output ``[n, d]``."""
        weights, frozen = self.weights, _Frozen()
        own = Stream.of_total(self.x[rows])

        def attend(source: Source) -> Stream:
            side = self._sides[source]
            alpha = frozen.alpha[source] = side.attention.attention_weights(rows)
            read = reference.context(alpha, side.values)
            return reference.attention_stream(side.weights, alpha, read, side.constant)

        def feed_forward(read: Stream) -> Stream:
            total = torch.zeros_like(read.total)
            routing = None if self.routing is None else self.routing.of(rows)
            for block in weights.blocks(routing):
                network, returned = self._freeze_network(block, read)
                frozen.networks.append(network)
                if block.tokens is None:
                    total += returned
                else:
                    total.index_add_(0, block.tokens, returned)
            return read.with_total(total)

        for station in walk(weights, own, attend, feed_forward):
            if station.norm_scale is not None:
                frozen.scales[self._passed_norm(station)] = station.norm_scale
            if station.scope is not None:
                frozen.totals[station.scope] = station.stream.total
        return frozen, station.stream.total

    def _freeze_network(self, block: Block, read: Stream) -> tuple[_Network, Tensor]:
        """Freezes a network at what it reads, and gives what it adds to its tokens ``[m, d]``."""
        branch, baseline = block.branch, self.rule.baseline
        read, _ = reference.enter_block(block, read)
        z = torch.stack([projection(read.total) for projection in branch.projections])
        bias = z.new_empty(0)
        if baseline == "bias":  # nothing else asks for it
            bias = torch.stack([projection(read.bias) for projection in branch.projections])
        base = reference.path_start(branch, z, bias, baseline)
        slope = self._slopes(branch, Path(z, bias, base, z[:, :0]))
        if base is None:
            start = z.new_tensor(reference.start_value(branch, None))
        else:
            start = reference.apply_activation(branch, base) - (slope * base).sum(0)
        network = _Network(block, slope, start if bool(start.any()) else None)
        returned = Stream.of_total(branch.down(reference.apply_activation(branch, z)))
        return network, reference.leave_block(block, returned).total

    def _passed_norm(self, station: Station) -> tuple[str, Source]:
        """Returns the name of the norm that a station lies behind, and the attention that it is of."""
        scope = station.scope
        if scope is None:
            return "norm_after_attn", "own"
        if scope.point == "atb":
            return "norm_after_attn", self.weights.attentions[-1][0]
        return _NORM_BEFORE[scope.point], scope.source

    def _pull_through(
        self,
        weights: LayerWeights,
        frozen: _Frozen,
        directions: Tensor,
        through: Through,
        constant: Tensor | None,
        before_networks: bool = False,
    ) -> tuple[dict[Source, Tensor], Tensor]:
        """The stations of the walk in reverse. Returns in which direction each attention's heads are read
        ``[K, n, H, dh]``, and the layer's own input beside them ``[K, n, d]``.

        Adds what comes from no token to ``constant`` ``[K]``. ``weights`` are the layer's, with nothing behind the
        point where the directions are; ``before_networks``: they are at what the feed-forward networks read.
        """

        def pull(name: str, norm: Norm | None, direction: Tensor, source: Source = "own") -> Tensor:
            if norm is None:
                return direction
            add_constant(constant, norm.bias, direction)
            return transpose_norm(norm, frozen.scales[name, source], direction)

        trunk = pull("norm_after_ff", weights.norm_after_ff, directions)
        beside = torch.zeros_like(trunk)  # what reads the layer's input past everything
        if through != "bypass":
            ff = pull("norm_of_ff", weights.norm_of_ff, trunk)
            ff = ff if before_networks else self._pull_networks(frozen.networks, ff, constant)
            ff = pull("norm_before_ff", weights.norm_before_ff, ff)
            trunk = torch.zeros_like(trunk) if through == "ff" else trunk
            beside, trunk = (ff, trunk) if weights.parallel else (beside, trunk + ff)
        attended: dict[Source, Tensor] = {}
        for source, part in reversed(weights.attentions):
            trunk = pull("norm_after_attn", part.norm_after_attn, trunk, source)
            read = pull("norm_of_attn", part.norm_of_attn, trunk, source)
            attended[source] = transpose_linear(part.out, read, constant).unflatten(-1, (part.heads, -1))
        return attended, trunk + beside

    def _pull_networks(self, networks: list[_Network], directions: Tensor, constant: Tensor | None) -> Tensor:
        """Pulls the directions ``[K, n, d]`` back through the sum of the feed-forward networks."""
        pulled = torch.zeros_like(directions)
        for network in networks:
            block, branch = network.block, network.block.branch
            share = None if block.share is None else block.share[:, None]
            part = directions if block.tokens is None else directions[:, block.tokens]
            part = part if share is None or branch.scales_input else part * share
            neurons = transpose_linear(branch.down, part, constant)
            if constant is not None and network.start is not None:
                constant += (neurons * network.start).sum((1, 2))
            for projection, slope in zip(branch.projections, network.slope, strict=True):
                back = transpose_linear(projection, neurons * slope, constant)
                back = back * share if share is not None and branch.scales_input else back
                if block.tokens is None:
                    pulled += back
                else:
                    pulled.index_add_(1, block.tokens, back)
        return pulled


def paths_of_point(point: Point) -> tuple[Through, bool]:
    """Returns which way a flow that is traced at a point of the layer takes past the feed-forward block, and whether
    the residual connection around attention belongs to it.

    What has reached a point before the block goes on to the layer's output along the residual connection alone; what
    the block reads and returns goes on through it; behind it, both have come together (our definition).
    """
    if point in ("attn", "attn_res", "atb"):
        return "bypass", point != "attn"
    return ("ff", True) if point in ("ff_input", "ff") else ("both", True)


def _cut_behind(weights: LayerWeights, scope: Scope) -> LayerWeights:
    """The layer without what lies behind the point of a scope."""
    cross, before = weights.cross, scope.point in ("attn", "attn_res")
    if before:
        cross = None if cross is None or scope.source == "own" else replace(cross, norm_after_attn=None)
    return replace(
        weights,
        cross=cross,
        norm_after_attn=None if before and scope.source == "own" else weights.norm_after_attn,
        norm_of_ff=None if scope.point == "ff_input" else weights.norm_of_ff,
        norm_after_ff=weights.norm_after_ff if scope.point == "ff_res_ln" else None,
    )

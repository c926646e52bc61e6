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
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .. import reference
from ..affine import Linear, Norm
from ..attention import Attention
from ..layer import Block, Branch, CrossWeights, LayerWeights
from ..reference import Encoder, Path, Rule
from ..routing import Routing
from ..scopes import Point, Source
from ..walk import Station, Stream, walk

__all__ = ["Flow", "LayerAdjoint", "Through", "list_blocks", "paths_of_point", "transpose_norm"]

Through = Literal["both", "bypass", "ff"]
"""Which way directions are pulled back past the feed-forward block: through it, along the residual connection that
bypasses it, or both."""

_AT_ONCE = 1 << 23
"""Numbers of the largest tensors of a block of queries."""

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


@dataclass
class _KeySide:
    """What the tokens that an attention reads have to do with it: the values that belong to each of them ``[H, T, dh]``
    and the ``constant`` ``[H, dh]`` that belongs to none.

    ``pulled`` ``[K, H, T, dh]`` gathers the directions in which the values are read.
    """

    weights: LayerWeights | CrossWeights
    keys: Tensor
    attention: Attention
    values: Tensor
    constant: Tensor
    pulled: Tensor | None = None

    @classmethod
    def read(
        cls, weights: LayerWeights | CrossWeights, keys: Tensor, attention: Attention, value_bias: str
    ) -> _KeySide:
        return cls(weights, keys, attention, *reference.own_values(weights, keys, value_bias))

    def gather(self, alpha: Tensor, read: Tensor) -> None:
        """Adds what the values give through ``alpha`` ``[H, n, T]`` to heads that are read by ``[K, n, H, dh]``."""
        pulled = alpha.mT @ read.transpose(1, 2)
        self.pulled = pulled if self.pulled is None else self.pulled.add_(pulled)

    def pull_to_keys(self, constant: Tensor) -> Tensor:
        """Returns the directions ``[K, T, d]`` in which the keys are read; adds what biases give to ``constant``."""
        assert self.pulled is not None
        norm, latent, x = self.weights.norm_before_attn, self.weights.latent, self.keys
        by_head = self.pulled.unflatten(1, (self.weights.kv_heads, -1)).sum(2)  # [K, Hkv, T, dh]
        pulled = _transpose_linear(self.weights.value, by_head.transpose(1, 2).flatten(2), constant)
        if latent is not None:
            scale = latent.norm.scale(latent.down(x if norm is None else norm(x)))
            _add_constant(constant, latent.norm.bias, pulled)
            pulled = _transpose_linear(latent.down, transpose_norm(latent.norm, scale, pulled), constant)
        if norm is not None:
            _add_constant(constant, norm.bias, pulled)
            pulled = transpose_norm(norm, norm.scale(x), pulled)
        return pulled


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

    ``scales``: ``1 / s_i`` ``[n]`` of each norm, by its name in the weights and the attention it belongs to.
    """

    alpha: dict[Source, Tensor] = field(default_factory=dict)
    scales: dict[tuple[str, Source], Tensor] = field(default_factory=dict)
    networks: list[_Network] = field(default_factory=list)


class LayerAdjoint:
    """One layer of one sequence, frozen; takes directions for its output, block of queries by block.

    ``own`` ``[K, T, d]`` and ``encoder`` ``[K, T', d]`` (where cross-attention reads an encoder's states) are the
    directions in which the layer's inputs are read, and ``constant`` ``[K]`` what comes from no token; all are whole
    after `finish`.
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
        self._sides: dict[Source, _KeySide] = {"own": _KeySide.read(weights, x, attention, value_bias)}
        if weights.cross is not None and encoder is not None:
            self._sides["cross"] = _KeySide.read(weights.cross, encoder.states, encoder.attention, value_bias)
        self.own = x.new_zeros(directions, *x.shape)
        self.encoder: Tensor | None = None
        self.constant = x.new_zeros(directions)

    def pull(self, rows: Tensor, directions: Tensor) -> tuple[Tensor, _Frozen]:
        """Takes the directions ``[K, n, d]`` of the query tokens ``rows`` ``[n]``.

        Returns the layer's output ``[n, d]`` there, as recomputed, and what `trace` needs.
        """
        frozen, output = self._freeze(rows)
        attended, residual = self._pull_through(frozen, directions, "both", self.constant)
        self.own.index_add_(1, rows, residual)
        for source, read in attended.items():
            self._sides[source].gather(frozen.alpha[source], read)
        return output, frozen

    def trace(
        self, rows: Tensor, directions: Tensor, frozen: _Frozen, through: Through, residual: bool, by_head: bool
    ) -> Flow:
        """Returns what passes to the query tokens ``rows``; ``frozen`` is what `pull` returned of them.

        Without ``residual``, what bypasses attention as well is left out.
        """
        attended, itself = self._pull_through(frozen, directions, through, None)
        kept = (itself * self.x[rows]).sum(-1) if residual else itself.new_zeros(itself.shape[:2])
        tiles: dict[Source, Tensor] = {}
        for source, read in attended.items():
            values, alpha = self._sides[source].values.transpose(0, 1), frozen.alpha[source]
            if by_head:
                tiles[source] = (read.transpose(1, 2) @ values.mT).mul_(alpha)
            else:  # head by head: of all of them it would be the largest tensor
                heads = range(len(alpha))
                tiles[source] = sum((read[:, :, h] @ values[h].T).mul_(alpha[h]) for h in heads)  # type: ignore[assignment]
                if source == "own":
                    tiles[source][:, torch.arange(len(rows), device=rows.device), rows] += kept
        return Flow(tiles, kept)

    def finish(self) -> None:
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

    def _freeze(self, rows: Tensor) -> tuple[_Frozen, Tensor]:
        """Carries the query tokens through the layer, and returns what stays frozen and their output ``[n, d]``."""
        weights, frozen = self.weights, _Frozen()
        own = Stream.of_total(self.x[rows])

        def attend(source: Source) -> Stream:
            side = self._sides[source]
            alpha = frozen.alpha[source] = side.attention.attention_weights(rows)
            read = reference.context(alpha, side.values)
            return reference.attention_stream(side.weights, alpha, read, side.constant, own.vectors)

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
            return Stream.of_total(total)

        for station in walk(weights, own, attend, feed_forward):
            if station.norm_scale is not None:
                frozen.scales[self._passed_norm(station)] = station.norm_scale
        return frozen, station.stream.total

    def _freeze_network(self, block: Block, read: Stream) -> tuple[_Network, Tensor]:
        """Freezes a network at what it reads, and gives what it adds to its tokens ``[m, d]``."""
        branch, baseline = block.branch, self.rule.baseline
        read = reference.enter_block(block, read)
        z = torch.stack([projection(read.total) for projection in branch.projections])
        bias = z.new_empty(0)
        if baseline == "bias":  # nothing else asks for it
            bias = torch.stack([projection(read.bias) for projection in branch.projections])
        base = reference.path_start(branch, z, bias, baseline)
        slope = self._slopes(branch, Path(z, bias, base))
        if base is None:
            start = reference.apply_activation(branch, z.new_zeros(len(z), 1, 1))
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
        self, frozen: _Frozen, directions: Tensor, through: Through, constant: Tensor | None
    ) -> tuple[dict[Source, Tensor], Tensor]:
        """The stations of the walk in reverse. Returns in which direction each attention's heads are read
        ``[K, n, H, dh]``, and the layer's own input beside them ``[K, n, d]``.

        Adds what comes from no token to ``constant`` ``[K]``.
        """
        weights = self.weights

        def pull(name: str, norm: Norm | None, direction: Tensor, source: Source = "own") -> Tensor:
            if norm is None:
                return direction
            _add_constant(constant, norm.bias, direction)
            return transpose_norm(norm, frozen.scales[name, source], direction)

        trunk = pull("norm_after_ff", weights.norm_after_ff, directions)
        beside = torch.zeros_like(trunk)  # what reads the layer's input past everything
        if through != "bypass":
            ff = pull("norm_of_ff", weights.norm_of_ff, trunk)
            ff = self._pull_networks(frozen.networks, ff, constant)
            ff = pull("norm_before_ff", weights.norm_before_ff, ff)
            trunk = torch.zeros_like(trunk) if through == "ff" else trunk
            beside, trunk = (ff, trunk) if weights.parallel else (beside, trunk + ff)
        attended: dict[Source, Tensor] = {}
        for source, part in reversed(weights.attentions):
            trunk = pull("norm_after_attn", part.norm_after_attn, trunk, source)
            read = pull("norm_of_attn", part.norm_of_attn, trunk, source)
            attended[source] = _transpose_linear(part.out, read, constant).unflatten(-1, (part.heads, -1))
        return attended, trunk + beside

    def _pull_networks(self, networks: list[_Network], directions: Tensor, constant: Tensor | None) -> Tensor:
        """Pulls the directions ``[K, n, d]`` back through the sum of the feed-forward networks."""
        pulled = torch.zeros_like(directions)
        for network in networks:
            block, branch = network.block, network.block.branch
            share = None if block.share is None else block.share[:, None]
            part = directions if block.tokens is None else directions[:, block.tokens]
            part = part if share is None or branch.scales_input else part * share
            neurons = _transpose_linear(branch.down, part, constant)
            if constant is not None and network.start is not None:
                constant += (neurons * network.start).sum((1, 2))
            for projection, slope in zip(branch.projections, network.slope, strict=True):
                back = _transpose_linear(projection, neurons * slope, constant)
                back = back * share if share is not None and branch.scales_input else back
                if block.tokens is None:
                    pulled += back
                else:
                    pulled.index_add_(1, block.tokens, back)
        return pulled


def transpose_norm(norm: Norm, scale: Tensor, direction: Tensor) -> Tensor:
    """The directions ``[..., n, d]`` in which a norm's input is read whose output is read in ``direction``.

    ``scale`` ``[n]`` is its frozen ``1 / s_i``.
    """
    pulled = direction * scale[:, None]
    if norm.weight is not None:
        pulled *= norm.weight
    return pulled - pulled.mean(-1, keepdim=True) if norm.kind == "layer" else pulled


def list_blocks(rows: Tensor, heads: int, keys: int, directions: int, neurons: int) -> Iterator[Tensor]:
    """Cuts the query tokens ``rows`` into blocks whose largest tensors are bounded, whatever the length."""
    numbers = max(heads * keys, directions * max(neurons, keys), 1)
    yield from rows.split(max(1, _AT_ONCE // numbers))


def paths_of_point(point: Point) -> tuple[Through, bool]:
    """Returns which way a flow that is traced at a point of the layer takes past the feed-forward block, and whether
    the residual connection around attention belongs to it.

    What has reached a point before the block goes on to the layer's output along the residual connection alone; what
    the block reads and returns goes on through it; behind it, both have come together (our definition).
    """
    if point in ("attn", "attn_res", "atb"):
        return "bypass", point != "attn"
    return ("ff", True) if point in ("ff_input", "ff") else ("both", True)


def _transpose_linear(linear: Linear, direction: Tensor, constant: Tensor | None) -> Tensor:
    """The directions ``[K, n, in]`` in which a projection's input is read whose output is read in ``direction``."""
    _add_constant(constant, linear.bias, direction)
    return direction @ linear.weight.mT


def _add_constant(constant: Tensor | None, bias: Tensor | None, direction: Tensor) -> None:
    """Adds what a bias ``[d]`` gives to tokens that are read in ``direction`` ``[K, n, d]``."""
    if constant is not None and bias is not None:
        constant += direction.sum(1) @ bias

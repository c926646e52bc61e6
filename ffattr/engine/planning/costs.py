"""What a layer's maps cost by each method: operations of each kind, and bytes that are alive at once.

Both are counted, not guessed (formulas: `ffattr.decomposition`): from what the engine does with a layer of a shape in
given blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ...decomposition.layer import LayerWeights
from ...decomposition.precision import operand_dtype, result_dtype
from ...decomposition.scopes import Scope
from ...ops.reduction import Reduction
from .rotation import choose_vectors, count_zeros

__all__ = ["BY_QUERY", "Blocks", "LayerShape", "Method"]

Method = Literal["direct", "operator", "mixed", "pairs", "attention", "reference"]
"""``mixed``: ``operator`` with the heads of a pair mixed first, so that a query's matrix is ``[d, d]``.
``pairs``: each vector on its own, of so few pairs that what the others prepare for many would cost more.
``attention``: no feed-forward work is done for a pair: no feed-forward scope is asked for, or layers are parallel."""

BY_QUERY: tuple[Method, ...] = ("operator", "mixed")
"""Make one matrix for each query, which then takes all of its keys at once."""

_UNNORMED = ("attn", "attn_res", "atb")
"""Points of a parallel layer at which its vectors have passed no norm."""


@dataclass(frozen=True)
class Blocks:
    """How many query tokens are worked on at a time, and how many key tokens for attention-level and for feed-forward
    maps.

    ``grams``: whether the matrices of attention-level maps are kept for all queries, not made for each block of them.
    """

    queries: int
    keys: int
    ff_keys: int
    grams: bool = False


@dataclass(frozen=True)
class LayerShape:
    """All that a layer's cost depends on.

    ``tokens`` are those of all ``sources`` of keys and all sequences, of which the longest has ``longest``; ``pairs``
    the (query, key) pairs that are not masked, ``group_pairs`` those of a query and a group of keys. In a mixture
    of experts ``ff_width`` is that of a token's experts together, ``expert_sets`` how many different ones the queries
    go to, each of which is prepared on its own; ``by_expert`` is whether there is a map per expert as well.
    ``sketched``: for every scope that is, what the width is narrowed to. ``rotatable`` is whether the width may be
    turned so that part of the down matrix is zero, ``rotated`` whether it is (`ffattr.engine.planning.rotation`).
    ``maps_per_pair`` are the numbers kept of a pair, ``attention_scopes`` how many scopes are attention-level, at
    ``stages`` different points of the layer. ``reduction``: what vectors become in the maps; ``rounded``: whether
    operands are rounded to the dtype of the products before a kernel gets them (`ffattr.ops.backends.Backend`).
    """

    queries: int
    tokens: int
    pairs: int
    width: int
    ff_width: int
    heads: int
    head_dim: int
    streams: int
    sources: int = 1
    expert_sets: int = 1
    by_expert: bool = False
    longest: int = 0
    group_pairs: int = 0
    sequences: int = 1
    sketched: tuple[int, ...] = ()
    rotatable: bool = False
    rotated: bool = False
    maps_per_pair: int = 1
    attention_scopes: int = 0
    stages: int = 0
    reduction: Reduction = "l2"
    rounded: bool = True

    def __post_init__(self) -> None:
        for name, value in (("longest", self.tokens), ("group_pairs", self.pairs)):  # one sequence, no groups
            object.__setattr__(self, name, getattr(self, name) or value)

    @classmethod
    def from_weights(
        cls,
        weights: LayerWeights,
        queries: int,
        tokens: int,
        pairs: int,
        experts: int = 1,
        expert_sets: int = 1,
        scopes: Collection[Scope] = (),
        reduction: Reduction = "l2",
        rounded: bool = True,
    ) -> LayerShape:
        """One sequence; ``experts`` of each token, in ``expert_sets`` different sets."""
        own = {scope.seen_from("own") for scope in scopes}
        attention_level = own - {*weights.pairwise_scopes, weights.expert_scope}
        # A parallel layer's own norm is passed by no vector but the query's.
        points = {scope.point for scope in attention_level if not weights.parallel or scope.point in _UNNORMED}
        return cls(
            queries,
            tokens,
            pairs,
            weights.width,
            weights.count_neurons(experts),
            weights.heads,
            weights.head_dim,
            weights.streams,
            len(weights.attentions),
            max(1, expert_sets),
            rotatable=reduction == "l2" and bool(choose_vectors(weights, own)),
            maps_per_pair=max(1, sum(_count_maps(scope, weights.heads, experts) for scope in scopes)),
            attention_scopes=len(attention_level),
            stages=len({len(weights.norms_before(point)) for point in points}),
            reduction=reduction,
            rounded=rounded,
        )

    @property
    def grouped(self) -> bool:
        """Whether keys are groups of tokens."""
        return self.group_pairs < self.pairs

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def passes(self) -> int:
        """How many passes over all pairs the feed-forward maps take."""
        return len(self.sketched) if self.sketched else 2 if self.by_expert else 1

    @property
    def vector_width(self) -> int:
        """What the vectors' width is in each of them."""
        return sum(self.sketched) // len(self.sketched) if self.sketched else self.width

    @property
    def zeros(self) -> int:
        """How many numbers of the down matrix are left out."""
        return count_zeros(self.ff_width, self.width) if self.rotated else 0

    @property
    def mean_group_size(self) -> float:
        """Tokens of a group, on average."""
        return self.pairs / max(1, self.group_pairs)

    @classmethod
    def join(cls, shapes: Sequence[LayerShape]) -> LayerShape:
        """The shape of sequences side by side."""
        added = ("queries", "tokens", "pairs", "group_pairs", "sequences")
        sums = {name: sum(getattr(shape, name) for shape in shapes) for name in added}
        return replace(shapes[0], **sums, longest=max(shape.longest for shape in shapes))

    # ---- operations

    def work(self, method: Method, blocks: Blocks | None = None) -> dict[str, float]:
        """How much there is of every kind of work, by the names of `ffattr.engine.machine_rates.Rates`; ``blocks``:
        None for a single one.

        For every block of queries what is made of the keys is made again, but for the matrices of attention-level maps
        where those are kept. Kinds that are counted in floating point operations are those of `FLOPS`.
        """
        n, t, d, f, mixed = self.queries, self.tokens, self.width, self.ff_width, self.heads + 1
        pairs, streams = self.pairs, self.streams
        blocks = blocks or Blocks(max(1, n), max(1, t), max(1, t))
        repeats = -(-n // blocks.queries)
        # The tokens' own way through the layer: values, attention, output projection of the stream and of its bias.
        found = {
            "product": 2.0 * t * d * self.inner + 4.0 * n * self.inner * d,
            "attention": 4.0 * n * self.longest * self.inner,
            "weights": 1.0 * n * self.longest * self.heads,
            "blocks": float(repeats * self.sequences),
            "calls": float(repeats * -(-t // blocks.keys) * self.maps_per_pair * (self.attention_scopes > 0)),
        }
        made = 1 if blocks.grams else repeats
        found["features"] = 2.0 * made * t * self.inner * d * self.stages
        if self.reduction == "l2":
            found["gram"] = 2.0 * made * t * self.mean_group_size * mixed * mixed * d * self.stages
            found["form"] = 2.0 * mixed * mixed * pairs * self.mean_group_size * self.attention_scopes
        else:  # vectors of pairs are added up
            found["mixing"] = 2.0 * pairs * mixed * d * self.attention_scopes
        if method == "attention":  # no bias through the FF block
            found["product"] += 2.0 * n * (streams + 1) * f * d
            return found
        found["blocks"] += repeats * -(-t // blocks.ff_keys) * self.passes
        found["slope" if streams == 1 else "gated_slope"] = 1.0 * streams * n * f
        found["product"] += 4.0 * n * (streams + 1) * f * d
        if method == "pairs":
            found["product"] += pairs * (2.0 * self.inner * d + 2.0 * (streams + 1) * f * d)
            return found
        if method != "mixed":
            found["product"] += 2.0 * streams * self.inner * d * f * self.sources * self.expert_sets
        found["features"] += 2.0 * repeats * t * self.inner * self.passes * self.vector_width
        found["mixing"] = found.get("mixing", 0.0) + 2.0 * pairs * mixed * self.passes * self.vector_width
        if method == "operator":
            found["product"] += 2.0 * n * streams * d * f * self.passes
            operators = 2.0 * n * (f * self.vector_width - self.zeros) * (self.inner + 1) * self.sources
            found["operator"] = self.passes * (operators + 2.0 * pairs * self.inner * self.vector_width)
            return found
        if method == "mixed":  # a call of the direct method's operator for each query
            found["product"] += 2.0 * n * d * f * self.vector_width * self.passes * self.sources
            found["features"] += 2.0 * repeats * t * self.inner * d
            found["mixing"] += 2.0 * pairs * mixed * self.passes * d
            found["direct"] = 2.0 * self.passes * pairs * d * self.vector_width
            found["calls"] += n * self.passes * self.sources
            return found
        found["product"] += 2.0 * repeats * streams * t * d * f * self.expert_sets
        found["features"] += 2.0 * repeats * streams * t * self.inner * f * self.expert_sets
        found["mixing"] += 2.0 * self.passes * f * pairs * streams * mixed
        found["direct"] = 2.0 * self.passes * self.group_pairs * (f * self.vector_width - self.zeros)
        return found

    def flops(self, method: Method) -> float:
        """Floating point operations by ``method`` in one block; "reference" is counted as the sums it evaluates."""
        work = self.work("direct" if method == "reference" else method)
        return sum(count for kind, count in work.items() if kind in FLOPS)

    # ---- bytes

    def key_bytes(self, method: Method, dtype: torch.dtype) -> int:
        """Working memory for one key token of a block: features for the feed-forward map, or what a Gram matrix is made
        of."""
        mixed = self.heads + 1
        if method == "attention" and self.reduction != "l2":  # vectors, and once more those of attention alone
            return 2 * mixed * self.width * result_dtype(dtype).itemsize
        if method == "attention":
            grams = 3 * round(mixed * mixed * self.mean_group_size) * 8
            return mixed * self.width * (result_dtype(dtype).itemsize + 8) + grams
        if method == "pairs":
            return 0
        neurons = {"direct": self.streams * self.ff_width, "mixed": self.width}.get(method, 0)
        own = self.ff_width if method == "direct" else 0  # of one stream at a time
        return (mixed * (self.passes * self.vector_width + neurons) + own) * operand_dtype(dtype, self.rounded).itemsize

    def pair_bytes(self, method: Method, dtype: torch.dtype, cut: bool = True) -> int:
        """Working memory for one pair of a block: a tile of every scope of a pass and, unless its keys are all that
        there are (``cut``), its weights. Of groups, weights are laid out anew."""
        if method == "pairs":
            widths = 2 * self.inner + 6 * self.width + (2 * self.streams + 1) * self.ff_width
            return widths * result_dtype(dtype).itemsize
        copies = (4 if self.grouped else cut) * (self.heads + 1)
        if method == "attention":  # those of some heads are taken out once more
            return (copies + self.heads + 2) * result_dtype(dtype).itemsize
        return (copies + 3) * result_dtype(dtype).itemsize + 16

    @property
    def gram_bytes(self) -> int:
        """The matrices of attention-level maps of all keys: not of groups, which differ in size, and of norms alone."""
        return 0 if self.grouped or self.reduction != "l2" else self.stages * self.tokens * 8 * (self.heads + 1) ** 2

    def query_bytes(self, method: Method, dtype: torch.dtype) -> tuple[int, int]:
        """Working memory for one query token: at most, on its own way through the layer, and kept for all keys."""
        weights, size = (self.heads + self.maps_per_pair) * self.longest, result_dtype(dtype).itemsize
        neurons = 0 if method == "attention" else 2 * self.streams * self.ff_width  # slopes, scaled and not
        passed = (2 * self.streams + 1 if method == "attention" else 4 * self.streams + 3) * self.ff_width
        totals = self.width * (self.maps_per_pair + 6) * (self.reduction == "alti")
        kept = weights + neurons + 8 * self.width + totals
        passing = weights + max(self.heads * self.longest, passed) + 12 * self.width
        return max(passing, kept) * size, kept * size

    def fixed_bytes(self, method: Method, dtype: torch.dtype) -> int:
        """The layer's own matrices and all tokens' values, whatever the blocks: maps, down as it is and packed, J of a
        few queries."""
        if method == "reference":
            return 0
        tokens = self.tokens * (self.inner + self.width * (1 + (self.sequences > 1))) * result_dtype(dtype).itemsize
        routes = self.sources * self.inner * self.width * result_dtype(dtype).itemsize
        if method in ("attention", "pairs"):
            return tokens + routes
        matrices = 2 * self.ff_width * self.width
        if method == "mixed":  # of a query at a time: its scaled projections, and K, twice
            matrices += self.ff_width * self.width + 2 * self.width * self.width
        else:
            matrices += self.sources * self.streams * self.inner * self.ff_width
        operand = operand_dtype(dtype, self.rounded)
        if operand != result_dtype(dtype):  # the projections once more, in the dtype of the feed-forward products
            matrices += self.streams * self.width * self.ff_width
        if self.rotated:
            matrices += self.ff_width * self.width + self.width * self.width
        if method == "operator":
            matrices += 4 * self.inner * self.width
        return tokens + routes + matrices * operand.itemsize

    def bytes(self, method: Method, blocks: Blocks, dtype: torch.dtype) -> int:
        """Working memory of the whole layer in these blocks."""
        if method == "reference":
            return blocks.queries * 4 * self.tokens * self.ff_width * result_dtype(dtype).itemsize
        n, longest, (passing, kept) = blocks.queries, self.longest, self.query_bytes(method, dtype)

        def count_key_bytes(kind: Method, count: int) -> int:
            cut = min(count, longest)  # of a pack all keys are there, and all weights as they are
            return count * self.key_bytes(kind, dtype) + n * cut * self.pair_bytes(kind, dtype, cut < longest)

        of_ff = 0 if method == "attention" else count_key_bytes(method, blocks.ff_keys)
        of_attention = count_key_bytes("attention", blocks.keys) if self.attention_scopes else 0
        grams = self.gram_bytes if blocks.grams else 0
        most = max(n * passing, n * kept + max(of_ff, of_attention))
        return self.fixed_bytes(method, dtype) + grams + most


FLOPS = ("product", "attention", "features", "gram", "form", "mixing", "operator", "direct")


def _count_maps(scope: Scope, heads: int, experts: int) -> int:
    return heads if scope.axis == "head" else experts if scope.axis == "expert" else 1

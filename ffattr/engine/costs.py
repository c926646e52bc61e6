"""What a layer's maps cost by each method: operations of each kind, and bytes that are alive at once.

Both are counted, not guessed (METHOD.md section 6): from what the engine does with a layer of a shape in given blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..decomposition.layer import LayerWeights
from ..decomposition.precision import operand_dtype, result_dtype
from ..decomposition.scopes import CROSS

__all__ = ["Blocks", "LayerShape", "Method"]

Method = Literal["direct", "operator", "pairs", "attention", "reference"]
"""``pairs``: each vector on its own, of so few pairs that what the others prepare for many would cost more.
``attention``: nothing d-wide is done for a pair: no feed-forward scope is asked for, or layers are parallel."""


@dataclass(frozen=True)
class Blocks:
    """How many query tokens are worked on at a time, and how many key tokens for attention-level and wide maps.

    ``grams``: whether the matrices of attention-level maps are kept for all queries, not made for each block of them.
    """

    queries: int
    keys: int
    wide_keys: int
    grams: bool = False


@dataclass(frozen=True)
class LayerShape:
    """All that a layer's cost depends on.

    ``tokens`` are those of all ``sources`` of keys and all sequences, of which the longest has ``longest``; ``pairs``
    the (query, key) pairs that are not masked, ``products`` those of a query and a group of keys. In a mixture
    of experts ``ff_width`` is that of a token's experts together, ``sets`` how many different ones the queries go to,
    each of which is prepared on its own; ``by_expert`` is whether a map is told apart by expert as well. ``sketched``:
    for every scope that is, what the width is narrowed to. ``maps`` are the numbers kept of a pair, ``forms`` how many
    scopes are attention-level, at ``levels`` different points of the layer.
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
    sets: int = 1
    by_expert: bool = False
    longest: int = 0
    products: int = 0
    sequences: int = 1
    sketched: tuple[int, ...] = ()
    maps: int = 1
    forms: int = 0
    levels: int = 0

    def __post_init__(self) -> None:
        for name, value in (("longest", self.tokens), ("products", self.pairs)):  # one sequence, no groups
            object.__setattr__(self, name, getattr(self, name) or value)

    @classmethod
    def of(
        cls,
        weights: LayerWeights,
        queries: int,
        tokens: int,
        pairs: int,
        active: int = 1,
        sets: int = 1,
        scopes: Collection[str] = (),
    ) -> LayerShape:
        """One sequence; ``active`` experts for each token, in ``sets`` different sets."""
        streams, heads, neurons = len(weights.projections), weights.heads, active * weights.ff_width
        sources = 1 if weights.cross is None else 2
        wide = {*weights.wide_scopes, weights.expert_scope}
        own = {name.removeprefix(CROSS) for name in scopes}
        # Before the norm after attention, behind it, and behind the one before the feed-forward block.
        unnormed = {"attn_heads", "attn", "atb" if weights.norm_after_attn is None else "attn_res"}
        levels = (
            not own.isdisjoint(unnormed),
            "atb" in own - unnormed,
            not weights.parallel and "atb_ln" in own,
        )
        return cls(
            queries,
            tokens,
            pairs,
            weights.width,
            neurons,
            heads,
            weights.head_dim,
            streams,
            sources,
            max(1, sets),
            maps=max(1, sum(_maps(name, heads, active) for name in scopes)),
            forms=len(own - wide),
            levels=sum(levels),
        )

    @property
    def grouped(self) -> bool:
        """Whether keys are groups of tokens."""
        return self.products < self.pairs

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def calls(self) -> int:
        """How many passes over all pairs the wide maps take."""
        return len(self.sketched) if self.sketched else 2 if self.by_expert else 1

    @property
    def columns(self) -> int:
        """What the vectors' width is in each of them."""
        return sum(self.sketched) // len(self.sketched) if self.sketched else self.width

    @property
    def size(self) -> float:
        """Tokens of a group, on average."""
        return self.pairs / max(1, self.products)

    @classmethod
    def joined(cls, shapes: Sequence[LayerShape]) -> LayerShape:
        """Of sequences side by side."""
        added = ("queries", "tokens", "pairs", "products", "sequences")
        sums = {name: sum(getattr(shape, name) for shape in shapes) for name in added}
        return replace(shapes[0], **sums, longest=max(shape.longest for shape in shapes))

    # ---- operations

    def work(self, method: Method, blocks: Blocks | None = None) -> dict[str, float]:
        """How much there is of every kind of work, by the names of `ffattr.engine.machine_rates.Rates`; ``blocks``: None for a single
        one.

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
            "calls": float(repeats * -(-t // blocks.keys) * self.maps * (self.forms > 0)),
        }
        made = 1 if blocks.grams else repeats
        found["features"] = 2.0 * made * t * self.inner * d * self.levels
        found["gram"] = 2.0 * made * t * self.size * mixed * mixed * d * self.levels
        found["form"] = 2.0 * mixed * mixed * pairs * self.size * self.forms
        if method == "attention":  # no bias through the FF block
            found["product"] += 2.0 * n * (streams + 1) * f * d
            return found
        found["blocks"] += repeats * -(-t // blocks.wide_keys) * self.calls
        found["slope" if streams == 1 else "gated_slope"] = 1.0 * streams * n * f
        found["product"] += 4.0 * n * (streams + 1) * f * d
        if method == "pairs":
            found["product"] += pairs * (4.0 * self.inner * d + 2.0 * (streams + 1) * f * d)
            return found
        found["product"] += 2.0 * streams * self.inner * d * f * self.sources * self.sets
        found["features"] += 2.0 * repeats * t * self.inner * self.calls * self.columns
        found["mixing"] = 2.0 * pairs * mixed * self.calls * self.columns
        if method == "operator":
            found["product"] += 2.0 * n * streams * d * f * self.calls
            operators = 2.0 * n * f * self.columns * (self.inner + 1) * self.sources
            found["operator"] = self.calls * (operators + 2.0 * pairs * self.inner * self.columns)
            return found
        found["product"] += 2.0 * repeats * streams * t * d * f * self.sets
        found["features"] += 2.0 * repeats * streams * t * self.inner * f * self.sets
        found["mixing"] += 2.0 * self.calls * f * pairs * streams * mixed
        found["direct"] = 2.0 * self.calls * f * self.products * self.columns
        return found

    def flops(self, method: Method) -> float:
        """Floating point operations by ``method`` in one block; "reference" is counted as the sums it evaluates."""
        work = self.work("direct" if method == "reference" else method)
        return sum(count for kind, count in work.items() if kind in FLOPS)

    # ---- bytes

    def key_bytes(self, method: Method, dtype: torch.dtype) -> int:
        """Working memory for one key token of a block: features for the wide map, or what a Gram matrix is made of."""
        mixed = self.heads + 1
        if method == "attention":
            grams = 3 * round(mixed * mixed * self.size) * 8
            return mixed * self.width * (result_dtype(dtype).itemsize + 8) + grams
        if method == "pairs":
            return 0
        neurons = self.streams * self.ff_width if method == "direct" else 0
        own = self.ff_width if method == "direct" else 0  # of one stream at a time
        return (mixed * (self.calls * self.columns + neurons) + own) * operand_dtype(dtype).itemsize

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
        """The matrices of attention-level maps of all keys: not of groups, which differ in size."""
        return 0 if self.grouped else self.levels * self.tokens * 8 * (self.heads + 1) ** 2

    def query_bytes(self, method: Method, dtype: torch.dtype) -> tuple[int, int]:
        """Working memory for one query token: at most, on its own way through the layer, and kept for all keys."""
        weights, size = (self.heads + self.maps) * self.longest, result_dtype(dtype).itemsize
        neurons = 0 if method == "attention" else 2 * self.streams * self.ff_width  # slopes, scaled and not
        passed = (2 * self.streams + 1 if method == "attention" else 4 * self.streams + 3) * self.ff_width
        kept = weights + neurons + 8 * self.width
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
        matrices = self.sources * self.streams * self.inner * self.ff_width + 2 * self.ff_width * self.width
        if dtype != result_dtype(dtype):  # the projections once more, in the dtype of the wide products
            matrices += self.streams * self.width * self.ff_width
        if method == "operator":
            matrices += 4 * self.inner * self.width
        return tokens + routes + matrices * operand_dtype(dtype).itemsize

    def bytes(self, method: Method, blocks: Blocks, dtype: torch.dtype) -> int:
        """Working memory of the whole layer in these blocks."""
        if method == "reference":
            return blocks.queries * 4 * self.tokens * self.ff_width * result_dtype(dtype).itemsize
        n, longest, (passing, kept) = blocks.queries, self.longest, self.query_bytes(method, dtype)

        def of_keys(kind: Method, count: int) -> int:
            cut = min(count, longest)  # of a pack all keys are there, and all weights as they are
            return count * self.key_bytes(kind, dtype) + n * cut * self.pair_bytes(kind, dtype, cut < longest)

        wide = 0 if method == "attention" else of_keys(method, blocks.wide_keys)
        narrow = of_keys("attention", blocks.keys) if self.forms else 0
        grams = self.gram_bytes if blocks.grams else 0
        most = max(n * passing, n * kept + max(wide, narrow))
        return self.fixed_bytes(method, dtype) + grams + most


FLOPS = ("product", "attention", "features", "gram", "form", "mixing", "operator", "direct")


def _maps(scope: str, heads: int, active: int) -> int:
    return heads if scope.endswith("attn_heads") else active if scope.endswith("_experts") else 1

"""What a layer's map costs by each method, which one to run, and in which blocks.

Costs are counted, not guessed (METHOD.md section 6); where two methods come near each other, short runs of both on this
machine decide.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Literal

import psutil
import torch

from .backends import Backend
from .dtypes import operand_dtype, result_dtype
from .layer import LayerWeights
from .rates import measured

__all__ = ["Blocks", "LayerPlan", "LayerShape", "Method", "Plan", "default_budget", "free_bytes", "plan_layer"]

Method = Literal["direct", "operator", "attention", "reference"]
"""``attention``: nothing d-wide is done for a pair: no feed-forward scope is asked for, or layers are parallel."""

_MiB = 1 << 20
_DEFAULT_BUDGET = 24 * _MiB
"""Working memory on a CPU beyond which no shape tried ran faster: blocks are then long enough to hide their set-up."""
_NEAR = 2.0  # counts further apart than this decide by themselves: no machine's rates differ by more


@dataclass(frozen=True)
class Blocks:
    """How many query tokens are worked on at a time, and how many key tokens for attention-level and wide maps."""

    queries: int
    keys: int
    wide_keys: int


@dataclass(frozen=True)
class LayerShape:
    """All that a layer's cost depends on.

    ``tokens`` are those of all ``sources`` of keys, ``pairs`` the (query, key) pairs that are not masked. In a mixture
    of experts ``ff_width`` is that of a token's experts together, ``sets`` how many different ones the queries go to,
    each of which is prepared on its own; ``by_expert`` is whether a map is told apart by expert as well.
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

    @classmethod
    def of(
        cls, weights: LayerWeights, queries: int, tokens: int, pairs: int, active: int = 1, sets: int = 1
    ) -> LayerShape:
        """``active`` experts for each token, in ``sets`` different sets."""
        streams, heads, neurons = len(weights.projections), weights.heads, active * weights.ff_width
        sources = 1 if weights.cross is None else 2
        return cls(
            queries, tokens, pairs, weights.width, neurons, heads, weights.head_dim, streams, sources, max(1, sets)
        )

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    def flops(self, method: Method) -> float:
        """Floating point operations by ``method``; "reference" is counted as the sums it evaluates."""
        n, t, d, f, mixed = self.queries, self.tokens, self.width, self.ff_width, self.heads + 1
        # The tokens' own way through the layer: values, attention, output projection of the stream and of its bias.
        own = 2.0 * t * d * self.inner + 4.0 * n * t * self.inner + 4.0 * n * self.inner * d
        features = 2.0 * t * self.inner * d
        if method == "attention":  # two levels, before and after a norm; three scopes; no bias through the FF block
            quadratic = 2.0 * mixed * mixed * (2 * t * d + 3 * self.pairs)
            return own + 2 * features + quadratic + 2.0 * n * (self.streams + 1) * f * d
        own += 4.0 * n * (self.streams + 1) * f * d
        prepared = 2.0 * self.streams * self.inner * d * f * self.sources * self.sets
        shared = own + features + 2.0 * self.pairs * mixed * d + prepared
        passes = 2 if self.by_expert else 1
        if method == "operator":
            operators = 2.0 * n * f * d * (self.inner + self.streams + 1) * self.sources
            return shared + passes * (operators + 2.0 * self.pairs * self.inner * d)
        made = 2.0 * self.streams * t * (self.inner + d) * f * self.sets
        return shared + made + passes * 2.0 * self.pairs * f * (d + self.streams * mixed)

    def key_bytes(self, method: Method, dtype: torch.dtype) -> int:
        """Working memory for one key token of a block: features for the wide map, or what a Gram matrix is made of."""
        mixed = self.heads + 1
        if method == "attention":
            return mixed * self.width * (result_dtype(dtype).itemsize + 8) + 3 * mixed * mixed * 8
        neurons = self.streams * self.ff_width if method == "direct" else 0
        return mixed * (self.width + neurons) * operand_dtype(dtype).itemsize

    def pair_bytes(self, dtype: torch.dtype) -> int:
        """Working memory for one pair of a block: its weights, and a tile of every scope of a pass."""
        return (self.heads + 4) * result_dtype(dtype).itemsize

    def query_bytes(self, dtype: torch.dtype) -> tuple[int, int]:
        """Working memory for one query token: at most, on its own way through the layer, and kept for all keys."""
        kept = self.heads * self.tokens + 2 * self.streams * self.ff_width + 4 * self.width
        passing = kept + self.heads * self.tokens + 6 * self.streams * self.ff_width + 8 * self.width
        size = result_dtype(dtype).itemsize
        return passing * size, kept * size

    def fixed_bytes(self, method: Method, dtype: torch.dtype) -> int:
        """The layer's own matrices, whatever the blocks: maps, down as it is and packed, and J of a few queries."""
        if method in ("attention", "reference"):
            return 0
        matrices = self.streams * self.inner * self.ff_width + 2 * self.ff_width * self.width
        if dtype != result_dtype(dtype):  # the projections once more, in the dtype of the wide products
            matrices += self.streams * self.width * self.ff_width
        if method == "operator":
            matrices += 4 * self.inner * self.width
        return matrices * operand_dtype(dtype).itemsize

    def bytes(self, method: Method, blocks: Blocks, dtype: torch.dtype) -> int:
        """Working memory of the whole layer in these blocks."""
        if method == "reference":
            return blocks.queries * 4 * self.tokens * self.ff_width * result_dtype(dtype).itemsize
        passing, kept = self.query_bytes(dtype)
        per_pair = blocks.queries * self.pair_bytes(dtype)
        longest = max(
            count * (self.key_bytes(kind, dtype) + per_pair)
            for kind, count in ((method, blocks.wide_keys), ("attention", blocks.keys))  # type: tuple[Method, int]
        )
        return self.fixed_bytes(method, dtype) + max(blocks.queries * passing, blocks.queries * kept + longest)


@dataclass(frozen=True)
class LayerPlan:
    """One layer of one sequence: what runs, in which blocks, and what it costs. ``stack``: "encoder", "decoder" or "".

    ``dtype`` is that of the wide products, ``choice`` why it is this method, ``halvings`` how often the blocks were
    halved because memory ran out.
    """

    layer: int
    shape: LayerShape
    method: Method
    blocks: Blocks
    dtype: torch.dtype
    choice: str
    halvings: int = 0
    stack: str = ""

    @property
    def flops(self) -> float:
        return self.shape.flops(self.method)

    @property
    def bytes(self) -> int:
        return self.shape.bytes(self.method, self.blocks, self.dtype)

    @property
    def reason(self) -> str:
        """Why this method, and what became of the blocks."""
        reason = self.choice
        repeats = -(-self.shape.queries // self.blocks.queries)
        if repeats > 1 and self.method != "reference":
            reason += f", features made {repeats} times"
        if self.halvings:
            reason += f", halved {self.halvings} time{'s' * (self.halvings > 1)} after running out of memory"
        return reason

    def halved(self) -> LayerPlan | None:
        """The same layer in blocks of half the queries or, of one query, half the keys. None: nothing is left."""
        queries, keys, wide_keys = self.blocks.queries, self.blocks.keys, self.blocks.wide_keys
        if queries > 1:
            smaller = Blocks(queries // 2, keys, wide_keys)
        elif self.method != "reference" and max(keys, wide_keys) > 1:
            smaller = Blocks(1, max(1, keys // 2), max(1, wide_keys // 2))
        else:
            return None
        return replace(self, blocks=smaller, halvings=self.halvings + 1)


@dataclass
class Plan:
    """What ran, or would run: backend, dtype of the wide products, operations and memory of every layer. Printable."""

    backend: str
    dtype: torch.dtype
    device: torch.device
    layers: list[LayerPlan] = field(default_factory=list)

    @property
    def flops(self) -> float:
        return sum(layer.flops for layer in self.layers)

    @property
    def bytes(self) -> int:
        return max((layer.bytes for layer in self.layers), default=0)

    def __str__(self) -> str:
        lines = [f"{self.backend} backend, {str(self.dtype).removeprefix('torch.')} on {self.device}"]
        for _, group in itertools.groupby(self.layers, key=lambda layer: replace(layer, layer=0)):
            same = list(group)
            first, numbers = same[0], _ranges([layer.layer for layer in same])
            layers = f"{first.stack} layer {numbers}".strip()
            keys = first.blocks.keys if first.method == "attention" else first.blocks.wide_keys
            lines.append(
                f"{len(same)} x {layers}: {first.method}, {first.shape.queries} queries x {first.shape.tokens} "
                f"tokens in blocks of {first.blocks.queries} x {keys}, {first.flops / 1e9:.2f} GFLOP and "
                f"{first.bytes / _MiB:.1f} MiB each ({first.reason})"
            )
        lines.append(f"total: {self.flops / 1e9:.2f} GFLOP, working memory {self.bytes / _MiB:.1f} MiB")
        return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, with what torch holds there for tensors to come."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def default_budget(device: torch.device) -> tuple[int, int]:
    """Bytes of working memory when the user names none: what is of use, and a share of what is free at most."""
    most = free_bytes(device) // 4
    return (most if device.type == "cuda" else min(_DEFAULT_BUDGET, most)), most


def plan_layer(
    layer: int,
    shape: LayerShape,
    wide: bool,
    backend: Backend,
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    budget: int | None,
) -> LayerPlan:
    """Choose the method and the blocks of one layer, of which feed-forward scopes are asked for if ``wide``.

    ``dtype`` is that of the wide products: the matrices of the feed-forward block and what is multiplied by them.
    ``budget`` bounds what blocks take; the maps and the layer's own matrices come on top. Raises ValueError where it
    cannot hold a single pair.
    """
    useful, most = default_budget(device) if budget is None else (budget, budget)
    chosen, choice = _choose(shape, wide, backend, method, dtype, device)
    if chosen == "reference":
        per_query = shape.bytes(chosen, Blocks(1, shape.tokens, shape.tokens), dtype)
        blocks = Blocks(max(1, min(shape.queries, useful // per_query)), shape.tokens, shape.tokens)
        return LayerPlan(layer, shape, chosen, blocks, dtype, choice)
    if chosen == "operator" and _least(shape, "operator", dtype) > most and method == "auto":
        chosen, choice = "direct", "operator would not fit the memory"
    least = _least(shape, chosen, dtype)
    if least > most:
        raise ValueError(
            f"memory_budget={budget} bytes is too small for layer {layer} ({chosen}, {shape.tokens} tokens): "
            f"expected at least {least}"
        )
    return LayerPlan(layer, shape, chosen, _blocks(shape, chosen, max(useful, least), dtype), dtype, choice)


def _blocks(shape: LayerShape, chosen: Method, useful: int, dtype: torch.dtype) -> Blocks:
    """The longest blocks that ``useful`` bytes hold."""
    passing, kept = shape.query_bytes(dtype)
    pair = shape.pair_bytes(dtype)
    wide_keys = shape.tokens if chosen == "operator" else 1
    spare = useful - wide_keys * shape.key_bytes(chosen, dtype)
    queries = max(1, min(shape.queries, useful // passing, spare // 2 // (kept + wide_keys * pair)))
    left = useful - queries * kept

    def keys(method: Method) -> int:
        return max(1, min(shape.tokens, left // (shape.key_bytes(method, dtype) + queries * pair)))

    return Blocks(queries, keys("attention"), keys("direct") if chosen == "direct" else wide_keys)


def _least(shape: LayerShape, method: Method, dtype: torch.dtype) -> int:
    """Bytes that the smallest blocks need: one query with one key, or with all keys where the method needs them all."""
    passing, kept = shape.query_bytes(dtype)
    keys = shape.tokens if method == "operator" else 1
    block = max(keys * shape.key_bytes(method, dtype), shape.key_bytes("attention", dtype))
    return max(passing, kept + block + keys * shape.pair_bytes(dtype))


def _choose(
    shape: LayerShape, wide: bool, backend: Backend, method: str, dtype: torch.dtype, device: torch.device
) -> tuple[Method, str]:
    if method not in ("auto", "direct", "operator"):
        raise ValueError(f"unknown method {method!r}, expected 'auto', 'direct' or 'operator'")
    if backend.is_reference:
        return "reference", "the definition"
    if not wide:
        return "attention", "no scope takes d-wide work for a pair"
    if method != "auto":
        return ("direct" if method == "direct" else "operator"), "asked for"
    if dtype == torch.float8_e4m3fn:
        return "direct", "the only method in float8"
    direct, operator = shape.flops("direct"), shape.flops("operator")
    ratio = direct / operator
    emulated = backend.emulated(device)  # whose rates would say nothing, and take minutes
    if not 1 / _NEAR < ratio < _NEAR or emulated:
        chosen: Method = "operator" if ratio > 1 else "direct"
        return chosen, f"{max(ratio, 1 / ratio):.1f}x fewer operations"
    rates = measured(backend.name, dtype, device, torch.get_num_threads())
    chosen = "operator" if direct / rates[0] > operator / rates[1] else "direct"
    return chosen, f"faster at {rates[0] / 1e9:.0f} direct, {rates[1] / 1e9:.0f} operator GFLOP/s measured here"

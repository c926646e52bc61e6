"""What a layer's map costs by each method, which one to run, and in which blocks.

Costs are counted, not guessed (METHOD.md section 6); where two methods come near each other, short runs of both on this
machine decide.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import psutil
import torch

from .backends import BACKENDS, Backend
from .layer import LayerWeights

__all__ = ["Blocks", "LayerPlan", "LayerShape", "Method", "Plan", "default_budget", "plan_layer"]

Method = Literal["direct", "operator", "attention", "reference"]
"""``attention``: no feed-forward scope is asked for, and nothing d-wide is done for a pair."""

_MiB = 1 << 20
_DEFAULT_BUDGET = 24 * _MiB
"""Working memory on a CPU beyond which no shape tried ran faster: blocks are then long enough to hide their set-up."""
_NEAR = 2.0  # counts further apart than this decide by themselves: no machine's rates differ by more


@dataclass(frozen=True)
class LayerShape:
    """All that a layer's cost depends on; ``pairs`` are the (query, key) pairs that are not masked."""

    queries: int
    tokens: int
    pairs: int
    width: int
    ff_width: int
    heads: int
    head_dim: int
    streams: int

    @classmethod
    def of(cls, weights: LayerWeights, queries: int, tokens: int, pairs: int) -> LayerShape:
        return cls(
            queries,
            tokens,
            pairs,
            weights.width,
            weights.ff_width,
            weights.heads,
            weights.head_dim,
            streams=len(weights.projections),
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
        shared = own + features + 2.0 * self.pairs * mixed * d + 2.0 * self.streams * self.inner * d * f
        if method == "operator":
            operators = 2.0 * n * f * d * (self.inner + self.streams + 1)
            return shared + operators + 2.0 * self.pairs * self.inner * d
        made = 2.0 * self.streams * t * (self.inner + d) * f
        return shared + made + 2.0 * self.pairs * f * (d + self.streams * mixed)

    def key_bytes(self, method: Method, itemsize: int) -> int:
        """Working memory for one key token of a block: features for the wide map, or what a Gram matrix is made of."""
        mixed = self.heads + 1
        if method == "attention":
            return mixed * self.width * (itemsize + 8) + 3 * mixed * mixed * 8
        neurons = self.streams * self.ff_width if method == "direct" else 0
        return mixed * (self.width + neurons) * itemsize

    def pair_bytes(self, itemsize: int) -> int:
        """Working memory for one pair of a block: its weights, and a tile of every scope of a pass."""
        return (self.heads + 4) * itemsize

    def query_bytes(self, itemsize: int) -> tuple[int, int]:
        """Working memory for one query token: at most, on its own way through the layer, and kept for all keys."""
        kept = self.heads * self.tokens + 2 * self.streams * self.ff_width + 4 * self.width
        return (kept + self.heads * self.tokens + 6 * self.streams * self.ff_width + 8 * self.width) * itemsize, (
            kept * itemsize
        )

    def fixed_bytes(self, method: Method, itemsize: int) -> int:
        """The layer's own matrices, whatever the blocks: maps, down as it is and packed, and J of a few queries."""
        if method == "attention":
            return 0
        matrices = self.streams * self.inner * self.ff_width + 2 * self.ff_width * self.width
        return (matrices + (4 * self.inner * self.width if method == "operator" else 0)) * itemsize


@dataclass(frozen=True)
class Blocks:
    """How many query tokens are worked on at a time, and how many key tokens for attention-level and wide maps."""

    queries: int
    keys: int
    wide_keys: int


@dataclass(frozen=True)
class LayerPlan:
    """One layer of one sequence: what runs, in which blocks, and what it costs."""

    layer: int
    shape: LayerShape
    method: Method
    blocks: Blocks
    flops: float
    bytes: int
    reason: str


@dataclass
class Plan:
    """What ran, or would run: backend, method, operations and working memory of every layer. Printable."""

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
            first, layers = same[0], _ranges([layer.layer for layer in same])
            keys = first.blocks.keys if first.method == "attention" else first.blocks.wide_keys
            lines.append(
                f"{len(same)} x layer {layers}: {first.method}, {first.shape.queries} queries x {first.shape.tokens} "
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


def default_budget(device: torch.device) -> tuple[int, int]:
    """Bytes of working memory when the user names none: what is of use, and a share of what is free at most."""
    if device.type == "cuda":
        free = int(torch.cuda.mem_get_info(device)[0])
        return free // 4, free // 4
    free = int(psutil.virtual_memory().available)
    return min(_DEFAULT_BUDGET, free // 4), free // 4


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

    ``budget`` bounds what blocks take; the maps and the layer's own matrices come on top. Raises ValueError where it
    cannot hold a single pair.
    """
    useful, most = default_budget(device) if budget is None else (budget, budget)
    chosen, reason = _choose(shape, wide, backend, method, dtype, device)
    size = dtype.itemsize
    if chosen == "reference":
        per_query = 4 * shape.tokens * shape.ff_width * size
        blocks = Blocks(max(1, min(shape.queries, useful // per_query)), shape.tokens, shape.tokens)
        return LayerPlan(layer, shape, chosen, blocks, shape.flops("direct"), blocks.queries * per_query, reason)
    if chosen == "operator" and _least(shape, "operator", size) > most and method == "auto":
        chosen, reason = "direct", "operator would not fit the memory"
    least = _least(shape, chosen, size)
    if least > most:
        raise ValueError(
            f"memory_budget={budget} bytes is too small for layer {layer} ({chosen}, {shape.tokens} tokens): "
            f"expected at least {least}"
        )
    useful = max(useful, least)
    passing, kept = shape.query_bytes(size)
    wide_keys = shape.tokens if chosen == "operator" else 1
    spare = useful - wide_keys * shape.key_bytes(chosen, size)
    queries = max(1, min(shape.queries, useful // passing, spare // 2 // (kept + wide_keys * shape.pair_bytes(size))))
    left = useful - queries * kept

    def keys(method: Method) -> int:
        return max(1, min(shape.tokens, left // (shape.key_bytes(method, size) + queries * shape.pair_bytes(size))))

    if chosen == "direct":
        wide_keys = keys("direct")
    blocks = Blocks(queries, keys("attention"), wide_keys)
    longest = max(
        count * (shape.key_bytes(kind, size) + queries * shape.pair_bytes(size))
        for kind, count in ((chosen, wide_keys), ("attention", blocks.keys))  # type: tuple[Method, int]
    )
    used = shape.fixed_bytes(chosen, size) + max(queries * passing, queries * kept + longest)
    repeats = -(-shape.queries // queries)
    if repeats > 1:
        reason += f", features made {repeats} times"
    return LayerPlan(layer, shape, chosen, blocks, shape.flops(chosen), used, reason)


def _least(shape: LayerShape, method: Method, size: int) -> int:
    """Bytes that the smallest blocks need: one query with one key, or with all keys where the method needs them all."""
    passing, kept = shape.query_bytes(size)
    keys = shape.tokens if method == "operator" else 1
    block = max(keys * shape.key_bytes(method, size), shape.key_bytes("attention", size))
    return max(passing, kept + block + keys * shape.pair_bytes(size))


def _choose(
    shape: LayerShape, wide: bool, backend: Backend, method: str, dtype: torch.dtype, device: torch.device
) -> tuple[Method, str]:
    if method not in ("auto", "direct", "operator"):
        raise ValueError(f"unknown method {method!r}, expected 'auto', 'direct' or 'operator'")
    if backend.is_reference:
        return "reference", "the definition"
    if not wide:
        return "attention", "no feed-forward scope asked for"
    if method != "auto":
        return ("direct" if method == "direct" else "operator"), "asked for"
    direct, operator = shape.flops("direct"), shape.flops("operator")
    ratio = direct / operator
    if not 1 / _NEAR < ratio < _NEAR:
        chosen: Method = "operator" if ratio > 1 else "direct"
        return chosen, f"{max(ratio, 1 / ratio):.1f}x fewer operations"
    rates = _rates(backend.name, dtype, device, torch.get_num_threads())
    chosen = "operator" if direct / rates[0] > operator / rates[1] else "direct"
    return chosen, f"faster at {rates[0] / 1e9:.0f} direct, {rates[1] / 1e9:.0f} operator GFLOP/s measured here"


@functools.lru_cache(maxsize=16)
def _rates(name: str, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[float, float]:
    """Operations per second of *direct* and *operator* on this machine, by a short run of each (about 0.1 s)."""
    del threads  # part of the key: another number of threads has other rates
    operators = BACKENDS[name].operators
    heads, head_dim, width, ff_width, queries, keys = 8, 32, 256, 1024, 16, 192

    def tensor(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device)

    alpha, position = tensor(heads, queries, keys), torch.arange(queries, device=device)
    slope, down = tensor(1, queries, ff_width), tensor(ff_width, width)
    tail = (tensor(keys, heads + 1, width), None, None, None, False)
    shape = LayerShape(queries, keys, queries * keys, width, ff_width, heads, head_dim, 1)
    inner = heads * head_dim

    def direct() -> object:
        return operators.ff_norms(alpha, position, tensor(1, keys, heads + 1, ff_width), slope, down, *tail)

    def operator() -> object:
        maps, own = tensor(1, inner, ff_width), tensor(1, queries, ff_width)
        return operators.operator_norms(alpha, position, tensor(keys, heads, head_dim), maps, own, slope, down, *tail)

    flops = (
        2.0 * shape.pairs * ff_width * width,
        2.0 * queries * inner * ff_width * width + 2.0 * shape.pairs * inner * width,
    )
    return flops[0] / _best(direct, device), flops[1] / _best(operator, device)


def _best(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)

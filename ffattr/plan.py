"""What a layer's map costs by each method, which one to run, and in which blocks.

Costs are counted, not guessed (METHOD.md section 6); where two methods come near each other, short runs of both on this
machine decide.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import psutil
import torch

from .backends import Backend
from .layer import LayerWeights

__all__ = ["Blocks", "LayerPlan", "LayerShape", "Method", "Plan", "default_budget", "plan_layer"]

Method = Literal["direct", "operator", "attention", "reference"]
"""``attention``: no feed-forward scope is asked for, and nothing d-wide is done for a pair."""

_MiB = 1 << 20
_DEFAULT_BUDGET = 64 * _MiB
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
        mixed = self.heads + 1
        gram = 2.0 * mixed * mixed * (self.pairs + self.tokens * self.width)
        if method == "attention":
            return gram
        shared = gram + 2.0 * self.pairs * mixed * self.width  # residual rows
        shared += 2.0 * self.streams * self.width * self.ff_width * (self.inner + self.tokens)  # maps, own features
        if method == "operator":
            build = 2.0 * self.inner * self.ff_width * self.width
            return shared + self.queries * build + 2.0 * self.pairs * self.inner * self.width
        wide = 2.0 * self.pairs * self.ff_width * (self.width + self.streams * mixed)
        return shared + wide + 2.0 * self.streams * self.tokens * self.inner * self.ff_width

    def key_bytes(self, method: Method, itemsize: int) -> int:
        """Working memory for one key token in a block of keys."""
        mixed = self.heads + 1
        features = mixed * self.width * (3 * itemsize + 8)  # raw, normed, being made; in float64 for the Gram matrix
        # The heads' features and the block they are copied into stand side by side for a moment.
        per_stream = {"direct": 2 * mixed, "operator": 1}.get(method, 0)
        return features + per_stream * self.streams * self.ff_width * itemsize + 2 * mixed * mixed * 8

    def pair_bytes(self, itemsize: int) -> int:
        """Working memory for one pair of a block: its weights, and a tile of every scope."""
        return (self.heads + 8) * itemsize

    def query_bytes(self, itemsize: int) -> int:
        """Working memory for one query token in a block of queries: weights of its keys, its path and its slopes."""
        return (2 * self.heads * self.tokens + 8 * self.streams * self.ff_width + 12 * self.width) * itemsize


@dataclass(frozen=True)
class Blocks:
    """How many query tokens, and how many key tokens, are worked on at a time."""

    queries: int
    keys: int


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
        for p in self.layers:
            shape = p.shape
            lines.append(
                f"layer {p.layer:3d}  {p.method:9s} {shape.queries} x {shape.tokens} tokens  "
                f"{p.flops / 1e9:10.2f} GFLOP  {p.bytes / _MiB:7.1f} MiB  "
                f"blocks {p.blocks.queries} x {p.blocks.keys}  ({p.reason})"
            )
        lines.append(f"total      {self.flops / 1e9:.2f} GFLOP, working memory {self.bytes / _MiB:.1f} MiB")
        return "\n".join(lines)


def default_budget(device: torch.device) -> int:
    """Bytes of working memory when the user names none: a share of what is free, no more than is of use."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] // 4)
    return min(_DEFAULT_BUDGET, psutil.virtual_memory().available // 4)


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

    Raises ValueError where ``budget`` cannot hold a single pair.
    """
    chosen, reason = _choose(shape, wide, backend, method, dtype, device)
    budget = default_budget(device) if budget is None else budget
    itemsize = dtype.itemsize
    per_query, per_key = shape.query_bytes(itemsize), shape.key_bytes(chosen, itemsize)
    per_pair = shape.pair_bytes(itemsize)
    if chosen == "reference":
        per_key = 4 * shape.tokens * shape.ff_width * itemsize  # of one query: it knows no blocks of keys
        blocks = Blocks(max(1, min(shape.queries, budget // per_key)), shape.tokens)
        return LayerPlan(layer, shape, chosen, blocks, shape.flops("direct"), blocks.queries * per_key, reason)
    if budget < per_query + per_key + per_pair:
        raise ValueError(
            f"memory_budget={budget} bytes is too small for layer {layer}: one query and one key token of "
            f"{shape.tokens} need {per_query + per_key + per_pair} bytes"
        )
    # Half for the queries: a longer block of queries repeats the keys' features less often.
    queries = max(1, min(shape.queries, budget // 2 // per_query))
    keys = max(1, min(shape.tokens, (budget - queries * per_query) // (per_key + queries * per_pair)))
    used = queries * per_query + keys * (per_key + queries * per_pair)
    repeats = -(-shape.queries // queries)
    if repeats > 1:
        reason += f", features made {repeats} times"
    return LayerPlan(layer, shape, chosen, Blocks(queries, keys), shape.flops(chosen), used, reason)


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
    from .backends import BACKENDS

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
        maps, own = tensor(1, inner, ff_width), tensor(1, keys, ff_width)
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

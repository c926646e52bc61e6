"""What runs at each layer, or would run: method, blocks, operations, bytes and seconds."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cached_property

import psutil
import torch

from ...decomposition.sketch import Sketch
from ...ops.availability import describe_product
from ...ops.backends import Backend
from ...ops.reduction import Reduction
from ..machine_rates import Rates
from .costs import Blocks, LayerShape, Method

__all__ = ["EngineOptions", "LayerPlan", "Plan", "default_budget", "free_bytes"]

_MiB = 1 << 20
_DEFAULT_BUDGET = 24 * _MiB
"""Working memory on a CPU beyond which no shape tried ran faster: blocks are then long enough to hide their set-up."""


@dataclass(frozen=True)
class EngineOptions:
    """How a user wants maps to be computed.

    ``matmul_dtype`` is the precision of the feed-forward products: the matrices of the feed-forward block and what is
    multiplied by them. ``memory_budget`` in bytes bounds what blocks take (None: a share of what is free); the maps and
    the layer's own matrices come on top.
    """

    backend: Backend
    method: str | Sketch
    matmul_dtype: torch.dtype
    device: torch.device
    memory_budget: int | None = None

    @cached_property
    def budget(self) -> tuple[int, int]:
        """Bytes of working memory that are of use, and that there are at most, when it is asked for first."""
        return default_budget(self.device) if self.memory_budget is None else (self.memory_budget, self.memory_budget)


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a pack of sequences: what runs, in which blocks, and what it costs. ``stack``: "encoder", "decoder"
    or "".

    ``dtype`` is that of the feed-forward products, ``choice`` why it is this method, ``halvings`` how often the blocks
    were halved because memory ran out, ``rates`` those of this machine, if they are known.
    """

    layer: int
    shape: LayerShape
    method: Method
    blocks: Blocks
    dtype: torch.dtype
    choice: str
    halvings: int = 0
    stack: str = ""
    sketch: Sketch | None = None
    rates: Rates | None = field(default=None, repr=False)

    @property
    def flops(self) -> float:
        return self.shape.flops(self.method)

    @property
    def bytes(self) -> int:
        return self.shape.bytes(self.method, self.blocks, self.dtype)

    @property
    def repeats(self) -> int:
        """In how many blocks of queries."""
        return -(-self.shape.queries // self.blocks.queries)

    @property
    def work(self) -> dict[str, float]:
        """How much there is to do of each kind that `ffattr.engine.machine_rates.Rates` has."""
        return {**self.shape.work(self.method, self.blocks), "fresh": float(self.bytes), "packs": 1.0}

    @property
    def seconds(self) -> float | None:
        """How long the layer's maps take, without the model's own forward pass. None where nothing is known of this
        machine (``ffattr bench --calibrate``), and for the reference."""
        return None if self.rates is None or self.method == "reference" else self.rates.seconds(self.work)

    @property
    def reason(self) -> str:
        """Why this method, and what became of the blocks."""
        reason = self.choice
        if self.repeats > 1 and self.method != "reference":
            reason += f", features made {self.repeats} times"
        if self.halvings:
            reason += f", halved {self.halvings} time{'s' * (self.halvings > 1)} after running out of memory"
        return reason

    def halve_blocks(self) -> LayerPlan | None:
        """The same layer in blocks of half the queries or, of one query, half the keys. None: nothing is left."""
        queries, keys, ff_keys = self.blocks.queries, self.blocks.keys, self.blocks.ff_keys
        if queries > 1:
            smaller = Blocks(queries // 2, keys, ff_keys, self.blocks.grams)
        elif self.method != "reference" and max(keys, ff_keys) > 1:
            smaller = Blocks(1, max(1, keys // 2), max(1, ff_keys // 2))
        else:
            return None
        return replace(self, blocks=smaller, halvings=self.halvings + 1)


@dataclass
class Plan:
    """What ran, or would run: backend, dtype of the feed-forward products, operations and memory of every layer.
    Printable.

    >>> plan = ffattr.plan(model, "The cat sat.", tokenizer=tokenizer, backend="torch", layers=[0, 2])
    >>> plan.backend, plan.dtype, [layer.layer for layer in plan.layers]
    ('torch', torch.float64, [0, 2])
    >>> plan.flops == sum(layer.flops for layer in plan.layers) > 0
    True
    >>> plan.layers[0].method, plan.layers[0].reason
    ('direct', '2.7x fewer operations')
    """

    backend: str
    dtype: torch.dtype
    device: torch.device
    layers: list[LayerPlan] = field(default_factory=list)
    reduction: Reduction = "l2"

    @property
    def flops(self) -> float:
        return sum(layer.flops for layer in self.layers)

    @property
    def bytes(self) -> int:
        return max((layer.bytes for layer in self.layers), default=0)

    @property
    def seconds(self) -> float | None:
        """How long all maps take, or None: see `LayerPlan.seconds`."""
        each = [layer.seconds for layer in self.layers]
        return None if None in each else sum(filter(None, each))

    def __str__(self) -> str:
        product = describe_product(self.backend, self.dtype)
        dtype = str(self.dtype).removeprefix("torch.") + (f" by {product}" if product else "")
        lines = [f"{self.backend} backend, {dtype} on {self.device}"]
        lines[0] += "" if self.reduction == "l2" else f", reduce={self.reduction!r}"
        for _, group in itertools.groupby(self.layers, key=lambda layer: replace(layer, layer=0)):
            same = list(group)
            first, numbers = same[0], _format_ranges([layer.layer for layer in same])
            layers = f"{first.stack} layer {numbers}".strip()
            keys = first.blocks.keys if first.method == "attention" else first.blocks.ff_keys
            lines.append(
                f"{len(same)} x {layers}: {first.method}, {first.shape.queries} queries x {first.shape.tokens} "
                f"tokens in blocks of {first.blocks.queries} x {keys}, {first.flops / 1e9:.2f} GFLOP and "
                f"{first.bytes / _MiB:.1f} MiB each ({first.reason})"
            )
        total = f"total: {self.flops / 1e9:.2f} GFLOP, working memory {self.bytes / _MiB:.1f} MiB"
        if self.layers and self.seconds is not None:
            total += f", about {self.seconds:.2g} s beside the model's own run"
        lines.append(total)
        return "\n".join(lines)


def _format_ranges(numbers: list[int]) -> str:
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

"""What every benchmark shares: a random layer of a known shape, its maps by any backend, and how to time them honestly.

Nothing is timed that was not compared with the float64 definition first. Speeds are given as shares of what this
machine's own matrix product reaches, counting ``2 T^2 F d`` operations for a layer of ``T`` tokens (half of them for a
causal one) and nothing else: what any exact method that goes pair by pair has to multiply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import backends, engine, reference, torch_ops
from .activations import ACTIVATIONS
from .attention import QueryKey
from .backends import Backend
from .engine import Done
from .errors import FfattrError, OutOfMemory
from .layer import LayerWeights
from .pack import OneSequence, Pack
from .parameters import Linear, Norm
from .plan import LayerPlan, LayerShape, plan_layer
from .reference import Rule
from .tiles import Layer
from .timing import timed

__all__ = [
    "SHAPES",
    "TOLERANCE",
    "Case",
    "Row",
    "Size",
    "Truth",
    "WrongResult",
    "compare",
    "dense",
    "maps",
    "materialise",
    "operands",
    "prepared",
]

Run = Callable[[], dict[str, Tensor]]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE[torch.float8_e4m3fn] = 3e-2  # kernels round both operands of the last product to it, by up to 2^-4 each
"""How far maps with wide products in a dtype may be from the definition, in parts of the scope's largest entry."""


class WrongResult(FfattrError):
    """What was to be timed computes something else than the definition."""


@dataclass(frozen=True)
class Size:
    """All of a layer that its speed depends on. ``pre``: norms before attention and the feed-forward block, not after;
    ``rms``: RMSNorm and no biases, as in Llama."""

    width: int
    heads: int
    ff_width: int
    activation: str = "gelu"
    pre: bool = False
    rms: bool = False
    gated: bool = False
    causal: bool = False


SHAPES = {
    "minilm": Size(384, 12, 1536),
    "bert-base": Size(768, 12, 3072),
    "gpt2": Size(768, 12, 3072, "gelu_tanh", pre=True, causal=True),
    "llama-7b": Size(4096, 32, 11008, "silu", pre=True, rms=True, gated=True, causal=True),
}


@dataclass(frozen=True)
class Case:
    """One random layer with one input of ``T`` tokens: everything that a variant gets."""

    weights: LayerWeights
    x: Tensor
    attention: QueryKey

    @classmethod
    def random(
        cls,
        size: Size,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> Case:
        """The same numbers for every dtype; another device draws other ones."""
        generator = torch.Generator(device).manual_seed(seed)
        width, heads, biased = size.width, size.heads, not size.rms

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(random(inputs, outputs, scale=inputs**-0.5), random(outputs, scale=0.1) if biased else None)

        def norm() -> Norm:
            shift = random(width, scale=0.1) if biased else None
            eps = 1e-6 if size.pre else 1e-12
            return Norm("rms" if size.rms else "layer", 1 + random(width, scale=0.1), shift, eps)

        around: dict[str, Any] = {
            name: norm()
            for name in (("norm_before_attn", "norm_before_ff") if size.pre else ("norm_after_attn", "norm_after_ff"))
        }
        weights = LayerWeights(
            heads=heads,
            kv_heads=heads,
            value=linear(width, width),
            out=linear(width, width),
            up=linear(width, size.ff_width),
            gate=linear(width, size.ff_width) if size.gated else None,
            down=linear(size.ff_width, width),
            activation=ACTIVATIONS[size.activation],
            **around,
        )
        head_dim = width // heads
        query, key = random(heads, tokens, head_dim), random(heads, tokens, head_dim)
        return cls(weights, random(tokens, width), QueryKey(query, key, head_dim**-0.5, causal=size.causal))

    def cast(self, dtype: torch.dtype) -> Case:
        def part(of: Any) -> Any:
            if type(of) not in (Linear, Norm):
                return of
            parameters = {"weight": of.weight, "bias": of.bias}
            return replace(of, **{name: None if t is None else t.to(dtype) for name, t in parameters.items()})

        weights = replace(self.weights, **{f.name: part(getattr(self.weights, f.name)) for f in fields(self.weights)})
        attention = replace(self.attention, query=self.attention.query.to(dtype), key=self.attention.key.to(dtype))
        return Case(weights, self.x.to(dtype), attention)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def flops(self) -> float:
        """What shares of the matrix rate count: ``2 T^2 F d``, half of it for a causal layer."""
        pairs = len(self.x) ** 2 / (2 if self.attention.causal else 1)
        return 2.0 * pairs * self.weights.ff_width * self.weights.width

    @property
    def wide_scopes(self) -> tuple[str, ...]:
        """From the feed-forward block on."""
        return self.weights.wide_scopes

    @property
    def narrow_scopes(self) -> tuple[str, ...]:
        """Those of attention, heads summed."""
        return tuple(name for name in self.weights.scopes if name not in self.wide_scopes and name != "attn_heads")


def prepared(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
) -> tuple[Run, LayerPlan]:
    """What computes the maps as `ffattr.attribute` does, one layer and sequence, and the plan it follows.

    ``rows`` ``[N]``: query tokens, None for all; ``wide_dtype``: of the wide products, None for that of ``case``.
    """
    chosen = backends.BACKENDS[backend] if isinstance(backend, str) else backend
    queries = torch.arange(len(case.x), device=case.device) if rows is None else rows.to(case.device)
    pairs = case.attention.pairs(queries)
    shape = LayerShape.of(case.weights, len(queries), len(case.x), pairs, scopes=scopes)
    wide = not set(case.wide_scopes).isdisjoint(scopes)
    plan = plan_layer(0, shape, wide, chosen, method, wide_dtype or case.x.dtype, case.device, None)

    def run() -> dict[str, Tensor]:
        layer = Layer(case.weights, scopes, Rule(), "token", chosen, plan.dtype)
        found, _ = dense(layer, OneSequence(case.x, case.attention, queries), plan)
        return found

    return run, plan


def dense(layer: Layer, sequence: OneSequence, plan: LayerPlan) -> tuple[dict[str, Tensor], Done]:
    """The maps ``{scope: [..., N, C]}`` of one sequence at a layer, and what else the engine says."""
    found: dict[str, Tensor] = {}

    def emit(number: int, rows: Tensor, tiles: dict[str, Tensor]) -> None:
        for name, tile in tiles.items():
            if name not in found:
                found[name] = tile.new_zeros(*tile.shape[:-2], len(sequence.rows), tile.shape[-1])
            found[name][..., rows, :] = tile

    done = engine.run(layer, Pack((sequence,)), plan, emit)
    return found, done


def maps(
    case: Case,
    backend: str | Backend,
    method: str,
    scopes: Collection[str],
    rows: Tensor | None = None,
    wide_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """``{scope: [N, T]}``, see `prepared`."""
    run, _ = prepared(case, backend, method, scopes, rows, wide_dtype)
    return run()


def materialise(case: Case, scopes: Collection[str]) -> dict[str, Tensor]:
    """What every earlier tool does: all vectors of all pairs in memory, then their norms."""
    rows = torch.arange(len(case.x), device=case.device)
    found: dict[str, Tensor] = {}
    for name, stream in reference.decompose(case.weights, case.x, case.attention, rows, Rule()):
        if name in scopes:
            found[name] = stream.vectors.norm(dim=-1)
        if len(found) == len(scopes):
            break
    return found


class _Reached(Exception):
    """No error: it carries out what was looked for."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class _Recorder:
    """Operators that stop a layer at its first wide one."""

    ig_slope = staticmethod(torch_ops.ig_slope)

    def ff_norms(self, *arguments: Any) -> Tensor:
        raise _Reached(*arguments)

    operator_norms = ff_norms


def operands(case: Case, method: str, wide_dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the layer's first call of ``ff_norms`` (method "direct") or ``operator_norms``, of which
    ``sequences``, the last, is left out."""
    recording = replace(backends.BACKENDS["torch"], load=_Recorder)
    try:
        maps(case, recording, method, case.wide_scopes, None, wide_dtype)
    except _Reached as reached:
        return reached.arguments[:-1]
    raise AssertionError("a layer without a wide operator")


@dataclass(frozen=True)
class Truth:
    """The float64 definition for a few query tokens ``rows`` ``[n]``: ``{scope: [n, T]}``."""

    rows: Tensor
    maps: dict[str, Tensor]

    @classmethod
    def of(cls, case: Case, scopes: Collection[str]) -> Truth:
        last = len(case.x) - 1
        rows = sorted({0, last // 3, last // 2, last})  # rarely at the same place of a kernel's block
        exact = case.cast(torch.float64)
        # One at a time: the vectors of all heads are the most that a query needs.
        found = [maps(exact, "reference", "auto", scopes, torch.tensor([row])) for row in rows]
        return cls(torch.tensor(rows, device=case.device), {s: torch.cat([one[s] for one in found]) for s in scopes})

    def only(self, scopes: Collection[str]) -> Truth:
        return Truth(self.rows, {scope: self.maps[scope] for scope in scopes})

    def error(self, found: dict[str, Tensor]) -> float:
        """Largest difference in parts of its scope's largest entry; NaN where anything in ``found`` is not finite."""
        if not all(bool(found[scope].isfinite().all()) for scope in self.maps):
            return math.nan
        return max(float((found[s][self.rows] - truth).abs().max() / truth.max()) for s, truth in self.maps.items())

    def verify(self, name: str, found: dict[str, Tensor], tolerance: float) -> float:
        """`error`, where it is below ``tolerance``; raises `WrongResult` otherwise."""
        error = self.error(found)
        if not error < tolerance:
            raise WrongResult(f"{name} is wrong by {error:.1e}, expected less than {tolerance:.0e}: not timed")
        return error


@dataclass(frozen=True)
class Row:
    """A backend's median ``seconds`` for all feed-forward scopes and its error, or in ``reason`` why there are none."""

    backend: str
    method: str = ""
    seconds: float | None = None
    error: float | None = None
    reason: str = ""


def compare(case: Case, wide_dtype: torch.dtype, backend: str, rounds: int) -> Iterator[Row]:
    """A row for each backend, or for the one asked for (``"auto"``: all). Raises `BackendUnavailable` for that one."""
    heads = case.weights.heads
    if backend != "auto":
        backends.select(backend, case.device, wide_dtype, heads)
    truth = Truth.of(case, case.wide_scopes)
    for name in backends.BACKENDS if backend == "auto" else (backend,):
        reason = backends.BACKENDS[name].why_not(case.device, wide_dtype, heads)
        if reason is None and backend == "auto" and backends.BACKENDS[name].emulated(case.device):
            reason = f"{name} kernels without a GPU show no speed: they run only where backend {name!r} is asked for"
        if reason is not None:
            yield Row(name, reason=reason)
            continue
        try:
            run, plan = prepared(case, name, "auto", case.wide_scopes, None, wide_dtype)
            error = truth.verify(name, run(), TOLERANCE[wide_dtype])
            yield Row(name, plan.method, timed(run, case.device, rounds, limit=10.0), error)
        except (WrongResult, OutOfMemory) as failure:
            yield Row(name, reason=str(failure))

"""How fast this machine does each kind of work: what decides where counts come near each other, and predicts times.

`ffattr.bench.calibrate` measures all rates and keeps them for later processes; where it has not run, a short run of
both methods tells how they compare.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from ..decomposition.precision import operand_dtype, result_dtype
from ..machine import Cache, cache_file, name_processor
from ..ops.availability import describe_product
from ..ops.backends import BACKENDS
from ..ops.contract import Epilogue

__all__ = ["Rates", "calibrated", "keep", "key_of", "measured", "pin", "rates_file"]


@dataclass(frozen=True)
class Rates:
    """What is done in a second of each kind of work: floating point operations, numbers, bytes, or times.

    A kind is slower by itself than others of the same operations, or counted otherwise.
    """

    product: float
    """Operations of a large matrix product of the library."""
    attention: float
    """Operations of the products with queries, keys and values of a head."""
    weights: float
    """Attention weights: logits, softmax, and all that goes over them once more."""
    features: float
    """Operations of what every head of a key brings: small products, written far apart."""
    gram: float
    """Operations, in float64, of the matrices of attention-level maps."""
    form: float
    """Operations of their quadratic forms."""
    slope: float
    """Slopes of dense feed-forward blocks."""
    gated_slope: float
    """Slopes of gated ones."""
    mixing: float
    """Operations of mixing the heads' features for a pair."""
    direct: float
    """Operations of the *direct* method's wide product."""
    operator: float
    """Operations of the *operator* method's wide products."""
    fresh: float
    """Bytes of memory that is used for the first time."""
    packs: float
    """Packs of sequences at a layer, whatever their size."""
    blocks: float
    """Blocks of queries, whatever their size."""
    calls: float
    """Calls of an operator for attention-level maps, or for a query alone, whatever their size."""

    def seconds(self, work: Mapping[str, float]) -> float:
        """For so much of each kind."""
        rates: dict[str, float] = asdict(self)
        return sum(count / rates[kind] for kind, count in work.items())


def key_of(name: str, dtype: torch.dtype, device: torch.device, threads: int) -> str:
    """What rates belong to: another machine, PyTorch, number of threads, dtype or backend has others."""
    here = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type
    product = describe_product(name, dtype)
    what = f"{name} in {str(dtype).removeprefix('torch.')}" + (f" by {product}" if product else "")
    return f"{name_processor(device)}, {here}, torch {torch.__version__}, {what}"


def rates_file() -> Path:
    """Returns the file that keeps rates."""
    return cache_file(_CACHE.name)


_pinned: list[Rates] = []


def pin(rates: Rates | None) -> None:
    """Makes all plans of this process follow these rates (None: this machine's again), so that every machine and every
    run of a program chooses the same methods, whatever was measured where."""
    _pinned[:] = [] if rates is None else [rates]


def calibrated(name: str, dtype: torch.dtype, device: torch.device, threads: int) -> Rates | None:
    """What `pin` says, or what `keep` kept for this machine, or None."""
    if _pinned:
        return _pinned[0]
    return _CACHE.read().get(key_of(name, dtype, device, threads))


def keep(key: str, rates: Rates) -> Path:
    """Stores ``rates`` beside those of other keys. Raises OSError where the file cannot be written."""
    return _CACHE.update(lambda known: {**known, key: rates})


def _parse_rates(values: Mapping[str, float]) -> Rates:
    rates = Rates(**values)
    for one in fields(Rates):
        value = getattr(rates, one.name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{one.name} is {value!r}")
    return rates


_CACHE = Cache("rates.json", "ffattr bench --calibrate", _parse_rates, asdict)


@functools.lru_cache(maxsize=16)
def measured(name: str, dtype: torch.dtype, device: torch.device, threads: int) -> tuple[float, float]:
    """Operations per second of *direct* and *operator* with wide products in ``dtype``, by a short run of each.

    About 0.1 s, once for a machine.
    """
    del threads  # part of the key: another number of threads has other rates
    backend = BACKENDS[name]
    operators, operand = backend.require_operators(), operand_dtype(dtype, backend.rounded)
    heads, head_dim, width, ff_width, queries, keys = 8, 32, 256, 1024, 16, 192
    if device.type == "cuda":  # which would be done with these before the next kernel is launched
        heads, head_dim, width, ff_width, queries, keys = 12, 64, 768, 3072, 64, 1024

    def tensor(*shape: int) -> torch.Tensor:
        return torch.full(shape, 0.5, dtype=operand, device=device)

    alpha, position = tensor(heads, queries, keys).to(result_dtype(dtype)), torch.arange(queries, device=device)
    slope, down = tensor(1, queries, ff_width), tensor(ff_width, width).to(operand_dtype(dtype))
    epilogue = Epilogue(tensor(keys, heads + 1, width))
    inner = heads * head_dim

    def direct() -> object:
        features = tensor(1, keys, heads + 1, ff_width)
        return operators.ff_norms(alpha, position, features, slope, down, None, *epilogue)

    def operator() -> object:
        maps, own = tensor(1, inner, ff_width), tensor(1, queries, ff_width)
        values = tensor(keys, heads, head_dim)
        return operators.operator_norms(alpha, position, values, maps, own, slope, down, *epilogue)

    flops = (
        2.0 * queries * keys * ff_width * width,
        2.0 * queries * inner * ff_width * width + 2.0 * queries * keys * inner * width,
    )
    return flops[0] / _best_seconds(direct, device), flops[1] / _best_seconds(operator, device)


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)

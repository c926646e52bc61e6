"""Tile sizes: what was measured on this device if `ffattr bench --tune` was run on it, else by rule.

The rules rest on registers and shared memory as compiled ahead of time (``benchmarks/gpu/resources.py`` prints them);
none has been timed on a GPU yet. A thread has 255 registers, and the sums of a tile take
``queries * columns / threads``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ...machine import Cache, cache_file
from .runtime import INTERPRETED

__all__ = [
    "Config",
    "Shape",
    "choose_apply",
    "choose_build",
    "choose_direct",
    "halve_columns",
    "list_candidates",
    "padded_heads",
    "remember_config",
    "save_configs",
    "tuned_file",
]


@dataclass(frozen=True)
class Config:
    """Describes the tile of a program: ``queries`` rows, ``columns`` of the output at a time, ``neurons`` of a step.

    ``stages`` steps are under way at once, loaded by TMA where ``tma`` and the strides allow it. Where rows are not
    queries, or the sum is not over neurons, the names stand for what is in their place.
    """

    queries: int
    columns: int
    neurons: int
    warps: int
    stages: int
    tma: bool


@dataclass(frozen=True)
class Shape:
    """Holds what a config depends on; ``dtype`` is that of ``down``, ``capability`` (0, 0) stands for the
    interpreter."""

    heads: int
    streams: int
    width: int
    queries: int
    dtype: torch.dtype
    capability: tuple[int, int]
    device: str = ""

    @classmethod
    def from_operands(cls, alpha: Tensor, down: Tensor, streams: int) -> Shape:
        heads, queries, _ = alpha.shape
        if INTERPRETED:
            return cls(heads, streams, down.shape[1], queries, down.dtype, (0, 0))
        properties = torch.cuda.get_device_properties(alpha.device)
        capability = (properties.major, properties.minor)
        return cls(heads, streams, down.shape[1], queries, down.dtype, capability, properties.name)

    @property
    def uses_warpgroups(self) -> bool:
        """Tells whether the matrix unit takes operands of whole warpgroups from shared memory, where TMA puts them."""
        return self.capability[0] in (9, 10)

    @property
    def has_few_queries(self) -> bool:
        return self.queries <= 64

    @property
    def is_narrow(self) -> bool:
        """Tells whether blocks of 256 columns would leave more than a tenth of their work outside the matrix."""
        return triton.cdiv(self.width, 256) * 256 > 1.1 * self.width

    def make_key(self, kernel: str) -> str:
        """Makes the key of a tuned config, which shapes with one key share."""
        dtype = str(self.dtype).removeprefix("torch.")
        size = f"{'few' if self.has_few_queries else 'many'} queries, {'narrow' if self.is_narrow else 'wide'}"
        return f"{kernel}: {dtype}, {self.streams} stream(s), {padded_heads(self.heads)} heads, {size}"


def padded_heads(heads: int) -> int:
    """Returns the rows of a tile of heads: a power of two, and no fewer than a matrix instruction sums over."""
    return max(16, triton.next_power_of_2(heads))


def choose_direct(shape: Shape) -> Config:
    return _choose_config("direct", shape, _rule_direct)


def choose_build(shape: Shape) -> Config:
    return _choose_config("build", shape, _rule_build)


def choose_apply(shape: Shape, head_dim: int) -> Config:
    config = _choose_config("apply", shape, _rule_apply)
    # A step stays within one head, whose weight is one number for each row.
    return replace(config, neurons=max(16, min(config.neurons, triton.next_power_of_2(head_dim))))


def halve_columns(config: Config) -> Config:
    """Makes room beside the sums for a second tile of their size: the rows that vectors are compared with."""
    return replace(config, columns=max(16, config.columns // 2))


def _rule_direct(shape: Shape) -> Config:
    heads, gated = padded_heads(shape.heads), shape.streams == 2
    tensor_memory = shape.capability[0] == 10  # its 512 columns hold sums, z and P: 128 x 256 sums would take all
    if shape.dtype == torch.float32:  # three products from operands split in registers: a quarter of a bfloat16 tile
        if (
            shape.uses_warpgroups and heads >= 64 and not (heads == 128 and tensor_memory)
        ):  # as few spills as any tile tried
            return Config(64, 64, 16, 4, 2, True) if heads == 64 else Config(128, 32, 16, 8, 2, True)
        if shape.uses_warpgroups:
            return Config(64, 64 if gated or heads > 16 or tensor_memory else 128, 32, 8, 2, True)
        return Config(64, 32 if gated or heads > 16 else 64, 16, 8, 2, False)
    if not shape.uses_warpgroups:  # operands and sums share the registers of mma.sync
        return Config(128, 64 if gated else 128, 32, 8, 3, False)
    # 128 x 256 sums take half the registers of 8 warps: more leave no room for z, fewer columns make z more often.
    # A step's float8 products are summed apart, which takes the registers of a tile once more.
    float8 = shape.dtype == torch.float8_e4m3fn
    columns = 128 if shape.is_narrow or heads == 128 or float8 or tensor_memory else 256
    # Two z and two slopes of a gated block, or many heads, leave room for half as many neurons.
    neurons, stages = (32, 4 if heads < 64 else 3) if gated or (heads == 64 and columns == 256) else (64, 3)
    if float8 and not gated and heads >= 64:  # two sets of sums beside rows of so many heads: half the queries fit
        return Config(64, 128, 64, 8, 3, True)
    if shape.has_few_queries and heads <= 32:
        return Config(64, columns, neurons, 4, 3, True)
    return Config(128, columns, neurons, 8, stages, True)


def _rule_build(shape: Shape) -> Config:
    if shape.dtype == torch.float32:
        return Config(64, 64, 32, 8, 2, True) if shape.uses_warpgroups else Config(64, 64, 16, 8, 2, False)
    if not shape.uses_warpgroups:
        return Config(128, 128, 32, 8, 3, False)
    return Config(128, 128 if shape.is_narrow else 256, 64, 8, 3, True)


def _rule_apply(shape: Shape) -> Config:
    if shape.dtype == torch.float32:
        return Config(64, 64, 32, 8, 2, True) if shape.uses_warpgroups else Config(64, 64, 16, 8, 2, False)
    if not shape.uses_warpgroups:
        return Config(128, 64, 32, 8, 3, False)
    return Config(128, 128, 64, 8, 3, True)  # 256 columns spill: the mixed residual is a second tile of that size


_INTERPRETED = Config(32, 64, 64, 4, 1, True)
"""The interpreter's time goes by operations, whatever their size; loops should still turn more than once in a test."""


def _choose_config(kernel: str, shape: Shape, rule: Callable[[Shape], Config]) -> Config:
    if shape.capability == (0, 0):
        return _INTERPRETED
    return _read_tuned().get(shape.device, {}).get(shape.make_key(kernel)) or rule(shape)


def list_candidates(shape: Shape) -> Iterator[Config]:
    """Yields what ``ffattr bench --tune`` tries: tiles whose sums leave registers for the rest; some do not compile."""
    least = 32 if shape.dtype == torch.float8_e4m3fn else 16
    for queries, columns, neurons, warps, stages in itertools.product(
        (64, 128), (64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3, 4)
    ):
        sums = queries * columns // (32 * warps)
        if neurons >= least and 16 <= sums <= 128:
            for tma in (True, False) if shape.capability >= (9, 0) else (False,):
                yield Config(queries, columns, neurons, warps, stages, tma)


def tuned_file() -> Path:
    """Returns the file that keeps tuned configs, by device name."""
    return cache_file(_CACHE.name)


def remember_config(shape: Shape, kernel: str, config: Config | None) -> None:
    """Uses ``config`` for shapes like this one in this process; None: the rule again."""
    table, key = _read_tuned().setdefault(shape.device, {}), shape.make_key(kernel)
    if config is None:
        table.pop(key, None)
        _forgotten.add((shape.device, key))
    else:
        table[key] = config
        _forgotten.discard((shape.device, key))


def save_configs() -> Path:
    """Keeps what is remembered for later processes, beside what others have kept. Raises OSError where the file cannot
    be written."""
    mine = _read_tuned()

    def merge_tables(known: Mapping[str, dict[str, Config]]) -> dict[str, dict[str, Config]]:
        merged = {device: {**known.get(device, {}), **mine.get(device, {})} for device in {**known, **mine}}
        for device, key in _forgotten:
            merged.get(device, {}).pop(key, None)
        return merged

    return _CACHE.update(merge_tables)


_forgotten: set[tuple[str, str]] = set()  # what was remembered for a device, and is not


@lru_cache
def _read_tuned() -> dict[str, dict[str, Config]]:
    _forgotten.clear()
    return {device: dict(configs) for device, configs in _CACHE.read().items()}


def _parse_configs(configs: Any) -> dict[str, Config]:
    found = {key: Config(**config) for key, config in configs.items()}
    for key, config in found.items():
        if not all(isinstance(size, int) and size >= 0 for size in asdict(config).values()):
            raise ValueError(f"{key} is {config}")
    return found


def _describe_configs(configs: dict[str, Config]) -> dict[str, Any]:
    return {key: asdict(config) for key, config in configs.items()}


_CACHE = Cache("triton.json", "ffattr bench --tune", _parse_configs, _describe_configs)

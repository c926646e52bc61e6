"""One call of an operator on random operands of a known shape, and how wrong its result is.

Operands are drawn as they arrive at a kernel, so that nothing but the kernel is checked and timed: no layer is run
before. The definition is `ffattr.ops.torch_kernels` in float64, for a few query tokens of every sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..decomposition.precision import operand_dtype, quantised
from ..ops import torch_kernels
from .cases import Size

__all__ = ["OPERATORS", "Problem"]

OPERATORS = ("ff_norms", "operator_norms", "gram_norms", "ig_slope")
QUERY_AXIS = {"alpha": 1, "position": 0, "slope": 1, "own": 1, "residual_scale": 0, "norm_scale": 0, "row_scale": 0}
KEY_AXIS = {"alpha": 2, "features": 1, "values": 0, "residual": 0, "gram": 0}
CHECKED_ROWS = 6


@dataclass(frozen=True)
class Problem:
    """The arguments of ``operator`` by name, and the numbers of tokens of the sequences that they are for."""

    operator: str
    size: Size
    lengths: tuple[int, ...]
    arguments: dict[str, Any]

    @classmethod
    def draw_random(
        cls,
        operator: str,
        size: Size,
        lengths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        keys: int | None = None,
        filled: bool = True,
        rounded: bool = True,
    ) -> Problem:
        """Draws the same numbers each time.

        ``lengths`` are of sequences that share the call; ``keys`` limits the key tokens of one that is alone in it;
        without ``filled`` numbers are whatever lies in memory, for who only compiles; without ``rounded`` the down
        matrix alone is in a narrow ``dtype``.
        """
        draw = _Draw(size, tuple(lengths), dtype, device, keys, filled, rounded)
        return cls(operator, size, tuple(lengths), getattr(draw, operator)())

    @property
    def flops(self) -> float:
        """What is counted for a call: ``2 F d`` for a pair by ``ff_norms``, the products of ``operator_norms``; 0 for
        the other two, which are no matrix products of the feed-forward block."""
        size = self.size
        queries = sum(self.lengths)
        pairs = sum(length**2 for length in self.lengths) / (2 if size.causal else 1)
        if self.operator == "ff_norms":
            return 2.0 * pairs * size.ff_width * size.width
        if self.operator == "operator_norms":
            streams = 2 if size.gated else 1
            return 2.0 * queries * size.width * size.ff_width * size.width * streams + 2.0 * pairs * size.width**2
        return 0.0

    def measure_error(self, found: Tensor) -> float:
        """Returns the largest difference from the definition, in parts of a map's largest entry; NaN where anything in
        ``found`` is not finite."""
        if not bool(found.isfinite().all()):
            return math.nan
        worst, first = 0.0, 0
        for number, length in enumerate(self.lengths):
            steps = torch.linspace(0, length - 1, min(CHECKED_ROWS, length))
            rows = steps.round().long().unique().to(found.device)
            expected = self._define_rows(number, first + rows)
            got = found[..., first + rows, :].double()
            if self.operator != "ig_slope":  # columns beyond a sequence's keys are zero
                assert not bool(got[..., expected.shape[-1] :].any())
                got = got[..., : expected.shape[-1]]
            scale = expected.abs().flatten(-2).amax(-1)[..., None, None].clamp_min(1e-300)
            worst = max(worst, float(((got - expected).abs() / scale).max()))
            first += length
        return worst

    def _define_rows(self, number: int, rows: Tensor) -> Tensor:
        """The definition for query tokens ``rows`` of the call, which are of sequence ``number``."""
        arguments: dict[str, Any] = {}
        first = sum(self.lengths[:number])
        for name, value in self.arguments.items():
            if isinstance(value, Tensor) and name != "sequences":
                if name in QUERY_AXIS or name == "z":
                    value = value.index_select(QUERY_AXIS.get(name, 1), rows)
                if name in KEY_AXIS and len(self.lengths) > 1:
                    start = 0 if name == "alpha" else first
                    value = value.narrow(KEY_AXIS[name], start, self.lengths[number])
                if value.is_floating_point():
                    value = value.double()
            arguments[name] = None if name == "sequences" else value
        if arguments.get("down_scale") is not None:  # float64 has no scaled operands
            arguments |= {"down": arguments["down"] * arguments["down_scale"], "down_scale": None}
        arguments.pop("sequences", None)
        found: Tensor = getattr(torch_kernels, self.operator)(*arguments.values())
        return found


class _Draw:
    def __init__(
        self,
        size: Size,
        lengths: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        keys: int | None,
        filled: bool,
        rounded: bool,
    ) -> None:
        self.size, self.lengths, self.asked, self.device, self.filled = size, lengths, dtype, device, filled
        self.dtype, self.down_dtype = operand_dtype(dtype, rounded), operand_dtype(dtype)
        self.queries, self.keys = sum(lengths), keys or sum(lengths)
        self.columns = keys or max(lengths)
        self.streams = 2 if size.gated else 1
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.dtype
        if not self.filled:
            return torch.empty(shape, dtype=dtype, device=self.device)
        # In the dtype at once: the features of a long text would not fit twice.
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0, scale, generator=self.generator)

    def attention(self) -> dict[str, Any]:
        """Rows sum to 1; a causal layer's are zero for later tokens."""
        position = torch.cat([torch.arange(length) for length in self.lengths]).to(self.device)
        alpha = self.normal(self.size.heads, self.queries, self.columns, scale=2.0, dtype=torch.float32)
        if self.filled:
            column = torch.arange(self.columns, device=self.device)
            length = torch.tensor(self.lengths).repeat_interleave(torch.tensor(self.lengths)).to(self.device)
            seen = column < torch.clamp(length, max=self.columns)[:, None]
            if self.size.causal:
                seen = seen & (column <= position[:, None])
            alpha = alpha.masked_fill_(~seen, -math.inf).softmax(-1)
        return {"alpha": alpha, "position": position}

    def epilogue(self) -> dict[str, Any]:
        """With the scales of norms after both blocks in a post-LN layer."""
        size, post = self.size, not self.size.pre

        def scale(count: int) -> Tensor | None:
            return self.normal(count, dtype=torch.float32).abs_().add_(0.5) if post else None

        residual = self.normal(self.keys, size.heads + 1, size.width, scale=0.5)
        bounds = torch.tensor([0, *self.lengths]).cumsum(0)[:, None].repeat(1, 2) if len(self.lengths) > 1 else None
        return {
            "residual": residual,
            "residual_scale": scale(self.queries),
            "gamma": scale(size.width),
            "norm_scale": scale(self.queries),
            "centre": post and not size.rms,
            "sequences": bounds,
        }

    def slopes(self) -> Tensor:
        return self.normal(self.streams, self.queries, self.size.ff_width, scale=0.5)

    def down(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.normal(
            self.size.ff_width, self.size.width, scale=self.size.ff_width**-0.5, dtype=dtype or self.down_dtype
        )

    def ff_norms(self) -> dict[str, Any]:
        size = self.size
        float8 = self.asked == torch.float8_e4m3fn
        down, down_scale = quantised(self.down(torch.float32)) if float8 else (self.down(), None)
        return {
            **self.attention(),
            "features": self.normal(self.streams, self.keys, size.heads + 1, size.ff_width),
            "slope": self.slopes(),
            "down": down,
            "down_scale": down_scale,
            **self.epilogue(),
        }

    def operator_norms(self) -> dict[str, Any]:
        size = self.size
        return {
            **self.attention(),
            "values": self.normal(self.keys, size.heads, size.width // size.heads),
            "maps": self.normal(self.streams, size.width, size.ff_width, scale=size.width**-0.5),
            "own": self.normal(self.streams, self.queries, size.ff_width),
            "slope": self.slopes(),
            "down": self.down(),
            **self.epilogue(),
        }

    def gram_norms(self) -> dict[str, Any]:
        vectors = self.normal(self.keys, self.size.heads + 1, 64, dtype=torch.float64)
        return {
            **self.attention(),
            "gram": vectors @ vectors.transpose(1, 2),
            "row_scale": None,
            "sequences": self.epilogue()["sequences"],
        }

    def ig_slope(self) -> dict[str, Any]:
        z = self.normal(self.streams, self.queries, self.size.ff_width, scale=2.0, dtype=torch.float32)
        names = ("base", "row_scale", "activation", "rule", "steps")
        return {"z": z, **dict(zip(names, (None, None, self.size.activation, "right", 50), strict=True))}

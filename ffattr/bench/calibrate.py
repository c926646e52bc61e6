"""The rates of `ffattr.engine.machine_rates` on this machine: ``ffattr bench --calibrate``, a few seconds once.

Each kind of work is timed alone, by the code that a layer runs it with, in a size that layers have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..decomposition.attention import QueryKey
from ..decomposition.precision import operand_dtype, quantised, result_dtype
from ..decomposition.reference import Rule, context
from ..engine.costs import Blocks
from ..engine.key_tokens import write_head_vectors
from ..engine.layer_maps import LayerTask
from ..engine.machine_rates import Rates
from ..engine.pack import OneSequence
from ..ops.backends import BACKENDS, Backend
from .cases import Case, Size
from .run import dense, prepared
from .timing import timed

__all__ = ["Seconds", "calibrate"]

Seconds = Callable[[Callable[[], object]], float]
"""How long one run takes."""

_HEADS, _HEAD_DIM, _WIDTH, _FF_WIDTH = 12, 32, 384, 1536


def calibrate(name: str, dtype: torch.dtype, device: torch.device, seconds: Seconds | None = None) -> Rates:
    """All rates of a backend with wide products in ``dtype``; ``seconds``: how to time (None: median of some runs)."""
    backend = BACKENDS[name]

    def median(run: Callable[[], object]) -> float:
        run()
        return timed(run, device, rounds=5, limit=1.0)

    return _Calibration(backend, dtype, device, seconds or median).rates()


class _Calibration:
    def __init__(self, backend: Backend, dtype: torch.dtype, device: torch.device, seconds: Seconds) -> None:
        self.backend, self.asked, self.device, self.seconds = backend, dtype, device, seconds
        self.dtype, self.result = operand_dtype(dtype), result_dtype(dtype)
        self.generator = torch.Generator(device).manual_seed(0)
        self.large = 4 if device.type == "cuda" else 1  # which is done with anything smaller before the next launch

    def rates(self) -> Rates:
        m, k, n = 256 * self.large, 2 * _WIDTH, 2 * _FF_WIDTH
        x, weight = self.random(m, k), self.random(n, k).T
        product = 2.0 * m * k * n / self.seconds(lambda: x @ weight)
        attention, weights = self.attention()
        gram, form = self.grams()
        direct, mixing, operator = self.wide()
        packs, blocks, calls = self.overheads()
        return Rates(
            product=product,
            attention=attention,
            weights=weights,
            features=self.features(),
            gram=gram,
            form=form,
            slope=self.slope(1, "gelu"),
            gated_slope=self.slope(2, "silu"),
            mixing=mixing,
            direct=direct,
            operator=operator,
            fresh=self.fresh(),
            packs=packs,
            blocks=blocks,
            calls=calls,
        )

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def attention(self) -> tuple[float, float]:
        queries, keys = 128 * self.large, 512 * self.large
        key, value = self.random(2, _HEADS, keys, 2 * _HEAD_DIM, dtype=self.result)
        given = QueryKey(self.random(_HEADS, queries, 2 * _HEAD_DIM, dtype=self.result), key, 0.1)
        rows, position = torch.arange(queries, device=self.device), value.transpose(0, 1)

        def whole() -> object:
            alpha = given.attention_weights(rows)
            return context(alpha, position), alpha.contiguous().any(), alpha.clone()

        logits = 2.0 * _HEADS * queries * keys * 2 * _HEAD_DIM
        attention = logits / self.seconds(lambda: given.query @ key.mT)
        return attention, _rest(self.seconds(whole), _HEADS * queries * keys, 2 * logits / attention)

    def features(self) -> float:
        keys, width = 48 * self.large, 2 * _FF_WIDTH
        values, matrix = self.random(keys, _HEADS, 2 * _HEAD_DIM), self.random(_HEADS * 2 * _HEAD_DIM, width)
        own, to = self.random(keys, width), self.random(keys, _HEADS + 1, width)
        return 2.0 * keys * len(matrix) * width / self.seconds(lambda: write_head_vectors(values, matrix, own, to))

    def grams(self) -> tuple[float, float]:
        keys, queries, mixed = 128 * self.large, 256 * self.large, _HEADS + 1
        vectors = self.random(keys, mixed, 2 * _WIDTH, dtype=self.result)

        def made() -> Tensor:
            wide = vectors.double()
            return wide @ wide.mT

        alpha, position = self.random(_HEADS, queries, keys, dtype=self.result), self.positions(queries)
        gram, of_pair = made(), 2.0 * mixed * mixed
        form = self.seconds(lambda: self.backend.operators.gram_norms(alpha, position, gram, None, None))
        return of_pair * keys * 2 * _WIDTH / self.seconds(made), of_pair * keys * queries / form

    def slope(self, streams: int, activation: str) -> float:
        z = self.random(streams, 512 * self.large, 2 * _FF_WIDTH, dtype=self.result)
        return z.numel() / self.seconds(lambda: self.backend.operators.ig_slope(z, None, None, activation, "exact", 0))

    def wide(self) -> tuple[float, float, float]:
        queries, keys, mixed, operators = 16 * self.large, 48 * self.large, _HEADS + 1, self.backend.operators
        alpha = self.random(_HEADS, queries, keys, dtype=self.result)
        tail = (self.random(keys, mixed, _WIDTH), None, None, None, False, None)
        down, down_scale = self.random(_FF_WIDTH, _WIDTH), None
        direct_down = down
        if self.asked != self.dtype:
            direct_down, down_scale = quantised(down)

        def direct(streams: int) -> float:
            made, slope = self.random(streams, keys, mixed, _FF_WIDTH), self.random(streams, queries, _FF_WIDTH)
            given = (alpha, self.positions(queries), made, slope, direct_down, down_scale, *tail)
            return self.seconds(lambda: operators.ff_norms(*given))

        dense, gated = direct(1), direct(2)
        more = 2.0 * queries * keys * mixed * _FF_WIDTH
        mixing = _rest(gated, more, dense)
        once = 2.0 * queries * keys * mixed * (_FF_WIDTH + _WIDTH) / mixing
        rate = _rest(dense, 2.0 * queries * keys * _FF_WIDTH * _WIDTH, once)
        return rate, mixing, self.operator(tail, down, alpha, mixing)

    def operator(self, tail: tuple[object, ...], down: Tensor, alpha: Tensor, mixing: float) -> float:
        _, queries, keys = alpha.shape
        few, inner = queries // 4, _HEADS * _HEAD_DIM
        maps, values = self.random(1, inner, _FF_WIDTH), self.random(keys, _HEADS, _HEAD_DIM)
        own, slope = self.random(2, 1, few, _FF_WIDTH)
        given = (alpha[:, :few].contiguous(), self.positions(few), values, maps, own, slope, down, *tail)
        flops = 2.0 * few * _FF_WIDTH * _WIDTH * (inner + 1) + 2.0 * few * keys * inner * _WIDTH
        mixed = 2.0 * few * keys * (_HEADS + 1) * _WIDTH / mixing
        return _rest(self.seconds(lambda: self.backend.operators.operator_norms(*given)), flops, mixed)

    def fresh(self) -> float:
        size = (1 << 25) * self.large
        return size / self.seconds(lambda: torch.empty(size, dtype=torch.uint8, device=self.device).zero_())

    def overheads(self) -> tuple[float, float, float]:
        """Packs and blocks of a layer that is too small to take time, and calls for its attention-level maps."""
        case = Case.random(Size(32, 2, 64), 16, self.result, self.device)
        sequence = OneSequence(case.x, case.attention, self.positions(16))

        def run(scopes: tuple[str, ...], blocks: Blocks) -> tuple[float, dict[str, float]]:
            _, plan = prepared(case, self.backend, "direct", scopes, None, self.asked)
            plan = replace(plan, blocks=blocks)
            task = LayerTask(case.weights, case.weights.pick_scopes(scopes), Rule(), "token", self.backend, plan.dtype)
            return self.seconds(lambda: dense(task, sequence, plan)), plan.work

        whole, last, narrow = Blocks(16, 16, 16), case.wide_scopes[-1:], case.narrow_scopes
        (one, few), (many, more) = run(last, whole), run(last, Blocks(1, 16, 16))
        blocks = _rest(many, more["blocks"] - few["blocks"], one)
        (one_key, few_calls), (by_key, calls) = run(narrow, whole), run(narrow, Blocks(16, 1, 16))
        rate = _rest(by_key, calls["calls"] - few_calls["calls"], one_key)
        return _rest(one, 1.0, few["blocks"] / blocks), blocks, rate

    def positions(self, queries: int) -> Tensor:
        return torch.arange(queries, device=self.device)


def _rest(seconds: float, count: float, known: float) -> float:
    """``count`` per second, done in ``seconds`` less ``known`` ones: no less than a tenth, since both are measured."""
    return count / max(seconds - known, 0.1 * seconds, 1e-9)

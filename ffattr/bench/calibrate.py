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
from ..engine.key_tokens import write_head_vectors
from ..engine.layer_maps import LayerTask
from ..engine.machine_rates import Rates
from ..engine.pack import OneSequence
from ..engine.planning.costs import Blocks
from ..ops.backends import BACKENDS, Backend
from ..ops.contract import Epilogue
from .cases import Case, Size
from .run import prepare_run, run_dense
from .timing import time_median

__all__ = ["Seconds", "measure_rates"]

Seconds = Callable[[Callable[[], object]], float]
"""Takes what to run and returns how many seconds one run takes."""

_HEADS, _HEAD_DIM, _WIDTH, _FF_WIDTH = 12, 32, 384, 1536


def measure_rates(name: str, dtype: torch.dtype, device: torch.device, seconds: Seconds | None = None) -> Rates:
    """Measures all rates of a backend with wide products in ``dtype``.

    ``seconds``: how to time (None: the median of some runs).
    """
    backend = BACKENDS[name]

    def time_median_of_five(run: Callable[[], object]) -> float:
        run()
        return time_median(run, device, rounds=5, limit=1.0)

    return _Calibration(backend, dtype, device, seconds or time_median_of_five).measure_all()


class _Calibration:
    def __init__(self, backend: Backend, dtype: torch.dtype, device: torch.device, seconds: Seconds) -> None:
        self.backend, self.asked, self.device, self.seconds = backend, dtype, device, seconds
        self.operators = backend.require_operators()
        self.dtype, self.result = operand_dtype(dtype, backend.rounded), result_dtype(dtype)
        self.generator = torch.Generator(device).manual_seed(0)
        self.large = 4 if device.type == "cuda" else 1  # which is done with anything smaller before the next launch

    def measure_all(self) -> Rates:
        m, k, n = 256 * self.large, 2 * _WIDTH, 2 * _FF_WIDTH
        x, weight = self.draw_normal(m, k), self.draw_normal(n, k).T
        product = 2.0 * m * k * n / self.seconds(lambda: x @ weight)
        attention, weights = self.measure_attention()
        gram, form = self.measure_grams()
        direct, mixing, operator = self.measure_ff_maps()
        packs, blocks, calls = self.measure_overheads()
        return Rates(
            product=product,
            attention=attention,
            weights=weights,
            features=self.measure_features(),
            gram=gram,
            form=form,
            slope=self.measure_slope(1, "gelu"),
            gated_slope=self.measure_slope(2, "silu"),
            mixing=mixing,
            direct=direct,
            operator=operator,
            fresh=self.measure_fresh_memory(),
            packs=packs,
            blocks=blocks,
            calls=calls,
        )

    def draw_normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)

    def measure_attention(self) -> tuple[float, float]:
        queries, keys = 128 * self.large, 512 * self.large
        key, value = self.draw_normal(2, _HEADS, keys, 2 * _HEAD_DIM, dtype=self.result)
        given = QueryKey(self.draw_normal(_HEADS, queries, 2 * _HEAD_DIM, dtype=self.result), key, 0.1)
        rows, position = torch.arange(queries, device=self.device), value.transpose(0, 1)

        def attend_and_read() -> object:
            alpha = given.attention_weights(rows)
            return context(alpha, position), alpha.contiguous().any(), alpha.clone()

        logits = 2.0 * _HEADS * queries * keys * 2 * _HEAD_DIM
        attention = logits / self.seconds(lambda: given.query @ key.mT)
        return attention, _compute_rate(self.seconds(attend_and_read), _HEADS * queries * keys, 2 * logits / attention)

    def measure_features(self) -> float:
        keys, width = 48 * self.large, 2 * _FF_WIDTH
        values, matrix = self.draw_normal(keys, _HEADS, 2 * _HEAD_DIM), self.draw_normal(_HEADS * 2 * _HEAD_DIM, width)
        own, to = self.draw_normal(keys, width), self.draw_normal(keys, _HEADS + 1, width)
        return 2.0 * keys * len(matrix) * width / self.seconds(lambda: write_head_vectors(values, matrix, own, to))

    def measure_grams(self) -> tuple[float, float]:
        keys, queries, mixed = 128 * self.large, 256 * self.large, _HEADS + 1
        vectors = self.draw_normal(keys, mixed, 2 * _WIDTH, dtype=self.result)

        def make_grams() -> Tensor:
            wide = vectors.double()
            return wide @ wide.mT

        alpha, position = self.draw_normal(_HEADS, queries, keys, dtype=self.result), self.number_queries(queries)
        gram, of_pair = make_grams(), 2.0 * mixed * mixed
        form = self.seconds(lambda: self.operators.gram_norms(alpha, position, gram, None, None))
        return of_pair * keys * 2 * _WIDTH / self.seconds(make_grams), of_pair * keys * queries / form

    def measure_slope(self, streams: int, activation: str) -> float:
        z = self.draw_normal(streams, 512 * self.large, 2 * _FF_WIDTH, dtype=self.result)
        return z.numel() / self.seconds(lambda: self.operators.ig_slope(z, None, None, activation, "exact", 0))

    def measure_ff_maps(self) -> tuple[float, float, float]:
        queries, keys, mixed, operators = 16 * self.large, 48 * self.large, _HEADS + 1, self.operators
        alpha = self.draw_normal(_HEADS, queries, keys, dtype=self.result)
        epilogue = Epilogue(self.draw_normal(keys, mixed, _WIDTH))
        down, down_scale = self.draw_normal(_FF_WIDTH, _WIDTH, dtype=operand_dtype(self.asked)), None
        direct_down = down
        if self.asked == torch.float8_e4m3fn:
            direct_down, down_scale = quantised(down)

        def time_direct(streams: int) -> float:
            made, slope = (
                self.draw_normal(streams, keys, mixed, _FF_WIDTH),
                self.draw_normal(streams, queries, _FF_WIDTH),
            )
            given = (alpha, self.number_queries(queries), made, slope, direct_down, down_scale, *epilogue)
            return self.seconds(lambda: operators.ff_norms(*given))

        dense, gated = time_direct(1), time_direct(2)
        more = 2.0 * queries * keys * mixed * _FF_WIDTH
        mixing = _compute_rate(gated, more, dense)
        once = 2.0 * queries * keys * mixed * (_FF_WIDTH + _WIDTH) / mixing
        rate = _compute_rate(dense, 2.0 * queries * keys * _FF_WIDTH * _WIDTH, once)
        return rate, mixing, self.measure_operator(epilogue, down, alpha, mixing)

    def measure_operator(self, epilogue: Epilogue, down: Tensor, alpha: Tensor, mixing: float) -> float:
        _, queries, keys = alpha.shape
        few, inner = queries // 4, _HEADS * _HEAD_DIM
        maps, values = self.draw_normal(1, inner, _FF_WIDTH), self.draw_normal(keys, _HEADS, _HEAD_DIM)
        own, slope = self.draw_normal(2, 1, few, _FF_WIDTH)
        given = (alpha[:, :few].contiguous(), self.number_queries(few), values, maps, own, slope, down, *epilogue)
        flops = 2.0 * few * _FF_WIDTH * _WIDTH * (inner + 1) + 2.0 * few * keys * inner * _WIDTH
        mixed = 2.0 * few * keys * (_HEADS + 1) * _WIDTH / mixing
        return _compute_rate(self.seconds(lambda: self.operators.operator_norms(*given)), flops, mixed)

    def measure_fresh_memory(self) -> float:
        size = (1 << 25) * self.large
        return size / self.seconds(lambda: torch.empty(size, dtype=torch.uint8, device=self.device).zero_())

    def measure_overheads(self) -> tuple[float, float, float]:
        """Times packs and blocks of a layer that is too small to take time, and calls for its attention-level maps."""
        case = Case.draw_random(Size(32, 2, 64), 16, self.result, self.device)
        sequence = OneSequence(case.x, case.attention, self.number_queries(16))

        def time_layer(scopes: tuple[str, ...], blocks: Blocks) -> tuple[float, dict[str, float]]:
            _, plan = prepare_run(case, self.backend, "direct", scopes, None, self.asked)
            plan = replace(plan, blocks=blocks)
            task = LayerTask(case.weights, case.weights.pick_scopes(scopes), Rule(), "token", self.backend, plan.dtype)
            return self.seconds(lambda: run_dense(task, sequence, plan)), plan.work

        whole, last, narrow = Blocks(16, 16, 16), case.wide_scopes[-1:], case.narrow_scopes
        (one, few), (many, more) = time_layer(last, whole), time_layer(last, Blocks(1, 16, 16))
        blocks = _compute_rate(many, more["blocks"] - few["blocks"], one)
        (one_key, few_calls), (by_key, calls) = time_layer(narrow, whole), time_layer(narrow, Blocks(16, 1, 16))
        rate = _compute_rate(by_key, calls["calls"] - few_calls["calls"], one_key)
        return _compute_rate(one, 1.0, few["blocks"] / blocks), blocks, rate

    def number_queries(self, queries: int) -> Tensor:
        return torch.arange(queries, device=self.device)


def _compute_rate(seconds: float, count: float, known: float) -> float:
    """Returns ``count`` per second, done in ``seconds`` less ``known`` ones: a tenth at least, since both are
    measured."""
    return count / max(seconds - known, 0.1 * seconds, 1e-9)

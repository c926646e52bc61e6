"""The search for the fastest tiles of the Triton kernels on this GPU: ``ffattr bench --tune``.

Each kernel is timed inside its whole operator, on the very arguments that a layer hands over, and only where the result
is that of plain PyTorch in the same precision. Configs near the rule's own come first: a search that is cut short has
seen those that are most likely of use.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import torch_kernels
from .cases import Case
from .run import record_operands
from .timing import time_median
from .truth import TOLERANCE, WrongResult

__all__ = ["Trial", "Tuned", "near_first", "search_configs", "tune_kernels"]

Attempt = Callable[[Any, int], float]
"""``(config, rounds)`` to median seconds; raises where it does not run or is wrong."""

Remember = Callable[[Any, str, Any, Any], None]
"""Use a config for a shape's kernel; the last is what was used before the search."""

Progress = Callable[[str, int, int, float], None]
"""Called with kernel, configs tried, configs in all, and the best seconds so far."""

OPERATOR = {"direct": "ff_norms", "build": "operator_norms", "apply": "operator_norms"}
"""Names the operator that each kernel is part of."""
_FEW, _MORE = 3, 15  # rounds for every config, and for the best
_BEST = 5  # of them


@dataclass(frozen=True)
class Trial:
    """One `Config`: median ``seconds`` of its operator, or None and in ``reason`` why it was not timed."""

    config: Any
    seconds: float | None
    reason: str = ""
    rule: bool = False


@dataclass(frozen=True)
class Tuned:
    """One kernel's trials, best first, those not timed last; ``left`` were not tried for want of time."""

    kernel: str
    key: str
    trials: list[Trial]
    left: int

    @property
    def best(self) -> Trial | None:
        return self.trials[0] if self.trials and self.trials[0].seconds is not None else None


def tune_kernels(
    case: Case, dtype: torch.dtype, seconds: float = math.inf, progress: Progress | None = None
) -> list[Tuned]:
    """Finds and remembers the best configs of every kernel for layers like ``case`` with wide products in ``dtype``.

    Kernels share ``seconds``; nothing is stored before `triton.configs.save_configs`. If it fails or is interrupted,
    what was remembered before holds again.
    """
    kernels = ["direct"] if dtype == torch.float8_e4m3fn else list(OPERATOR)  # see plan: float8 has one method
    deadline = time.monotonic() + seconds
    done: list[Tuned] = []
    operator, problem = "", None
    with _undone_on_failure() as remember:
        for number, kernel in enumerate(kernels):
            if OPERATOR[kernel] != operator:
                operator, problem = OPERATOR[kernel], None  # one at a time: a large layer's are gigabytes
                problem = _Problem(case, operator, dtype)
            assert problem is not None
            now = time.monotonic()
            share = now + (deadline - now) / (len(kernels) - number)
            done.append(problem.tune_kernel(kernel, remember, share, progress))
    return done


def search_configs(
    configs: Iterable[Any],
    rule: Any,
    attempt: Attempt,
    deadline: float = math.inf,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[list[Trial], int]:
    """Tries ``rule`` and ``configs`` in their order; returns trials, best first, and how many were left at
    ``deadline``.

    Every config runs a few rounds, the best few then more; `time.monotonic` is the clock. What cannot run is skipped.
    """
    waiting = [rule, *(config for config in configs if config != rule)]
    trials: list[Trial] = []
    for number, config in enumerate(waiting):
        if number and time.monotonic() > deadline:
            break
        trials.append(_run_trial(config, attempt, _FEW, config == rule))
        if progress is not None:
            progress(number + 1, len(waiting), min(map(_read_seconds, trials)))
    ranked = sorted((t for t in trials if t.seconds is not None), key=_read_seconds)
    again = sorted((_run_trial(t.config, attempt, _MORE, t.rule) for t in ranked[:_BEST]), key=_read_seconds)
    found = [*again, *ranked[_BEST:], *(t for t in trials if t.seconds is None)]
    return sorted(found, key=lambda t: t.seconds is None), len(waiting) - len(trials)


def _run_trial(config: Any, attempt: Attempt, rounds: int, rule: bool) -> Trial:
    try:
        return Trial(config, attempt(config, rounds), rule=rule)
    except Exception as error:  # a compiler's errors are of many types
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # raises where the failure has left the device unusable
        return Trial(config, None, f"{type(error).__name__}: {' '.join(str(error).split())}"[:200], rule)


def _read_seconds(trial: Trial) -> float:
    return math.inf if trial.seconds is None else trial.seconds


class _Problem:
    """An operator with the arguments that a layer hands it, and what plain PyTorch makes of them."""

    def __init__(self, case: Case, operator: str, dtype: torch.dtype) -> None:
        from ..ops import triton
        from ..ops.triton import configs

        self.configs, self.run, self.dtype = configs, getattr(triton, operator), dtype
        self.arguments = record_operands(case, "direct" if operator == "ff_norms" else "operator", dtype)
        definition = getattr(torch_kernels, operator)
        self.expected: Tensor = definition(*self.arguments)
        self.head_dim = case.weights.head_dim
        named = inspect.signature(definition).bind(*self.arguments).arguments
        self.shape = configs.Shape.from_operands(named["alpha"], named["down"], len(named["slope"]))

    def tune_kernel(self, kernel: str, remember: Remember, deadline: float, progress: Progress | None) -> Tuned:
        before = self._choose_config(kernel)
        remember(self.shape, kernel, None, before)
        rule = self._choose_config(kernel)
        before = None if before == rule else before

        def time_config(config: Any, rounds: int) -> float:
            remember(self.shape, kernel, config, before)
            return self._time_operator(rounds)

        def report_progress(tried: int, count: int, best: float) -> None:
            if progress is not None:
                progress(kernel, tried, count, best)

        # A step of `apply` stays within one head, and is cut to it or to the least that there is.
        depth = max(16, self.head_dim) if kernel == "apply" else math.inf
        candidates = [config for config in self.configs.list_candidates(self.shape) if config.neurons < 2 * depth]
        trials, left = search_configs(near_first(candidates, rule), rule, time_config, deadline, report_progress)
        found = Tuned(kernel, self.shape.make_key(kernel), trials, left)
        remember(self.shape, kernel, None if found.best is None else found.best.config, before)
        return found

    def _choose_config(self, kernel: str) -> Any:
        if kernel == "apply":
            return self.configs.choose_apply(self.shape, self.head_dim)
        choose = self.configs.choose_direct if kernel == "direct" else self.configs.choose_build
        return choose(self.shape)

    def _time_operator(self, rounds: int) -> float:
        found = self.run(*self.arguments)  # compiles
        largest = self.expected.flatten(1).amax(1)
        error = float(((found - self.expected).abs().flatten(1).amax(1) / largest).max())  # a NaN stays one
        if not error < TOLERANCE[self.dtype]:
            raise WrongResult(f"off plain PyTorch by {error:.1e}")
        return time_median(lambda: self.run(*self.arguments), self.expected.device, rounds, limit=5.0)


@contextmanager
def _undone_on_failure() -> Iterator[Remember]:
    """Yields `configs.remember_config` with what was chosen ``before``, which is remembered again if the block
    fails."""
    from ..ops.triton import configs

    undo: dict[tuple[Any, str], Any] = {}

    def remember_config(shape: Any, kernel: str, config: Any, before: Any) -> None:
        undo[shape, kernel] = before
        configs.remember_config(shape, kernel, config)

    try:
        yield remember_config
    except BaseException:
        for (shape, kernel), before in undo.items():
            configs.remember_config(shape, kernel, before)
        raise


def near_first(candidates: Iterable[Any], rule: Any) -> list[Any]:
    """Sorts by distance from the rule's own config: each halving or doubling of a size is a step."""

    def count_steps(config: Any) -> float:
        steps = abs(config.stages - rule.stages) + 2.0 * (config.tma != rule.tma)
        for size in ("queries", "columns", "neurons", "warps"):
            steps += abs(math.log2(getattr(config, size) / getattr(rule, size)))
        return float(steps)

    return sorted(candidates, key=count_steps)

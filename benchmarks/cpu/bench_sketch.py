"""How far sketched maps are from exact ones on trained models, and how much faster a layer is.

    python benchmarks/cpu/bench_sketch.py [--models minilm smollm2] [--tokens 128 512] [--components 64]
    python benchmarks/cpu/bench_sketch.py --speed bert-base llama-7b [--tokens 512] [--backend cpu] [--rounds 3]

Accuracy, per layer and scope, each scope on its own: median and 99th percentile of the relative error over all pairs
that have weight, the median that `ffattr.Attribution.sketch_error` expects, the ratio of the two, and ``1 - Spearman
rho`` to the exact map. Both maps are those of `ffattr.attribute`, on the same backend; "exact" where the plan left the
sketch out. Targets: median at most 2 %, ``1 - rho`` at most 5e-4, ratio within 1.5; the last line says what missed
them.

Speed, of random layers: the last scope of one layer, exactly and sketched, in turns on the same backend. What is timed
was compared with the float64 definition first: the exact map as every benchmark does it, the sketched one by its median
relative error, which may be no more than twice the expected one. The sampling and the fit count as part of the sketch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "paper"))
from models import MODELS, Loaded
from texts import prose

import ffattr
from ffattr.analysis import spearman
from ffattr.bench.cases import SHAPES, Case
from ffattr.bench.run import run_dense
from ffattr.bench.timing import seconds_of
from ffattr.bench.truth import TOLERANCE, Truth, WrongResult
from ffattr.decomposition.reference import Rule
from ffattr.decomposition.sketch import Sketch
from ffattr.engine.layer_maps import LayerTask
from ffattr.engine.pack import OneSequence
from ffattr.engine.planning.choose import plan_layer
from ffattr.engine.planning.costs import LayerShape
from ffattr.engine.planning.plan import EngineOptions
from ffattr.machine import name_processor
from ffattr.ops import backends

MEDIAN, RANKS, RATIO = 0.02, 5e-4, 1.5


@dataclass(frozen=True)
class Accuracy:
    """One layer and scope: ``median`` and ``tail`` (99th percentile) of the relative error, the median ``expected``."""

    layer: int
    scope: str
    median: float
    tail: float
    expected: float
    ranks: float

    @property
    def exact(self) -> bool:
        """Whether the plan left the sketch out."""
        return self.expected == 0

    @property
    def ratio(self) -> float:
        return self.expected / self.median

    @property
    def missed(self) -> list[str]:
        if self.exact:
            return []
        within = {
            "median": self.median <= MEDIAN,
            "1 - rho": self.ranks <= RANKS,
            "ratio": 1 / RATIO <= self.ratio <= RATIO,
        }
        return [f"{self.scope} of layer {self.layer}: {name}" for name, kept in within.items() if not kept]


def relative(found: Tensor, exact: Tensor) -> Tensor:
    """The relative errors of all pairs that have weight, in float64."""
    weight = exact > 0
    return (found[weight].double() / exact[weight].double() - 1).abs()


def percentile(values: Tensor, share: float) -> float:
    """As ``Tensor.quantile``, which takes no more than 16 million values."""
    return float(values.flatten().sort().values[int(share * (values.numel() - 1))])


def accuracy(loaded: Loaded, tokens: int, sketch: Sketch) -> Iterator[Accuracy]:
    inputs = prose(loaded, tokens)
    whole = ffattr.attribute(loaded.model, inputs, scopes="all")
    for scope in (name for name in whole.scopes if "_ff" in name):
        found = ffattr.attribute(loaded.model, inputs, scopes=scope, method=sketch)
        for place, layer in enumerate(found.layers):
            exact, sketched = whole.maps[scope][place, 0], found.maps[scope][place, 0]
            errors, weight = relative(sketched, exact), exact > 0
            yield Accuracy(
                layer,
                scope,
                percentile(errors, 0.5),
                percentile(errors, 0.99),
                float(found.sketch_error[scope][place, 0]),
                1 - spearman(sketched[weight], exact[weight]),
            )


def show_accuracy(console: Console, title: str, rows: list[Accuracy]) -> None:
    table = Table("scope", "layer", "median", "99th", "expected", "ratio", "1 - rho", title=title)
    for row in rows:
        if row.exact:
            table.add_row(row.scope, str(row.layer), "exact")
            continue
        table.add_row(
            row.scope,
            str(row.layer),
            f"{row.median:.2%}",
            f"{row.tail:.1%}",
            f"{row.expected:.2%}",
            f"{row.ratio:.2f}",
            f"{row.ranks:.1e}",
        )
    console.print(table)
    missed = [text for row in rows for text in row.missed]
    sketched = sum(not row.exact for row in rows)
    console.print(f"{sketched} of {len(rows)} maps sketched; missed: {'; '.join(missed) or 'none'}\n", soft_wrap=True)


def prepared(
    case: Case, backend: str, method: str | Sketch, scope: str
) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """What computes one scope's map ``[T, T]``, and where it leaves the error that it expects of it."""
    chosen = backends.BACKENDS[backend]
    queries = torch.arange(len(case.x))
    scopes, pairs = case.weights.pick_scopes((scope,)), case.attention.pairs(queries)
    shape = LayerShape.from_weights(case.weights, len(queries), len(case.x), pairs, scopes=scopes)
    plan = plan_layer(0, shape, 1, EngineOptions(chosen, method, case.x.dtype, case.device))
    if isinstance(method, Sketch) and plan.sketch is None:
        raise SystemExit(f"nothing to compare: the plan leaves the sketch out ({plan.choice})")
    expected: dict[str, float] = {}

    def run() -> Tensor:
        task = LayerTask(case.weights, scopes, Rule(), "token", chosen, plan.dtype)
        maps, done = run_dense(task, OneSequence(case.x, case.attention, queries), plan)
        expected.update({str(name): error for name, error in done.sketch_error.items()})
        return maps[scope]

    return run, expected


def speed(name: str, tokens: int, backend: str, sketch: Sketch, rounds: int) -> tuple[str, ...]:
    """Medians of the seconds, and how much faster the sketch is: of rounds, so that a change of the machine's speed
    meets both."""
    case = Case.draw_random(SHAPES[name], tokens)
    scope = case.wide_scopes[-1]
    truth = Truth.from_case(case, (scope,))
    exactly, _ = prepared(case, backend, "auto", scope)
    sketched, expected = prepared(case, backend, sketch, scope)
    truth.verify_maps(f"{name}, exact", {scope: exactly()}, TOLERANCE[torch.float32])
    error = percentile(relative(sketched()[truth.rows], truth.maps[scope]), 0.5)
    if not error < 2 * expected[scope]:
        raise WrongResult(f"{name}, sketched, is off by {error:.1%}, expected {expected[scope]:.1%}: not timed")
    seconds = [(seconds_of(exactly, case.device), seconds_of(sketched, case.device)) for _ in range(rounds)]
    slow, fast = (statistics.median(times) for times in zip(*seconds, strict=True))
    ratio = statistics.median(before / after for before, after in seconds)
    return name, str(tokens), scope, f"{slow:.2f}", f"{fast:.2f}", f"{ratio:.1f}", f"{error:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--speed", nargs="+", choices=list(SHAPES), help="random layers instead of trained models")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--components", type=int, default=64)
    parser.add_argument("--projections", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--backend", default="cpu", choices=[name for name in backends.BACKENDS if name != "reference"])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    sketch = Sketch(asked.components, asked.projections, asked.seed, asked.tolerance)
    console = Console()
    console.print(f"{sketch}, {name_processor(torch.device('cpu'))}, {torch.get_num_threads()} threads", soft_wrap=True)
    if asked.speed:
        table = Table("layer", "T", "scope", "exact, s", "sketch, s", "times faster", "median error")
        for name in asked.speed:
            for tokens in asked.tokens or [512]:
                table.add_row(*speed(name, tokens, asked.backend, sketch, asked.rounds))
        console.print(table)
        return
    for name in asked.models:
        loaded = MODELS[name]()
        for tokens in asked.tokens or [128, 512]:
            show_accuracy(console, f"{name}, {tokens} tokens", list(accuracy(loaded, tokens, sketch)))


if __name__ == "__main__":
    main()

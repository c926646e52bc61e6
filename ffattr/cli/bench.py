"""The work of ``ffattr bench``: it times, calibrates or tunes one layer, and prints tables."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from ..bench.calibrate import measure_rates
from ..bench.cases import SHAPES, Case
from ..bench.compare import compare_backends
from ..bench.timing import matrix_rate
from ..bench.truth import TOLERANCE
from ..bench.tune import Tuned, tune_kernels
from ..engine.machine_rates import keep, key_of
from ..errors import BackendUnavailable
from ..machine import name_processor
from ..ops import backends
from .output import print_json

__all__ = ["Layer", "calibrate_backend", "choose_layer", "print_comparison", "tune_layer"]

_SHOWN = 10
"""Rows of a table of tuned configs."""


@dataclass(frozen=True)
class Layer:
    """Describes what was asked for: a layer of ``tokens``, with wide products in ``dtype``."""

    shape: str
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def make_case(self) -> Case:
        double = self.dtype == torch.float64
        return Case.draw_random(
            SHAPES[self.shape], self.tokens, torch.float64 if double else torch.float32, self.device
        )

    def __str__(self) -> str:
        what = f"{self.shape}, {self.tokens} tokens, {_name_dtype(self.dtype)}, all feed-forward scopes of a layer"
        return f"{name_processor(self.device)}: {what}"


def choose_layer(shape: str, tokens: int | None, dtype: torch.dtype | None, device: str) -> Layer:
    """Checks what was asked for and fills in defaults. Raises ValueError for what there is not."""
    if shape not in SHAPES:
        raise ValueError(f"--shape {shape!r}: expected one of {', '.join(SHAPES)}")
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here")
    gpu = device != "cpu" and torch.cuda.is_available()
    chosen = dtype or (torch.bfloat16 if gpu else torch.float32)
    if chosen not in TOLERANCE:
        raise ValueError(f"--dtype {_name_dtype(chosen)}: expected one of {', '.join(map(_name_dtype, TOLERANCE))}")
    return Layer(
        shape, tokens or (512 if gpu else 128), chosen, torch.device("cuda", 0) if gpu else torch.device("cpu")
    )


def print_comparison(asked: Layer, backend: str, rounds: int, as_json: bool = False) -> None:
    """Prints what the machine itself reaches, what every backend does (or the one asked for), and why others cannot."""
    if as_json:
        backends.select_backend(backend, asked.device, asked.dtype, SHAPES[asked.shape].heads)
        kind, rate = matrix_rate(asked.device, asked.dtype)
        case = asked.make_case()
        rows = [
            {"backend": row.backend, "method": row.method, "seconds": row.seconds, "error": row.error}
            | ({"reason": row.reason} if row.seconds is None else {"share": case.flops / row.seconds / rate})
            for row in compare_backends(case, asked.dtype, backend, rounds)
        ]
        print_json({"layer": str(asked), "product": {"dtype": _name_dtype(kind), "flops": rate}, "backends": rows})
        return
    console = Console()
    heads = SHAPES[asked.shape].heads
    if backend != "auto":
        backends.select_backend(backend, asked.device, asked.dtype, heads)  # before the matrix product takes its time
    console.print(str(asked), markup=False, highlight=False, soft_wrap=True)
    kind, rate = matrix_rate(asked.device, asked.dtype)
    console.print(f"its own {_name_dtype(kind)} matrix product: {rate / 1e12:.3g} TFLOP/s", highlight=False)
    case = asked.make_case()
    table, reasons = Table("backend", "method", "ms", "share of that", "error"), []
    with console.status("timing") if console.is_terminal else nullcontext():
        for row in compare_backends(case, asked.dtype, backend, rounds):
            if row.seconds is None:
                reasons.append(f"no {row.backend}: {row.reason}")
            else:
                share = case.flops / row.seconds / rate
                table.add_row(
                    row.backend, row.method, _format_milliseconds(row.seconds), f"{share:.1%}", f"{row.error:.0e}"
                )
    if table.row_count:
        console.print(table)
    for reason in reasons:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)


def calibrate_backend(asked: Layer, backend: str) -> None:
    """Measures and stores this machine's rates for a backend, and prints them."""
    chosen = backends.select_backend(backend, asked.device, asked.dtype)
    console = Console()
    with console.status("measuring") if console.is_terminal else nullcontext():
        rates = measure_rates(chosen.name, asked.dtype, asked.device)
    key = key_of(chosen.name, asked.dtype, asked.device, torch.get_num_threads())
    table = Table("work", "billions a second", title=escape(key), title_justify="left")
    for kind, rate in asdict(rates).items():
        table.add_row(kind.replace("_", " "), f"{rate / 1e9:.3g}")
    console.print(table)
    console.print(f"stored in {keep(key, rates)}", markup=False, highlight=False, soft_wrap=True)


def tune_layer(asked: Layer, minutes: float | None) -> None:
    """Prints tables of the best configs of each kernel, and stores these. Raises `BackendUnavailable` without a GPU."""
    if asked.device.type != "cuda":
        raise BackendUnavailable(f"--tune times Triton kernels on a CUDA device, not on {asked.device}")
    reason = backends.BACKENDS["triton"].why_not(asked.device, asked.dtype, SHAPES[asked.shape].heads)
    if reason is not None:
        raise BackendUnavailable(f"--tune needs the triton backend: {reason}")
    from ..ops.triton import configs

    console = Console()
    console.print(str(asked), markup=False, highlight=False, soft_wrap=True)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def update_bar(kernel: str, tried: int, count: int, best: float) -> None:
            if kernel not in tasks:
                tasks[kernel] = bars.add_task(kernel)
            bars.update(
                tasks[kernel],
                completed=tried,
                total=count,
                description=f"{kernel}, best {_format_milliseconds(best)} ms",
            )

        limit = math.inf if minutes is None else 60 * minutes
        found = tune_kernels(asked.make_case(), asked.dtype, limit, update_bar)
    for tuned in found:
        console.print(_tabulate_configs(tuned))
    console.print(f"stored in {configs.save_configs()}", markup=False, highlight=False, soft_wrap=True)


def _tabulate_configs(tuned: Tuned) -> Table:
    """Shows the best configs, the rule's own and, in the caption, what became of the others."""
    table = Table("ms", title=escape(tuned.key), title_justify="left", caption_justify="left")
    shown = [trial for place, trial in enumerate(tuned.trials) if trial.rule or (place < _SHOWN and trial.seconds)]
    for name in asdict(shown[0].config):
        table.add_column(name)
    table.add_column("")
    for trial in shown:
        values = [str(value) for value in asdict(trial.config).values()]
        time = "not run" if trial.seconds is None else _format_milliseconds(trial.seconds)
        table.add_row(time, *values, f"the rule's {escape(trial.reason)}".strip() if trial.rule else "")
    timed = sum(trial.seconds is not None for trial in tuned.trials)
    table.caption = f"{timed} timed, {len(tuned.trials) - timed} do not run here or are wrong"
    if tuned.left:
        table.caption += f", {tuned.left} not tried for want of time"
    return table


def _format_milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def _name_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

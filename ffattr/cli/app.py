"""The command line: ``ffattr map``, ``decide``, ``analyze``, ``corpus``, ``check``, ``models``, ``info`` and ``bench``.

torch, transformers and the rest of ffattr are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import arguments
from .options import Debug, Model, one_line_errors
from .table_commands import analyze_command, corpus_command
from .text_commands import decide_command, map_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="ffattr",
    help="Maps of how Transformer layers mix tokens, feed-forward blocks included.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("map")(map_command)
app.command("decide")(decide_command)
app.command("analyze")(analyze_command)
app.command("corpus")(corpus_command)


@app.command("check")
def check_command(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="What a model of text is to read (default: a sentence).")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the model and of the check: float64, float32, bfloat16 or float16.", metavar="DTYPE"
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """How closely every layer of MODEL is reproduced, and by which description of it."""
    with one_line_errors(debug):
        from . import check

        if not check.check_model(model, text, arguments.parse_dtype(dtype), debug):
            raise typer.Exit(1)


@app.command("models")
def models_command(debug: Debug = False) -> None:
    """The model families that are known, and how closely each was reproduced."""
    with one_line_errors(debug):
        from . import check

        check.print_models()


@app.command("info")
def info_command(debug: Debug = False) -> None:
    """Versions, what was built and why, and which backends can run here."""
    console = Console()
    with one_line_errors(debug):
        from importlib.metadata import PackageNotFoundError, version

        from ..ops import backends

        versions = Table(title="versions", title_justify="left", show_header=False)
        versions.add_row("python", sys.version.split()[0])
        for package in ("ffattr", "torch", "transformers", "triton"):
            try:
                versions.add_row(package, version(package))
            except PackageNotFoundError:
                versions.add_row(package, "not installed")
        console.print(versions)
        build = Table(title="build", title_justify="left", show_header=False)
        for key, value in backends.build_info().items():
            build.add_row(escape(str(key)), escape(str(value)))
        console.print(build)
        table = Table("backend", "can run here", "because", title="backends", title_justify="left")
        for name, available, reason in backends.report_backends():
            table.add_row(escape(name), "[green]yes" if available else "[yellow]no", escape(reason))
        console.print(table)


@app.command("bench")
def bench_command(
    shape: Annotated[str, typer.Option(help="minilm, bert-base, gpt2 or llama-7b.", metavar="NAME")] = "bert-base",
    tokens: Annotated[int | None, typer.Option(help="Tokens (default: 512, on a CPU 128).", min=1)] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Precision of the wide products (default: bfloat16, on a CPU float32).", metavar="DTYPE"),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto (all that can run) or one of them.", metavar="NAME")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", metavar="NAME")] = "auto",
    rounds: Annotated[int, typer.Option(help="Times are medians of up to so many.", min=1)] = 5,
    tune: Annotated[
        bool, typer.Option("--tune", help="Find the fastest tiles of the Triton kernels here, and store them.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what plans predict times by, some seconds, and store it.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(help="End --tune after about so long (default: when all is tried).", min=0)
    ] = None,
    debug: Debug = False,
) -> None:
    """Time one random layer of a known SHAPE, all feed-forward scopes; or --tune the kernels for it, or --calibrate."""
    with one_line_errors(debug):
        from . import bench

        if minutes is not None and not tune:
            raise ValueError("--minutes goes with --tune")
        if calibrate and tune:
            raise ValueError("--calibrate and --tune are two runs")
        layer = bench.choose_layer(shape, tokens, arguments.parse_dtype(dtype), device)
        if tune:
            bench.tune_layer(layer, minutes)
        elif calibrate:
            bench.calibrate_backend(layer, backend)
        else:
            bench.print_comparison(layer, backend, rounds)


def main() -> None:
    """The console script."""
    app()

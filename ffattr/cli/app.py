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
from .options import Debug, Json, Model, give_help, one_line_errors
from .output import print_json
from .table_commands import analyze_command, corpus_command
from .text_commands import decide_command, map_command

__all__ = ["app", "main"]

app = typer.Typer(
    name="ffattr",
    help="Maps of how Transformer layers mix tokens, feed-forward blocks included.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_map_help = give_help(
    'map MODEL "The cat sat on the mat." --html maps.html',
    "map MODEL --file text.txt --scope all -o maps.safetensors",
    'map MODEL "The cat sat." --scope attn_heads --layers 3 --head 2 --picture head.svg',
)
app.command("map", **_map_help)(map_command)
app.command(
    "decide", **give_help('decide MODEL "The Eiffel Tower is in the city of" --target " Paris" --contrast " London"')
)(decide_command)
app.command(
    "analyze",
    **give_help("analyze maps.safetensors -o analysis", "analyze MODEL --corpus sentences.txt -o analysis"),
)(analyze_command)
app.command("corpus", **give_help("corpus MODEL texts/ -o run --workers 8", "analyze run -o analysis"))(corpus_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .._version import __version__

        typer.echo(f"ffattr {__version__}")
        raise typer.Exit


@app.callback()
def ffattr(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Maps of how Transformer layers mix tokens, feed-forward blocks included."""


@app.command("check", **give_help("check MODEL"))
def check_command(
    model: Model,
    text: Annotated[str | None, typer.Argument(help="What a model of text is to read (default: a sentence).")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the model and of the check: float64, float32, bfloat16 or float16.", metavar="DTYPE"
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """How closely every layer of MODEL is reproduced, and by which description of it."""
    with one_line_errors(debug):
        from . import check

        if not check.check_model(model, text, arguments.parse_dtype(dtype), debug, as_json):
            raise typer.Exit(1)


@app.command("models", **give_help("models", "models --json"))
def models_command(as_json: Json = False, debug: Debug = False) -> None:
    """The model families that are known, and how closely each was reproduced."""
    with one_line_errors(debug):
        from . import check

        check.print_models(as_json)


@app.command("info", **give_help("info"))
def info_command(as_json: Json = False, debug: Debug = False) -> None:
    """Versions, what was built and why, and which backends can run here."""
    console = Console()
    with one_line_errors(debug):
        from importlib.metadata import PackageNotFoundError, version

        from ..ops import backends

        known: dict[str, str | None] = {"python": sys.version.split()[0]}
        for package in ("ffattr", "torch", "transformers", "triton"):
            try:
                known[package] = version(package)
            except PackageNotFoundError:
                known[package] = None
        if as_json:
            reported = [
                {"name": name, "available": available, "reason": reason}
                for name, available, reason in backends.report_backends()
            ]
            build = {str(key): str(value) for key, value in backends.build_info().items()}
            print_json({"versions": known, "build": build, "backends": reported})
            return
        versions = Table(title="versions", title_justify="left", show_header=False)
        for package, number in known.items():
            versions.add_row(package, number or "not installed")
        console.print(versions)
        built = Table(title="build", title_justify="left", show_header=False)
        for key, value in backends.build_info().items():
            built.add_row(escape(str(key)), escape(str(value)))
        console.print(built)
        table = Table("backend", "can run here", "because", title="backends", title_justify="left")
        for name, available, reason in backends.report_backends():
            table.add_row(escape(name), "[green]yes" if available else "[yellow]no", escape(reason))
        console.print(table)


@app.command("bench", **give_help("bench --shape gpt2 --tokens 256"))
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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one random layer of a known SHAPE, all feed-forward scopes; or --tune the kernels for it, or --calibrate."""
    with one_line_errors(debug):
        from . import bench

        if minutes is not None and not tune:
            raise ValueError("--minutes goes with --tune")
        if calibrate and tune:
            raise ValueError("--calibrate and --tune are two runs")
        if as_json and (calibrate or tune):
            raise ValueError("--json goes with times, not with --calibrate or --tune")
        layer = bench.choose_layer(shape, tokens, arguments.parse_dtype(dtype), device)
        if tune:
            bench.tune_layer(layer, minutes)
        elif calibrate:
            bench.calibrate_backend(layer, backend)
        else:
            bench.print_comparison(layer, backend, rounds, as_json)


def main() -> None:
    """The console script."""
    app()

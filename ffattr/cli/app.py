"""The command line: ``ffattr map``, ``decide``, ``analyze``, ``check``, ``models``, ``info`` and ``bench``.

torch, transformers and the rest of ffattr are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import arguments

__all__ = ["app", "main"]

app = typer.Typer(
    name="ffattr",
    help="Maps of how Transformer layers mix tokens, feed-forward blocks included.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command("map")
def map_command(
    model: Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name of the model.")],
    text: Annotated[str | None, typer.Argument(help="The text to map (or --file).")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the text from this UTF-8 file.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help='How far through the layer: "layer", "all" or a scope; may be repeated.', metavar="NAME"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help='Layers: "0,3,-1" or a slice "0:4" (default: all).', metavar="LAYERS")
    ] = None,
    ig: Annotated[
        str, typer.Option(help="Integrated Gradients: exact, riemann:STEPS[:RULE] or gauss:NODES.", metavar="RULE")
    ] = "exact",
    value_bias: Annotated[
        str, typer.Option(help='Where the value bias goes: "token" or "separate".', metavar="WHERE")
    ] = "token",
    baseline: Annotated[
        str, typer.Option(help='Start of the gradient path: "zero" or "bias".', metavar="START")
    ] = "zero",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the wide products: float64, float32, bfloat16, float16 or float8_e4m3fn.",
            metavar="DTYPE",
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or one that `ffattr info` lists.", metavar="NAME")] = "auto",
    method: Annotated[str, typer.Option(help="auto, direct, operator, mixed or pairs.", metavar="NAME")] = "auto",
    reduce: Annotated[
        str, typer.Option(help="What a vector becomes: l2 (its norm), l1 or alti.", metavar="NAME")
    ] = "l2",
    words: Annotated[bool, typer.Option("--words", help="Add up the vectors of the tokens of each word.")] = False,
    top: Annotated[int | None, typer.Option(help="Keep the K largest entries of each row only.", metavar="K")] = None,
    pool: Annotated[
        int | None, typer.Option(help="Keep the means of blocks of N x N tokens only.", metavar="N")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save all maps here (safetensors).", metavar="FILE")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the last layer's last scope here.", metavar="FILE")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help='Write a page to look around in; scopes are then "all" by default.', metavar="FILE"),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run, and compute nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Map how the tokens of TEXT reach each other in every layer of MODEL."""
    with _one_line_errors(debug):
        content = arguments.read_text(text, file)
        arguments.check_folders(output, png, html)
        scopes = scope or ["layer" if html is None else "all"]
        keep = arguments.parse_keep(top, pool)
        options: dict[str, Any] = {
            "scopes": scopes[0] if len(scopes) == 1 else scopes,
            "layers": arguments.parse_layers(layers),
            "ig": arguments.parse_ig(ig),
            "value_bias": value_bias,
            "baseline": baseline,
            "dtype": arguments.parse_dtype(dtype),
            "backend": backend,
            "method": method,
            "reduce": reduce,
            "groups": "words" if words else None,
        }

        from . import map as map_command

        if plan:
            map_command.print_plan(model, content, options)
        else:
            map_command.write_maps(model, content, {**options, "keep": keep}, output, png, html)


@app.command("decide")
def decide_command(
    model: Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name of a model with a head.")],
    text: Annotated[str | None, typer.Argument(help="What the model reads (or --file).")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="Read the text from this UTF-8 file.")] = None,
    target: Annotated[
        str, typer.Option(help='Whose logit: a token (" Paris"), a class, or "predicted".', metavar="NAME")
    ] = "predicted",
    contrast: Annotated[
        str | None, typer.Option(help="Explain by how much the target is ahead of this one.", metavar="NAME")
    ] = None,
    position: Annotated[
        str | None,
        typer.Option(help="The token that it is read at: a number, cls or mask (default: the last).", metavar="N"),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also what speaks for it at the input of each layer.")
    ] = False,
    flow: Annotated[bool, typer.Option("--flow", help="Also what passes from token to token in each layer.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to look around in.", metavar="FILE")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the words and layers here.", metavar="FILE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print scores by word for other programs.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save everything here (safetensors).", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Which words of TEXT make MODEL say what it says: signed scores that add up to a logit."""
    with _one_line_errors(debug):
        content = arguments.read_text(text, file)
        arguments.check_folders(output, png, html)
        place = arguments.parse_position(position)

        from . import decide

        asked = decide.Asked(target, contrast, place, layers, flow, as_json, html, png, output)
        decide.decide(model, content, asked)


@app.command("analyze")
def analyze_command(
    files: Annotated[
        list[str],
        typer.Argument(
            help="Files of maps (ffattr map -o), folders of tables (ffattr corpus -o); with --corpus, a model."
        ),
    ],
    corpus: Annotated[
        Path | None, typer.Option(help="Documents for a MODEL to read, as of `ffattr corpus`.", metavar="FILE")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for tables and pictures.", metavar="DIR")
    ] = Path("analysis"),
    top: Annotated[int, typer.Option(help="Amplified pairs of each layer.", metavar="K", min=1)] = 50,
    detailed: Annotated[
        int | None,
        typer.Option(
            help="Texts of a corpus for what takes vectors (default: 8; 0: load no model).", metavar="N", min=0
        ),
    ] = None,
    spacy: Annotated[
        str | None, typer.Option(help="spaCy pipeline for grammatical categories of pairs.", metavar="NAME")
    ] = None,
    picture: Annotated[list[str] | None, typer.Option(help="png (default), svg or pdf; may be repeated.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the tables of folders into few files of 256 MB as well.")
    ] = False,
    debug: Debug = False,
) -> None:
    """What feed-forward blocks change, as tables and pictures: of maps in FILES, of a corpus' tables or of a MODEL."""
    with _one_line_errors(debug):
        from . import analyze

        formats = picture or ["png"]
        if corpus is None and detailed is not None and not any(Path(file).is_dir() for file in files):
            raise ValueError("--detailed goes with --corpus or a folder of tables: files of maps hold no vectors")
        texts = 8 if detailed is None else detailed
        if corpus is None:
            analyze.analyze_files(files, output, top, spacy, formats, texts, merge)
        else:
            analyze.analyze_corpus(files, corpus, output, top, spacy, formats, texts)


@app.command("corpus")
def corpus_command(
    model: Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name of the model.")],
    inputs: Annotated[list[str], typer.Argument(help="Documents: .txt, .jsonl, .parquet, .arrow; globs; folders.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tables.", metavar="DIR")],
    engine: Annotated[str, typer.Option(help="local (processes), ray, or here (this process).")] = "local",
    workers: Annotated[int | None, typer.Option(help="How many (default: what there is room for).", min=1)] = None,
    threads: Annotated[int, typer.Option(help="Threads of each worker.", min=1)] = 1,
    rank: Annotated[
        str | None, typer.Option(help="Compute this share alone, from 0/N to N-1/N.", metavar="I/N")
    ] = None,
    text: Annotated[str, typer.Option(help="Column of the texts.", metavar="COLUMN")] = "text",
    id_column: Annotated[str | None, typer.Option("--id", help="Column of identifiers.", metavar="COLUMN")] = None,
    keep: Annotated[
        str, typer.Option(help="Tables: documents, pairs, tokens, top:K, maps.", metavar="NAMES")
    ] = "documents,pairs,tokens",
    layers: Annotated[
        str | None, typer.Option(help='Layers: "0,3,-1" or a slice "0:4" (default: all).', metavar="LAYERS")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help='Scopes of tokens, top and maps (default: "layer"); may be repeated.', metavar="NAME"),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Amplified pairs of each document and layer.", metavar="K", min=1)] = 10,
    target: Annotated[
        str | None,
        typer.Option(
            help='Also the table "scores": what tokens give to a token, class or "predicted".', metavar="WHAT"
        ),
    ] = None,
    long: Annotated[str, typer.Option(help="Documents too long: error, cut or window.", metavar="WHAT")] = "error",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens that are too many (default: the model's positions).", min=1)
    ] = None,
    shard_docs: Annotated[int, typer.Option(help="Documents of a shard, about two minutes of work.", min=1)] = 1024,
    max_errors: Annotated[
        str, typer.Option(help='End the run beyond so many errors: a number, or a share "1%".', metavar="N")
    ] = "1%",
    spacy: Annotated[
        str | None, typer.Option(help="spaCy pipeline for grammatical categories of pairs.", metavar="NAME")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run, and compute nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Measure any number of documents into tables; called again, it goes on. Exit code 3: some have errors."""
    with _one_line_errors(debug):
        from . import corpus

        arguments.parse_layers(layers)
        options: dict[str, Any] = {
            "text": text,
            "id": id_column,
            "keep": (*keep.split(","), *["scores"] * (target is not None)),
            "target": target,
            "scopes": tuple(scope or ["layer"]),
            "layers": layers,
            "pairs": pairs,
            "long": long,
            "max_tokens": max_tokens,
            "shard_docs": shard_docs,
            "threads": threads,
            "spacy": spacy,
        }
        if plan:
            corpus.plan_corpus(model, inputs, output, options)
        elif not corpus.compute_corpus(model, inputs, output, engine, workers, rank, max_errors, options):
            raise typer.Exit(3)


@app.command("check")
def check_command(
    model: Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name of the model.")],
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
    with _one_line_errors(debug):
        from . import check

        if not check.check_model(model, text, arguments.parse_dtype(dtype), debug):
            raise typer.Exit(1)


@app.command("models")
def models_command(debug: Debug = False) -> None:
    """The model families that are known, and how closely each was reproduced."""
    with _one_line_errors(debug):
        from . import check

        check.print_models()


@app.command("info")
def info_command(debug: Debug = False) -> None:
    """Versions, what was built and why, and which backends can run here."""
    console = Console()
    with _one_line_errors(debug):
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
    with _one_line_errors(debug):
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


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Prints an error as one line: exit code 2 for what the caller can put right, 1 for the rest, 130 after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]interrupted")
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        message = " ".join(message.split()) or type(error).__name__
        usage = isinstance(error, (OSError, ValueError, TypeError, LookupError))
        if not usage and not type(error).__module__.startswith("ffattr"):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(2 if usage else 1) from None

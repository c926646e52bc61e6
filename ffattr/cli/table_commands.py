"""The commands that write tables: ``analyze`` and ``corpus``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import arguments
from .options import Debug, Json, Layers, Model, Plan, Spacy, one_line_errors

__all__ = ["analyze_command", "corpus_command"]


def analyze_command(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...",
            help="Files of maps (ffattr map -o), folders of tables (ffattr corpus -o); with --corpus, a model.",
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
    spacy: Spacy = None,
    picture: Annotated[list[str] | None, typer.Option(help="png (default), svg or pdf; may be repeated.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the tables of folders into few files of 256 MB as well.")
    ] = False,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="Also products of maps through the layers, of one text.")
    ] = False,
    long: Annotated[
        str, typer.Option(help="Lines too long for --corpus: error, skip, cut or window.", metavar="WHAT")
    ] = "error",
    debug: Debug = False,
) -> None:
    """What feed-forward blocks change, as tables and pictures: of maps in FILES, of a corpus' tables or of a MODEL."""
    with one_line_errors(debug):
        from . import analyze

        formats = picture or ["png"]
        arguments.check_choice("--long", long, ("error", "skip", "cut", "window"))
        if corpus is None and long != "error":
            raise ValueError(f"--long {long} goes with --corpus")
        if corpus is None and detailed is not None and not any(Path(file).is_dir() for file in files):
            raise ValueError("--detailed goes with --corpus or a folder of tables: files of maps hold no vectors")
        texts = 8 if detailed is None else detailed
        if corpus is None:
            analyze.analyze_files(files, output, top, spacy, formats, texts, merge, rollout)
        else:
            analyze.analyze_corpus(files, corpus, output, top, spacy, formats, texts, rollout, long)


def corpus_command(
    model: Model,
    inputs: Annotated[
        list[str], typer.Argument(metavar="INPUT...", help="Documents: .txt, .jsonl, .parquet, .arrow; globs; folders.")
    ],
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
    layers: Layers = None,
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
    spacy: Spacy = None,
    plan: Plan = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure any number of documents into tables; called again, it goes on. Exit code 3: some have errors."""
    with one_line_errors(debug):
        from . import corpus

        arguments.check_layers(model, arguments.parse_layers(layers))
        arguments.check_scopes(scope or [])
        arguments.check_choice("--engine", engine, ("local", "ray", "here"))
        arguments.check_choice("--long", long, ("error", "cut", "window"))
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
        elif not corpus.compute_corpus(model, inputs, output, engine, workers, rank, max_errors, options, as_json):
            raise typer.Exit(3)

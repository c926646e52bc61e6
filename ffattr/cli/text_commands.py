"""The commands that read one text: ``map`` and ``decide``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from . import arguments
from .options import Debug, File, Json, Layers, Model, Plan, Verbose, one_line_errors

__all__ = ["decide_command", "map_command"]


def map_command(
    model: Model,
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to map (or --file).")] = None,
    file: File = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help='How far through the layer: "layer", "all" or a scope; may be repeated.', metavar="NAME"),
    ] = None,
    layers: Layers = None,
    queries: Annotated[
        str | None, typer.Option(help='Rows: tokens "0,3,-1" or a slice "0:4" (default: all).', metavar="TOKENS")
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
    method: Annotated[
        str,
        typer.Option(
            help="auto, direct, operator, mixed, pairs or sketch (approximate; sketch:TOLERANCE).", metavar="NAME"
        ),
    ] = "auto",
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
    picture: Annotated[
        Path | None,
        typer.Option("--picture", "--png", help="Draw the last scope here: .png, .svg or .pdf.", metavar="FILE"),
    ] = None,
    layer: Annotated[int, typer.Option(help="The layer that is drawn or listed (-1: the last).", metavar="N")] = -1,
    head: Annotated[
        int | None, typer.Option(help="The head of attn_heads that is drawn (default: all).", metavar="N", min=0)
    ] = None,
    scale: Annotated[str, typer.Option(help="Colours of the picture: log or linear.", metavar="NAME")] = "log",
    html: Annotated[
        Path | None,
        typer.Option(help='Write a page to look around in; scopes are then "all" by default.', metavar="FILE"),
    ] = None,
    as_json: Json = False,
    plan: Plan = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Map how the tokens of TEXT reach each other in every layer of MODEL."""
    with one_line_errors(debug):
        content = arguments.read_text(text, file)
        arguments.check_folders(output, picture, html)
        arguments.check_picture(picture)
        scopes = scope or ["layer" if html is None else "all"]
        arguments.check_scopes(scopes)
        for option, given, known in (
            ("--value-bias", value_bias, ("token", "separate")),
            ("--baseline", baseline, ("zero", "bias")),
            ("--reduce", reduce, ("l2", "l1", "alti")),
            ("--scale", scale, ("log", "linear")),
            ("--backend", backend, ("auto", "cpu", "triton", "cuda", "torch", "reference")),
        ):
            arguments.check_choice(option, given, known)
        if picture is None and (head is not None or scale != "log"):
            raise ValueError("--head and --scale go with --picture")
        keep = arguments.parse_keep(top, pool)
        options: dict[str, Any] = {
            "scopes": scopes[0] if len(scopes) == 1 else scopes,
            "layers": arguments.parse_layers(layers),
            "queries": arguments.parse_queries(queries),
            "ig": arguments.parse_ig(ig),
            "value_bias": value_bias,
            "baseline": baseline,
            "dtype": arguments.parse_dtype(dtype),
            "backend": backend,
            "method": arguments.parse_method(method),
            "reduce": reduce,
            "groups": "words" if words else None,
        }

        arguments.check_layers(model, options["layers"])
        arguments.check_layers(model, [layer], "--layer")

        from . import map as map_command

        shown = map_command.Shown(output, picture, html, layer, head, scale, as_json, verbose)
        if plan:
            map_command.print_plan(model, content, options)
        else:
            map_command.write_maps(model, content, {**options, "keep": keep}, shown)


def decide_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Local folder, .gguf file or hub name of a model with a head.")
    ],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="What the model reads (or --file).")] = None,
    file: File = None,
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
    sentences: Annotated[bool, typer.Option("--sentences", help="By sentence instead of by word.")] = False,
    flow: Annotated[bool, typer.Option("--flow", help="Also what passes from token to token in each layer.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page to look around in.", metavar="FILE")] = None,
    png: Annotated[
        Path | None,
        typer.Option("--picture", "--png", help="Draw the words and layers here: .png, .svg or .pdf.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save everything here (safetensors).", metavar="FILE")
    ] = None,
    debug: Debug = False,
) -> None:
    """Which words of TEXT make MODEL say what it says: signed scores that add up to a logit."""
    with one_line_errors(debug):
        content = arguments.read_text(text, file)
        arguments.check_folders(output, png, html)
        arguments.check_picture(png)
        place = arguments.parse_position(position)

        from . import decide

        asked = decide.Asked(target, contrast, place, layers, sentences, flow, as_json, html, png, output)
        decide.decide(model, content, asked)

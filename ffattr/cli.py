"""The command line: ``ffattr map``, ``check``, ``models``, ``info`` and ``bench``.

torch, transformers and the rest of ffattr are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import pretrained

if TYPE_CHECKING:
    from .maps import Attribution

__all__ = ["app", "main"]

app = typer.Typer(
    name="ffattr",
    help="Maps of how Transformer layers mix tokens, feed-forward blocks included.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_PAIRS = 10
"""Rows of the table of strongest pairs that stands in for a file when none is asked for."""


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
    method: Annotated[str, typer.Option(help="auto, direct or operator.", metavar="NAME")] = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save all maps here (safetensors).", metavar="FILE")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the last layer's last scope here.", metavar="FILE")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would run, and compute nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Map how the tokens of TEXT reach each other in every layer of MODEL."""
    console = Console()
    with _one_line_errors(debug):
        content = _text(text, file)
        for target in (output, png):
            if target is not None and not target.absolute().parent.is_dir():
                raise FileNotFoundError(f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}")
        scopes = scope or ["layer"]
        options: dict[str, Any] = {
            "scopes": scopes[0] if len(scopes) == 1 else scopes,
            "layers": _layers(layers),
            "ig": _ig(ig),
            "value_bias": value_bias,
            "baseline": baseline,
            "dtype": _dtype(dtype),
            "backend": backend,
            "method": method,
        }
        with Console(stderr=True).status("loading the model") if console.is_terminal else nullcontext():
            loaded, tokenizer = pretrained.load(model)

        from . import api

        options["tokenizer"] = tokenizer
        if plan:
            console.print(str(api.explain(loaded, content, **options)), markup=False, highlight=False, soft_wrap=True)
            return
        with _progress() as progress:
            attribution = api.attribute(loaded, content, progress=progress, **options)
        if output is not None:
            attribution.save(output)
            console.print(f"maps: {output}", markup=False, highlight=False, soft_wrap=True)
        if png is not None:
            _draw(attribution, png)
            console.print(f"picture: {png}", markup=False, highlight=False, soft_wrap=True)
        if output is None and png is None:
            console.print(_strongest(attribution))
        console.print(str(attribution.plan), markup=False, highlight=False, soft_wrap=True)


@app.command()
def check(
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
        from . import cli_models

        if not cli_models.check(model, text, _dtype(dtype), debug):
            raise typer.Exit(1)


@app.command()
def models(debug: Debug = False) -> None:
    """The model families that are known, and how closely each was reproduced."""
    with _one_line_errors(debug):
        from . import cli_models

        cli_models.models()


@app.command()
def info(debug: Debug = False) -> None:
    """Versions, what was built and why, and which backends can run here."""
    console = Console()
    with _one_line_errors(debug):
        from importlib.metadata import PackageNotFoundError, version

        from . import backends

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
        for name, available, reason in backends.report():
            table.add_row(escape(name), "[green]yes" if available else "[yellow]no", escape(reason))
        console.print(table)


@app.command()
def bench(
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
    minutes: Annotated[
        float | None, typer.Option(help="End --tune after about so long (default: when all is tried).", min=0)
    ] = None,
    debug: Debug = False,
) -> None:
    """Time one random layer of a known SHAPE, all feed-forward scopes; or --tune the kernels for it."""
    with _one_line_errors(debug):
        from . import cli_bench

        if minutes is not None and not tune:
            raise ValueError("--minutes goes with --tune")
        layer = cli_bench.layer(shape, tokens, _dtype(dtype), device)
        if tune:
            cli_bench.tune(layer, minutes)
        else:
            cli_bench.compare(layer, backend, rounds)


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


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar over layers, as the ``progress`` callback of `ffattr.attribute`."""
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("layers", total=None)

        def update(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield update


def _text(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise ValueError("give either TEXT or --file FILE" + (", not both" if text is not None else ""))
    if file is None:
        content = text or ""
    else:
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        except OSError as error:
            raise OSError(f"cannot read {str(file)!r}: {error.strerror}") from error
    if not content.strip():
        raise ValueError("the text is empty: there is nothing to map")
    return content


def _layers(text: str | None) -> list[int] | slice | None:
    if text is None:
        return None
    try:
        if ":" in text:
            start, stop = (int(part) if part.strip() else None for part in text.split(":"))
            return slice(start, stop)
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f'--layers {text!r}: expected numbers "0,3,-1" or a slice "0:4"') from None


def _ig(text: str) -> Any:
    if text == "exact":
        return text

    from .ig import GaussLegendre, Riemann

    name, *rest = text.split(":")
    rule: Any = rest[1:]  # checked by Riemann itself
    if name == "riemann" and len(rest) in (1, 2) and rest[0].isdecimal():
        return Riemann(int(rest[0]), *rule)
    if name == "gauss" and len(rest) == 1 and rest[0].isdecimal():
        return GaussLegendre(int(rest[0]))
    raise ValueError(f"--ig {text!r}: expected exact, riemann:STEPS[:RULE] or gauss:NODES, for instance riemann:50")


def _dtype(text: str | None) -> Any:
    if text is None:
        return None

    import torch

    dtype = getattr(torch, text, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"--dtype {text!r} is no torch dtype; try float32, bfloat16 or float64")
    return dtype


def _draw(attribution: Attribution, target: Path) -> None:
    from .files import replacing

    figure = attribution.plot()
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _strongest(attribution: Attribution) -> Table:
    """The largest entries of the last layer's last scope, a token with itself left out."""
    import torch

    values = attribution["layer"][-1, 0].clone()
    own = torch.tensor(attribution.queries)
    values[torch.arange(len(own)), own] = 0
    top = values.flatten().topk(min(_PAIRS, values.numel()))
    table = Table("query", "key", "norm", title=f"{attribution.scopes[-1]}, layer {attribution.layers[-1]}")
    for norm, place in zip(top.values.tolist(), top.indices.tolist(), strict=True):
        if norm == 0:  # masked: a causal map of few tokens has no more pairs
            break
        row, key = divmod(place, values.shape[1])
        query = attribution.queries[row]
        names = [f"{position} {attribution.tokens[0][position]}" for position in (query, key)]
        table.add_row(*map(escape, names), f"{norm:.3g}")
    return table

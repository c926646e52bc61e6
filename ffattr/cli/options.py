"""What commands share: the types of their options, and how errors are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .terminal import make_cell

__all__ = ["Debug", "File", "Layers", "Model", "Plan", "Spacy", "one_line_errors"]

Model = Annotated[str, typer.Argument(help="Local folder, .gguf file or hub name of the model.")]
File = Annotated[Path | None, typer.Option("--file", help="Read the text from this UTF-8 file.")]
Layers = Annotated[str | None, typer.Option(help='Layers: "0,3,-1" or a slice "0:4" (default: all).', metavar="LAYERS")]
Spacy = Annotated[str | None, typer.Option(help="spaCy pipeline for grammatical categories of pairs.", metavar="NAME")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would run, and compute nothing.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
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
        Console(stderr=True).print(f"[red]error:[/red] {make_cell(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(2 if usage else 1) from None

"""What commands share: the types of their options, the examples in their help, and how errors are told."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .output import make_cell

__all__ = [
    "Debug",
    "File",
    "Json",
    "Layers",
    "Model",
    "Plan",
    "Spacy",
    "Verbose",
    "give_help",
    "name_option",
    "one_line_errors",
]

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, .gguf file or hub name of the model.")]
File = Annotated[Path | None, typer.Option("--file", help="Read the text from this UTF-8 file.", metavar="FILE")]
Layers = Annotated[str | None, typer.Option(help='Layers: "0,3,-1" or a slice "0:4" (default: all).', metavar="LAYERS")]
Spacy = Annotated[str | None, typer.Option(help="spaCy pipeline for grammatical categories of pairs.", metavar="NAME")]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would run, and compute nothing.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Also say what ran.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for other programs instead of a table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_ARGUMENTS = {
    "scopes": "--scope",
    "scope": "--scope",
    "layers": "--layers",
    "layer": "--layer",
    "queries": "--queries",
    "head": "--head",
    "groups": "--words",
    "ig": "--ig",
    "value_bias": "--value-bias",
    "baseline": "--baseline",
    "dtype": "--dtype",
    "backend": "--backend",
    "method": "--method",
    "reduce": "--reduce",
    "position": "--position",
    "target": "--target",
    "long": "--long",
    "max_tokens": "--max-tokens",
}
"""Arguments of Python, as messages name them, and the options that they come from."""
_NAMED = re.compile(rf"\b({'|'.join(_ARGUMENTS)})=")


def give_help(*examples: str) -> dict[str, Any]:
    """Returns what a command is registered with, so that its help ends with examples."""
    word = "Example" if len(examples) == 1 else "Examples"
    return {"epilog": f"\b\n{word}:\n" + "\n".join(f"  ffattr {example}" for example in examples)}


def name_option(message: str) -> str:
    """Returns a message that names arguments of Python with the options that they come from.

    >>> from ffattr.cli.options import name_option
    >>> name_option("method='fast' is none")
    "--method 'fast' is none"
    """
    return _NAMED.sub(lambda found: f"{_ARGUMENTS[found[1]]} ", message).replace("  ", " ")


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Prints an error as one line: exit code 2 for what the caller can put right, 1 for the rest, 130 after Ctrl-C.

    Where nobody reads on, as behind ``| head``, it ends without a word.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        Console(stderr=True).print("[red]interrupted")
        raise typer.Exit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end has a place to go
        raise typer.Exit(0) from None
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:
        if debug:
            raise
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        message = name_option(" ".join(message.split())) or type(error).__name__
        usage = isinstance(error, (OSError, ValueError, TypeError, LookupError))
        if not usage and not type(error).__module__.startswith("ffattr"):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        Console(stderr=True).print(f"[red]error:[/red] {make_cell(message)}", soft_wrap=True, highlight=False)
        raise typer.Exit(2 if usage else 1) from None

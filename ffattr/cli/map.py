"""The work of ``ffattr map``: it computes maps, writes the files asked for and prints a table or a plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..machine import replacing
from ..models import pretrained
from ..pipeline import attribute, plan
from ..results import Attribution
from .progress import show_progress
from .terminal import make_cell, print_line

__all__ = ["print_plan", "write_maps"]

_PAIRS = 10
"""Rows of the table of strongest pairs that stands in for a file when none is asked for."""


def print_plan(model: str, text: str, options: Mapping[str, Any]) -> None:
    """Prints what would run; ``options`` are arguments of `ffattr.plan`."""
    loaded, tokenizer = _load_model(model)
    print_line(str(plan.plan(loaded, text, tokenizer=tokenizer, **options)))


def write_maps(
    model: str, text: str, options: Mapping[str, Any], output: Path | None, png: Path | None, html: Path | None
) -> None:
    """Computes maps and writes them to the files asked for, or prints the strongest pairs.

    ``options`` are arguments of `ffattr.attribute`. Raises OSError, ValueError or an `FfattrError`.
    """
    loaded, tokenizer = _load_model(model)
    with show_progress(len(tokenizer(text)["input_ids"]), Console(stderr=True)) as progress:
        attribution = attribute.attribute(loaded, text, tokenizer=tokenizer, progress=progress, **options)
    if output is not None:
        attribution.save(output)
        print_line(f"maps: {output}")
    if png is not None:
        figure = attribution.plot()
        with replacing(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
        print_line(f"picture: {png}")
    if html is not None:
        attribution.to_html(html)
        print_line(f"page: {html}")
    if output is None and png is None and html is None:
        Console().print(_tabulate_strongest(attribution))
    print_line(str(attribution.plan))


def _load_model(model: str) -> tuple[Any, Any]:
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        return pretrained.load(model)


def _tabulate_strongest(attribution: Attribution) -> Table:
    """Shows the largest entries of the last layer's last scope, but for those of a token with itself."""
    scope, layer = attribution.scope("layer"), attribution.layers[-1]
    found = attribution.top(_PAIRS, scope)
    table = Table("query", "key", attribution.measure, title=f"{scope}, layer {layer}")
    for pair in found[found["layer"] == layer].itertuples():
        names = (f"{pair.query} {pair.query_token}", f"{pair.key} {pair.key_token}")
        table.add_row(*map(make_cell, names), f"{pair.norm:.3g}")
    return table

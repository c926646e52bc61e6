"""The work of ``ffattr map``: it computes maps, writes the files asked for and prints a table or a plan."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..analysis.words import spell_tokens
from ..models import pretrained
from ..pipeline import attribute, plan
from ..results import Attribution
from ..results.figures import save_figure
from ..selection import describe_scope, layer_place
from .output import make_cell, print_json, print_line
from .progress import show_progress

__all__ = ["Shown", "print_plan", "write_maps"]

_PAIRS = 10
"""Rows of the table of strongest pairs that stands in for a file when none is asked for."""


def print_plan(model: str, text: str, options: Mapping[str, Any]) -> None:
    """Prints what would run; ``options`` are arguments of `ffattr.plan`."""
    loaded, tokenizer = _load_model(model)
    print_line(str(plan.plan(loaded, text, tokenizer=tokenizer, **options)))


@dataclass(frozen=True)
class Shown:
    """What becomes of maps: the files to write, and which ``layer`` and ``head`` are drawn or listed, and how."""

    output: Path | None = None
    picture: Path | None = None
    html: Path | None = None
    layer: int = -1
    head: int | None = None
    scale: str = "log"
    as_json: bool = False
    verbose: bool = False


def write_maps(model: str, text: str, options: Mapping[str, Any], shown: Shown) -> None:
    """Computes maps and writes them to the files asked for, or prints the strongest pairs.

    ``options`` are arguments of `ffattr.attribute`. Raises OSError, ValueError or an `FfattrError`.
    """
    loaded, tokenizer = _load_model(model)
    errors = Console(stderr=True)
    with show_progress(len(tokenizer(text)["input_ids"]), errors) as progress:
        attribution = attribute.attribute(loaded, text, tokenizer=tokenizer, progress=progress, **options)
    said = errors if shown.as_json else Console()
    if shown.output is not None:
        attribution.save(shown.output)
        print_line(f"maps: {shown.output}", said)
    if shown.picture is not None:
        save_figure(attribution.plot(layer=shown.layer, head=shown.head, scale=shown.scale), shown.picture)
        print_line(f"picture: {shown.picture}", said)
    if shown.html is not None:
        attribution.to_html(shown.html)
        print_line(f"page: {shown.html}", said)
    if shown.as_json:
        print_json(_describe_strongest(attribution, shown.layer))
    elif shown.output is None and shown.picture is None and shown.html is None:
        Console().print(_tabulate_strongest(attribution, shown.layer))
    if shown.verbose:
        print_line(str(attribution.plan), said)


def _load_model(model: str) -> tuple[Any, Any]:
    console = Console(stderr=True)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        return pretrained.load(model)


def _list_strongest(attribution: Attribution, layer: int) -> tuple[str, int, Any]:
    """Returns the last scope, the number of a layer, and the largest entries of its first sequence, but for those of a
    token with itself."""
    scope = attribution.scope("layer")
    number = attribution.layers[layer_place(layer, attribution.layers)]
    found = attribution.top(_PAIRS, scope)
    return scope, number, found[(found["layer"] == number) & (found["batch"] == 0)]


def _tabulate_strongest(attribution: Attribution, layer: int) -> Table:
    scope, number, found = _list_strongest(attribution, layer)
    words = describe_scope(scope)
    title = f"{scope if words == scope else f'{words} ({scope})'}, layer {number}"
    by = [name for name in ("head", "expert") if name in found]
    table = Table(*by, "query", "key", attribution.measure, "of its row", title=title)
    for pair in found.to_dict("records"):
        names = (f"{pair[of]} {_spell(pair[f'{of}_token'])}" for of in ("query", "key"))
        table.add_row(
            *(str(pair[name]) for name in by), *map(make_cell, names), f"{pair['norm']:.3g}", f"{pair['share']:.1%}"
        )
    return table


def _spell(token: str) -> str:
    """Returns a token as text, without the tokenizer's mark of a space; what is nothing else as it is."""
    return spell_tokens([token])[0].strip() or token


def _describe_strongest(attribution: Attribution, layer: int) -> dict[str, Any]:
    """Returns what ``--json`` prints."""
    scope, number, found = _list_strongest(attribution, layer)
    pairs = found.drop(columns=["layer", "batch"]).to_dict("records")
    return {"scope": scope, "layer": number, "measure": attribution.measure, "pairs": pairs}

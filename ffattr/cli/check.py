"""The work of ``ffattr check`` and ``ffattr models``: they print how closely layers are and were reproduced.

The former loads torch and a model, the latter reads a file: what the one needs is imported there.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..models import verified
from .output import make_cell, print_json, print_line, print_lines, show_controls

if TYPE_CHECKING:
    import torch

    from ..models.examples import Example
    from ..pipeline.reproduce import Reproduced, Reproduction

__all__ = ["check_model", "print_models"]


def check_model(
    name: str, text: str | None, dtype: torch.dtype | None, debug: bool = False, as_json: bool = False
) -> bool:
    """Tells whether a description was found and every layer is reproduced; prints which are, or the `FfattrError`.

    Unlike other commands, it prints an error with the error's name and in as many lines as it has: it may hold a
    program to complete. Raises OSError or ValueError for a model that is not there or inputs that do not fit it.
    """
    from ..errors import FfattrError
    from ..models import examples, pretrained, registry
    from ..pipeline import reproduce

    _require_float(dtype)
    console = Console()
    try:
        with console.status("loading the model") if console.is_terminal else nullcontext():
            model = pretrained.load_model(name, dtype)
        try:
            example = examples.make_example(model, name, text)
        except (OSError, ValueError):
            registry.resolve(model)  # what is wrong with a model that no description fits comes first
            raise
        with console.status("running the model") if console.is_terminal else nullcontext():
            found = reproduce.reproduce(model, example.inputs, example.tokenizer)
    except FfattrError as error:
        if debug:
            raise
        message = f"[red]{type(error).__name__}:[/red] {escape(show_controls(str(error), keep=chr(10)))}"
        Console(stderr=True).print(message, soft_wrap=True, highlight=False)
        return False
    if as_json:
        print_json(_describe(found))
        return all(layer.passed for layer in found.layers)
    for line in _describe_inputs(example, found):
        print_line(line, console)
    console.print(_tabulate_layers(found))
    console.print(_format_verdict(found), highlight=False, soft_wrap=True)
    return all(layer.passed for layer in found.layers)


_BY_STRUCTURE = "found by structure"
"""What is said of the layers of a model type that no family describes: each model says which scopes they have."""


def print_models(as_json: bool = False) -> None:
    """Prints the record of what was measured: on a terminal a table, else a line for each model type."""
    record = verified.read()
    console = Console()
    rows = list(verified.rows(record))
    if as_json:
        described = [_describe_row(row, name) for row in rows for name in row.model_types]
        print_json([*described, *map(_describe_structure, record.structures)])
        return
    head = ("model types", "layers", "scopes", "error", "of maps", "trained")
    print_lines(
        head,
        [
            (
                names,
                str(row.layers),
                " ".join(row.layers.scopes),
                _format_error(row.error),
                _format_error(row.maps),
                ", ".join(f"{model.name} {_format_error(model.error)}" for model in row.trained),
            )
            for row in rows
            for names in ([", ".join(row.model_types)] if console.is_terminal else row.model_types)
        ]
        + [
            (one.model_type, _BY_STRUCTURE, "", _format_error(one.error), _format_error(one.maps), "")
            for one in record.structures
        ],
    )
    if not console.is_terminal:
        return
    console.print(
        "error: the largest relative difference of a layer's recomputed output from the model's own, on small random "
        "models in float64 and on trained ones in float32; of maps: of any entry from the definition. Of a decoder "
        "with an encoder, every scope is there once more for the encoder's tokens, as cross.<scope>. Measured with "
        + ", ".join(f"{package} {version}" for package, version in record.versions.items()),
        markup=False,
        highlight=False,
    )


def _describe_structure(one: verified.Structure) -> dict[str, Any]:
    """Returns what ``--json`` says of a model type that its structure tells."""
    return {
        "model_type": one.model_type,
        "layers": _BY_STRUCTURE,
        "scopes": [],
        "error": one.error,
        "map_error": one.maps,
        "trained": {},
    }


def _describe_row(row: Any, name: str) -> dict[str, Any]:
    """Returns what ``--json`` says of a model type."""
    return {
        "model_type": name,
        "layers": str(row.layers),
        "scopes": list(row.layers.scopes),
        "error": row.error,
        "map_error": row.maps,
        "trained": {model.name: model.error for model in row.trained},
    }


def _describe(found: Reproduction) -> dict[str, Any]:
    """Returns what ``--json`` says of a model."""
    layers = [
        {
            "stack": layer.stack,
            "layer": layer.layer,
            "scopes": list(layer.scopes),
            "error": layer.error,
            "tolerance": layer.tolerance,
            "reproduced": layer.passed,
        }
        for layer in found.layers
    ]
    return {"adapter": found.family, "error": found.error, "layers": layers}


def _require_float(dtype: torch.dtype | None) -> None:
    import torch

    known = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if dtype is not None and dtype not in known:
        names = ", ".join(str(one).removeprefix("torch.") for one in known)
        raise ValueError(f"--dtype {str(dtype).removeprefix('torch.')}: expected one of {names}")


def _describe_inputs(example: Example, found: Reproduction) -> list[str]:
    """Says what the model was given, and how many tokens that was."""
    inputs = found.request.inputs
    length = inputs.mask.shape[1]
    if inputs.encoder is None:
        return [f"input: {example.words}: {length} tokens"]
    read = inputs.encoder.mask.shape[1]
    return [f"encoder input: {example.words}: {read} tokens", f"decoder input: {example.written}: {length} tokens"]


def _tabulate_layers(found: Reproduction) -> Table:
    """Writes scopes where they are not those of the layer above."""
    stacks = len({layer.stack for layer in found.layers}) > 1
    table = Table(*["stack"] * stacks, "layer", "scopes", "error", "tolerance", "verdict")
    above: Reproduced | None = None
    for layer in found.layers:
        same = above is not None and (above.stack, above.scopes) == (layer.stack, layer.scopes)
        table.add_row(
            *[layer.stack] * stacks,
            str(layer.layer),
            "" if same else _shorten_scopes(layer.scopes),
            _format_error(layer.error),
            _format_error(layer.tolerance),
            "[green]reproduced" if layer.passed else "[red]differs",
        )
        above = layer
    return table


def _shorten_scopes(scopes: tuple[str, ...]) -> str:
    """Shortens the scopes of an encoder's tokens, which are the same once more."""
    from ..results.scope_names import split_stack

    across = [scope for scope in scopes if split_stack(scope)[0] == "cross"]
    own = " ".join(scope for scope in scopes if scope not in across)
    return f"{own} {across[0]} to {across[-1]}" if across else own


def _format_verdict(found: Reproduction) -> str:
    failed = [layer for layer in found.layers if not layer.passed]
    adapter = f"adapter: {make_cell(found.family)}"
    if not failed:
        return f"{len(found.layers)} layers reproduced to {_format_error(found.error)}; {adapter}"
    first = f"{failed[0].stack} layer {failed[0].layer}".strip()
    return f"[red]{len(failed)} of {len(found.layers)} layers differ[/red], the first is {first}; {adapter}"


def _format_error(value: float) -> str:
    return f"{value:.0e}"

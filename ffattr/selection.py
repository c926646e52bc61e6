"""Which of a number of things a user asks for: layers, query tokens, key tokens, scopes, sequences; which of the
inputs was left out; scopes in words."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Indices",
    "Skipped",
    "describe_scope",
    "indices",
    "integer",
    "layer_place",
    "list_names",
    "parse_indices",
    "scope_named",
    "sequence",
]

Indices = int | slice | Sequence[int] | None


@dataclass(frozen=True)
class Skipped:
    """Says which of the inputs was left out, by its ``index`` in the list, and why: the type of the error that it would
    have raised, and its message."""

    index: int
    error_type: str
    message: str


def indices(name: str, asked: Indices, count: int) -> tuple[int, ...]:
    """Returns numbers from 0 to ``count - 1`` in the order asked for; None asks for all, negative ones count from the
    end.

    Raises TypeError or IndexError that calls them ``name``.
    """
    if asked is None:
        return tuple(range(count))
    if isinstance(asked, slice):
        return tuple(range(count)[asked])
    if not isinstance(asked, (int, Sequence)) or isinstance(asked, str):
        raise TypeError(f"{name} is {asked!r}, expected an integer, a sequence of integers, a slice or None")
    values = [asked] if isinstance(asked, int) else list(asked)
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} has {value!r}, expected integers, a slice or None")
        if not -count <= value < count:
            raise IndexError(f"{name} has {value}, but there are {count}: expected {-count} to {count - 1}")
    return tuple(value % count for value in values)


def parse_indices(given: str) -> list[int] | slice:
    """Reads ``"0,3,-1"`` or ``"0:4"``. Raises ValueError for anything else."""
    try:
        if ":" in given:
            start, stop = (int(part) if part.strip() else None for part in given.split(":"))
            return slice(start, stop)
        return [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f'{given!r}: expected numbers "0,3,-1" or a slice "0:4"') from None


def integer(name: str, value: Any) -> int:
    """Returns ``value``, of Python or of numpy, as an integer. Raises TypeError that calls it ``name``."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected an integer") from None


def list_names(name: str, asked: Any) -> list[Any]:
    """Returns a name, or several, as a list. Raises TypeError that calls them ``name`` for anything else."""
    if isinstance(asked, str):
        return [asked]
    if not isinstance(asked, Sequence) or isinstance(asked, bytes):
        raise TypeError(f"{name} is {asked!r}, expected a name or a sequence of names")
    return list(asked)


def layer_place(layer: int, layers: Sequence[int]) -> int:
    """The place among the computed ``layers`` of the model's layer ``layer``, or, negative, counted from the end.

    Raises TypeError, or IndexError listing the computed ones.
    """
    layer = integer("layer", layer)
    if -len(layers) <= layer < 0:
        return layer + len(layers)
    if layer not in layers:
        raise IndexError(f"layer {layer} was not computed; computed: {', '.join(map(str, layers))}")
    return list(layers).index(layer)


def sequence(batch: int, count: int) -> int:
    """The number, from 0, of one of ``count`` sequences; a negative one counts from the end.

    Raises TypeError, or IndexError for one that is not there.
    """
    batch = integer("batch", batch)
    if not -count <= batch < count:
        raise IndexError(f"batch {batch} is out of range: there are {count} sequences")
    return batch % count


def scope_named(name: str, scopes: Sequence[str]) -> str:
    """The name of a computed scope: ``"layer"`` stands for the last one. Raises KeyError listing the others."""
    if name == "layer" and scopes:
        return scopes[-1]
    if name not in scopes:
        raise KeyError(f"no scope {name!r} here; computed: {', '.join(scopes)} (and the alias 'layer')")
    return name


_PARTS = {"ln": "norm", "ff": "FF", "res": "residual", "experts": "by expert"}
_STARTS = {"attn_heads": "attention, by head", "attn": "attention", "attn_res": "attention + residual"}


def describe_scope(name: str) -> str:
    """Returns the name of a scope in words, ``"attention block + FF"``; another name, as it is.

    >>> from ffattr.selection import describe_scope
    >>> describe_scope("atb_ff"), describe_scope("cross.attn")
    ('attention block + FF', "attention, of the encoder's tokens")
    """
    stack, _, scope = name.rpartition(".")
    first, *parts = scope.split("_")
    if scope in _STARTS:
        words = _STARTS[scope]
    elif first == "atb" and set(parts) <= _PARTS.keys():
        words = " + ".join(["attention block", *(_PARTS[part] for part in parts)]).replace(" + by", ", by")
    else:
        return name
    return f"{words}, of the encoder's tokens" if stack == "cross" else f"{stack}: {words}" if stack else words

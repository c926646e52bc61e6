"""An `Attribution` as the tensors and the description of a file, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..analysis.rows import key_mask
from .contents import OF_TOP, Contents, apart
from .files import FileFormatError
from .keep import Top

__all__ = ["check_kept", "contents_of", "parts"]

_OPTIONAL = ("key_mask", "groups", "experts", "shares")  # tensors that not every attribution has


def parts(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by name, and what else there is as JSON takes it."""
    tensors = {"mask": contents.mask, "error": contents.error}
    for scope in contents.scopes:
        if scope in contents.largest:
            tensors |= {f"top.{scope}.{part}": getattr(contents.largest[scope], part) for part in OF_TOP}
        elif scope in contents.maps:
            tensors[f"maps.{scope}"] = contents.maps[scope]
        tensors[f"bias.{scope}"] = contents.bias[scope]
        if scope in contents.sketch_error:
            tensors[f"sketch_error.{scope}"] = contents.sketch_error[scope]
    for name in _OPTIONAL:
        tensor = getattr(contents, name)
        if tensor is not None:
            tensors[name] = tensor
    described = {
        "scopes": contents.scopes,
        "layers": contents.layers,
        "queries": contents.queries,
        "tokens": contents.tokens,
        "key_tokens": contents.key_tokens,
        "plan": None if contents.plan is None else str(contents.plan),
        "arguments": contents.arguments,
        "block": contents.block,
    }
    return tensors, described


def contents_of(tensors: Mapping[str, Tensor], content: Any, name: str) -> Contents:
    """The inverse of `parts`; ``name`` is that of the file."""
    try:
        scopes = tuple(content["scopes"])
        cut = [scope for scope in scopes if f"top.{scope}.{OF_TOP[0]}" in tensors]
        found = Contents(
            maps={scope: tensors[f"maps.{scope}"] for scope in scopes if scope not in cut},
            largest={scope: Top(*(tensors[f"top.{scope}.{part}"] for part in OF_TOP)) for scope in cut},
            block=content.get("block"),
            bias={scope: tensors[f"bias.{scope}"] for scope in scopes},
            sketch_error={s: tensors[f"sketch_error.{s}"] for s in scopes if f"sketch_error.{s}" in tensors},
            tokens=[list(sequence) for sequence in content["tokens"]],
            layers=tuple(content["layers"]),
            queries=tuple(content["queries"]),
            scopes=scopes,
            mask=tensors["mask"],
            error=tensors["error"],
            plan=content["plan"],
            arguments=dict(content["arguments"]),
            key_tokens=content.get("key_tokens"),
            key_mask=tensors.get("key_mask"),
            groups=tensors.get("groups"),
            experts=tensors.get("experts"),
            shares=tensors.get("shares"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
    _check_shapes(found, name)
    return found


def check_kept(contents: Contents) -> None:
    """Raises ValueError where there are no maps to save."""
    for scope in contents.scopes:
        if scope not in contents.maps and scope not in contents.largest:
            raise ValueError(
                f"nothing to save of {scope}: keep=Reduce keeps no maps. Save what the function returned, "
                "attr.reduced, yourself, or compute with keep='dense', TopK or Pool"
            )


def _check_shapes(contents: Contents, name: str) -> None:
    keys = key_mask(contents)
    sequences, tokens = keys.shape if keys.dim() == 2 else (-1, -1)
    rows, block = (len(contents.layers), sequences, len(contents.queries)), contents.block or 1
    for scope in contents.scopes:
        cut = contents.largest.get(scope)
        if cut is None:
            tensors = {"the map": contents.maps[scope]}
            inner = (math.ceil(rows[2] / block), math.ceil(tokens / block))
        else:
            tensors = {"the top of": cut.values, "the keys of": cut.keys}
            inner = (rows[2], cut.values.shape[-1])
        for what, tensor in tensors.items():
            shape = tuple(tensor.shape)
            if shape[:2] + shape[-2:] != rows[:2] + inner or len(shape) != (5 if apart(scope) else 4):
                raise FileFormatError(
                    f"{name!r}: {what} {scope} has shape {list(shape)}, expected {[*rows[:2], *inner]} (layers, "
                    "sequences, queries, tokens)"
                )

"""An `Attribution` as the tensors and the description of a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..analysis.rows import key_mask
from .contents import Contents
from .files import FileFormatError
from .keep import restore_kept
from .scope_names import extra_axis

__all__ = ["check_saved", "from_parts", "to_parts"]

_OPTIONAL = ("key_mask", "groups", "experts", "shares")  # tensors that not every attribution has


def to_parts(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns all tensors by name, and what else there is as JSON takes it."""
    tensors = {"mask": contents.mask, "error": contents.error, **contents.kept.list_tensors(contents.scopes)}
    for scope in contents.scopes:
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
        **contents.kept.file_description(),
    }
    return tensors, described


def from_parts(tensors: Mapping[str, Tensor], content: Any, name: str) -> Contents:
    """Undoes `to_parts`; ``name`` is that of the file. Raises FileFormatError where they do not fit together."""
    try:
        scopes = tuple(content["scopes"])
        found = Contents(
            kept=restore_kept(scopes, tensors, content),
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


def check_saved(contents: Contents) -> None:
    """Raises ValueError where there is nothing to save of a scope."""
    for scope in contents.scopes:
        if not contents.kept.can_save(scope):
            raise ValueError(contents.kept.explain_unsaved(scope))


def _check_shapes(contents: Contents, name: str) -> None:
    keys = key_mask(contents)
    sequences, tokens = keys.shape if keys.dim() == 2 else (-1, -1)
    outer = (len(contents.layers), sequences)
    for scope in contents.scopes:
        for what, tensor, inner in contents.kept.list_sizes(scope, len(contents.queries), tokens):
            shape = tuple(tensor.shape)
            if shape[:2] + shape[-2:] != outer + inner or len(shape) != (5 if extra_axis(scope) else 4):
                raise FileFormatError(
                    f"{name!r}: {what} {scope} has shape {list(shape)}, expected {[*outer, *inner]} (layers, "
                    "sequences, queries, tokens)"
                )

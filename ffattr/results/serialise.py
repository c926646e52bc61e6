"""An `Attribution` as the tensors and the description of a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..analysis.rows import key_mask
from ..errors import FileFormatError
from .contents import Contents
from .keep import restore_kept
from .saved.schema import check_attribution, check_maps, read_texts

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
        **({} if contents.labels is None else {"labels": contents.labels}),  # files without any stay as they were
        "key_tokens": contents.key_tokens,
        "plan": None if contents.plan is None else str(contents.plan),
        "arguments": contents.arguments,
        **contents.kept.file_description(),
    }
    return tensors, described


def from_parts(tensors: Mapping[str, Tensor], content: Any, name: str) -> Contents:
    """Undoes `to_parts`; ``name`` is that of the file. Raises FileFormatError where they do not fit together."""
    check_attribution(tensors, content, name)
    scopes = tuple(content["scopes"])
    try:
        kept = restore_kept(scopes, tensors, content)
    except KeyError as error:
        raise FileFormatError(f"{name!r} says it is an ffattr file but lacks or garbles {error}") from error
    key_texts = content.get("key_tokens")
    found = Contents(
        kept=kept,
        bias={scope: tensors[f"bias.{scope}"] for scope in scopes},
        sketch_error={s: tensors[f"sketch_error.{s}"] for s in scopes if f"sketch_error.{s}" in tensors},
        tokens=read_texts(content["tokens"]),
        labels=None if content.get("labels") is None else read_texts(content["labels"]),
        layers=tuple(content["layers"]),
        queries=tuple(content["queries"]),
        scopes=scopes,
        mask=tensors["mask"],
        error=tensors["error"],
        plan=content.get("plan"),
        arguments=dict(content["arguments"]),
        key_tokens=None if key_texts is None else read_texts(key_texts),
        key_mask=tensors.get("key_mask"),
        groups=tensors.get("groups"),
        experts=tensors.get("experts"),
        shares=tensors.get("shares"),
    )
    outer = [len(found.layers), len(found.mask)]
    check_maps(kept, scopes, outer, (len(found.queries), key_mask(found).shape[1]), name)
    return found


def check_saved(contents: Contents) -> None:
    """Raises ValueError where there is nothing to save of a scope."""
    for scope in contents.scopes:
        if not contents.kept.can_save(scope):
            raise ValueError(contents.kept.explain_unsaved(scope))

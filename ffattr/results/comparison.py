"""Two attributions of the same tokens side by side: of two models, of two ways to compute, of two scopes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..analysis.ranks import spearman
from ..analysis.rows import key_mask
from ..errors import names_missing_extra
from .contents import Contents, drop_padding, key_tokens, label_axes, mark_own_tokens
from .scope_names import extra_axis

if TYPE_CHECKING:
    import pandas

__all__ = ["compare_maps"]

_STRONGEST = 10
_COLUMNS = ["scope", "other_scope", "layer", "other_layer", "batch", "rho", "difference", "largest", "overlap"]


@names_missing_extra
def compare_maps(first: Contents, second: Contents, scopes: Sequence[tuple[str, str]]) -> pandas.DataFrame:
    """Does `Attribution.compare`; ``scopes`` are pairs of names, of the first and of the second."""
    import pandas as pd

    _check_same_tokens(first, second)
    causal = bool(first.arguments.get("causal")) and bool(second.arguments.get("causal"))
    found = []
    for scope, other in scopes:
        if extra_axis(scope) != extra_axis(other):
            raise ValueError(f"maps of {scope} and of {other} have different axes: one is told apart by head or expert")
        for place, other_place in _match_layers(first, second):
            for batch in range(len(first.mask)):
                rows, keys = label_axes(first, batch)
                a, b = (
                    drop_padding(of[name][at, batch].cpu(), rows, keys).double()
                    for of, name, at in ((first, scope, place), (second, other, other_place))
                )
                if a.shape != b.shape:
                    raise ValueError(f"maps of {scope} have shape {list(a.shape)} here and {list(b.shape)} there")
                seen = torch.ones(a.shape[-2:], dtype=torch.bool)
                if causal:
                    seen = keys.positions <= rows.positions[:, None]
                of_itself = mark_own_tokens(first, batch, rows, keys)
                numbers = _compare_pairs(a, b, seen.expand(a.shape), (seen & ~of_itself).expand(a.shape))
                found.append((scope, other, first.layers[place], second.layers[other_place], batch, *numbers))
    return pd.DataFrame(found, columns=_COLUMNS)


def _compare_pairs(a: Tensor, b: Tensor, seen: Tensor, between: Tensor) -> tuple[float, float, float, float]:
    """Returns rank correlation, relative and largest difference of pairs that are ``seen``, and what the strongest of
    the pairs ``between`` different tokens have in common. All are ``[..., n, m]``.
    """
    one, other = a[seen], b[seen]
    if not len(one):
        return (float("nan"),) * 4
    size = float(one.norm())
    k = min(_STRONGEST, int(between.sum()))
    top = [set(side[between].topk(k).indices.tolist()) for side in (a, b)]
    return (
        spearman(one, other),
        float((one - other).norm()) / size if size else float("nan"),
        float((one - other).abs().max()),
        len(top[0] & top[1]) / k if k else float("nan"),
    )


def _match_layers(first: Contents, second: Contents) -> list[tuple[int, int]]:
    """Returns places of layers that belong together: of the same number or, in two models, at the same place."""
    if both := [layer for layer in first.layers if layer in second.layers]:
        return [(first.layers.index(layer), second.layers.index(layer)) for layer in both]
    if len(first.layers) == len(second.layers):
        return [(place, place) for place in range(len(first.layers))]
    raise ValueError(
        f"no layer is in both: {', '.join(map(str, first.layers))} here, {', '.join(map(str, second.layers))} there; "
        "compute the same layers, or as many"
    )


def _check_same_tokens(first: Contents, second: Contents) -> None:
    if first.mask.shape != second.mask.shape or not torch.equal(first.mask.cpu(), second.mask.cpu()):
        raise ValueError(
            f"the sequences differ: {_format_lengths(first.mask)} tokens here, {_format_lengths(second.mask)} there. "
            "Compare attributions of the same texts with the same tokenizer"
        )
    for name, one, other in (
        ("queries", list(first.queries), list(second.queries)),
        ("tokens", first.tokens, second.tokens),
        ("columns", key_tokens(first), key_tokens(second)),
        ("blocks", first.block, second.block),
    ):
        if one != other:
            raise ValueError(f"the {name} differ: {_first_difference(one, other)}")
    if not torch.equal(key_mask(first).cpu(), key_mask(second).cpu()):
        raise ValueError("the columns differ: their masks are not the same")


def _format_lengths(mask: Tensor) -> str:
    return ", ".join(map(str, mask.sum(1).tolist()))


def _first_difference(one: object, other: object) -> str:
    while isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        one, other = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
    return f"{one!r} here, {other!r} there"[:200]

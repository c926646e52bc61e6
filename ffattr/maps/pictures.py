"""Pictures of an `Attribution`: which numbers and labels `ffattr.plot` draws.

Shapes: ``N`` query tokens, ``T`` columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import plot
from .contents import Contents, apart, layer_place, one, ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["one_map"]


def one_map(
    contents: Contents,
    scope: str,
    layer: int,
    batch: int,
    head: int | None,
    expert: int | None,
    options: Mapping[str, Any],
) -> Figure:
    """See `Attribution.plot`."""
    place = layer_place(contents, layer)
    values = one(contents, scope, place, batch)
    title = f"{scope}, layer {contents.layers[place]}"
    if apart(scope) == "expert":
        if expert is None:
            raise ValueError(f"scope {scope} is told apart by expert: name one of them with expert=")
        assert contents.experts is not None
        chosen = (contents.experts[place, batch] == expert).T[..., None]  # [k, N, 1]
        values, title = (values * chosen).sum(0), f"{title}, expert {expert}"
    elif expert is not None:
        raise ValueError(f"expert={expert} is for scopes told apart by expert; {scope} is summed over experts")
    if apart(scope) == "head":
        if head is None or not -values.shape[0] <= head < values.shape[0]:
            raise ValueError(f"scope {scope} has {values.shape[0]} heads; got head={head}: name one of them")
        values, title = values[head], f"{title}, head {head % values.shape[0]}"
    elif head is not None:
        raise ValueError(f"head={head} is for the scope attn_heads; {scope} is summed over heads")
    rows, keys = ticks(contents, batch)
    return plot.map_figure(values[rows.places][:, keys.places], rows.labels, keys.labels, **{"title": title, **options})

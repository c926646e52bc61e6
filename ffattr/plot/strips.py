"""Rows of small maps: what each component of a layer does to one map, what the feed-forward blocks amplify."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import names_missing_extra
from ..selection import describe_scope
from .style import (
    Scale,
    check_map,
    find_colormap,
    find_ends,
    label_axis,
    label_ends,
    label_signed,
    largest_but,
    plain_text,
    scale_colours,
    short_text,
    to_array,
    to_cells,
    wrap_words,
)

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["amp_strip", "scope_strip"]

_NAMED = 30
"""Tokens whose labels fit beside a small map."""

_WIDEST = 13.5
"""Inches after which a strip goes on in the next line."""

_RINGS = (("o", "○"), ("s", "□"), ("D", "◇"), ("^", "△"), ("v", "▽"))
"""Marker in the map and the same sign before the name of the pair, strongest first."""


@names_missing_extra
def scope_strip(
    maps: Mapping[str, Tensor],
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str | None = None,
    *,
    normalize: bool = True,
    scale: Scale = "log",
    cmap: str | None = None,
    columns: int | None = None,
) -> Figure:
    """Draws the maps ``[N, T]`` of one layer, one per scope in the order given, each with its name and what it is of.

    An arrow between neighbours names the component that lies between them: ``RES``, ``LN`` or ``FF``, as the names of
    the scopes tell it (none where they do not). With ``normalize`` every row of a map is divided by its sum, so that
    all maps share one colour scale; without, each has its own. The first map's tokens are named where they are few.
    ``columns`` maps stand side by side (None: as many as fit). Raises ValueError for maps that are not ``[N, T]``
    (``attn_heads`` has one map per head: pick one) and for negative entries, whose rows have no shares. Scales and grey
    cells are those of `map_figure`.

    >>> from ffattr.plot import scope_strip
    >>> maps = {scope: attr[scope][1, 0] for scope in attr.scopes if scope != "attn_heads"}
    >>> figure = scope_strip(maps, attr.tokens[0], attr.tokens[0], "layer 1")
    >>> [text.get_text() for axes in figure.axes for text in axes.texts]
    ['RES', 'LN', 'FF', 'RES', 'LN']
    """
    from matplotlib.figure import Figure

    if not maps:
        raise ValueError("scope_strip got no maps: pass {scope: map [queries, keys]} of at least one scope")
    for scope, values in maps.items():
        check_map(values, query_tokens, key_tokens, f"the map of {scope}")
    shown = {scope: _divide_rows(values, scope) if normalize else values for scope, values in maps.items()}
    chosen, together = find_colormap(cmap, scale), torch.stack([one.detach().double().cpu() for one in shown.values()])
    norms = [scale_colours(together if normalize else one, scale) for one in shown.values()]

    count, names = len(shown), list(shown)
    few = max(len(query_tokens), len(key_tokens)) <= _NAMED
    side = min(max(0.13 * max(len(query_tokens), len(key_tokens)), 1.5), 2.6) if few else 1.65
    ratio = len(query_tokens) / max(len(key_tokens), 1)
    rows, columns = _wrap_panels(count, columns, side + 0.5)
    beside, below = (
        0.06 * max(len(short_text(token)) for token in tokens) * few for tokens in (query_tokens, key_tokens)
    )
    height = side * min(max(ratio, 0.25), 4.0) + 0.65
    between = 0.5 if normalize else 0.95
    figure = Figure(
        figsize=(columns * (side + between) + beside + 0.9, rows * height + below + 0.65), layout="compressed"
    )
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= count:
            axes.set_axis_off()
            continue
        image = axes.imshow(to_cells(shown[names[place]], scale), cmap=chosen, norm=norms[place])
        axes.set_title(_name_in_lines(names[place]), fontsize=8)
        axes.set(xticks=[], yticks=[])
        if place and (component := _name_component(names[place - 1], names[place], names)):
            _draw_arrow(axes, component)
        if not normalize:
            ends = find_ends(shown[names[place]], norms[place])
            label_ends(figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, extend=ends), norms[place])
    first = grid.flat[0]
    if few:
        label_axis(first, "x", key_tokens, 7)
        label_axis(first, "y", query_tokens, 7)
    first.set_xlabel("key token $j$", fontsize=8)
    first.set_ylabel("query token $i$", fontsize=8)
    what = "share of the row" if normalize else "norms, each map with its own colours"
    if normalize:
        ends = find_ends(together, norms[0])
        bar = figure.colorbar(image, ax=list(grid.flat), fraction=0.03, pad=0.015, aspect=14 * rows, extend=ends)
        bar.set_label(what, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    default = "one layer's maps, component by component"
    figure.suptitle(plain_text((title or default) + ("" if normalize else f" ({what})")), fontsize=10)
    return figure


@names_missing_extra
def amp_strip(
    values: Tensor,
    layers: Sequence[int],
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str | None = None,
    *,
    mark: int = 3,
    unmarked: Tensor | None = None,
    cmap: str | None = None,
    columns: int | None = None,
) -> Figure:
    """Draws what the feed-forward block of each layer amplifies: ``values`` ``[L, N, T]``, shares after minus before.

    All layers share one colour scale, logarithmic on both sides of zero, more blue and less orange, and blind to the
    few largest entries, which the arrows of the colour bar stand for. Cells without a finite number are grey. Few
    tokens are named, at the first map of each line and at the lowest ones. The ``mark`` (at most 5) strongest positive
    pairs of a layer are marked and named below it, ``query ← key``; those where ``unmarked`` ``[N, T]`` is True, say of
    a token and itself, are left out. ``columns`` maps stand side by side (None: as many as fit).

    >>> from ffattr.plot import amp_strip
    >>> before, after = (attr[s][:, 0] / attr[s][:, 0].sum(-1, keepdim=True) for s in ("atb", "atb_ff"))
    >>> figure = amp_strip(after - before, attr.layers, attr.tokens[0], attr.tokens[0])
    >>> figure.axes[0].get_title()
    'layer 0'
    """
    from matplotlib.figure import Figure

    if values.dim() != 3 or len(layers) != values.shape[0] or not len(layers):
        raise ValueError(f"expected FF-amp maps [layers, N, T] of {len(layers)} layers, got {list(values.shape)}")
    check_map(values[0], query_tokens, key_tokens, "an FF-amp map")
    if unmarked is not None and unmarked.shape != values.shape[1:]:
        raise ValueError(f"unmarked has shape {list(unmarked.shape)}, expected that of a map: {list(values.shape[1:])}")
    if not 0 <= mark <= len(_RINGS):
        raise ValueError(f"mark={mark}, expected 0 to {len(_RINGS)}: more names do not fit below a map")
    finite = int(values.isfinite().sum())
    top = largest_but(values, max(1, finite // 500)) or largest_but(values, 0)
    norm, chosen = scale_colours(values, "signed", top), find_colormap(cmap, "signed")
    rows, columns = _wrap_panels(len(layers), columns, 2.0)
    few = max(len(query_tokens), len(key_tokens)) <= _NAMED
    beside, below = (
        0.06 * max(len(short_text(token, 13)) for token in tokens) * few for tokens in (query_tokens, key_tokens)
    )
    height = 1.75 * min(max(len(query_tokens) / max(len(key_tokens), 1), 0.25), 4.0) + 0.35 + 0.13 * mark
    figure = Figure(figsize=(columns * 2.0 + 1.2 + beside, rows * height + 0.7 + below), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_axis_off()
            continue
        one = to_array(values[place])
        image = axes.imshow(to_cells(values[place], "diverging"), cmap=chosen, norm=norm)
        axes.set_title(f"layer {layers[place]}", fontsize=9)
        axes.set(xticks=[], yticks=[])
        if few and place % columns == 0:
            label_axis(axes, "y", query_tokens, 6, 13)
        if few and place + columns >= len(layers):
            label_axis(axes, "x", key_tokens, 6, 13)
        candidates = one if unmarked is None else to_array(values[place].masked_fill(unmarked, float("-inf")))
        names = []
        for (query, key), (marker, sign) in zip(_find_strongest_pairs(candidates, mark), _RINGS, strict=False):
            axes.plot(key, query, marker, ms=6.5, mfc="none", mec="black", mew=0.9, clip_on=False)
            names.append(
                f"{plain_text(sign)} {short_text(query_tokens[query], 13)} ← {short_text(key_tokens[key], 13)}"
            )
        axes.set_xlabel("\n".join(names), fontsize=7, ha="left", x=0.0)
    bar = figure.colorbar(
        image, ax=list(grid.flat), fraction=0.03, pad=0.015, aspect=14 * rows, extend=find_ends(values, norm)
    )
    bar.set_label("change of a row's share through FF: more is blue", fontsize=8)
    label_signed(bar, norm)
    figure.supxlabel("key token $j$", fontsize=9)
    figure.supylabel("query token $i$", fontsize=9)
    figure.suptitle(plain_text(title or "what the feed-forward blocks amplify"), fontsize=10)
    return figure


def _divide_rows(values: Tensor, scope: str) -> Tensor:
    """Returns every row divided by the sum of its numbers; a row of zeros stays one."""
    wide = values.detach().to(torch.promote_types(values.dtype, torch.float32))
    if bool((wide < 0).any()):
        raise ValueError(
            f"the map of {scope} has negative entries, down to {float(wide.nan_to_num().min()):.3g}: rows of "
            "differences have no shares; pass normalize=False, scale='diverging'"
        )
    sums = wide.nansum(-1, keepdim=True)
    return wide / torch.where(sums > 0, sums, 1)


def _name_in_lines(scope: str) -> str:
    """Returns the name of a scope, and below it what that is in words, in lines as wide as a small map."""
    words = describe_scope(scope)
    return plain_text(scope) if words == scope else f"{scope}\n{wrap_words(words, 23)}"


def _name_component(before: str, after: str, names: Sequence[str]) -> str | None:
    """Names what is between two neighbours of ``names``: a scope's name is its predecessor's and the component.

    But ``atb``, the whole attention block: it ends with its norm where there is one, whose scopes before and after are
    ``attn_res`` and ``atb``, and with its residual where there is none.
    """
    place, _, first = before.rpartition(".")
    other, _, second = after.rpartition(".")
    if place != other:
        return None
    if second == "atb":
        pre_norm = any(name.rpartition(".")[2].startswith("atb_ln") for name in names)
        return {"attn_res": "LN", "attn": "RES" if pre_norm else "ATB"}.get(first)
    added = second.removeprefix(f"{first}_")
    parts = added.split("_")
    if added == second or not set(parts) <= {"res", "ln", "ff"}:
        return None
    return " + ".join(part.upper() for part in parts)


def _draw_arrow(axes: Axes, component: str) -> None:
    """Draws an arrow into the left side of a map, with the component's name above it."""
    # One annotation for both: the layout leaves no room for an arrow without text. It starts below the text's left end.
    look = {"arrowstyle": "-|>", "color": "black", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 9}
    look |= {"relpos": (0, 0), "patchA": None}
    axes.annotate(
        component,
        (0.0, 0.5),
        (-28.0, 0.0),
        xycoords="axes fraction",
        textcoords="offset points",
        arrowprops=look,
        va="bottom",
        fontsize=8,
    )


def _wrap_panels(count: int, columns: int | None, width: float) -> tuple[int, int]:
    """Returns rows and columns of ``count`` pictures ``width`` inches wide, evenly filled."""
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}, expected at least 1 or None")
    most = columns or max(1, int(_WIDEST / width))
    rows = math.ceil(count / most)
    return rows, min(most, count) if columns else math.ceil(count / rows)


def _find_strongest_pairs(values: numpy.ndarray, count: int) -> list[tuple[int, int]]:
    """Returns row and column of the ``count`` largest positive numbers, the largest first."""
    import numpy as np

    flat = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0).ravel()
    order = np.argsort(-flat, kind="stable")[:count]
    return [divmod(int(place), values.shape[1]) for place in order if flat[place] > 0]

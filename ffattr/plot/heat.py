"""Heat maps: one map with its tokens, or one small map per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import names_missing_extra
from .style import (
    Scale,
    check_map,
    find_colormap,
    find_ends,
    label_axis,
    label_ends,
    label_step,
    plain_text,
    scale_colours,
    to_cells,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["layer_grid", "map_figure"]

_NORM = r"norm $\Vert F_i(x_j)\Vert_2$"


@names_missing_extra
def map_figure(
    values: Tensor,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str | None = None,
    *,
    scale: Scale = "log",
    cmap: str | None = None,
    size: float | None = None,
    colour_label: str | None = None,
) -> Figure:
    """Draws a heat map of ``values`` ``[N, T]`` with its query tokens down and its key tokens across.

    ``scale="log"`` shows small entries beside a strong diagonal, ``"linear"`` begins at zero, ``"diverging"`` is for
    differences of two maps: zero has the middle colour, more is blue and less orange. An arrow at an end of the colour
    bar says that there are values beyond. ``size`` is the longer side of the map in inches, ``cmap`` a colour map of
    matplotlib (None: as pages have it), ``colour_label`` what is written at the colour bar. Cells without a finite
    number are grey, and on a logarithmic scale those of zero.

    >>> from ffattr.plot import map_figure
    >>> figure = map_figure(attr["layer"][0, 0], attr.tokens[0], attr.tokens[0], "layer 0")
    >>> figure.axes[0].get_xlabel()
    'key token $j$'
    """
    from matplotlib.figure import Figure

    check_map(values, query_tokens, key_tokens)
    norm, chosen = scale_colours(values, scale), find_colormap(cmap, scale)
    rows, columns = values.shape
    longest = size or min(max(0.24 * max(rows, columns), 3.5), 12.0)
    inch = longest / max(rows, columns, 1)
    figure = Figure(figsize=(max(inch * columns, 2.0) + 2.6, max(inch * rows, 2.0) + 1.6), layout="compressed")
    axes = figure.add_subplot()
    cells = to_cells(values, scale)
    image = axes.imshow(cells, cmap=chosen, norm=norm)
    axes.set_xlabel(
        "key token $j$" + _note_thinning(label_axis(axes, "x", key_tokens, _choose_font_size(inch, key_tokens)))
    )
    axes.set_ylabel(
        "query token $i$" + _note_thinning(label_axis(axes, "y", query_tokens, _choose_font_size(inch, query_tokens)))
    )
    if title:
        axes.set_title(plain_text(title))
    default = "difference of the maps" if scale == "diverging" else _NORM
    figure.colorbar(
        image,
        ax=axes,
        fraction=0.04,
        pad=0.02,
        extend=find_ends(values, norm),
        label=(plain_text(colour_label) if colour_label else default) + ("; grey: none" if cells.mask.any() else ""),
    )
    return figure


@names_missing_extra
def layer_grid(
    values: Tensor,
    layers: Sequence[int],
    title: str | None = None,
    *,
    columns: int = 6,
    scale: Scale = "log",
    cmap: str | None = None,
    kind: str = "layer",
    measure: str = "norm",
) -> Figure:
    """Draws one small map per layer of ``values`` ``[L, N, T]``, each with its own colours, because norms grow.

    ``kind`` is what they are maps of, if not of layers: ``"head"``; ``measure`` what their numbers are called.

    >>> from ffattr.plot import layer_grid
    >>> figure = layer_grid(attr["layer"][:, 0], attr.layers)
    >>> [axes.get_title() for axes in figure.axes if axes.images]
    ['layer 0', 'layer 1', 'layer 2']
    """
    from matplotlib.figure import Figure

    if values.dim() != 3 or len(layers) != values.shape[0] or not len(layers):
        raise ValueError(f"expected maps [{kind}s, N, T] of {len(layers)} {kind}s, got shape {list(values.shape)}")
    columns = max(1, min(columns, len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.1 * columns + 0.4, 1.9 * rows + 0.6), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_axis_off()
            continue
        one = values[place]
        norm = scale_colours(one, scale)
        image = axes.imshow(to_cells(one, scale), cmap=find_colormap(cmap, scale), norm=norm)
        axes.set_title(f"{kind} {layers[place]}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04, extend=find_ends(one, norm))
        label_ends(bar, norm)
    figure.supxlabel("key token $j$", fontsize=9)
    figure.supylabel("query token $i$", fontsize=9)
    what = "difference" if scale == "diverging" else measure
    figure.suptitle(plain_text(f"{title} (colour: {what})" if title else f"colour: {what}"), fontsize=10)
    return figure


def _choose_font_size(inch: float, tokens: Sequence[str]) -> float:
    """Returns the size in points of labels whose cells are ``inch`` high."""
    return min(max(inch * label_step(tokens) * 40, 5.0), 9.0)


def _note_thinning(step: int) -> str:
    return "" if step == 1 else f" (one in {step} named)"

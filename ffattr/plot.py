"""Pictures of maps: one map with its tokens, or one small map per layer.

Figures are made without pyplot: they belong to nobody's global state, need no display and are freed when dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

__all__ = ["layer_grid", "map_figure"]

_LABELS = 60
"""Token labels on one axis that can still be read side by side; more are thinned out."""

_SPAN = 1e3
"""Largest over smallest colour of a logarithmic scale: what is a thousandth of the largest is as good as nothing."""


def map_figure(
    values: Tensor,
    query_tokens: Sequence[str],
    key_tokens: Sequence[str],
    title: str | None = None,
    *,
    scale: Literal["linear", "log"] = "linear",
    cmap: str = "viridis",
    size: float | None = None,
) -> Figure:
    """A heat map of ``values`` ``[N, T]`` with its query tokens down and its key tokens across.

    ``scale="log"`` shows small entries beside a strong diagonal. ``size`` is the longer side of the map in inches.
    """
    from matplotlib.figure import Figure

    rows, columns = values.shape
    if (len(query_tokens), len(key_tokens)) != (rows, columns):
        raise ValueError(
            f"a map of {rows} x {columns} needs as many query and key tokens, got {len(query_tokens)} and "
            f"{len(key_tokens)}"
        )
    longest = size or min(max(0.24 * max(rows, columns), 3.5), 12.0)
    inch = longest / max(rows, columns, 1)
    figure = Figure(figsize=(max(inch * columns, 2.0) + 2.6, max(inch * rows, 2.0) + 1.6), layout="compressed")
    axes = figure.add_subplot()
    image = axes.imshow(_array(values), cmap=cmap, norm=_colours(values, scale), interpolation="nearest")
    font = min(max(inch * 40, 5.0), 9.0)
    _label(axes, "x", key_tokens, font)
    _label(axes, "y", query_tokens, font)
    axes.set_xlabel("key token $j$")
    axes.set_ylabel("query token $i$")
    if title:
        axes.set_title(_plain(title))
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, label=r"norm $\Vert F_i(x_j)\Vert_2$")
    return figure


def layer_grid(
    values: Tensor,
    layers: Sequence[int],
    title: str | None = None,
    *,
    columns: int = 6,
    scale: Literal["linear", "log"] = "linear",
    cmap: str = "viridis",
) -> Figure:
    """One small map per layer of ``values`` ``[L, N, T]``, each with its own colours: norms grow along the layers."""
    from matplotlib.figure import Figure

    if values.dim() != 3 or len(layers) != values.shape[0]:
        raise ValueError(f"expected maps [layers, N, T] of {len(layers)} layers, got shape {list(values.shape)}")
    columns = max(1, min(columns, len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.1 * columns + 0.4, 1.9 * rows + 0.6), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(layers):
            axes.set_axis_off()
            continue
        one = values[place]
        image = axes.imshow(_array(one), cmap=cmap, norm=_colours(one, scale), interpolation="nearest")
        axes.set_title(f"layer {layers[place]}", fontsize=9)
        axes.set_xticks([])
        axes.set_yticks([])
        bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.04)
        bar.ax.tick_params(labelsize=6)
    figure.supxlabel("key token $j$", fontsize=9)
    figure.supylabel("query token $i$", fontsize=9)
    if title:
        figure.suptitle(_plain(f"{title} (colour: norm)"), fontsize=10)
    return figure


def _array(values: Tensor) -> numpy.ndarray:
    array: numpy.ndarray = values.detach().float().cpu().numpy()
    return array


def _colours(values: Tensor, scale: str) -> Normalize:
    from matplotlib.colors import LogNorm, Normalize

    top = float(values.max()) if values.numel() else 0.0
    if scale == "log" and values.numel():
        top = _typical_top(values) or top
    top = top if math.isfinite(top) and top > 0 else 1.0
    if scale == "linear":
        return Normalize(0.0, top)
    if scale == "log":
        return LogNorm(top / _SPAN, top, clip=True)  # clip: an exact zero gets the lowest colour, not a hole
    raise ValueError(f"scale={scale!r}, expected 'linear' or 'log'")


def _typical_top(values: Tensor) -> float:
    """The largest entry but for one in a thousand.

    In many language models the first token's own norm is a hundred times every other, and would leave them no colour.
    """
    ordered = values.detach().float().flatten().sort().values
    return float(ordered[len(ordered) - 1 - len(ordered) // 1000])


def _label(axes: Axes, axis: Literal["x", "y"], tokens: Sequence[str], font: float) -> None:
    step = math.ceil(len(tokens) / _LABELS)
    places = range(0, len(tokens), step)
    labels = [_plain(tokens[place]) for place in places]
    if axis == "x":
        axes.set_xticks(places, labels, rotation=90, fontsize=font)
    else:
        axes.set_yticks(places, labels, fontsize=font)


def _plain(text: str) -> str:
    """Text as matplotlib should show it: word-start marks as nothing, line ends visible, no mathematics in ``$``."""
    text = text.removeprefix("\u0120").removeprefix("\u2581")  # byte-level BPE and SentencePiece
    text = text.replace("\u010a", "\\n").replace("\n", "\\n")
    return text.replace("$", r"\$")

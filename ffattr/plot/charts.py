"""Charts of what the analyses measure: of each component, of categories of pairs, of removed dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import names_missing_extra
from .style import GREY, LINES, MARKERS, check_frame, plain_text

if TYPE_CHECKING:
    import numpy
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "cancellation_chart",
    "category_bars",
    "change_chart",
    "choose_line_style",
    "finish_figure",
    "make_panels",
    "name_category",
]

_COMPONENTS = ("FF", "RES", "LN", "FF block")
_CATEGORIES = {
    "subwords": "pieces of one word",
    "adjacent": "neighbouring words",
    "repeated": "the same word again",
    "special_or_punctuation": "special token or punctuation",
    "compound": "parts of a compound",
    "named_entity": "parts of a name",
    "verb_object": "verb and object",
    "verb_subject": "verb and subject",
    "other": "none of these",
}
"""Of `ffattr.analysis.Categories`, for people."""

_ORDERS = {
    "ff": "largest in what the network writes first",
    "gain": "most scaled down by the norm first",
    "random": "at random",
}
"""Of `ffattr.analysis.cancellation`, for people."""

_CHANGE = r"contextualization change, $1 - \rho$ (Spearman)"


@names_missing_extra
def change_chart(frame: pandas.DataFrame, title: str | None = None, *, columns: int | None = None) -> Figure:
    """Draws what each component changes, layer by layer: a line per ``component`` over ``layer``, at ``value``.

    With columns ``low`` and ``high``, or ``standard_error``, a band of that range (of one standard error to both
    sides); with ``model`` a panel for each, on one scale. Further columns are ignored. Raises ValueError where one of
    the columns is missing, there are no rows, or a layer has two values of a component.

    >>> from ffattr.analysis import contextualization_change
    >>> from ffattr.plot import change_chart
    >>> figure = change_chart(contextualization_change(attr))
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['FF', 'RES', 'LN', 'FF block']
    """
    from matplotlib.ticker import MaxNLocator

    check_frame(frame, ("layer", "component", "value"), "change_chart")
    models = list(frame["model"].unique()) if "model" in frame else [None]
    by = ["layer", "component", *(["model"] if "model" in frame else [])]
    twice = frame[frame.duplicated(by)]
    if len(twice):
        raise ValueError(
            f"layer {twice['layer'].iloc[0]} has several values of {twice['component'].iloc[0]}: average them first, "
            f"as frame.groupby({by}, as_index=False)['value'].mean() does"
        )
    found = list(frame["component"].unique())
    components = [
        *(name for name in _COMPONENTS if name in found),
        *(name for name in found if name not in _COMPONENTS),
    ]
    figure, panels = make_panels(len(models), columns, 3.4 if len(models) > 1 else 5.0, 2.6, one_x=False)
    for axes, model in zip(panels, models, strict=True):
        rows = frame if model is None else frame[frame["model"] == model]
        for place, component in enumerate(components):
            one = rows[rows["component"] == component].sort_values("layer")
            if len(one):
                _draw_line(axes, one, plain_text(str(component)), place)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if model is not None:
            axes.set_title(plain_text(str(model)), fontsize=10)
    finish_figure(figure, panels, "layer", _CHANGE, title or "what each component changes in the map")
    return figure


@names_missing_extra
def category_bars(
    frame: pandas.DataFrame, title: str | None = None, *, by_layer: bool = False, columns: int | None = None
) -> Figure:
    """Draws how often amplified pairs are of a ``category`` (``share``), beside how often any pair is (``base_rate``).

    Two bars per category, the mean over the layers where there is a column ``layer``, and how many times as often as
    among all pairs the category is among amplified ones; or, ``by_layer``, a panel per category with both as lines over
    the layers. Raises ValueError where a column is missing or there are no rows.

    >>> import pandas
    >>> from ffattr.plot import category_bars
    >>> frame = pandas.DataFrame({"category": ["same word", "subword"], "share": [0.2, 0.3], "base_rate": [0.1, 0.3]})
    >>> [text.get_text() for text in category_bars(frame).axes[0].texts]
    ['2.0 times as often as among all pairs', '1.0 times']
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    check_frame(frame, ("category", "share", "base_rate", *(["layer"] if by_layer else [])), "category_bars")
    kinds = list(frame["category"].unique())
    rates = (("share", LINES[0], "among amplified pairs"), ("base_rate", GREY, "among all pairs"))
    heading = title or "categories of the pairs that FF amplifies"
    if by_layer:
        figure, panels = make_panels(len(kinds), columns, width=2.6, height=2.0)
        for axes, kind in zip(panels, kinds, strict=True):
            rows = frame[frame["category"] == kind].groupby("layer")[["share", "base_rate"]].mean()
            for (column, colour, name), marker in zip(rates, MARKERS, strict=False):
                axes.plot(rows.index, rows[column], color=colour, marker=marker, ms=4, lw=1.5, label=name)
            axes.set_title(name_category(str(kind)), fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        panels[0].set_ylim(bottom=0.0)
        finish_figure(figure, panels, "layer", "share of the pairs", heading)
        return figure

    from matplotlib.figure import Figure

    means = frame.groupby("category", sort=False, observed=True)[["share", "base_rate"]].mean()
    figure = Figure(figsize=(5.6, 1.5 + 0.42 * len(means)), layout="constrained")
    axes = figure.add_subplot()
    for offset, (column, colour, name) in zip((-0.2, 0.2), rates, strict=True):
        axes.barh([place + offset for place in range(len(means))], means[column], 0.38, color=colour, label=name)
    for place, (share, base) in enumerate(zip(means["share"], means["base_rate"], strict=True)):
        if base > 0 and math.isfinite(share):
            place_at = (share, place - 0.2)
            what = " as often as among all pairs" if place == 0 else ""
            axes.annotate(
                f"{share / base:.1f} times{what}", place_at, (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    axes.set_yticks(range(len(means)), [name_category(str(kind)) for kind in means.index])
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    finish_figure(figure, [axes], "share of the pairs", "category", heading)
    return figure


def name_category(name: str) -> str:
    """Returns a category of `ffattr.analysis` in words."""
    return plain_text(_CATEGORIES.get(name, name.replace("_", " ")))


def _name_order(name: object) -> str:
    """Returns in words which dimensions are left out first."""
    return plain_text(_ORDERS.get(str(name), str(name)))


@names_missing_extra
def cancellation_chart(frame: pandas.DataFrame, title: str | None = None, *, columns: int | None = None) -> Figure:
    """Draws what a component still changes (``value``) without the ``removed`` dimensions, a panel per ``component``.

    Dimensions are removed in some ``order``: with a single one there is a line per ``layer``, with several a line per
    order, the mean over the layers. Raises ValueError where a column is missing or there are no rows.

    >>> import pandas
    >>> from ffattr.plot import cancellation_chart
    >>> rows = [(0, "FF", "largest", 0, 0.3), (0, "FF", "largest", 4, 0.2), (1, "FF", "largest", 0, 0.1)]
    >>> frame = pandas.DataFrame(rows, columns=["layer", "component", "order", "removed", "value"])
    >>> len(cancellation_chart(frame).axes[0].lines)
    2
    """
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    check_frame(frame, ("layer", "component", "order", "removed", "value"), "cancellation_chart")
    components, orders = list(frame["component"].unique()), list(frame["order"].unique())
    layers = sorted(frame["layer"].unique())
    figure, panels = make_panels(len(components), columns, width=3.0, height=2.4)
    shades = matplotlib.colormaps["viridis"]([0.9 * place / max(len(layers) - 1, 1) for place in range(len(layers))])
    for axes, component in zip(panels, components, strict=True):
        rows = frame[frame["component"] == component]
        if len(orders) > 1:
            for place, order in enumerate(orders):
                mean = rows[rows["order"] == order].groupby("removed")["value"].mean()
                axes.plot(mean.index, mean, label=_name_order(order), **choose_line_style(place))
        else:
            for layer, shade in zip(layers, shades, strict=True):
                one = rows[rows["layer"] == layer].sort_values("removed")
                axes.plot(one["removed"], one["value"], color=shade, lw=1.4, marker="o", ms=3)
        axes.set_title(plain_text(str(component)), fontsize=10)
        _set_count_axis(axes, float(frame["removed"].max()))
    order = "" if len(orders) > 1 else f", {_name_order(orders[0])}"
    finish_figure(
        figure, panels, f"removed dimensions{order}", _CHANGE, title or "what is left without some dimensions"
    )
    if len(orders) == 1 and len(layers) > 1:
        bounds = [place - 0.5 for place in range(len(layers) + 1)]
        from matplotlib.colors import ListedColormap

        scale = ScalarMappable(BoundaryNorm(bounds, len(layers)), ListedColormap(shades))
        step = math.ceil(len(layers) / 12)
        bar = figure.colorbar(scale, ax=panels, label="layer", ticks=range(0, len(layers), step), pad=0.02)
        bar.ax.set_yticklabels([str(layer) for layer in layers[::step]])
        bar.ax.minorticks_off()
    return figure


@names_missing_extra
def make_panels(
    count: int, columns: int | None, width: float, height: float, one_x: bool = True, one_y: bool = True
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of ``count`` axes on one scale, across only with ``one_x`` and upwards with ``one_y``; at most
    four (or ``columns``) stand side by side."""
    from matplotlib.figure import Figure

    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns}, expected at least 1 or None")
    rows = math.ceil(count / (columns or 4))
    across = min(columns, count) if columns else math.ceil(count / rows)
    figure = Figure(figsize=(across * width + 0.8, rows * height + 1.1), layout="constrained")
    grid = figure.subplots(rows, across, sharex=one_x, sharey=one_y, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, count - across) : count]:
        axes.tick_params(labelbottom=True)  # nothing stands below it
    return figure, list(grid.flat[:count])


def _draw_line(axes: Axes, rows: pandas.DataFrame, name: str, place: int) -> None:
    look = choose_line_style(place)
    axes.plot(rows["layer"], rows["value"], label=name, **look)
    band = _read_band(rows)
    if band is not None:
        axes.fill_between(rows["layer"], *band, color=look["color"], alpha=0.2, lw=0)


def _read_band(rows: pandas.DataFrame) -> tuple[numpy.ndarray, numpy.ndarray] | None:
    if {"low", "high"} <= set(rows) and rows["low"].notna().any():
        return rows["low"].to_numpy(float), rows["high"].to_numpy(float)
    if "standard_error" in rows and (rows["standard_error"] > 0).any():
        value, error = rows["value"].to_numpy(float), rows["standard_error"].to_numpy(float)
        return value - error, value + error
    return None


def choose_line_style(place: int) -> dict[str, Any]:
    at = place % len(LINES)
    return {"color": LINES[at], "marker": MARKERS[at], "ms": 5, "lw": 1.5}


def _set_count_axis(axes: Axes, top: float) -> None:
    """Makes the horizontal axis a logarithmic one of counts that begins at zero."""
    axes.set_xscale("symlog", linthresh=1.0, linscale=0.5)
    ticks = [0] + [10**power for power in range(math.floor(math.log10(max(top, 1.0))) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(-0.15, max(top, 1.0) * 1.25)


def finish_figure(figure: Figure, panels: Sequence[Axes], x: str, y: str, title: str) -> None:
    """Names the axes, and adds the title and one legend of all panels' lines."""
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(visible=True, color="#e4e4e4", lw=0.6)
        axes.set_axisbelow(True)
        spec = axes.get_subplotspec()
        assert spec is not None
        if spec.rowspan.stop == spec.get_gridspec().nrows or axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel(x)  # no supxlabel: the legend would lie on it
    figure.supylabel(y, fontsize=10)
    figure.suptitle(plain_text(title), fontsize=11)
    entries = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if len(entries) > 1:
        panels[0].figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False)

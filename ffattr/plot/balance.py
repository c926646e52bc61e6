"""Charts of the feed-forward network beside what bypasses it, and beside the gain of a norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import names_missing_extra
from .charts import choose_line_style, finish_figure, make_panels
from .style import GREY, LINES, check_frame, plain_text

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["alignment_chart", "gain_chart"]


@names_missing_extra
def alignment_chart(frame: pandas.DataFrame, title: str | None = None) -> Figure:
    """Draws what the feed-forward network does to what bypasses it, layer by layer, of pairs of different tokens.

    Two panels: the ``median`` cosine of the two vectors, below zero where the network takes away, and the ``ratio`` of
    their lengths; a line for each ``model``, where there is that column. The frame is that of
    `ffattr.analysis.alignment`. Raises ValueError where a column is missing or there are no rows.

    >>> from ffattr.analysis import alignment
    >>> from ffattr.plot import alignment_chart
    >>> [axes.get_title() for axes in alignment_chart(alignment(attr)).axes]
    ['cosine of the two, median', 'length over that of the bypass']
    """
    from matplotlib.ticker import MaxNLocator

    check_frame(frame, ("layer", "pairs_of", "median", "ratio"), "alignment_chart")
    others = frame[frame["pairs_of"] == "others"]
    rows = (others if len(others) else frame).sort_values("layer")
    models = list(rows["model"].unique()) if "model" in rows else [None]
    figure, panels = make_panels(2, None, 3.6, 2.6, one_y=False)
    names = {"median": "cosine of the two, median", "ratio": "length over that of the bypass"}
    for axes, (column, name) in zip(panels, names.items(), strict=True):
        for place, model in enumerate(models):
            one = rows if model is None else rows[rows["model"] == model]
            axes.plot(one["layer"], one[column], label=plain_text(str(model)), **choose_line_style(place))
        axes.axhline(0.0, color=GREY, lw=0.9)
        axes.set_title(name, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    of = "pairs of different tokens" if len(others) else "a token and itself"
    finish_figure(figure, panels, "layer", of, title or "what the network adds, and what bypasses it")
    return figure


def gain_chart(frame: pandas.DataFrame, title: str | None = None, *, columns: int | None = None) -> Figure:
    """Draws the gain of a norm beside what the feed-forward network writes: a panel per ``layer``, a dot per dimension.

    Both axes are logarithmic; dimensions where either is zero are left out. The frame is that of
    `ffattr.analysis.gain_balance`, of one model. Raises ValueError where a column is missing or there are no rows.

    >>> import pandas
    >>> from ffattr.plot import gain_chart
    >>> frame = pandas.DataFrame({"layer": [0, 0], "gain": [1.0, 0.5], "ff": [0.1, 0.4], "rho": [-1.0, -1.0]})
    >>> gain_chart(frame).axes[0].get_title()
    'layer 0, ρ = −1.00'
    """
    check_frame(frame, ("layer", "gain", "ff", "rho"), "gain_chart")
    layers = sorted(frame["layer"].unique())
    figure, panels = make_panels(len(layers), columns or min(6, len(layers)), 1.7, 1.5)
    for axes, layer in zip(panels, layers, strict=True):
        rows = frame[(frame["layer"] == layer) & (frame["gain"] > 0) & (frame["ff"] > 0)]
        axes.plot(rows["ff"], rows["gain"], ".", ms=2, color=LINES[0], alpha=0.5)
        axes.set(xscale="log", yscale="log")
        rho = f"{frame.loc[frame['layer'] == layer, 'rho'].iloc[0]:.2f}".replace("-", "\u2212")
        axes.set_title(f"layer {layer}, \u03c1 = {rho}", fontsize=8)
        axes.tick_params(labelsize=6)
    finish_figure(figure, panels, "written by FF", "gain of the norm", title or "gain and what the network writes")
    for axes in panels:
        axes.xaxis.label.set_fontsize(8)
    return figure

"""One row of a map as arcs from a token to those it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import names_missing_extra
from .style import GREY, ROWS, plain_text, short_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["arcs"]

# Inches, but for the font, in points.
_FONT = 9.0
_WIDEST = 11.0
_HIGHEST = 1.9
_LINE = 0.17
"""Between two labels side by side on end."""
_THICKEST = 7.0
"""Points, of the arc with the largest share."""
_DISC = 18.0**2
"""Square points, of the disc of a token that reads nothing but itself."""
_QUERY = "#bd1e75"


@names_missing_extra
def arcs(
    values: Tensor,
    tokens: Sequence[str],
    query: int | None,
    title: str | None = None,
    *,
    other: Tensor | None = None,
    names: Sequence[str] | None = None,
    limit: int = 24,
    query_token: str | None = None,
) -> Figure:
    """Draws what one token reads, ``values`` ``[T]``, row ``query`` of a map, as arcs over its key tokens.

    The width and the opacity of an arc tell the key's share of the row; the disc at the query its own share, in the
    area. Only the ``limit`` strongest are drawn. ``other`` ``[T]`` is a second row, drawn below the first in the same
    measure, and ``names`` tells the two apart. Where there are too many tokens to write in a line, only those at the
    ends of arcs are named. ``query_token``: the query is no key, as in attention to an encoder, and stands above them;
    ``query`` is then ignored.

    Raises ValueError for rows that are not ``[T]`` or hold negative entries or nothing but zeros, IndexError for a
    query that is none of the tokens; entries that are no finite numbers count as zero.

    >>> from ffattr.plot import arcs
    >>> figure = arcs(attr["atb_ff"][1, 0, 2], attr.tokens[0], 2, "layer 1")
    >>> figure.axes[0].get_title()
    'layer 1'
    """
    if limit < 1:
        raise ValueError(f"limit={limit}, expected the number of arcs to draw, at least 1")
    if query_token is None and (query is None or not 0 <= query < len(tokens)):
        raise IndexError(f"query {query} is none of the {len(tokens)} tokens: name a position from 0, or query_token=")
    rows = (
        [_read_shares(values, tokens)] if other is None else [_read_shares(values, tokens), _read_shares(other, tokens)]
    )
    if names is not None and len(names) != len(rows):
        raise ValueError(f"names={list(names)!r}, expected one for each of the {len(rows)} rows")
    own = query if query_token is None else None
    drawn = [_pick_strongest(row, own, limit) for row in rows]
    named = {key for keys in drawn for key in keys} | ({own} if own is not None else set())
    line = _lay_out_tokens(tokens, named, both=other is not None)

    names = names or [""] * len(rows)
    top = max(max((float(row[key]) for key in keys), default=0.0) for row, keys in zip(rows, drawn, strict=True)) or 1.0
    start = line.places[own] if own is not None else line.width / 2
    reach = max((abs(line.places[key] - start) for key in named), default=0.0) or 1.0
    high = _HIGHEST if own is None else min(_HIGHEST, 0.6 * reach)
    room = high + (0.35 if own is not None else 0.6)
    low = line.low - (room if other is not None else 0.05)
    figure, axes = _make_canvas(line.width, low, room)
    _write_tokens(axes, tokens, line, own, both=other is not None)
    for place, (row, keys, name) in enumerate(zip(rows, drawn, names, strict=True)):
        up, base = (1, 0.0) if place == 0 else (-1, line.low)
        colour = ROWS[place]
        for key in reversed(keys):
            end = line.places[key]
            # The farther the key, the higher, so that no arc crosses another.
            height = up * high * (abs(end - start) / reach) ** 0.6
            shape = _bend_down(start, end, base, up * high) if own is None else _bend_arc(start, end, base, height)
            _draw_arc(axes, shape, colour, float(row[key]) / top)
        if own is not None:
            axes.scatter([start], [base], s=_DISC * float(row[own]), color=colour, alpha=0.85, lw=0, zorder=4)
        else:
            where, side = base + up * (high + 0.06), "bottom" if up > 0 else "top"
            axes.text(start, where, short_text(query_token or ""), ha="center", va=side, fontsize=_FONT, color=_QUERY)
        said = _describe_row(row, keys, own, name)
        axes.text(0.0, base + up * (room - 0.12), said, ha="left", va="center", fontsize=8.5, color=colour)
    _draw_legend(figure, top)
    axes.set_xlabel("key token $j$" if own is None else f"key token $j$ of query token $i$, {short_text(tokens[own])}")
    axes.set_title(plain_text(title or "what a token reads"), fontsize=11)
    return figure


@dataclass(frozen=True)
class _Line:
    """Says where tokens are: ``places`` of all, ``labels`` of those named, in inches; ``low`` is the lower line."""

    places: list[float]
    labels: dict[int, float]
    width: float
    low: float
    upright: bool


def _lay_out_tokens(tokens: Sequence[str], named: set[int], both: bool) -> _Line:
    """Puts tokens side by side like a sentence where that fits, or evenly with the ``named`` ones written on end."""
    widths = {place: _measure_label(token) for place, token in enumerate(tokens) if place in named or len(tokens) <= 60}
    if len(widths) == len(tokens) and sum(widths.values()) + 0.14 * len(tokens) <= _WIDEST:
        places, x = [], 0.0
        for place in range(len(tokens)):
            places.append(x + widths[place] / 2)
            x += max(widths[place], 0.08) + 0.14
        stretch = max(1.0, 4.5 / x)  # room for what is written above
        places = [place * stretch for place in places]
        return _Line(places, dict(enumerate(places)), x * stretch, -0.5, upright=False)
    if _LINE * len(tokens) <= _WIDEST:
        named = set(range(len(tokens)))
    order = sorted(named)
    width = max(_LINE * len(order) + 0.2, min(_LINE * len(tokens), _WIDEST))
    places = [width * (place + 0.5) / len(tokens) for place in range(len(tokens))]
    spread = _spread_labels([places[place] for place in order], _LINE, width)
    tall = max(_measure_label(tokens[place]) for place in order)
    return _Line(places, dict(zip(order, spread, strict=True)), width, -(tall + (0.66 if both else 0.36)), upright=True)


def _spread_labels(wanted: Sequence[float], gap: float, width: float) -> list[float]:
    """Returns ascending places at least ``gap`` apart within ``width``, crowded ones in groups around their middle."""
    groups: list[tuple[float, int]] = []  # of labels side by side: where the first one is, how many
    for x in wanted:
        first, count = x, 1
        while groups and groups[-1][0] + groups[-1][1] * gap > first:
            before, others = groups.pop()
            middle = ((before + gap * (others - 1) / 2) * others + (first + gap * (count - 1) / 2) * count) / (
                others + count
            )
            count += others
            first = min(max(middle - gap * (count - 1) / 2, 0.0), width - gap * (count - 1))
        groups.append((first, count))
    return [first + gap * place for first, count in groups for place in range(count)]


def _measure_label(token: str) -> float:
    """Returns the inches that a token's label takes."""
    from matplotlib.textpath import TextPath

    shown = short_text(token)
    return float(TextPath((0, 0), shown, size=_FONT).get_extents().width) / 72 if shown.strip() else 0.05


def _make_canvas(width: float, low: float, room: float) -> tuple[Figure, Axes]:
    """Makes axes in inches: what is written must not overlap, so no layout may stretch them."""
    from matplotlib.figure import Figure

    beside, below, above = 0.15, 0.7, 0.35
    figure = Figure(figsize=(width + 2 * beside, room - low + below + above))
    whole_width, whole = figure.get_size_inches()
    axes = figure.add_axes((beside / whole_width, below / whole, width / whole_width, (room - low) / whole))
    axes.set(xlim=(0.0, width), ylim=(low, room), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return figure, axes


def _write_tokens(axes: Axes, tokens: Sequence[str], line: _Line, own: int | None, both: bool) -> None:
    """Writes the tokens, and where they are on end draws a leader from each to its place on the line, or both lines."""
    for place, x in line.labels.items():
        colour = _QUERY if place == own else "black"
        if not line.upright:
            axes.text(
                x, line.low / 2, short_text(tokens[place]), ha="center", va="center", fontsize=_FONT, color=colour
            )
            continue
        axes.text(x, -0.3, short_text(tokens[place]), ha="center", va="top", fontsize=_FONT, rotation=90, color=colour)
        leader, at = (colour if place == own else GREY), line.places[place]
        axes.plot([at, at, x], [0.0, -0.06, -0.27], color=leader, lw=0.7)
        if both:
            ends = [line.low, line.low + 0.06, line.low + 0.27, -0.36 - _measure_label(tokens[place])]
            axes.plot([at, at, x, x], ends, color=leader, lw=0.7)
    for height in (0.0, line.low)[: (1 + both) * line.upright]:
        axes.plot(line.places, [height] * len(line.places), ".", ms=1.5, color="black")


def _bend_arc(start: float, end: float, base: float, height: float) -> list[tuple[float, float]]:
    """Returns control points of a curve that rises by ``height`` and comes back."""
    over = base + height * 4 / 3
    return [(start, base), (start, over), (end, over), (end, base)]


def _bend_down(start: float, end: float, base: float, height: float) -> list[tuple[float, float]]:
    """Returns control points of a curve from the query, ``height`` above the line, down to a key."""
    return [(start, base + height), (start, base + height / 2), (end, base + height / 2), (end, base)]


def _draw_arc(axes: Axes, points: list[tuple[float, float]], colour: str, share: float) -> None:
    """Draws one arc as wide and as opaque as its ``share`` of the largest one says."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    axes.add_patch(PathPatch(path, fc="none", ec=colour, capstyle="butt", clip_on=False, **_choose_line_style(share)))


def _choose_line_style(share: float) -> dict[str, Any]:
    return {"lw": max(0.4, _THICKEST * share), "alpha": 0.25 + 0.6 * share}


def _draw_legend(figure: Figure, top: float) -> None:
    """Explains below the picture what three widths stand for."""
    from matplotlib.lines import Line2D

    parts = (1.0, 0.5, 0.2)
    lines = [Line2D([], [], color="#404040", **_choose_line_style(part)) for part in parts]
    names = [f"{100 * part * top:.2g} % of the row" for part in parts]
    figure.legend(lines, names, loc="lower center", ncols=3, frameon=False, fontsize=8, borderaxespad=0.3)


def _describe_row(row: Tensor, keys: Sequence[int], own: int | None, name: str) -> str:
    """Returns what is written above a row's arcs: its name, the own share, and what was left out."""
    parts = [plain_text(name)] if name else []
    if own is not None:
        parts.append(f"own token {100 * float(row[own]):.0f} %")
    rest = int((row > 0).sum()) - len(keys) - (own is not None and bool(row[own] > 0))
    if rest > 0:
        parts.append(f"{len(keys)} strongest keys {100 * float(row[keys].sum()):.0f} %, {rest} more not drawn")
    return " · ".join(parts)


def _read_shares(values: Tensor, tokens: Sequence[str]) -> Tensor:
    """Returns a row ``[T]`` over its sum, in float64. Raises ValueError for one that has no shares."""
    if values.dim() != 1 or len(values) != len(tokens):
        raise ValueError(f"expected one row of a map, [{len(tokens)}] as there are tokens, got {list(values.shape)}")
    row = values.detach().cpu().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if bool((row < 0).any()):
        raise ValueError(f"the row has negative entries, down to {float(row.min()):.3g}: shares need norms")
    if not bool(row.sum() > 0):
        raise ValueError("the row holds nothing but zeros: this query reads no token (is it padding?)")
    return row / row.sum()


def _pick_strongest(row: Tensor, own: int | None, limit: int) -> list[int]:
    """Returns keys other than the query, the largest share first; those without any are left out."""
    order: list[int] = torch.argsort(row, descending=True, stable=True).tolist()
    return [key for key in order if key != own and row[key] > 0][:limit]

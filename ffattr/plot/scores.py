"""What tokens give to a number, with signs: as coloured text, as a sum, and through the layers.

Shapes: ``n`` tokens of a text, ``M`` boundaries of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import names_missing_extra
from .running_text import LINE, Laid, lay_out, write_text
from .style import (
    SIGNED,
    find_colormap,
    format_signed,
    label_axis,
    label_step,
    largest_but,
    plain_text,
    scale_colours,
    to_array,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

__all__ = ["ScoredText", "score_figure"]

_WIDEST, _NARROWEST = 9.0, 5.6
"""Inches of a line of text, and of a map."""
_COLUMN = 0.7
"""Inches of a column of a map, at most."""
_ROW = 0.24
"""Inches of a row of the sum."""
_SHOWN = 400
"""Tokens of a text that are written; of a longer one those around what gives most."""
_NUMBERED = 24
"""Tokens that have their number below them, where there are more than `_FEW`."""
_FEW = 60
_COLUMNS = 1200
"""Columns of a map that can still be told apart in a picture; more are drawn together."""


@dataclass(frozen=True)
class ScoredText:
    """A text whose tokens give to a number.

    ``pieces`` are its tokens as running text, with the space before each, ``labels`` the same for an axis, ``scores``
    ``[n]`` what they give where the text is shown, ``layers`` ``[M, n]`` what they give at the ``boundaries``.
    ``mark`` is the token that the number is read at (None: none of them), ``name`` tells texts apart.

    >>> from ffattr.plot import ScoredText
    >>> ScoredText(["no", " day"], ["no", "day"], torch.ones(2), torch.ones(1, 2), ["layer 0"], mark=1).check()
    """

    pieces: Sequence[str]
    labels: Sequence[str]
    scores: Tensor
    layers: Tensor
    boundaries: Sequence[str]
    mark: int | None = None
    name: str = ""

    def check(self) -> None:
        """Raises ValueError where the parts are not of as many tokens."""
        count, rows = len(self.pieces), len(self.boundaries)
        if len(self.labels) != count or list(self.scores.shape) != [count] or list(self.layers.shape) != [rows, count]:
            raise ValueError(
                f"a text of {count} pieces and {rows} boundaries needs as many labels, scores [{count}] and layers "
                f"[{rows}, {count}], got {len(self.labels)}, {list(self.scores.shape)} and {list(self.layers.shape)}"
            )


@names_missing_extra
def score_figure(
    texts: Sequence[ScoredText],
    rest: Mapping[str, float],
    value: float,
    title: str | None = None,
    *,
    cmap: str | None = None,
) -> Figure:
    """Draws texts with their tokens on colours of what they give, how that adds up, and what they give layer by layer.

    Blue speaks for the number ``value``, orange against it. ``rest`` is what comes from no token, by name (``"bias"``).
    Texts and maps share a colour scale, whose ends stand for the few scores beyond them. A number is written below
    tokens where there are few, and below the strongest. Raises ValueError without texts or tokens.

    >>> from ffattr.plot import ScoredText, score_figure
    >>> scores = torch.tensor([0.5, -1.0, 2.0])
    >>> text = ScoredText(["no", " good", " day"], ["no", "good", "day"], scores, scores[None], ["layer 0"])
    >>> figure = score_figure([text], {"bias": 0.5}, 2.0, "a day")
    >>> figure.axes[0].get_title(loc="left")
    'a day'
    """
    if not texts or not any(len(text.pieces) for text in texts):
        raise ValueError("score_figure got no tokens: pass a text of at least one")
    for text in texts:
        text.check()
    chosen = find_colormap(cmap, "signed")
    shown = [_choose_stretch(text) for text in texts]
    numbers = [_list_numbers(text.scores.double().cpu())[part] for text, part in zip(texts, shown, strict=True)]
    width = min(max(_COLUMN * max(len(text.labels) for text in texts), _NARROWEST), _WIDEST)
    laid = [lay_out(text.pieces[part], said, width) for text, part, said in zip(texts, shown, numbers, strict=True)]
    heights = [one.lines * LINE + 0.08 + 0.22 * bool(text.name) for one, text in zip(laid, texts, strict=True)]
    maps = [text for text in texts if len(text.boundaries) > 1]
    rows = [min(max(0.13 * len(text.boundaries), 0.8), 4.5) for text in maps]
    named = [_room_for_labels(text.labels) for text in maps]
    sum_height = _ROW * (2 * len(texts) + len(rest) + 1)
    blocks = [*heights, sum_height, *(high + room for high, room in zip(rows, named, strict=True))]
    canvas = _Canvas(width, blocks, [0.34, *([0.05] * (len(texts) - 1)), 0.42, *([0.5] * len(maps))])
    top = _choose_top(torch.cat([text.scores.double().cpu() for text in texts]))
    norm = scale_colours(torch.zeros(1), "diverging", top)
    for place, (text, part, lines) in enumerate(zip(texts, shown, laid, strict=True)):
        axes = canvas.add(place)
        _draw_text(axes, width, text, part, lines, [chosen(norm(score))[:3] for score in text.scores[part].tolist()])
        if place == 0:
            axes.set_title(plain_text(title or "what each token gives"), fontsize=11, loc="left", pad=6)
    _draw_sum(canvas.add(len(texts)), texts, rest, value)
    _draw_key(canvas, len(texts), sum_height, top, chosen)
    for place, (text, high) in enumerate(zip(maps, rows, strict=True)):
        axes = canvas.add(len(texts) + 1 + place, high, _COLUMN * len(text.labels))
        _draw_layers(axes, text, norm, chosen)
    return canvas.figure


class _Canvas:
    """A figure of blocks one below the other, in inches; each has a gap above it."""

    def __init__(self, inner: float, heights: Sequence[float], gaps: Sequence[float]) -> None:
        from matplotlib.figure import Figure

        self.inner = inner
        self.left, self.height = 1.15, sum(heights) + sum(gaps) + 0.1
        self.width = self.left + inner + 0.2
        self.figure = Figure(figsize=(self.width, self.height))
        self.tops, self.heights = [], list(heights)
        y = self.height
        for height, gap in zip(heights, gaps, strict=True):
            self.tops.append(y - gap)
            y -= gap + height

    def add(self, place: int, height: float | None = None, width: float | None = None) -> Axes:
        """Returns axes for a block, or for its upper part of this height and its left one of this width."""
        high = self.heights[place] if height is None else height
        return self.add_at(0.0, self.tops[place], self.inner if width is None else min(width, self.inner), high)

    def add_at(self, x: float, top: float, width: float, height: float) -> Axes:
        box = ((self.left + x) / self.width, (top - height) / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box)


def _choose_top(scores: Tensor) -> float:
    """Returns where colours end: at the largest score, but for a few that would leave the others none."""
    most, others = largest_but(scores, 0), largest_but(scores, max(1, len(scores) // 50))
    return most if most <= 4 * others or others == 0 else 2 * others


def _choose_stretch(text: ScoredText) -> slice:
    """Returns which tokens are written: all, or a stretch of `_SHOWN` that gives most."""
    count = len(text.pieces)
    if count <= _SHOWN:
        return slice(0, count)
    sizes = text.scores.double().cpu().abs().cumsum(0)
    sums = sizes[_SHOWN - 1 :] - torch.cat([sizes.new_zeros(1), sizes[:-_SHOWN]])
    first = int(sums.argmax())
    return slice(first, first + _SHOWN)


def _list_numbers(scores: Tensor) -> list[str]:
    """Returns what is written below each token: its number, or nothing where many give more."""
    strong = set(scores.abs().topk(min(len(scores), _NUMBERED)).indices.tolist())
    few = len(scores) <= _FEW
    return [format_signed(one, 2) if one and (few or at in strong) else "" for at, one in enumerate(scores.tolist())]


def _draw_text(
    axes: Axes, width: float, text: ScoredText, part: slice, laid: Laid, boxes: Sequence[tuple[float, float, float]]
) -> None:
    low = -(laid.lines * LINE + 0.08 + 0.22 * bool(text.name))
    axes.set(xlim=(0, width), ylim=(low + 0.22 * bool(text.name), 0.22 * bool(text.name)), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    mark = None if text.mark is None or not part.start <= text.mark < part.stop else text.mark - part.start
    write_text(axes, laid, boxes, mark)
    name = text.name
    if part.stop - part.start < len(text.pieces):
        others = format_signed(float(text.scores.double().sum() - text.scores[part].double().sum()))
        stretch = f"tokens {part.start} to {part.stop - 1} of {len(text.pieces)}; the others give {others}"
        axes.text(width, 0.02, plain_text(f"{name} {stretch}".strip()), ha="right", va="bottom", fontsize=8)
    elif name:
        axes.text(0, 0.03, plain_text(name), ha="left", va="bottom", fontsize=9, weight="bold")


def _draw_sum(axes: Axes, texts: Sequence[ScoredText], rest: Mapping[str, float], value: float) -> None:
    """Draws how tokens and the rest add up: each bar begins where the one above it ends."""
    rows: list[tuple[str, float]] = []
    for text in texts:
        scores = text.scores.double().cpu()
        name = f"{text.name} " if text.name else ""
        rows += [
            (f"{name}for it", float(scores.clamp_min(0).sum())),
            (f"{name}against", float(scores.clamp_max(0).sum())),
        ]
    rows += rest.items()
    at, ends = 0.0, [0.0, value]
    for place, (name, number) in enumerate(rows):
        axes.barh(-place, number, left=at, height=0.62, color=SIGNED[6 if number > 0 else 2], lw=0)
        at += number
        ends.append(at)
        axes.plot([at, at], [-place - 0.31, -place - 0.69], color="#606060", lw=0.8)
        _name_row(axes, -place, name, number)
    axes.barh(-len(rows), value, height=0.62, color="#404040", lw=0)
    _name_row(axes, -len(rows), "the number", value, weight="bold")
    low, high = min(ends), max(ends)
    span = high - low or 1.0
    axes.set(xlim=(low - 0.01 * span, high + 0.12 * span), ylim=(-len(rows) - 0.5, 0.5), xticks=[], yticks=[])
    axes.axvline(0, color="#606060", lw=0.8)
    axes.spines[:].set_visible(False)


def _name_row(axes: Axes, y: float, name: str, number: float, **look: Any) -> None:
    options: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "va": "center", "ha": "right", **look}
    axes.annotate(plain_text(name), (-0.01, y), fontsize=9, **options)
    axes.annotate(format_signed(number), (1.0, y), fontsize=8.5, **options)


def _draw_key(canvas: _Canvas, place: int, height: float, top: float, colours: Colormap) -> None:
    """Draws the colour scale of the text, above the sum, at the right."""
    import numpy as np

    axes = canvas.add_at(canvas.inner - 2.9, canvas.tops[place] + 0.27, 2.0, 0.1)
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=colours, aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_linewidth(0.4)
    for x, text, side in (
        (-0.03, f"against it {format_signed(-top)}", "right"),
        (1.03, f"{format_signed(top)} for it", "left"),
    ):
        axes.text(x, 0.45, text, transform=axes.transAxes, ha=side, va="center", fontsize=8)


def _room_for_labels(labels: Sequence[str]) -> float:
    step = label_step(labels)
    longest = max((min(len(label), 28) for label in labels[::step]), default=1)
    return 0.075 * longest + 0.25


def _draw_layers(axes: Axes, text: ScoredText, norm: Normalize, colours: Colormap) -> None:
    """Draws a map of boundaries and tokens, in the colours of the text."""
    values, step = _draw_together(text.layers.double().cpu())
    axes.imshow(to_array(values), cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    every = max(1, math.ceil(len(text.boundaries) / 16))
    places = [*range(0, len(text.boundaries) - 1, every)]
    if len(places) > 1 and len(text.boundaries) - 1 - places[-1] < every:
        places.pop()
    places.append(len(text.boundaries) - 1)
    axes.set_yticks(places, [plain_text(text.boundaries[place]) for place in places], fontsize=8)
    if step == 1:
        named = label_axis(axes, "x", text.labels, 8)
        note = "" if named == 1 else f"one in {named} tokens named"
    else:
        axes.set_xticks([0, values.shape[1] - 1], ["0", str(len(text.labels) - 1)], fontsize=8)
        note = f"position; {step} tokens in a column, the largest by size"
    title = f"{text.name}: what each gives at the input of each layer" if text.name else "at the input of each layer"
    axes.set_title(plain_text(f"{title} ({note})" if note else title), fontsize=9, loc="left", pad=4)
    axes.tick_params(length=2, width=0.5)
    axes.spines[:].set_linewidth(0.4)


def _draw_together(values: Tensor) -> tuple[Tensor, int]:
    """Returns ``[M, c]`` with at most `_COLUMNS` columns, each the largest by size of so many tokens, and how many."""
    step = math.ceil(values.shape[1] / _COLUMNS)
    if step == 1:
        return values, 1
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % step))
    blocks = padded.unflatten(1, (-1, step))
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0], step

"""What all pictures share: text as it is shown, colours and their scales, checks of what is drawn."""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import names_missing_extra

if TYPE_CHECKING:
    import numpy
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize

__all__ = [
    "GREY",
    "LINES",
    "MARKERS",
    "ROWS",
    "SIGNED",
    "SIZES",
    "Scale",
    "check_frame",
    "check_map",
    "find_colormap",
    "find_ends",
    "format_signed",
    "label_axis",
    "label_ends",
    "label_signed",
    "label_step",
    "largest_but",
    "plain_text",
    "scale_colours",
    "short_text",
    "to_array",
    "to_cells",
    "wrap_words",
]

Scale = Literal["linear", "log", "diverging", "signed"]

LINES = ("#00796b", "#7b5aa6", "#8a8a1a", "#4a4f55", "#c2558f", "#5f8f3a", "#000000")
"""Colours of lines, as pages have them: neither blue nor orange, which say more and less."""

SIGNED = ("#7a3100", "#b4540a", "#df8a3c", "#f3c797", "#f6f5f1", "#a9cbe6", "#5698cd", "#2068a8", "#0b3a6b")
"""From less, orange, over zero to more, blue: of differences, and of what speaks against a number and for it. Pages
have the same, and nothing else is blue or orange."""

SIZES = ("#f2f7ee", "#cdeacb", "#93d3b2", "#57b8ae", "#3a97a8", "#36749a", "#3c5089", "#3a2f5c", "#221731")
"""From small to large, of norms and shares, even to the eye (mako of seaborn, reversed): as pages have it."""

ROWS = ("#00796b", "#7b5aa6")
"""Of two rows or scopes that are compared: no colour that says more or less."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

GREY = "#b0b0b0"
"""The colour of cells without a number, and of what is only there to compare with."""

_LABELS = 60
"""Token labels on one axis that can still be read side by side; more are thinned out."""

_LONGEST = 28
"""Characters of a token's label: a longer one would take its place from the picture."""

_SPAN = 1e4
"""Largest over smallest colour of a logarithmic scale, at most; it ends where only one entry in a hundred is less."""

_BEND = 1 / 30
"""Part of the largest colour of a signed scale around zero in which it is linear; beyond, it is logarithmic."""

_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories without a picture: control and format characters, surrogates, line and paragraph ends."""


def plain_text(text: str) -> str:
    """Returns text as matplotlib should show it.

    Word-start marks are left out and spaces visible where there is nothing else, line ends are ``\\n``, ``$`` starts no
    mathematics, and characters that nothing can be drawn for are their code points, ``\\u4f60``: those of control, and
    those that the fonts of matplotlib's ``rcParams["font.family"]`` lack. To see Chinese or emoji, put a font that has
    them into that list.
    """
    bare = text.removeprefix("\u0120").removeprefix("\u2581")  # byte-level BPE and SentencePiece
    if text and not bare.strip(" "):
        bare = "\u2423" * max(len(bare), 1)
    bare = bare.replace("\u010a", "\n")
    if not bare.isascii() or not bare.isprintable():
        known = _known_characters()
        bare = "".join(_show_character(character, known) for character in bare)
    return bare.replace("$", r"\$")


def short_text(text: str, longest: int = _LONGEST) -> str:
    """Returns `plain_text`, cut where it has more characters than ``longest``."""
    shown = plain_text(text).replace(r"\$", "$")
    return (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")


def wrap_words(text: str, width: int) -> str:
    """Returns text in lines of about so many characters, broken at spaces."""
    return "\n".join(textwrap.wrap(text, width, break_long_words=False))


def _show_character(character: str, known: Sequence[frozenset[int]]) -> str:
    code = ord(character)
    if unicodedata.category(character) not in _UNSEEN and any(code in font for font in known):
        return character
    if character in "\n\r\t":
        return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}[character]
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _known_characters() -> list[frozenset[int]]:
    """Returns the code points of each font that matplotlib tries."""
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont

    families = matplotlib.rcParams["font.family"]
    return [_read_font(str(findfont(FontProperties(family=[family])))) for family in families]


@cache
def _read_font(path: str) -> frozenset[int]:
    from matplotlib.font_manager import get_font

    return frozenset(get_font(path).get_charmap())


def format_signed(value: float, digits: int = 3) -> str:
    """Returns a number with its sign, so many digits and a minus as long as the plus."""
    if value == 0:
        return "0"
    text = f"{value:+.{digits}g}" if 0.001 <= abs(value) < 1000 else f"{value:+.{digits - 1}e}"
    return text.replace("-", "\u2212")


def label_step(tokens: Sequence[str]) -> int:
    """Returns ``n`` where every ``n``-th token is named on an axis."""
    return max(1, math.ceil(len(tokens) / _LABELS))


def label_axis(axes: Axes, axis: Literal["x", "y"], tokens: Sequence[str], font: float, longest: int = _LONGEST) -> int:
    """Writes the tokens at an axis, every n-th where there are too many; returns n."""
    step = label_step(tokens)
    places = range(0, len(tokens), step)
    labels = [short_text(tokens[place], longest) for place in places]
    if axis == "x":
        axes.set_xticks(places, labels, rotation=90, fontsize=font)
    else:
        axes.set_yticks(places, labels, fontsize=font)
    return step


def label_ends(bar: Colorbar, norm: Normalize) -> None:
    """Names the ends and the middle of a small colour bar, which more numbers would crowd."""
    places = [float(norm.inverse(part)) for part in (0.0, 0.5, 1.0)]
    bar.set_ticks(places, labels=[f"{place:.2g}" for place in places])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=6)


def label_signed(bar: Colorbar, norm: Normalize) -> None:
    """Names zero on a colour bar of both signs, and powers of ten on either side that are beyond its linear part."""
    assert norm.vmax is not None
    most = math.floor(math.log10(norm.vmax) + 1e-9)
    sizes = [10.0**power for power in range(most - 3, most + 1) if 10.0**power > 1.5 * _BEND * norm.vmax]
    places = [*(-size for size in reversed(sizes)), 0.0, *sizes]
    bar.set_ticks(places, labels=[format_signed(place) for place in places])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)


def to_array(values: Tensor) -> numpy.ndarray:
    """Returns the values in float32 at least, which matplotlib needs."""
    result: numpy.ndarray = values.detach().cpu().to(torch.promote_types(values.dtype, torch.float32)).numpy()
    return result


def to_cells(values: Tensor, scale: str) -> numpy.ma.MaskedArray[Any, Any]:
    """Returns the values to draw, where a cell is grey that has no number: masked, or zero on a logarithmic scale."""
    import numpy as np

    array = to_array(values)
    hidden = ~np.isfinite(array) | (array <= 0 if scale == "log" else False)
    return np.ma.masked_array(array, hidden)


@names_missing_extra
def find_colormap(cmap: str | None, scale: str) -> Colormap:
    """Returns the colour map ``cmap``, or one that suits the scale; grey where there is no number. Raises ValueError,
    naming it, for an unknown one."""
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap

    if cmap is None:
        name, stops = ("signed", SIGNED) if scale in ("diverging", "signed") else ("sizes", SIZES)
        return LinearSegmentedColormap.from_list(name, stops).with_extremes(bad=GREY)
    if cmap not in matplotlib.colormaps:
        raise ValueError(
            f"cmap={cmap!r} is no colour map of matplotlib: try 'viridis' or 'cividis', for differences 'RdBu_r' or "
            "'PuOr_r'; matplotlib.colormaps lists all"
        )
    return matplotlib.colormaps[cmap].with_extremes(bad=GREY)


@names_missing_extra
def scale_colours(values: Tensor, scale: str, top: float | None = None) -> Normalize:
    """Returns what takes numbers to places on a colour map: from 0 (``"diverging"``, ``"signed"``: from ``-top``) to
    ``top``, their largest one. ``"signed"`` is logarithmic on both sides of zero, ``"log"`` from small entries on to
    large ones, but for a few: `find_ends` says whether some lie beyond."""
    from matplotlib.colors import LogNorm, Normalize, SymLogNorm

    if scale not in ("linear", "log", "diverging", "signed"):
        raise ValueError(f"scale={scale!r}, expected 'linear', 'log', 'diverging' or 'signed'")
    if top is None:
        top = largest_but(values, 0)
        if scale == "log":
            # In many language models the first token's own norm is a hundred times every other, and would leave them
            # no colour.
            top = largest_but(values, values.numel() // 1000) or top
        elif scale == "signed":  # what tokens pass to themselves is most of a map
            top = largest_but(values, values.numel() // 500) or top
    top = top if top > 0 else 1.0
    if scale == "log":
        return LogNorm(min(max(_smallest_but_few(values), top / _SPAN), top / 2), top)
    if scale == "signed":
        return SymLogNorm(top * _BEND, vmin=-top, vmax=top, clip=True)
    return Normalize(0.0 if scale == "linear" else -top, top)


def find_ends(values: Tensor, norm: Normalize) -> Literal["neither", "min", "max", "both"]:
    """Returns which ends of a colour bar stand for values beyond them, for the arrows that say so. A little beyond, as
    rounding goes, is not beyond."""
    finite = values.detach()[values.detach().isfinite()].double()
    assert norm.vmin is not None
    assert norm.vmax is not None
    if norm.vmin >= 0:
        finite = finite[finite > 0]
    below = bool((finite < norm.vmin - 1e-6 * abs(norm.vmin)).any())
    above = bool((finite > norm.vmax + 1e-6 * abs(norm.vmax)).any())
    return "both" if below and above else "min" if below else "max" if above else "neither"


def _smallest_but_few(values: Tensor) -> float:
    """Returns the value that one in a hundred of the positive ones is below; 0 where there is none."""
    finite = values.detach()[values.detach().isfinite()].double()
    positive = finite[finite > 0].sort().values
    return float(positive[len(positive) // 100]) if len(positive) else 0.0


def largest_but(values: Tensor, left_out: int) -> float:
    """Returns the largest absolute value but for ``left_out`` larger ones, among finite ones; 0 where there is none."""
    finite = values.detach()[values.detach().isfinite()].abs().double()
    if len(finite) <= left_out:
        return 0.0
    return float(finite.sort(descending=True).values[left_out])


def check_map(values: Tensor, queries: Sequence[str], keys: Sequence[str], what: str = "a map") -> None:
    """Raises ValueError unless the last two dimensions of ``values`` are as many as there are tokens."""
    if values.dim() != 2:
        raise ValueError(f"{what} has the shape [queries, keys], got {list(values.shape)}: pick one layer and sequence")
    rows, columns = values.shape
    if (len(queries), len(keys)) != (rows, columns):
        raise ValueError(
            f"{what} of {rows} x {columns} needs as many query and key tokens, got {len(queries)} and {len(keys)}"
        )


def check_frame(frame: pandas.DataFrame, needed: Iterable[str], what: str) -> None:
    """Raises ValueError where the frame lacks a column or has no rows."""
    needed = list(needed)
    lacking = [name for name in needed if name not in frame]
    if lacking:
        raise ValueError(
            f"{what} needs the columns {', '.join(needed)}; the frame lacks {', '.join(lacking)} and has "
            f"{', '.join(map(str, frame.columns)) or 'none'}"
        )
    if frame.empty:
        raise ValueError(f"{what} got a frame without rows: there is nothing to draw")

"""Running text in a picture: where each token stands in its line, and a box behind it in the colour of its score.

Everything is in inches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import names_missing_extra
from .style import plain_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LINE", "Laid", "lay_out", "write_text"]

FONT = 11.0
"""Points."""
LINE = 0.42
"""From one line to the next, with room for a number below a token."""

_SPACE = 0.055
_BOX = 0.21
_NUMBER = 6.5
_DIGIT = 0.06


@dataclass(frozen=True)
class Laid:
    """Tokens in lines: ``left`` and ``width`` of each token's box, its ``line``, its text as it is shown, and what is
    written below it."""

    left: list[float]
    width: list[float]
    line: list[int]
    shown: list[str]
    below: Sequence[str]

    @property
    def lines(self) -> int:
        return self.line[-1] + 1 if self.line else 1


def lay_out(pieces: Sequence[str], below: Sequence[str], width: float) -> Laid:
    """Breaks a text into lines of ``width``, before a word where there is a space, and where the text itself does.

    ``pieces`` are its tokens, with the spaces and line ends before them, ``below`` what is written below each.
    """
    left: list[float] = []
    widths: list[float] = []
    line: list[int] = []
    shown: list[str] = []
    x, row = 0.0, 0
    for at, piece in enumerate(pieces):
        bare = piece.strip()
        text = plain_text(bare) if bare else plain_text(piece.replace(" ", "\u2423")) or "\u00b7"
        wide = max(_measure(text), _DIGIT * len(below[at]))
        gap = _SPACE if at and piece[:1].isspace() and x > 0 else 0.0
        following = _measure_word(pieces, at) if gap or not at else wide
        if x > 0 and (x + gap + min(following, width) > width if gap else x + wide > width):
            x, row, gap = 0.0, row + 1, 0.0
        left.append(x + gap)
        widths.append(wide)
        line.append(row)
        shown.append(text)
        x += gap + wide
        if "\n" in piece and at + 1 < len(pieces):
            x, row = 0.0, row + 1
    return Laid(left, widths, line, shown, below)


def _measure_word(pieces: Sequence[str], first: int) -> float:
    """Returns how wide the word is that begins with a piece: up to the next one with a space before it."""
    last = first + 1
    while last < len(pieces) and not pieces[last][:1].isspace() and last - first < 12:
        last += 1
    return sum(_measure(plain_text(piece.strip())) for piece in pieces[first:last])


@lru_cache(2**14)
def _measure(text: str) -> float:
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=FONT).get_extents().width) / 72 + 0.05 if text.strip() else 0.06


@names_missing_extra
def write_text(axes: Axes, laid: Laid, colours: Sequence[tuple[float, float, float]], mark: int | None) -> None:
    """Writes a text into axes in inches, from 0 down, on boxes of ``colours``.

    ``mark`` is the token that a frame is drawn around, None: none.
    """
    from matplotlib.patches import Rectangle

    for at, text in enumerate(laid.shown):
        x, y = laid.left[at], -(laid.line[at] + 0.5) * LINE
        box = Rectangle((x, y - _BOX / 2), laid.width[at], _BOX, color=colours[at], lw=0)
        axes.add_patch(box)
        if at == mark:
            axes.add_patch(Rectangle((x, y - _BOX / 2), laid.width[at], _BOX, fill=False, ec="black", lw=0.9, zorder=4))
        dark = sum(part * weight for part, weight in zip(colours[at], (0.299, 0.587, 0.114), strict=True)) < 0.55
        ink, middle = "white" if dark else "black", x + laid.width[at] / 2
        axes.text(middle, y, text, ha="center", va="center_baseline", fontsize=FONT, color=ink)
        if laid.below[at]:
            axes.text(
                middle, y - _BOX / 2 - 0.015, laid.below[at], ha="center", va="top", fontsize=_NUMBER, color="#404040"
            )

"""Text that is data, on a terminal: of tokens, models and errors nothing moves the cursor, changes colours or hides."""

from __future__ import annotations

import unicodedata

from rich.console import Console
from rich.markup import escape

__all__ = ["make_cell", "print_line", "show_controls"]

_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows."""


def show_controls(text: str, keep: str = "") -> str:
    """Returns text with codes in place of control characters but those to ``keep``: ``\\x1b`` for an escape."""

    def show(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNS
        return character.encode("unicode_escape").decode() if hidden and character not in keep else character

    return text if text.isprintable() else "".join(map(show, text))


def make_cell(text: str) -> str:
    """Returns text as a cell of a table of rich shows it as it is."""
    return escape(show_controls(text))


def print_line(text: str, console: Console | None = None) -> None:
    """Prints a line, or several, as they are and however long."""
    console = Console() if console is None else console
    console.print(show_controls(text, keep="\n"), markup=False, highlight=False, soft_wrap=True)

"""What commands print: lines, tables for people, and rows or JSON for other programs.

Of text that is data, of tokens, models and errors, nothing moves the cursor of a terminal, changes colours or hides.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["make_cell", "print_json", "print_line", "print_lines", "show_controls"]

_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that turn the direction of what follows."""
_CONTROLS = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that JSON may leave as they are, and terminals and readers of lines may not."""


def show_controls(text: str, keep: str = "") -> str:
    """Returns text with codes in place of control characters but those to ``keep``: ``\\x1b`` for an escape."""

    def show(character: str) -> str:
        hidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNS
        return character.encode("unicode_escape").decode() if hidden and character not in keep else character

    return text if text.isprintable() else "".join(map(show, text))


def make_cell(text: str) -> str:
    """Returns text as a cell of a table of rich shows it as it is."""
    return escape(show_controls(text))


def print_line(line: str, console: Console | None = None) -> None:
    """Prints a line, or several, whatever is in it, and however long it is."""
    (console or Console()).print(show_controls(line, keep="\n"), markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Prints one JSON document for other programs. Numbers that are none are null."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    print(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))  # noqa: T201 (as it is)


def print_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table where there is a terminal, and else a line for each row, with tabs between whole cells."""
    console = Console()
    if not console.is_terminal:
        for row in (head, *rows):
            print("\t".join(map(show_controls, row)))  # noqa: T201 (tabs as they are)
        return
    table = Table(*head, show_lines=True)
    for row in rows:
        table.add_row(*map(make_cell, row))
    console.print(table)

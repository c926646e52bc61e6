"""What commands print: lines, tables for people, and rows or JSON for other programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["print_json", "print_line", "print_lines"]


def print_line(line: str, console: Console | None = None) -> None:
    """Prints a line as it is, whatever is in it, and however long it is."""
    (console or Console()).print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(content: Any) -> None:
    """Prints one JSON document for other programs. Numbers that are none are null."""
    print(json.dumps(content, ensure_ascii=False, allow_nan=False))  # noqa: T201 (as it is)


def print_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table where there is a terminal, and else a line for each row, with tabs between whole cells."""
    console = Console()
    if not console.is_terminal:
        for row in (head, *rows):
            print("\t".join(row))  # noqa: T201 (tabs as they are)
        return
    table = Table(*head, show_lines=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)

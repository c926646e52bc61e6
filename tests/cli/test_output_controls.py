"""What a terminal is told, whatever tokens, models and errors are called."""

import io

import pytest
from rich.console import Console
from rich.table import Table

from ffattr.cli.output import make_cell, print_line, show_controls

EVIL = "a\x1b[31mred\x07\x9b2J\r\n\u202etxt.exe\u2028[red]x[/red]\ud83d"


def test_controls_are_shown_and_other_text_is_left_alone():
    assert show_controls("日本 é ⁇ 🙂") == "日本 é ⁇ 🙂"
    assert show_controls(EVIL) == "a\\x1b[31mred\\x07\\x9b2J\\r\\n\\u202etxt.exe\\u2028[red]x[/red]\\ud83d"
    assert show_controls("a\nb\x1b", keep="\n") == "a\nb\\x1b"


@pytest.mark.parametrize("kind", ["line", "cell"])
def test_a_terminal_gets_no_control_characters_of_data(kind):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200, color_system=None)
    if kind == "line":
        print_line(EVIL, console)
    else:
        table = Table("token", box=None)
        table.add_row(make_cell(EVIL))
        console.print(table)
    said = file.getvalue()
    assert "a\\x1b[31mred\\x07" in said
    assert "[red]x[/red]" in said
    for character in "\x07\x9b\r\u202e\u2028":
        assert character not in said
    assert "\x1b[31mred" not in said

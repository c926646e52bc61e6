"""Tables for people, lines with tabs for other programs."""

import json

import pytest
from rich.console import Console

from ffattr.cli import output


def test_off_a_terminal_every_cell_is_whole(capsys):
    output.print_lines(("name", "what"), [("a" * 300, "[red]b"), ("c", "d")])
    assert capsys.readouterr().out == f"name\twhat\n{'a' * 300}\t[red]b\nc\td\n"


def test_on_a_terminal_it_is_a_table(capsys, monkeypatch):
    monkeypatch.setattr(output, "Console", lambda: Console(force_terminal=True, width=40, color_system=None))
    output.print_lines(("name", "what"), [("[red]a", "b")])
    assert "[red]a" in capsys.readouterr().out.replace("│", "")


def test_json_has_no_number_that_is_none(capsys):
    output.print_json({"token": "„é"})
    said = capsys.readouterr().out
    assert "„é" in said
    assert json.loads(said) == {"token": "„é"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        output.print_json({"value": float("nan")})

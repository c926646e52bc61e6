"""Tables for people, lines with tabs for other programs."""

import json
import os
import subprocess
import sys

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


@pytest.mark.parametrize(("command", "code"), [(["models"], 0), (["info", "--json"], 0), (["--help"], 1)])
def test_a_reader_that_has_seen_enough_is_told_nothing(command, code):
    """What ``ffattr models | head -0`` does: the pipe is closed before the first line. Help is click's."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ffattr", *command], stdout=write, stderr=subprocess.PIPE, timeout=120, check=False
        )
    finally:
        os.close(write)
    assert done.stderr == b""
    assert done.returncode == code


def test_the_first_lines_reach_a_reader_that_leaves():
    with subprocess.Popen(
        [sys.executable, "-m", "ffattr", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.read(4)
        running.stdout.close()
        assert running.stderr.read() == b""
        assert running.wait(120) == 0

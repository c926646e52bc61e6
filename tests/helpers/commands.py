"""The command line in this process, with what it says when it fails, and a script that runs it in another."""

from __future__ import annotations

from typer.testing import CliRunner

from ffattr import cli

RUNNER = CliRunner()


def run(*arguments):
    """Runs ``ffattr`` with these arguments in this process."""
    return RUNNER.invoke(cli.app, [str(argument) for argument in arguments])


def fails(code, message, *arguments):
    """Asserts that ``ffattr`` ends with ``code`` and one line that has ``message``, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    return result


HELP = """
import runpy, sys
sys.argv[0] = "ffattr"  # as the installed command has it
try:
    runpy.run_module("ffattr", run_name="__main__", alter_sys=True)
finally:
    print("LOADED", sorted(sys.modules.keys() & {"torch", "transformers", "numpy"}), file=sys.stderr)
"""

"""What ``--help`` says, word for word, and how commands end.

``PYTHONPATH=. python tests/cli/test_app_help.py`` writes the former anew, for a look at the difference.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from commands import RUNNER, fails, run

from ffattr import cli

COMMANDS = ("", "map", "decide", "analyze", "corpus", "check", "models", "info", "bench")
GOLDEN = Path(__file__).with_name("help.txt")


def _read_help(command):
    arguments = [*command.split(), "--help"]
    result = RUNNER.invoke(cli.app, arguments, prog_name="ffattr", env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return f"$ ffattr {' '.join(arguments)}\n{result.stdout}"


def _read_all():
    return "\n".join(map(_read_help, COMMANDS))


def test_help_is_what_was_looked_at():
    assert _read_all().splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_short_option_for_help_and_an_example(command):
    text = _read_help(command)
    assert "-h, --help" in text
    assert "<bool>" not in text
    assert not command or f"  ffattr {command}" in text
    assert RUNNER.invoke(cli.app, [*command.split(), "-h"], prog_name="ffattr").exit_code == 0


def test_the_version():
    import ffattr

    result = run("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, f"ffattr {ffattr.__version__}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_shells(shell):
    result = RUNNER.invoke(cli.app, [], prog_name="ffattr", env={"_FFATTR_COMPLETE": f"source_{shell}"})
    assert "_FFATTR_COMPLETE" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scope", "atb_fff"], "--scope 'atb_fff': expected layer, all, attn_heads"),
        (["--backend", "gpu"], "--backend 'gpu': expected one of auto, cpu"),
        (["--method", "fast"], "--method 'fast': expected one of auto, direct"),
        (["--method", "sketch:2"], "--method 'sketch:2': Sketch(tolerance=2.0)"),
        (["--dtype", "int8"], "--dtype 'int8': expected one of float64"),
        (["--reduce", "l3"], "--reduce 'l3': expected one of l2, l1, alti"),
        (["--value-bias", "both"], "--value-bias 'both': expected one of token, separate"),
        (["--baseline", "mean"], "--baseline 'mean': expected one of zero, bias"),
        (["--queries", "x"], "--queries 'x': expected numbers"),
        (["--layers", "6"], "--layers 6: the model has 6 layers, 0 to 5"),
        (["--layer", "-7"], "--layer -7: the model has 6 layers"),
        (["--png", "map.jpg"], "'map.jpg': expected the name of a picture, .png, .svg, .pdf"),
        (["--head", "1"], "--head and --scale go with --picture"),
        (["--picture", "a.png", "--scale", "cubic"], "--scale 'cubic': expected one of log, linear"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(calls, tmp_path, arguments, message):
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 6}')
    fails(2, message, "map", tmp_path, "text", *arguments)
    assert calls == []


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["map"], ["map", "m", "--nothing"], ["bench", "--rounds", "0"], ["corpus", "m"]]
)
def test_wrong_usage_ends_with_2(arguments):
    assert run(*arguments).exit_code == 2


if __name__ == "__main__":
    GOLDEN.write_text(_read_all(), encoding="utf-8")

"""Any words on the command line: something done, or one line that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import documented
import hypothesis
import pytest
import tiny_models
from commands import RUNNER
from hostile import Own, examples, is_own, judge
from hypothesis import strategies as st
from synthetic import attribution

from ffattr import cli

WORDS = st.sampled_from(
    [
        "",
        "x",
        "0",
        "-1",
        "layer",
        "all",
        "atb",
        "999",
        "1e9",
        "0:1",
        "0,1",
        ":",
        "nan",
        "\0",
        "\x1b[31m",
        "[red]",
        "é",
        "=1",
    ]
)
OPTIONS = {
    "map": [
        "--scope",
        "--layers",
        "--ig",
        "--baseline",
        "--dtype",
        "--backend",
        "--method",
        "--reduce",
        "--top",
        "--pool",
    ],
    "decide": ["--target", "--contrast", "--position", "--layers", "--sentences", "--flow", "--json"],
    "check": ["--dtype"],
    "analyze": ["--top", "--format", "--model", "--detailed", "--corpus"],
    "info": ["--nonsense"],
}
FLAGS = ("--sentences", "--flow", "--json", "--words", "--plan")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, and maps of it."""
    place = tmp_path_factory.mktemp("command-line")
    tiny_models.build("gpt2", head="LMHeadModel").float().save_pretrained(place / "model")
    documented.tokenizer().save_pretrained(place / "model")
    attribution().save(place / "maps.safetensors")
    (place / "text.txt").write_text("the cat sat\n")
    return place


@st.composite
def lines(draw: Any, folder: Path) -> list[str]:
    command = draw(st.sampled_from(sorted(OPTIONS)))
    line = [command]
    if command != "info":
        names = ["model", "maps.safetensors", "text.txt", "nowhere", "."]
        line.append(str(folder / draw(st.sampled_from(names[:1] * 3 + names))))
    if command in ("map", "decide", "check"):
        line.append(draw(st.one_of(st.just("the cat sat"), WORDS)))
    for option in draw(st.lists(st.sampled_from(OPTIONS[command]), unique=True, max_size=2)):
        line += [option] if option in FLAGS else [option, draw(WORDS)]
    if command in ("map", "decide") and draw(st.booleans()):
        line += ["-o", str(folder / draw(st.sampled_from(["out.safetensors", "nowhere/out", "", "model"])))]
    if command == "analyze":
        line += ["-o", str(folder / draw(st.sampled_from(["out", "text.txt", "nowhere/out"])))]
    return line


def run(line: list[str]) -> None:
    """Raises what a command ended by; `Own` for its own refusals, whose message is one line."""
    result = RUNNER.invoke(cli.app, line)
    assert "Traceback" not in result.output
    assert "\x1b[31m" not in result.output
    if result.exit_code in (0, 3):
        return
    assert result.exit_code in (1, 2), result.output
    debug = RUNNER.invoke(cli.app, [*line, "--debug"])
    error = debug.exception
    if error is not None and not isinstance(error, SystemExit) and not is_own(error):
        raise error
    raise Own(result.output)


def test_any_line(folder: Path) -> None:
    @hypothesis.given(lines(folder))
    @examples(40)
    def attack(line: list[str]) -> None:
        judge("command line", lambda: run(line))

    attack()

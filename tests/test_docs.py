"""The README and the pages of docs/: short where they should be, complete, and true."""

from __future__ import annotations

import ast
import re

import pytest
from paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


def test_installing_is_told_once() -> None:
    """The same commands in both places."""
    commands = re.findall(r"^    pip install .*$", README, flags=re.MULTILINE)
    assert len(commands) == 2
    assert re.findall(r"^    pip install .*$", PAGES["start.md"], flags=re.MULTILINE) == commands


def test_every_public_name_is_in_the_reference() -> None:
    stub = ast.parse((ROOT / "ffattr" / "__init__.pyi").read_text(encoding="utf-8"))
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = alias.asname or alias.name
                if node.module is None:  # a room, as a whole
                    assert f"ffattr.{name}" in PAGES["api.md"] + PAGES["operators.md"], name
                elif node.module != "errors" and not name.startswith("_"):
                    assert re.search(rf":: {name}\n", PAGES["api.md"]), name


@pytest.mark.parametrize("name", ["README.md", *sorted(PAGES)])
def test_links_lead_somewhere(name: str) -> None:
    text, folder = (README, ROOT) if name == "README.md" else (PAGES[name], ROOT / "docs")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (folder / target).exists(), f"{name} links to {target}"


def test_every_page_is_in_the_table_of_contents() -> None:
    for name in PAGES:
        assert name == "index.md" or re.search(
            rf"^{name.removesuffix('.md')}$", PAGES["index.md"], flags=re.MULTILINE
        ), name


@pytest.mark.parametrize("name", ["README.md", *sorted(PAGES)])
def test_python_in_pages_is_python(name: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", README if name == "README.md" else PAGES[name], flags=re.DOTALL):
        ast.parse(block)

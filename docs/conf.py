"""Sphinx: ``make docs``. Pages are Markdown, the reference is made of docstrings, the tour is shown as it was run."""

import inspect
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ffattr

project = "ffattr"
author = "the authors of ffattr"
copyright = author  # noqa: A001
version = release = ffattr.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ffattr {version}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # it needs a trained model; a test runs it

default_role = "code"  # docstrings name things in single backticks
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
suppress_warnings = ["config.cache"]


def list_arguments(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Makes bullets of the lines ``name: text`` in which docstrings explain arguments, and a block of what a room's
    docstring tells one to read."""
    try:
        known = set(inspect.signature(documented).parameters)
    except (TypeError, ValueError):
        known = set()
    found: list[str] = []
    kind = "text"
    for line in lines:
        term, colon, text = line.partition(": ")
        if colon and set(term.split(", ")) <= known:
            found += [*([] if kind == "argument" else [""]), f"- ``{term}``: {text}"]
            kind = "argument"
        elif kind == "argument" and line.startswith("    "):
            found.append(f"  {line.strip()}")
        elif line == "Read":
            found += ["Read::", ""]
            kind = "list"
        elif kind == "list" and (not line or line.startswith(" ")):
            found.append(line)
        else:
            found += [line] if kind == "text" or not line else ["", line]
            kind = "text"
    lines[:] = found


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", list_arguments)

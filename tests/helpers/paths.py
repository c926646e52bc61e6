"""Where things are in the repository, and what another process needs to find them."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CSRC = ROOT / "csrc"
HELPERS = ROOT / "tests" / "helpers"
PACKAGE = ROOT / "ffattr"


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with the package and the tests' helpers to import: the package that it has itself."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HELPERS), *filter(None, given), str(ROOT)]), **more}

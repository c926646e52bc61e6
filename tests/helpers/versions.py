"""Versions of transformers: the pinned one, the oldest one supported, and what a test needs."""

from __future__ import annotations

import importlib.metadata
import re

import pytest
from packaging.version import Version
from paths import ROOT

__all__ = ["OLDEST", "PINNED", "RESTRUCTURED", "have", "is_older", "needs"]

_PINS = (ROOT / "requirements-dev.txt").read_text()
PINNED, OLDEST = (Version(version) for version in re.findall(r"^transformers==(\S+)$", _PINS, re.MULTILINE))

RESTRUCTURED = ("granitemoe", "granitemoe-shared")
"""Families whose modules were others in the oldest version; there, they are refused by name."""


def have(version: str) -> bool:
    """Whether transformers is at least of ``version``: the pinned one always, the oldest one never."""
    assert OLDEST < Version(version) <= PINNED
    return Version(importlib.metadata.version("transformers")) >= Version(version)


def is_older() -> bool:
    """Whether transformers is older than the pinned one."""
    return Version(importlib.metadata.version("transformers")) < PINNED


def needs(version: str, reason: str) -> None:
    """Skip the test where transformers is older than ``version``, the first one ``reason``."""
    if not have(version):
        pytest.skip(f"transformers {version} was the first one {reason}")

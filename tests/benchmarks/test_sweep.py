"""The sweep over model types: what becomes of some, and the record of all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "paper"))
    import sweep

    yield sweep
    for name in ("sweep", "small_models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("model_type", "outcome", "by", "reason"),
    [
        ("bert", "mapped", "family", ""),
        ("helium", "mapped", "structure", ""),
        ("mamba", "refused", "", "no attention was seen"),
        ("encoder-decoder", "not built", "", "AutoModel has no class for it"),
    ],
)
def test_what_becomes_of_a_type(sweep: Any, model_type: str, outcome: str, by: str, reason: str) -> None:
    found = sweep.sweep_type(model_type)
    assert (found.outcome, found.by) == (outcome, by)
    assert reason in found.reason
    assert found.error < 1e-5
    assert found.maps < 1e-10


def test_the_record_is_what_was_written(sweep: Any, tmp_path: Path) -> None:
    rows = [
        sweep.Swept("one", "mapped", "family", 2, 1e-15, 0.0),
        sweep.Swept("two", "mapped", "structure", 2, 2e-7, 0.0),
        sweep.Swept(
            "three", "refused", reason="no adapter knows X, and its structure was not found: a | b. Describe its"
        ),
        sweep.Swept("four", "not built", reason="too large"),
    ]
    sweep.write(rows, tmp_path)
    assert sweep.read(tmp_path) == rows
    text = (tmp_path / "sweep.md").read_text()
    assert "3 were built small and run: 2 are mapped, 1 of these by their structure alone, 1 are refused" in text
    assert "two (2e-07)" in text
    assert "| three | a \\| b. Describe its |" in text
    assert "| four | too large |" in text


def test_no_type_of_the_record_crashes(sweep: Any) -> None:
    rows = sweep.read()
    assert sum(row.outcome == "mapped" for row in rows) >= 150
    assert [row.model_type for row in rows if row.outcome == "crashed"] == []
    assert all(row.reason for row in rows if row.outcome != "mapped")

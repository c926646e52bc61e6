"""What the tests of plans ask for."""

from pathlib import Path

import pytest

from ffattr.engine.planning import choose as planning


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[float, float]]:
    """No test measures this machine or knows its rates: both methods run at one speed unless a test says otherwise."""
    monkeypatch.setenv("FFATTR_CACHE", str(tmp_path))
    speed = {"both": (1e9, 1e9)}
    monkeypatch.setattr(planning, "measured", lambda *key: speed["both"])
    return speed

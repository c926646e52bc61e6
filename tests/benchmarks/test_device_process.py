"""benchmarks/gpu/device_process.py: processes that hang, die, or do not end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from paths import BENCHMARKS

GO = "import os, sys; os.dup2(2, 1); sys.stdin.readline(); "
STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    import device_process

    return device_process


def run(processes: Any, folder: Path, codes: dict[str, str], seconds: float = 30, gpu: int = 1, **options: Any) -> Any:
    started = [
        processes.Process(name, (sys.executable, "-c", code), options.get("limit", 20.0), waits=code.startswith(GO))
        for name, code in codes.items()
    ]
    outcomes: list[Any] = []
    with (folder / "log").open("w") as log:
        processes.run_phase(started, {"gpu": gpu}, seconds, dict(os.environ), folder, log, outcomes.append)
    return {one.name: one for one in outcomes}


def test_each_is_reported_and_what_it_says_is_kept(processes: Any, tmp_path: Path) -> None:
    codes = {"good": GO + "print('here')", "bad": GO + "raise SystemExit(3)", "command": "print('there')"}
    found = run(processes, tmp_path, codes)
    assert {name: one.status for name, one in found.items()} == {"good": "ok", "bad": "failed: exit 3", "command": "ok"}
    assert sorted((tmp_path / "log").read_text().split()) == ["here", "there"]


def test_a_process_has_the_gpu_alone(processes: Any, tmp_path: Path) -> None:
    alone = (
        GO
        + "from pathlib import Path; f = Path('busy'); f.touch(exist_ok=False); "
        + "import time; time.sleep(0.3); f.unlink()"
    )
    found = run(processes, tmp_path, {str(i): alone for i in range(4)})
    assert {one.status for one in found.values()} == {"ok"}


def test_the_limit_counts_from_when_a_process_is_ready(processes: Any, tmp_path: Path) -> None:
    slow = "import time; time.sleep(1.5); " + GO
    started = [processes.Process("slow to import", (sys.executable, "-c", slow), 1.0)]
    outcomes: list[Any] = []
    with (tmp_path / "log").open("w") as log:
        processes.run_phase(started, {"gpu": 1}, 30, dict(os.environ), tmp_path, log, outcomes.append)
    assert outcomes[0].status == "ok"
    assert outcomes[0].seconds < 1


def test_what_hangs_is_stopped_and_the_next_one_has_its_turn(processes: Any, tmp_path: Path) -> None:
    hangs = GO + "import time, pathlib, os; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    begin = time.monotonic()
    found = run(processes, tmp_path, {"hangs": hangs, "stubborn": GO + STUBBORN, "next": GO}, limit=1.0)
    assert [found[name].status for name in ("hangs", "stubborn", "next")] == ["stopped after 1 s"] * 2 + ["ok"]
    assert "KeyboardInterrupt" in (tmp_path / "log").read_text()  # where it was
    assert time.monotonic() - begin < 20
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_does_not_even_die_is_given_up(processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that waits for a GPU may survive SIGKILL."""
    monkeypatch.setattr(processes, "GRACE", 0.2)
    real = os.killpg
    kept: list[int] = []

    def deaf(pid: int, number: int) -> None:
        kept.append(pid)

    monkeypatch.setattr(processes.os, "killpg", deaf)
    found = run(processes, tmp_path, {"deaf": GO + "import time; time.sleep(60)", "next": GO}, limit=1.0)
    real(kept[0], 9)
    assert found["deaf"].status == "stopped after 1 s, and does not end"
    assert found["next"].status == "ok"


def test_what_does_not_begin_within_its_phase_is_named(processes: Any, tmp_path: Path) -> None:
    codes = {"long": "import time; time.sleep(60)", "late": GO, "later": GO}  # which begins at once
    found = run(processes, tmp_path, codes, seconds=2.0)
    assert found["long"].status.startswith("stopped after")
    assert [found[name].status for name in ("late", "later")] == ["not begun"] * 2


def test_a_process_that_is_never_ready(processes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "READY_LIMIT", 0.5)
    started = [processes.Process("never", (sys.executable, "-c", "import time; time.sleep(60)"), 5.0)]
    outcomes: list[Any] = []
    with (tmp_path / "log").open("w") as log:
        processes.run_phase(started, {"gpu": 1}, 30, dict(os.environ), tmp_path, log, outcomes.append)
    assert outcomes[0].status == "failed: exit -9"

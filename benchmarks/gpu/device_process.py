"""Processes side by side under limits: each may hang or die, none is waited for without end, none outlives its turn.

A process of `device_tasks.py` is started ahead of its turn, so that importing torch costs the GPU no time. It closes
its standard output when it is ready, and begins when a line arrives on its standard input: from there its limit counts.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

__all__ = ["Outcome", "Process", "run_phase"]

GRACE = 1.0
"""Seconds between SIGINT, on which Python still says where it was, and SIGKILL; and again until it is given up."""
AHEAD = 2
"""How many processes of a lane get ready while others run."""
READY_LIMIT = 30.0
"""Seconds in which a process has to be ready."""
PAUSE = 0.02


@dataclass(frozen=True)
class Process:
    """What to start. ``waits``: it begins on a line from its standard input. ``lane``: the "gpu", or the "cpu"."""

    name: str
    command: tuple[str, ...]
    limit: float
    lane: str = "gpu"
    waits: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """``status``: "ok", "failed: exit 1", "stopped after 12 s" or "not begun"; ``seconds`` count from its turn."""

    name: str
    status: str
    seconds: float


class _Running:
    def __init__(self, process: Process, environment: dict[str, str], folder: Path, log: IO[str]) -> None:
        self.process = process
        self.started, self.begun = time.monotonic(), 0.0
        self.stopping: float | None = None
        self.limit = process.limit
        self.child = subprocess.Popen(
            process.command,
            env={**environment, **process.environment},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if process.waits else log,
            stderr=log,
            text=True,
            start_new_session=True,
        )

    def is_ready(self) -> bool:
        """Whether it may begin, or will never: what has died, or takes too long, begins to be reported."""
        if not self.process.waits or self.child.poll() is not None:
            return True
        if time.monotonic() > self.started + READY_LIMIT:
            self.signal(signal.SIGKILL)
            return True
        assert self.child.stdout is not None
        return bool(select.select([self.child.stdout], [], [], 0)[0])

    def begin(self, limit: float) -> None:
        self.begun, self.limit = time.monotonic(), limit
        assert self.child.stdin is not None
        with suppress(OSError):  # it died while it waited: its exit code says so
            if self.process.waits:
                self.child.stdin.write("go\n")
            self.child.stdin.close()

    def poll(self) -> Outcome | None:
        """Returns what became of it, if it is over; stops it where its limit has passed."""
        now = time.monotonic()
        code = self.child.poll()
        if code is not None:
            self.signal(signal.SIGKILL)  # what it may have started
            if self.stopping is not None:
                return self.outcome(f"stopped after {self.limit:.0f} s")
            return self.outcome("ok" if code == 0 else f"failed: exit {code}")
        if self.stopping is None:
            if now >= self.begun + self.limit:
                self.signal(signal.SIGINT)
                self.stopping = now
        elif now >= self.stopping + 2 * GRACE:
            return self.outcome(f"stopped after {self.limit:.0f} s, and does not end")
        elif now >= self.stopping + GRACE:
            self.signal(signal.SIGKILL)
        return None

    def outcome(self, status: str) -> Outcome:
        return Outcome(self.process.name, status, time.monotonic() - self.begun)

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.child.pid, number)


def run_phase(
    processes: Sequence[Process],
    lanes: dict[str, int],
    seconds: float,
    environment: dict[str, str],
    folder: Path,
    log: IO[str],
    report: Callable[[Outcome], None],
) -> None:
    """Runs processes in order, at most ``lanes[lane]`` of a lane at once, and is over after ``seconds`` and the time
    that stopping takes. ``report`` hears of each as soon as it is over, also of those that could not begin."""
    deadline = time.monotonic() + seconds
    left = list(processes)
    waiting: list[_Running] = []
    running: list[_Running] = []
    try:
        while left or waiting or running:
            now = time.monotonic()
            for one in list(running):
                outcome = one.poll()
                if outcome is not None:
                    running.remove(one)
                    report(outcome)
            if now < deadline:
                _begin_waiting(waiting, running, lanes, deadline)
                while left and _has_room(left[0], waiting, running, lanes):
                    waiting.append(_Running(left.pop(0), environment, folder, log))
                _begin_waiting(waiting, running, lanes, deadline)
            else:
                for one in waiting:
                    one.signal(signal.SIGKILL)
                for process in [*(one.process for one in waiting), *left]:
                    report(Outcome(process.name, "not begun", 0.0))
                waiting, left = [], []
            time.sleep(PAUSE)
    finally:  # Ctrl-C, or an error of who reports
        for one in [*waiting, *running]:
            one.signal(signal.SIGKILL)


def _begin_waiting(waiting: list[_Running], running: list[_Running], lanes: dict[str, int], deadline: float) -> None:
    for one in [one for one in waiting if one.is_ready()]:
        lane = one.process.lane
        if sum(other.process.lane == lane for other in running) < lanes[lane]:
            waiting.remove(one)
            one.begin(max(0.0, min(one.process.limit, deadline - time.monotonic())))
            running.append(one)


def _has_room(process: Process, waiting: list[_Running], running: list[_Running], lanes: dict[str, int]) -> bool:
    """Whether to start it by now: it may begin at once, or is among the next of its lane."""
    mine = sum(one.process.lane == process.lane for one in running)
    ahead = sum(one.process.lane == process.lane for one in waiting)
    return mine + ahead < lanes[process.lane] + (AHEAD if process.waits else 0)

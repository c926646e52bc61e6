"""Processes that can be given up: one command with a time limit, and one that answers jobs and may hang or die."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["Worker", "run_limited"]


def run_limited(command: list[str], environment: dict[str, str], folder: Path, limit: float) -> tuple[int | None, str]:
    """Exit code, None after ``limit`` seconds, and what it printed until then."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = _started(command, environment, folder, stdout=output, stderr=subprocess.STDOUT)
        code: int | None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        output.seek(0)
        return code, output.read()


class Worker:
    """Starts its command when it is asked something, and anew after it died or was given up.

    The command reads a line of JSON for each job and prints ``answer`` and a line of JSON.
    """

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self._start = (command, environment, folder)
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: IO[str] | None = None

    def ask(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """The answer, or ``{"status": "failed", "reason": ...}`` where there is none within ``limit`` seconds."""
        try:
            if self._process is None:
                self._begin()
            assert self._process is not None
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=limit)
        except queue.Empty:
            self.stop()
            return {"status": "failed", "reason": f"no answer within {limit:.0f} s: given up"}
        except OSError:  # it died between two jobs
            line = None
        if line is None:
            reason = self._last_error()
            self.stop()
            return {"status": "failed", "reason": f"the process died: {reason}"}
        answer: dict[str, Any] = json.loads(line)
        if answer.pop("unusable", False):
            self.stop()
        return answer

    def stop(self) -> None:
        if self._process is not None:
            _end(self._process)
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _begin(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by stop
        self._lines = queue.Queue()
        self._process = _started(*self._start, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()

    def _last_error(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]


def _read(source: Any, lines: queue.Queue[str | None]) -> None:
    """Puts every answer into ``lines``, and None at the end."""
    for line in source:
        if line.startswith("answer "):
            lines.put(line.removeprefix("answer "))
    lines.put(None)


def _started(command: list[str], environment: dict[str, str], folder: Path, **streams: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=environment, cwd=folder, text=True, start_new_session=True, **streams)


def _end(process: subprocess.Popen[str]) -> None:
    """With all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        with suppress(OSError):  # what it no longer read
            process.stdin.close()

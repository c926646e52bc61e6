"""Interrupts at every line: what a Ctrl-C may do that comes at the worst moment."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from paths import PACKAGE

__all__ = ["count_lines", "interrupt_at"]


class _Tracer:
    """Counts lines of some files as they begin, and raises at one of them."""

    def __init__(self, files: tuple[str, ...], at: int | None) -> None:
        self.files, self.at, self.count = files, at, 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        if event == "line":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self


def _trace(call: Callable[[], Any], files: tuple[str, ...], at: int | None) -> int:
    names = tuple(str(Path(PACKAGE) / file) for file in files)
    tracer, before = _Tracer(names, at), sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    finally:
        sys.settrace(before)
    return tracer.count


def count_lines(call: Callable[[], Any], *files: str) -> int:
    """Returns how many lines of ``files``, or of what lies in such folders of ffattr, a call begins."""
    return _trace(call, files, None)


def interrupt_at(line: int, call: Callable[[], Any], *files: str) -> bool:
    """Makes the call, with a KeyboardInterrupt in place of its ``line``-th line; False where it had fewer."""
    try:
        _trace(call, files, line)
    except KeyboardInterrupt:
        return True
    return False

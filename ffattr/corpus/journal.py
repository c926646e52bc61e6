"""The journal of a shard: what a process was at when it died.

Every step is written down before it begins and crossed out when it ends, however it ends, so that what stands there
alone is what a process did not survive. It takes no sync: what a killed process wrote is in the file all the same.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["Journal"]


class Journal:
    """Counts the deaths in each step of the work on a shard: ``path`` is its file, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._deaths = Counter(self._list_unfinished())
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(self._file, b"\n\n")  # the first in case that a line ended in the middle

    def count_deaths(self, *step: object) -> int:
        """Returns how many processes ended in this step."""
        return self._deaths[json.dumps(step)]

    @contextmanager
    def enter(self, *step: object) -> Iterator[None]:
        """Says that the block is this step, which JSON can hold."""
        os.write(self._file, json.dumps(step).encode() + b"\n")
        try:
            yield
        finally:
            os.write(self._file, b"done\n")

    def close(self, remove: bool = False) -> None:
        """Ends the writing; with ``remove`` nothing stays of the journal."""
        os.close(self._file)
        if remove:
            self.path.unlink()

    def _list_unfinished(self) -> list[str]:
        """Lists the steps that were begun and did not end."""
        died: list[str] = []
        began: str | None = None
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else ():
            if not line and began is not None:  # another process begins here, or the file ends
                died.append(began)
            began = line.decode() if line.endswith(b"]") else None
        return died

"""A bar on the terminal that says how far a computation is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["show_progress"]


@contextmanager
def show_progress(tokens: int, console: Console) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar over layers, with tokens per second through all of them and the time left, where there is a terminal.

    Yields the ``progress`` callback for `ffattr.attribute` on inputs of so many ``tokens``.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    # A layer of a long text may take minutes: the time left is judged by all layers so far, not by the latest ones.
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        speed_estimate_period=math.inf,
    ) as bars:
        task = bars.add_task("layers", total=None, rate="")

        def update_bar(done: int, total: int) -> None:
            elapsed = bars.tasks[0].elapsed
            rate = _format_rate(tokens * done / total / elapsed) if elapsed else ""
            bars.update(task, completed=done, total=total, rate=rate)

        yield update_bar


def _format_rate(tokens: float) -> str:
    return f"{tokens:,.0f} tokens/s" if tokens >= 10 else f"{tokens:.2g} tokens/s"

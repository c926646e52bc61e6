"""The work of ``ffattr corpus``: it plans or computes a run and says how far it is and what it came to."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .output import print_json, print_line

if TYPE_CHECKING:
    from ..corpus import Count

__all__ = ["compute_corpus", "plan_corpus", "show_count"]

_QUIET = 60.0  # seconds between two lines where there is no terminal


def compute_corpus(
    model: str,
    inputs: Sequence[str],
    folder: Path,
    engine: str,
    workers: int | None,
    rank: str | None,
    max_errors: str,
    options: Mapping[str, Any],
    as_json: bool = False,
) -> bool:
    """Tells whether no document has an error; prints what the run came to."""
    corpus = require_corpus()
    with show_count(Console(stderr=True)) as listen:
        count = corpus.run_corpus(
            model,
            inputs,
            folder,
            engine=engine,
            workers=workers,
            rank=None if rank is None else corpus.Rank.from_text(rank),
            max_errors=max_errors,
            listen=listen,
            **options,
        )
    if as_json:
        told = {name: getattr(count, name) for name in ("documents", "tokens", "errors", "empty")}
        print_json({"tables": str(folder), **told})
        return not count.errors
    print_line(f"tables: {folder}: {count.documents:,} documents, {count.tokens:,} tokens")
    if count.errors:
        kinds = f", {count.empty:,} of them empty" if count.empty else ""
        print_line(f"errors: {count.errors:,} documents{kinds}: column 'error' of {folder / 'documents'} says why")
    return not count.errors


def plan_corpus(model: str, inputs: Sequence[str], folder: Path, options: Mapping[str, Any]) -> None:
    """Prints what would run, and computes and writes nothing."""
    corpus = require_corpus()
    chosen = corpus.Options(**options)
    sources = corpus.find_sources(inputs)
    shards = corpus.plan_shards(sources, chosen.shard_docs, chosen.text, chosen.id)
    done = sum(corpus.is_done(folder, number) for number in range(len(shards)))
    print_line(f"{sum(shard.count for shard in shards):,} documents in {len(sources):,} files")
    print_line(f"{len(shards):,} shards of up to {chosen.shard_docs:,}, {done:,} of them done in {folder}")
    print_line(f"tables {', '.join(chosen.keep)} by {model}, {chosen.threads} threads for each worker")


def require_corpus() -> Any:
    """Returns `ffattr.corpus`. Raises ValueError where what it stands on is not installed."""
    try:
        from .. import corpus
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("pyarrow", "filelock"):
            raise
        raise ValueError(f"a corpus needs {error.name}: pip install 'ffattr[corpus]'") from None
    return corpus


@contextmanager
def show_count(console: Console) -> Iterator[Any]:
    """Shows a bar over documents where there is a terminal, and else a line every minute. Yields what is told."""
    columns = (TextColumn("documents"), BarColumn(bar_width=12), TextColumn("{task.fields[said]}"))
    began = said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("documents", total=None, said="")

        def tell(count: Count) -> None:
            nonlocal said
            now = time.monotonic()
            if console.is_terminal:
                done = count.documents + count.documents_ahead
                bars.update(task, total=count.all_documents, completed=done, said=_format_count(count, now - began))
            elif now - said >= _QUIET:
                said = now
                print_line(_format_count(count, now - began), console)

        yield tell


def _format_count(count: Count, seconds: float) -> str:
    """Says how far a run is, how fast it goes, and how long the rest takes at this speed."""
    done = count.documents + count.documents_ahead
    new = done - count.before
    tokens = count.tokens + count.tokens_ahead - count.before_tokens
    parts = [f"{done:,} of {count.all_documents:,} documents"]
    if new > 0 and seconds > 0:
        left = (count.all_documents - done) * seconds / new
        parts += [  # what matters first: a narrow terminal cuts the end
            f"{_format_time(left)} left",
            f"{new / seconds:,.1f} documents/s",
            f"{tokens / seconds:,.0f} tokens/s",
        ]
    return ", ".join([*parts, f"{count.errors:,} errors"])


def _format_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"

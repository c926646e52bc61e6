"""Real English text: the beginning of Jane Austen's Pride and Prejudice (1813), a sentence or so on each line."""

from __future__ import annotations

from pathlib import Path

__all__ = ["SENTENCES", "running"]

SENTENCES = (Path(__file__).parent / "prose.txt").read_text().splitlines()


def running(sentences: int | None = None) -> str:
    """The first ``sentences`` of them (None: all) as running text."""
    return " ".join(SENTENCES[:sentences])

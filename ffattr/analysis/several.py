"""One pass of the rows for several analyses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .rows import Block

__all__ = ["Several"]


class Several:
    """Hands every block of rows to each of several collectors, in this order.

        pairs, tokens = AmplifiedPairs(), TokenSummary()
        attr = ffattr.attribute(model, inputs, scopes="all", keep=ffattr.Reduce(Several(pairs, tokens)))

    >>> from ffattr.analysis import AmplifiedPairs, Several, TokenSummary
    >>> pairs, sums = AmplifiedPairs(3), TokenSummary()
    >>> words = tokenizer(["the cat sat"], return_tensors="pt")
    >>> attr = ffattr.attribute(model, words, tokenizer=tokenizer, scopes="all",
    ...                         keep=ffattr.Reduce(Several(pairs, sums)))
    >>> len(pairs.frame(attr)), len(sums.frame(attr))  # of three layers: three pairs each; five tokens each
    (9, 15)

    ``attr.reduced`` lists what they return, a tuple for each block with an entry for each collector; nothing where none
    of them returns anything. Raises TypeError for what cannot be called.
    """

    def __init__(self, *collectors: Callable[[Any], Any]) -> None:
        for collector in collectors:
            if not callable(collector):
                raise TypeError(f"Several({collector!r}), expected functions that take an ffattr.Rows")
        self.collectors = collectors

    def __call__(self, rows: Block) -> tuple[Any, ...] | None:
        """Takes the next block of rows."""
        found = tuple(collector(rows) for collector in self.collectors)
        return found if any(one is not None for one in found) else None
